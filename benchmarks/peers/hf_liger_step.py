"""The same step in transformers + PEFT with Liger's kernels, as it sets them by default: norms,
rotary, the gated activation, and the head fused with its loss.

--variant checkpoint turns gradient checkpointing on.
"""

from __future__ import annotations

import json

from liger_kernel import transformers as liger

from benchmarks.common import arguments
from benchmarks.peers.hf_peft_step import VARIANTS, run


def main() -> None:
    args = arguments(__doc__ or "", VARIANTS)
    family = json.loads((args.folder / "config.json").read_text())["model_type"]
    # Before the model is made: it replaces classes of transformers.
    getattr(liger, f"apply_liger_kernel_to_{family}")()
    run("HF + PEFT + Liger", args)


if __name__ == "__main__":
    main()
