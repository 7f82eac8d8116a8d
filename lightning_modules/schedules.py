"""Learning-rate schedules per step, chosen in YAML as partials and completed with the number of steps."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def cosine(optimizer: Optimizer, total_steps: int, warmup: float = 0.05, final: float = 0.0) -> LambdaLR:
    """Linear warm-up over a share of the steps, then half a cosine down to ``final`` times the base rate."""
    first = max(1, round(warmup * total_steps))

    def factor(step: int) -> float:
        if step < first:
            return (step + 1) / first
        progress = min(1.0, (step - first) / max(1, total_steps - first))
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)


def piecewise(
    optimizer: Optimizer, total_steps: int, milestones: Sequence[float] = (0.75, 0.9), gamma: float = 0.1
) -> LambdaLR:
    """The rate times ``gamma`` at each milestone, a share of the steps (0.75 and 0.9: the usual AT schedule)."""
    return LambdaLR(optimizer, lambda step: gamma ** sum(step >= m * total_steps for m in milestones))
