"""The base of this library's batch norms: torch's constructor and behaviour, another measure of spread.

Not a subclass of torch's `_BatchNorm`: everything that recognises that class (fusers, converters, exporters) would read
`running_var` and take a square root, and be silently wrong. The buffer of a spread that is not a variance is called
`running_scale` for the same reason. A new norm overrides a few methods, each a call to `functional.py`, and is one line
in `NORMS`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lowprec.affine import ChannelAffine
from lowprec.functional import (
    Average,
    accumulation_dtype,
    apply_channel_affine,
    average,
    cast,
    channel_mean,
    normalise,
)
from lowprec.kernels import BackwardChoice
from lowprec.norm.activation import AddReLU, PendingSum
from lowprec.norm.checks import check_count, check_input, check_not_mapped
from lowprec.norm.rounded import Accumulation, RoundedArithmetic
from lowprec.statistics import BatchStatistics, Kind, write_statistics


class BatchMoments(NamedTuple):
    """What one batch is normalised by, and what it leaves.

    Args:
        mean: (C,), differentiable.
        scale: (C,), what to divide by, eps included, differentiable; None for a norm that only centres.
        running: the values for the running buffers, detached.
    """

    mean: Tensor
    scale: Tensor | None
    running: BatchStatistics


class ScaleBatchNorm(nn.Module, ABC):
    """Batch norm with y = weight * (x - mean) / S + bias, S some scale of x; the base of all norms of this library.

    Constructor, modes and errors are those of `torch.nn.BatchNorm2d`. Statistics, parameters and the result are
    computed in float32 or wider and the result is rounded to x's dtype; float64 input gets float64 statistics.
    Running means start at 0 and running spreads at 1; they follow the batch with torch's meaning of momentum, without
    bias correction. Inside `torch.func.vmap` training works without running statistics and is refused with them.

    With `stats_dtype` the batch and every intermediate of the statistics, running buffers included, are rounded to that
    type (see `lowprec.norm.rounded`); y is then computed wide from what was rounded. The gradient is that of the wide
    formula at the rounded values (straight-through).

    Fold: exact, as a per-channel affine; see `inference_affine`.

    Args:
        num_features: channels C.
        eps: added to the scale (L2: to the variance).
        momentum: weight of the newest batch in the running statistics; None for a plain average over batches.
        affine: whether there are `weight` and `bias`.
        track_running_stats: whether there are running statistics; without them evaluation uses the batch's own.
        device: of parameters and buffers.
        dtype: of parameters and buffers.
        bias: whether an affine norm has `bias`.
        stats_dtype: None for wide statistics; torch.float16 or torch.bfloat16 for truly narrow ones.
        accumulation: of narrow statistics, "tree" or "naive".
        relu: whether a ReLU follows inside; then forward also takes a residual to add before it.

    Raises:
        ConfigError: a `stats_dtype` or an `accumulation` that there is not.
    """

    input_ranks: ClassVar[tuple[int, ...]]
    running_kinds: ClassVar[Mapping[str, Kind]]
    _version = 2  # torch's batch norms are at 2: their states must not pass for states of a later lowprec

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor | None
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
        stats_dtype: torch.dtype | None = None,
        accumulation: Accumulation = "tree",
        relu: bool = False,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.stats_dtype = stats_dtype
        self.accumulation = accumulation
        self._rounded = None if stats_dtype is None else RoundedArithmetic(stats_dtype, accumulation)
        self.act = AddReLU() if relu else None
        self.awaits_residual = False
        self._backward_choice = BackwardChoice()

        def channels(value: float, kind: torch.dtype | None = dtype) -> Tensor:
            return torch.full((num_features,), value, device=device, dtype=kind or torch.get_default_dtype())

        self.register_parameter("weight", nn.Parameter(channels(1.0)) if affine else None)
        self.register_parameter("bias", nn.Parameter(channels(0.0)) if affine and bias else None)
        for name, kind in self.running_kinds.items():
            start = channels(0.0 if kind == "mean" else 1.0, stats_dtype or dtype)
            self.register_buffer(name, start if track_running_stats else None)
        tracked = torch.tensor(0, dtype=torch.long, device=device)
        self.register_buffer("num_batches_tracked", tracked if track_running_stats else None)

    @abstractmethod
    def batch_spread(self, x_NCX: Tensor, mean_C: Tensor, average: Average) -> Tensor | None:
        """The spread of one batch about its mean, (C,), in the mean's dtype, differentiable; None for no spread.

        `average` is how to average over a channel, so that one formula serves wide and narrow statistics.
        """

    @abstractmethod
    def divisor(self, spread_C: Tensor) -> Tensor:
        """What x - mean is divided by, from the spread as `batch_spread` or the running buffer has it."""

    @abstractmethod
    def running_spread(self, spread_C: Tensor, count: int | Tensor) -> Tensor:
        """What the running buffer takes in for a spread over `count` elements."""

    def batch_moments(self, x_NCX: Tensor) -> BatchMoments:
        """The moments of one batch: wide, or rounded with the gradient of the wide ones."""
        count = x_NCX.numel() // x_NCX.shape[1]
        if self._rounded is None:
            mean_C = channel_mean(x_NCX)
            return self.moments(mean_C, self.batch_spread(x_NCX, mean_C, average), count)
        with torch.no_grad():
            mean_C = self._rounded.mean(x_NCX)
            rounded = self.moments(mean_C, self.batch_spread(x_NCX, mean_C, self._rounded.average), count)
        if not (torch.is_grad_enabled() and x_NCX.requires_grad):
            return rounded
        mean_C = channel_mean(x_NCX)
        wide = self.moments(mean_C, self.batch_spread(x_NCX, mean_C, average), count)
        scale_C = rounded.scale
        if scale_C is not None and wide.scale is not None:
            scale_C = _straight_through(scale_C, wide.scale)
        return BatchMoments(_straight_through(rounded.mean, wide.mean), scale_C, rounded.running)

    def moments(self, mean_C: Tensor, spread_C: Tensor | None, count: int | Tensor) -> BatchMoments:
        """Mean and spread as what normalises and what is left in the buffers."""
        values = {name: mean_C.detach() for name, kind in self.running_kinds.items() if kind == "mean"}
        if spread_C is None:
            return BatchMoments(mean_C, None, BatchStatistics(count, values))
        for name in self._spread_names():
            values[name] = self.running_spread(spread_C.detach(), count)
        return BatchMoments(mean_C, self.divisor(spread_C), BatchStatistics(count, values))

    def joins_processes(self) -> bool:
        """Whether the batch is spread over several processes, now; see `lowprec.norm.sync`."""
        return False

    def reset_running_stats(self) -> None:
        """Mean 0, spread 1, no batches."""
        for name, kind in self.running_kinds.items():
            buffer = getattr(self, name)
            if buffer is not None:
                buffer.fill_(0 if kind == "mean" else 1)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Running statistics as at the start, weight 1, bias 0."""
        self.reset_running_stats()
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | PendingSum:
        """Normalises x (N, C, ...) with the batch's statistics in training, with the running ones in evaluation.

        With `act`: relu(norm(x) + residual), or a `PendingSum` if the norm awaits its residual.
        """
        check_input(x, self.input_ranks, self.num_features)
        if not self.training and self.running_mean is not None:
            y = apply_channel_affine(x, self.running_mean, self._running_divisor(), self.weight, self.bias)
            return self._finished(y, residual)
        if self.awaits_residual and residual is None:
            return PendingSum(partial(self, x), type(self).__name__)
        tracking = self.training and self.track_running_stats and self.running_mean is not None
        if tracking:
            check_not_mapped(x)
        if not self.joins_processes():
            check_count(x)
            if x.numel() == 0:
                return self._finished(self._empty(x, tracking), residual)
        y, running = self.of_batch(x, residual)
        if tracking:
            write_statistics(self, running)
        return y

    def of_batch(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, BatchStatistics]:
        """The result with this batch's own statistics, and what it leaves in the running buffers."""
        mean_C, scale_C, running = self.batch_moments(x)
        if self.stats_dtype is not None:
            x = _rounded_values(x, self.stats_dtype)
        y = normalise(x, mean_C, scale_C, self.weight, self.bias)
        return (y if self.act is None else self.act(y, residual)), running

    def _finished(self, y: Tensor, residual: Tensor | None) -> Tensor | PendingSum:
        if self.act is None:
            return y
        if self.awaits_residual and residual is None:
            return PendingSum(partial(self.act, y), type(self).__name__)
        active: Tensor = self.act(y, residual)
        return active

    def inference_affine(self) -> ChannelAffine | None:
        """weight / S * x + (bias - mean * weight / S) in float64.

        None in training, without running statistics, and with a ReLU inside.
        """
        if self.training or self.running_mean is None or self.act is not None:
            return None
        scale_C = self._running_divisor(torch.float64)
        numbers = [
            default if value is None else value.detach().double().cpu().numpy()
            for value, default in ((self.running_mean, 0.0), (scale_C, 1.0), (self.weight, 1.0), (self.bias, 0.0))
        ]
        return ChannelAffine.from_statistics(*numbers)

    def extra_repr(self) -> str:
        """The constructor arguments, as torch's norms print them."""
        narrow = "" if self.stats_dtype is None else f", stats_dtype={self.stats_dtype}, {self.accumulation} sums"
        relu = "" if self.act is None else ", relu"
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}{narrow}{relu}"
        )

    def _spread_names(self) -> list[str]:
        return [name for name, kind in self.running_kinds.items() if kind != "mean"]

    def _running_divisor(self, dtype: torch.dtype | None = None) -> Tensor | None:
        """S of evaluation, computed wide whatever the buffers are held in; None where there is no spread."""
        for name in self._spread_names():
            running_C: Tensor = getattr(self, name)
            return self.divisor(cast(running_C, dtype or accumulation_dtype(running_C.dtype)))
        return None

    def _empty(self, x: Tensor, tracking: bool) -> Tensor:
        """As torch has it: an empty result, running statistics untouched, one more batch counted."""
        if tracking and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        zeros_C = x.new_zeros(self.num_features, dtype=accumulation_dtype(x.dtype))
        return normalise(x, zeros_C, None, self.weight, self.bias)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Refuses a state of a later version, whose buffers may mean something else."""
        version = local_metadata.get("version")
        if version is not None and version > self._version:
            error_msgs.append(
                f"{prefix[:-1] or type(self).__name__}: its state has version {version}, this lowprec reads up to "
                f"{self._version}; update lowprec"
            )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _straight_through(value_C: Tensor, wide_C: Tensor) -> Tensor:
    """`value_C` with the gradient of `wide_C`."""
    return cast(value_C, wide_C.dtype) + (wide_C - wide_C.detach())


def _rounded_values(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x with values of `dtype`, in its own dtype and with its own gradient: a cast there and back would round that."""
    if x.dtype == dtype:
        return x
    return x + (x.detach().to(dtype).to(x.dtype) - x.detach())
