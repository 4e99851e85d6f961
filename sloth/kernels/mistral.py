"""The fused twin of the Mistral block: the wiring of Llama's;
windows and the factor on the queries come with the context.

The model file is the specification (`sloth/models/mistral.py`); a test pins the twin to it.
"""

from sloth.kernels import llama

WIRING = llama.WIRING
block = llama.block
