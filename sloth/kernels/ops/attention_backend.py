"""Which kernel computes attention: one table, keyed by the GPU, the dtype, the head dim and what is
to be seen; never by trying.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sloth.kernels.engine import engine_for
from sloth.kernels.ops.attention_layout import AttentionLayout

Backend = Literal["math", "cpu_flash", "cudnn", "flash", "efficient", "triton", "decode"]

_HALF = (torch.float16, torch.bfloat16)


def choose_backend(
    q: Tensor, k: Tensor, layout: AttentionLayout, softcap: float | None = None
) -> Backend:
    """The back end for these tensors: q [B, H, T, E], k [B, K, S, E].

    16 bits on a GPU, by what is to be seen (ms forward / backward on an H100, 4x2048):

                                 32/8 heads of 128                16/8 heads of 256
                           cudnn      flash      ours       cudnn      flash      ours
        causal             0.34/1.07  0.53/1.58  0.45/1.43  0.29/1.22  0.54/1.85  0.43/1.80
        window of 1024                0.53/1.36  0.43/1.15             0.42/1.56  0.39/1.50
        packed, 1x8192                0.35/0.92  0.21/0.72             0.21/0.93  0.31/0.86

    So a Hopper takes cuDNN for plain causal rows, up to heads of 128 and of 256, whose backward is
    not deterministic, and our own kernel (`flash_attention.py`) for the rest. Other GPUs, for which
    ours is not tuned, take FlashAttention's there, and every GPU when it decodes; those newer than
    Hopper cuDNN up to heads of 128. A cache of fixed size goes to a kernel of its own
    (`decode_attention.py`), which has no backward. No mask of T x T is made.

    fp32 goes to the memory-efficient kernel, which wants a mask where causal order is not all.
    There, and for a softcap, our own serves where T == S and bounds are known; fp64 and what no
    kernel takes go to the formula.
    """
    (num_queries, head_dim), num_keys = q.shape[2:], k.shape[2]
    if q.dtype == torch.float64 or (q.is_cuda and head_dim % 8 != 0):
        return "math"
    if layout.spans is not None:
        return "decode" if engine_for(q) == "triton" and num_queries == 1 else "math"
    is_square = num_queries == num_keys
    bounded = layout.query_documents is None or (is_square and layout.bounds is not None)
    ours = engine_for(q) == "triton" and is_square and bounded and head_dim <= 256
    if softcap is not None:
        return "triton" if ours else "math"
    if not q.is_cuda:
        return "cpu_flash"
    is_plain = layout.is_plain(num_queries, num_keys)
    if q.dtype not in _HALF or head_dim > 256:
        return "triton" if ours and not is_plain else "efficient"
    major = torch.cuda.get_device_capability(q.device)[0]
    fits = (major >= 9 and head_dim <= 128) or (major == 9 and head_dim == 256)  # as measured
    exact = torch.are_deterministic_algorithms_enabled()
    if num_queries > 1 and is_plain and fits and not exact:
        return "cudnn"
    if num_queries > 1 and major == 9 and ours:
        return "triton"
    return "flash" if bounded else "efficient"
