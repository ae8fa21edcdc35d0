"""Mean and variance of what enters a layer, per column of its weight, over all samples of a step.

A step may be made of several forwards (micro-batches, a layer that is used twice) in several processes: parts are
pooled exactly (Chan, Golub and LeVeque 1983), in float64 and in the order of the ranks, so that every process has the
same bits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from lowprec.functional import accumulation_dtype, cast

Columns = Literal["channel", "patch"]
"""One mean and variance per input channel, or per channel and kernel position as zero padding makes them."""


class InputStatistics(nn.Module):
    """Running mean and variance of a layer's input: a child of that layer, so that its state is saved.

    They start at mean 0 and variance 1, which count as one step: the t-th step has the weight
    f = max(1 - rho, 1 / (t + 1)), so that it is a plain average at first. The spread between the steps belongs to the
    variance; it is all there is of it where a step is a single sample. With d = m - mean, for a step's (m, v):

    mean <- mean + f d, variance <- (1 - f) variance + f v + f (1 - f) d^2.

    Args:
        shape: of one mean, see `Columns`.
        dtype: of the buffers.
        device: of the buffers.
    """

    wide_parameters = ("mean", "variance")
    mean: Tensor
    variance: Tensor
    steps: Tensor

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(tuple(shape), dtype=dtype, device=device))
        self.register_buffer("variance", torch.ones(tuple(shape), dtype=dtype, device=device))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long, device=device))

    @torch.no_grad()
    def take_in(self, mean: Tensor, variance: Tensor, rho: float) -> None:
        """One step's statistics, float64."""
        self.steps.add_(1)
        share = (1 / (self.steps.double() + 1)).clamp(min=1 - rho)
        d = mean.reshape(self.mean.shape) - self.mean
        spread = (1 - share) * self.variance + share * variance.reshape(self.mean.shape) + share * (1 - share) * d**2
        self.mean.add_((share * d).to(self.mean.dtype))
        self.variance.copy_(spread)


def statistics_shape(layer: nn.Module, columns: Columns) -> tuple[int, ...]:
    """The shape of one mean of the input of a linear or conv layer."""
    if isinstance(layer, _ConvNd):
        return (layer.in_channels, *(layer.kernel_size if columns == "patch" else ()))
    return (int(layer.weight.shape[1]),)  # type: ignore[index]


@torch.no_grad()
def measured(layer: nn.Module, x: Tensor, columns: Columns) -> Tensor:
    """(elements, samples, positions, means..., sums of squared deviations...) of one forward, flat, float64.

    Args:
        layer: a linear or conv layer.
        x: what entered it; (..., features), (N, C, ...) or (C, ...).
        columns: see `Columns`.
    """
    x = cast(x.detach(), accumulation_dtype(x.dtype))
    if not isinstance(layer, _ConvNd):
        x = x.reshape(-1, x.shape[-1])
        samples = positions = x.shape[0]
        parts = [x]
    else:
        if x.dim() == len(layer.kernel_size) + 1:
            x = x[None]
        sizes = _output_sizes(layer, x)
        samples = x.shape[0]
        positions = samples * math.prod(sizes)
        parts = [x] if columns == "channel" else _taps(layer, x, sizes)
    elements = parts[0].numel() // max(parts[0].shape[1], 1)
    pairs = [_moments(part) for part in parts]
    mean, variance = (torch.stack(values, -1).flatten().double() for values in zip(*pairs, strict=True))
    counts = mean.new_tensor([elements, samples, positions])
    return torch.cat([counts, mean, variance * elements])


def pooled(parts: Sequence[Tensor]) -> Tensor:
    """Several results of `measured` as one; a part that is not finite, or empty, counts for nothing."""
    if len(parts) == 1 and bool(parts[0].isfinite().all()):
        return parts[0]
    rows = torch.stack(list(parts))
    fine = rows.isfinite().all(1) & (rows[:, 0] > 0)
    rows = torch.where(fine[:, None], rows, 0.0)
    columns = (rows.shape[1] - 3) // 2
    counts, means, squares = torch.split(rows, [3, columns, columns], 1)
    total = counts.sum(0)
    share = counts[:, :1] / total[0].clamp(min=1)
    mean = (means * share).sum(0)
    between = (counts[:, :1] * (means - mean) ** 2).sum(0)
    return torch.cat([total, mean, squares.sum(0) + between])


def _moments(x_NCX: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel; zeros of an empty batch."""
    if x_NCX.numel() == 0:
        zeros = x_NCX.new_zeros(x_NCX.shape[1])
        return zeros, zeros
    mean, variance = torch.batch_norm_update_stats(x_NCX, None, None, 0.0)
    return mean, variance


def _output_sizes(layer: _ConvNd, x: Tensor) -> list[int]:
    pads = _padding(layer)
    return [
        (size + pad - dilation * (kernel - 1) - 1) // stride + 1
        for size, pad, dilation, kernel, stride in zip(
            x.shape[2:], pads, layer.dilation, layer.kernel_size, layer.stride, strict=True
        )
    ]


def _padding(layer: Any) -> list[int]:
    """Both sides together, per axis."""
    twice = layer._reversed_padding_repeated_twice
    return [twice[2 * axis] + twice[2 * axis + 1] for axis in reversed(range(len(layer.kernel_size)))]


def _taps(layer: Any, x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """For each kernel position what it reads, (N, C, *sizes): the columns of an unfold, one after the other."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    found = []
    for tap in itertools.product(*map(range, layer.kernel_size)):
        view = x
        for axis, (at, size) in enumerate(zip(tap, sizes, strict=True)):
            stride, first = layer.stride[axis], at * layer.dilation[axis]
            view = view[(slice(None),) * (axis + 2) + (slice(first, first + stride * (size - 1) + 1, stride),)]
        found.append(view)
    return found
