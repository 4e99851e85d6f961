"""What labels hold beside token ids."""

# Of a token that is read and not trained on; torch's and Hugging Face's losses have the same.
IGNORE_INDEX = -100
