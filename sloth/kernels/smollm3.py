"""The fused twin of the SmolLM3 block: the wiring of Llama's;
layers without RoPE have no tables in their context.

The model file is the specification (`sloth/models/smollm3.py`); a test pins the twin to it.
"""

from sloth.kernels import llama

WIRING = llama.WIRING
block = llama.block
