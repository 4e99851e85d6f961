"""Numbers that mean the same everywhere."""

# The label of a token that is read and not trained on; torch's and Hugging Face's losses have it.
IGNORE_INDEX = -100
# Units of memory, in bytes.
MIB, GIB = 2**20, 2**30
