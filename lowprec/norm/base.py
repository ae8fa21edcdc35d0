"""The base of this library's batch norms: torch's constructor and behaviour, another measure of spread.

Not a subclass of torch's `_BatchNorm`: everything that recognises that class (fusers, converters, exporters) would read
`running_var` and take a square root, and be silently wrong. The buffer is called `running_scale` for the same reason.
A new norm overrides two methods, both a call to `functional.py`, and is one line in `NORMS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from lowprec.affine import ChannelAffine
from lowprec.functional import apply_channel_affine, normalise
from lowprec.statistics import BatchStatistics, Kind, write_statistics


class ScaleEstimator(Protocol):
    """Streams a data set, batch by batch, to the exact scale of all of it about a mean that is already known."""

    def update(self, x_NCX: Tensor) -> None:
        """Takes in one batch."""

    def scale(self) -> Tensor:
        """The (C,) scale of everything taken in, float64, eps included."""


class ScaleBatchNorm(nn.Module, ABC):
    """Batch norm with y = weight * (x - mean) / S + bias, S a scale that is a first power of x.

    Constructor, modes and errors are those of `torch.nn.BatchNorm2d`. Statistics, parameters and the result are
    computed in float32 or wider and the result is rounded to x's dtype; float64 input gets float64 statistics.
    `running_mean` starts at 0 and `running_scale` at 1; both follow the batch with torch's meaning of momentum, no
    Bessel factor, no bias correction. S includes eps.

    Fold: exact, as a per-channel affine; see `inference_affine`.

    Args:
        num_features: channels C.
        eps: added to the scale.
        momentum: weight of the newest batch in the running statistics; None for a plain average over batches.
        affine: whether there are `weight` and `bias`.
        track_running_stats: whether there are running statistics; without them evaluation uses the batch's own.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        bias: whether an affine norm has `bias`.
    """

    input_ranks: ClassVar[tuple[int, ...]]
    running_kinds: ClassVar[Mapping[str, Kind]] = {"running_mean": "mean", "running_scale": "scale"}
    _version = 1

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor | None
    running_scale: Tensor | None
    num_batches_tracked: Tensor | None

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
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats

        def channels(value: float) -> Tensor:
            return torch.full((num_features,), value, device=device, dtype=dtype or torch.get_default_dtype())

        self.register_parameter("weight", nn.Parameter(channels(1.0)) if affine else None)
        self.register_parameter("bias", nn.Parameter(channels(0.0)) if affine and bias else None)
        tracked = torch.tensor(0, dtype=torch.long, device=device)
        self.register_buffer("running_mean", channels(0.0) if track_running_stats else None)
        self.register_buffer("running_scale", channels(1.0) if track_running_stats else None)
        self.register_buffer("num_batches_tracked", tracked if track_running_stats else None)

    @abstractmethod
    def batch_statistics(self, x_NCX: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale (eps included) of one batch, (C,), float32 or wider, differentiable."""

    @abstractmethod
    def scale_estimator(self, mean_C: Tensor) -> ScaleEstimator:
        """The streaming form of the scale about `mean_C`, for exact re-estimation over a data set."""

    def reset_running_stats(self) -> None:
        """Mean 0, scale 1, no batches."""
        if self.running_mean is not None and self.running_scale is not None and self.num_batches_tracked is not None:
            self.running_mean.zero_()
            self.running_scale.fill_(1)
            self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Running statistics as at the start, weight 1, bias 0."""
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Normalises x (N, C, ...) with the batch's statistics in training, with the running ones in evaluation."""
        self._check_input(x)
        if not self.training and self.running_mean is not None and self.running_scale is not None:
            return apply_channel_affine(x, self.running_mean, self.running_scale, self.weight, self.bias)
        if self.training and x.numel() <= x.shape[1]:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.shape}")
        mean_C, scale_C = self.batch_statistics(x)
        if self.training and self.track_running_stats and self.running_mean is not None:
            values = {"running_mean": mean_C.detach(), "running_scale": scale_C.detach()}
            write_statistics(self, BatchStatistics(x.numel() // x.shape[1], values))
        return normalise(x, mean_C, scale_C, self.weight, self.bias)

    def inference_affine(self) -> ChannelAffine | None:
        """weight / S * x + (bias - mean * weight / S) in float64; None in training or without running statistics."""
        if self.training or self.running_mean is None or self.running_scale is None:
            return None
        numbers = [
            default if value is None else value.detach().double().cpu().numpy()
            for value, default in (
                (self.running_mean, 0.0), (self.running_scale, 1.0), (self.weight, 1.0), (self.bias, 0.0),
            )
        ]  # fmt: skip
        return ChannelAffine.from_statistics(*numbers)

    def extra_repr(self) -> str:
        """The constructor arguments, as torch's norms print them."""
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}"
        )

    def _check_input(self, x: Tensor) -> None:
        if x.dim() not in self.input_ranks:
            expected = " or ".join(f"{rank}D" for rank in self.input_ranks)
            raise ValueError(f"expected {expected} input (got {x.dim()}D input)")
        if x.shape[1] != self.num_features:
            raise ValueError(f"expected {self.num_features} channels on axis 1, got input size {tuple(x.shape)}")
