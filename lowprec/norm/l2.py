"""Plain L2 batch normalisation, torch's semantics, for what torch's own classes cannot do.

Torch's kernels reduce half input in float32 and run synchronised on a GPU only. This one takes `stats_dtype` (the
published comparisons are against L2 batch norm in true half arithmetic) and has a synchronised form for any device.
Otherwise use torch's: it is faster, and folds the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from lowprec.functional import Average, l2_variance
from lowprec.norm.base import ScaleBatchNorm
from lowprec.statistics import Kind


class L2BatchNorm(ScaleBatchNorm):
    """S = sqrt(mean((x - mean)^2) + eps); `running_var` follows the unbiased variance, as torch's does."""

    running_kinds: ClassVar[Mapping[str, Kind]] = {"running_mean": "mean", "running_var": "variance"}
    running_var: Tensor | None

    def batch_spread(self, x_NCX: Tensor, mean_C: Tensor, average: Average) -> Tensor:
        """The biased variance of one batch."""
        return l2_variance(x_NCX, mean_C, average)

    def divisor(self, spread_C: Tensor) -> Tensor:
        """sqrt(variance + eps)."""
        return (spread_C + self.eps).sqrt()

    def running_spread(self, spread_C: Tensor, count: int | Tensor) -> Tensor:
        """The unbiased variance."""
        return spread_C * (count / (count - 1))


class L2BatchNorm1d(L2BatchNorm):
    """L2 batch norm over (N, C) or (N, C, L). Arguments: see `ScaleBatchNorm`. Fold: exact."""

    input_ranks = (2, 3)


class L2BatchNorm2d(L2BatchNorm):
    """L2 batch norm over (N, C, H, W). Arguments: see `ScaleBatchNorm`. Fold: exact."""

    input_ranks = (4,)


class L2BatchNorm3d(L2BatchNorm):
    """L2 batch norm over (N, C, D, H, W). Arguments: see `ScaleBatchNorm`. Fold: exact."""

    input_ranks = (5,)
