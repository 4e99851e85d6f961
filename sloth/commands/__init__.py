"""The commands of `sloth`, a file each: `run(arguments)` works, prints, and gives the exit code.

Nothing here imports torch before a command starts to work, so that help is quick.
"""
