"""The base of the norms that divide by a statistic of absolute deviations, and the kernels that compute them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Protocol

from torch import Tensor

from lowprec.kernels import fused_norm, kernels_apply
from lowprec.norm.base import ScaleBatchNorm
from lowprec.statistics import BatchStatistics, Kind


class ScaleEstimator(Protocol):
    """Streams a data set, batch by batch, to the exact scale of all of it about a mean that is already known."""

    def update(self, x_NCX: Tensor) -> None:
        """Takes in one batch."""

    def scale(self) -> Tensor:
        """The (C,) scale of everything taken in, float64, eps included."""


class AbsoluteBatchNorm(ScaleBatchNorm):
    """A norm whose S is a constant times a statistic of |x - mean|, plus eps: no square, no root.

    `running_scale` follows S itself, eps and constant included, without a Bessel factor.
    """

    running_kinds: ClassVar[Mapping[str, Kind]] = {"running_mean": "mean", "running_scale": "scale"}
    running_scale: Tensor | None

    @abstractmethod
    def scale_estimator(self, mean_C: Tensor) -> ScaleEstimator:
        """The streaming form of S about `mean_C`, for exact re-estimation over a data set."""

    def kernel_k(self) -> int | None:
        """The `k` of `lowprec.kernels.fused_norm` that computes this norm; None where no kernel does."""
        return None

    def of_batch(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, BatchStatistics]:
        """One kernel for norm, residual and ReLU, where there is one."""
        k = self.kernel_k()
        if k is None or not self._can_run(x, residual):
            return super().of_batch(x, residual)
        relu = self.act is not None
        from_output = relu and residual is None and self._backward_choice.review(self.weight, self.bias, x)
        y, mean_C, scale_C, *_ = fused_norm(
            x, self.weight, self.bias, residual, k=k, eps=self.eps, relu=relu, from_output=from_output
        )
        # Not detached, which would cost two calls: they are written, without a graph, and dropped.
        return y, BatchStatistics(x.numel() // self.num_features, {"running_mean": mean_C, "running_scale": scale_C})

    def _can_run(self, x: Tensor, residual: Tensor | None) -> bool:
        if self.stats_dtype is not None or self.joins_processes() or not kernels_apply(x):
            return False
        if residual is None:
            return True
        alike = (x.shape, x.dtype, x.device) == (residual.shape, residual.dtype, residual.device)
        return alike and kernels_apply(residual)

    def divisor(self, spread_C: Tensor) -> Tensor:
        """S, as it is."""
        return spread_C

    def running_spread(self, spread_C: Tensor, count: int | Tensor) -> Tensor:
        """S, as it is."""
        return spread_C
