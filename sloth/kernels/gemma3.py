"""The fused twin of the Gemma 3 block: Gemma 2's with norms on q and k and no softcap.

The model file is the specification (`sloth/models/gemma3.py`); a test pins the twin to it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from sloth.kernels import gemma2

WIRING = replace(gemma2.WIRING, qk_norms=True, softcap=False)
block = partial(gemma2.block, wiring=WIRING)
