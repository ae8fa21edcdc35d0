"""What values a tensor takes, streamed: extremes, zeros, and how it sits in half precision."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowprec.calibration.record import range_summary
from lowprec.formats import FP16


class RangeCounter:
    """Collects a few numbers of a stream of tensors, on their device, without synchronising until `summary`.

    Constant memory: extremes and counts, no values. Counts are float64, exact to 2^53.
    """

    def __init__(self) -> None:
        self._count = 0
        self._sums: Tensor | None = None  # zeros, half-subnormals, sum of squares, non-finite
        self._extremes: Tensor | None = None  # min, max

    def update(self, x: Tensor) -> None:
        """Takes in one tensor."""
        wide = x.detach().double()
        magnitude = wide.abs()
        finite = torch.isfinite(wide)
        sums = torch.stack(
            [
                (wide == 0).sum().double(),
                ((magnitude > 0) & (magnitude < FP16.min_normal)).sum().double(),
                torch.where(finite, wide, 0.0).square().sum(),
                (~finite).sum().double(),
            ]
        )
        extremes = torch.stack([wide.amin(), wide.amax()])
        self._count += x.numel()
        self._sums = sums if self._sums is None else self._sums + sums
        if self._extremes is None:
            self._extremes = extremes
        else:
            self._extremes = torch.stack(
                [torch.minimum(self._extremes[0], extremes[0]), torch.maximum(self._extremes[1], extremes[1])]
            )

    def nonfinite(self) -> Tensor:
        """How many NaNs and infinities came by, 0-d, on the device of the data."""
        return torch.zeros((), dtype=torch.float64) if self._sums is None else self._sums[3]

    def summary(self) -> dict[str, Any]:
        """Plain numbers for JSON: `range_summary`."""
        if self._sums is None or self._extremes is None:
            raise ValueError("nothing was counted")
        zeros, subnormal, squares, _ = self._sums.tolist()
        low, high = self._extremes.tolist()
        return range_summary(self._count, low, high, zeros, subnormal, squares)
