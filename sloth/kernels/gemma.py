"""The fused twin of the Gemma block: Llama's with a tanh GELU; norms bring their offset of 1.

The model file is the specification (`sloth/models/gemma.py`); a test pins the twin to it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from sloth.kernels import llama

WIRING = replace(llama.WIRING, activation="gelu_tanh")
block = partial(llama.block, wiring=WIRING)
