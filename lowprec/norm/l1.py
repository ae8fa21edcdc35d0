"""L1 batch normalisation: the spread is the mean absolute deviation.

Why: the variance squares, and a half square overflows at 256 and vanishes below 1.7e-4; the absolute deviation has the
range of x itself. For normal data S equals the standard deviation; for other data the standard deviation is a multiple
of it (1.128 for Laplace, 0.921 for uniform data) that the learned weight takes up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowprec.functional import L1_CONSTANT, Average, deviations, l1_scale, reduced_axes
from lowprec.norm.absolute import AbsoluteBatchNorm


class L1BatchNorm(AbsoluteBatchNorm):
    """S = sqrt(pi/2) * mean(|x - mean|) + eps; see `functional.l1_statistics`."""

    def kernel_k(self) -> int:
        """0: all deviations."""
        return 0

    def batch_spread(self, x_NCX: Tensor, mean_C: Tensor, average: Average) -> Tensor:
        """The L1 scale of one batch."""
        return l1_scale(x_NCX, mean_C, self.eps, average)

    def scale_estimator(self, mean_C: Tensor) -> L1ScaleEstimator:
        """Sums |x - mean| over the stream."""
        return L1ScaleEstimator(mean_C, self.eps)


class L1BatchNorm1d(L1BatchNorm):
    """L1 batch norm over (N, C) or (N, C, L). Arguments: see `ScaleBatchNorm`. Fold: exact."""

    input_ranks = (2, 3)


class L1BatchNorm2d(L1BatchNorm):
    """L1 batch norm over (N, C, H, W). Arguments: see `ScaleBatchNorm`. Fold: exact."""

    input_ranks = (4,)


class L1BatchNorm3d(L1BatchNorm):
    """L1 batch norm over (N, C, D, H, W). Arguments: see `ScaleBatchNorm`. Fold: exact."""

    input_ranks = (5,)


class L1ScaleEstimator:
    """S = sqrt(pi/2) * mean(|x - mean|) + eps over a stream of batches, in float64."""

    def __init__(self, mean_C: Tensor, eps: float) -> None:
        self._mean_C = mean_C.double()
        self._sum_C = torch.zeros_like(self._mean_C)
        self._count = 0
        self._eps = eps

    def update(self, x_NCX: Tensor) -> None:
        """Adds the absolute deviations of one batch."""
        self._sum_C += deviations(x_NCX, self._mean_C).abs().sum(reduced_axes(x_NCX))
        self._count += x_NCX.numel() // x_NCX.shape[1]

    def scale(self) -> Tensor:
        """The scale of everything taken in."""
        return L1_CONSTANT * self._sum_C / self._count + self._eps
