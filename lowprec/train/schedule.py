"""Learning-rate schedules as pure functions of landed steps.

Functions of a count instead of `torch.optim.lr_scheduler` objects: a skipped step must not move the rate, a resumed run
must find the same rate from the count alone, and there is no state to save.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """Where a run is.

    Args:
        step: landed steps after warm-up.
        total: planned steps after warm-up, at least 1.
        steps_per_drop: steps between two drops of `step`.
        gamma: factor of a drop of `step`.
    """

    step: int
    total: int
    steps_per_drop: int
    gamma: float


def constant(progress: Progress) -> float:
    """1."""
    return 1.0


def cosine(progress: Progress) -> float:
    """(1 + cos(pi * step / total)) / 2. Source: Loshchilov and Hutter, SGDR, 2017, eq. 5, without restarts."""
    return 0.5 * (1.0 + math.cos(math.pi * min(progress.step / progress.total, 1.0)))


def drops(progress: Progress) -> float:
    """gamma^floor(step / steps_per_drop)."""
    return float(progress.gamma ** (progress.step // progress.steps_per_drop))


SCHEDULES: dict[str, Callable[[Progress], float]] = {"constant": constant, "cosine": cosine, "step": drops}


def learning_rate_factor(
    schedule: str, landed: int, total: int, warmup: int = 0, steps_per_drop: int = 1, gamma: float = 0.1
) -> float:
    """The factor on the learning rate for the step that follows `landed` landed ones.

    Linear warm-up (landed + 1) / (warmup + 1) for the first `warmup` steps, then the schedule over the rest.

    Args:
        schedule: a name in `SCHEDULES`.
        landed: steps that landed so far.
        total: steps planned, warm-up included.
        warmup: landed steps of warm-up.
        steps_per_drop: see `Progress`.
        gamma: see `Progress`.
    """
    if landed < warmup:
        return (landed + 1) / (warmup + 1)
    return SCHEDULES[schedule](Progress(landed - warmup, max(total - warmup, 1), steps_per_drop, gamma))
