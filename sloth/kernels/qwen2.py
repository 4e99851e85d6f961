"""The fused twin of the Qwen 2 block: the wiring of Llama's;
the biases of q, k and v are part of their product.

The model file is the specification (`sloth/models/qwen2.py`); a test pins the twin to it.
"""

from sloth.kernels import llama

WIRING = llama.WIRING
block = llama.block
