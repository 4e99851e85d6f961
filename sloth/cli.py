"""The `sloth` command: finds the command that is meant, and turns errors into a line.

Errors meant for users print one line and exit with 2. Commands are in sloth/commands; none imports
torch before it needs it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from pydantic import ValidationError

from sloth import __version__
from sloth.commands import (
    chat,
    data,
    doctor,
    estimate,
    export,
    generate,
    info,
    init,
    push,
    runs,
    train,
)
from sloth.errors import SlothError, one_line
from sloth.quiet import give_up_on_broken, tell

USAGE_ERROR = 2
INTERRUPTED = 130

COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "init": init.run,
    "estimate": estimate.run,
    "train": train.run,
    "runs": runs.run,
    "generate": generate.run,
    "chat": chat.run,
    "export": export.run,
    "push": push.run,
    "info": info.run,
    "doctor": doctor.run,
    "data": data.run,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code. 2 for errors a user can mend, 130 or 143 after a signal."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if arguments else USAGE_ERROR
    if arguments[0] == "--version":
        print(f"sloth {__version__}")
        return 0
    command = COMMANDS.get(arguments[0])
    if command is None:
        return _complain(f"unknown command {arguments[0]!r}; known: {', '.join(COMMANDS)}")
    try:
        code = command(arguments[1:])
        if sys.stdout is not None:
            sys.stdout.flush()  # what could not be written is an error of the command, here still
        return code
    except ValidationError as error:
        return _complain(one_line(error))
    except (SlothError, ValueError, OSError) as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        tell("interrupted", sys.stderr)
        return INTERRUPTED
    except SystemExit as leaving:  # tyro, after help and usage errors; training, after a signal
        return leaving.code if isinstance(leaving.code, int) else USAGE_ERROR
    finally:
        give_up_on_broken(sys.stdout, sys.stderr)


def _complain(text: str) -> int:
    """Say what is wrong, on one line and without secrets."""
    rank = os.environ.get("RANK")
    who = "error" if rank is None else f"error (rank {rank})"
    tell(f"{who}: {' '.join(text.split())}", sys.stderr)
    return USAGE_ERROR


def _help() -> str:
    lines = [f"  {name:<10}{command.__doc__}" for name, command in COMMANDS.items()]
    purpose = "usage: sloth COMMAND ...\n\nFine-tune Llama, Mistral, Gemma and Qwen models.\n"
    hint = "\n`sloth COMMAND --help` lists a command's flags; `sloth --version` the version."
    return "\n".join([purpose, *lines, hint])


if __name__ == "__main__":
    sys.exit(main())
