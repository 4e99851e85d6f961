"""The fused twin of the Qwen 3 block: Llama's with a norm on each head of q and k.

The model file is the specification (`sloth/models/qwen3.py`); a test pins the twin to it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from sloth.kernels import llama

WIRING = replace(llama.WIRING, qk_norms=True)
block = partial(llama.block, wiring=WIRING)
