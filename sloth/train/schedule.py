"""Learning rate as a pure function of the step, so that a resumed run follows the same curve.

With W warm-up steps, N steps in all, p = (s - W) / (N - W):

    s < W       lr (s + 1) / W
    constant    lr
    linear      lr (1 - p)
    cosine      lr (1 + cos(pi p)) / 2
    wsd         lr, then lr (1 - sqrt(q)) over the last fifth of the steps, q rising from 0 to 1

Warmup-stable-decay and its 1 - sqrt shape: Hagele et al. 2024, https://arxiv.org/abs/2405.18392.
No step has rate 0: p and q reach 1 only after the last step.
"""

from __future__ import annotations

import math

DECAY_SHARE = 0.2


def learning_rate(
    schedule: str, peak: float, step: int, num_steps: int, warmup_steps: int = 0
) -> float:
    """Rate of step 0 <= step < num_steps. Raises ValueError for an unknown schedule."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    rest = max(num_steps - warmup_steps, 1)
    progress = (step - warmup_steps) / rest
    if schedule == "constant":
        return peak
    if schedule == "linear":
        return peak * (1 - progress)
    if schedule == "cosine":
        return peak * (1 + math.cos(math.pi * progress)) / 2
    if schedule == "wsd":
        decay_steps = max(1, round(DECAY_SHARE * rest))
        into_decay = step - (num_steps - decay_steps)
        return peak * (1 - math.sqrt(max(into_decay, 0) / decay_steps))
    raise ValueError(f"schedule {schedule!r} is unknown; known: linear, cosine, constant, wsd")


def num_warmup_steps(steps: int, ratio: float, num_steps: int) -> int:
    """Steps of warm-up, given as such or as a share of all."""
    return steps or math.ceil(ratio * num_steps)


def depends_on_length(schedule: str, warmup_ratio: float = 0.0) -> bool:
    """Whether the rate of a step changes with the number of steps."""
    return schedule != "constant" or warmup_ratio > 0
