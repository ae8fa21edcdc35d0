"""Mean-only batch normalisation: the batch's mean is taken off, nothing is divided.

The companion of weights with a fixed norm: they hold the scale of a layer, the mean is what is left to normalise.
Nothing is squared, and nothing is divided by a small number, so half arithmetic has no hazard here but the sum itself.
Evaluation moves a bias, which folds into the layer before it without touching its weight.

Not a line in `NORMS`: those are drop-in replacements of batch norm, with a weight and invariant to the scale of their
input, and this norm is neither. The method `mean_only` puts it into a network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowprec.functional import Average
from lowprec.norm.base import ScaleBatchNorm
from lowprec.statistics import Kind


class MeanOnlyBatchNorm(ScaleBatchNorm):
    """y = x - mean(x) + bias per channel; with `weight`, y = weight * (x - mean(x)) + bias.

    Gradient: dL/dx = g - mean(g) with g = weight * dL/dy. `running_mean` is the only running statistic. `eps` is
    accepted because torch's batch norms have it, and has no effect. Fold: exact, as a per-channel shift.

    Args:
        num_features: see `ScaleBatchNorm`, as are the others.
        weight: whether an affine norm has a weight. Off, because it gives weights of fixed norm a learned
            gain again.

    Source: Salimans and Kingma, Weight normalization, NeurIPS 2016, section 3; Hoffer et al., Norm matters, NeurIPS
    2018, use it with bounded weights.
    """

    running_kinds: ClassVar[Mapping[str, Kind]] = {"running_mean": "mean"}

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        weight: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **options)
        if not weight:
            self.weight = None

    def batch_spread(self, x_NCX: Tensor, mean_C: Tensor, average: Average) -> None:
        """None: there is no spread."""

    def divisor(self, spread_C: Tensor) -> Tensor:
        """1, whatever the spread."""
        return torch.ones_like(spread_C)

    def running_spread(self, spread_C: Tensor, count: int | Tensor) -> Tensor:
        """The spread as it is; this norm has no buffer that takes it in."""
        return spread_C


class MeanOnlyBatchNorm1d(MeanOnlyBatchNorm):
    """Mean-only batch norm over (N, C) or (N, C, L). Arguments: see `MeanOnlyBatchNorm`. Fold: exact."""

    input_ranks = (2, 3)


class MeanOnlyBatchNorm2d(MeanOnlyBatchNorm):
    """Mean-only batch norm over (N, C, H, W). Arguments: see `MeanOnlyBatchNorm`. Fold: exact."""

    input_ranks = (4,)


class MeanOnlyBatchNorm3d(MeanOnlyBatchNorm):
    """Mean-only batch norm over (N, C, D, H, W). Arguments: see `MeanOnlyBatchNorm`. Fold: exact."""

    input_ranks = (5,)
