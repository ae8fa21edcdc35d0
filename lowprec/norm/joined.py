"""Batch statistics of a batch that is spread over processes, exactly as if it were one, forward and backward.

Each family exchanges what its statistic needs and no more, in float32 (float64 for float64 input): L-infinity and top-k
one gather of (n, mean, k largest, k smallest) - the largest |x - mean| about a mean that nobody knows yet is among the
extremes -, L2 one gather of (n, mean, variance), L1 a gather of (n, mean) and then a sum of |x - mean|. The parts are
combined in float64 and in the order of the ranks, so every process has the same bits. Means are exchanged instead of
sums: they keep the digits of a channel far from zero.

The backward pass needs one sum over the processes. With u = dL/dmu and v = dL/dT (T the spread), summed over all
processes, and q_j = dT/dx_j about a fixed mean, dL/dx_j = u / n + v * (q_j - mean(q)): that is all of it, because the
normalisation itself is local and is left to autograd. Gradients of weight and bias are those of the local samples, as
in torch's SyncBatchNorm; data-parallel training sums them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from lowprec.functional import (
    L1_CONSTANT,
    accumulation_dtype,
    cast,
    channel_mean,
    deviations,
    l2_variance,
    linf_constant,
    per_channel,
    reduced_axes,
    rows_by_channel,
)  # fmt: skip


class Joined(NamedTuple):
    """What all processes agree on, and the local slope.

    Args:
        elements: n of all processes, 0-d float64.
        mean: (C,).
        spread: (C,), as the family's `batch_spread` defines it.
        slope: q = d spread / d x about a fixed mean, shaped like the local x.
    """

    elements: Tensor
    mean: Tensor
    spread: Tensor
    slope: Tensor


class JoinedStatistic(ABC):
    """One family's exchange."""

    @abstractmethod
    def measure(self, x_NCX: Tensor, group: dist.ProcessGroup | None) -> Joined:
        """The statistics of the joined batch; `x_NCX` is wide and may be empty. Collective: all processes call it."""


class _JoinedStatistics(torch.autograd.Function):
    """(mean, spread, count) of the joined batch with the gradient of the module docstring."""

    @staticmethod
    def forward(
        ctx: Any, x_NCX: Tensor, statistic: JoinedStatistic, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        joined = statistic.measure(x_NCX, group)
        ctx.save_for_backward(joined.slope, joined.elements)
        ctx.group = group
        ctx.mark_non_differentiable(joined.elements)
        return joined.mean, joined.spread, joined.elements

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u_C: Tensor, v_C: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        slope_NCX, count = ctx.saved_tensors
        sums_3C = torch.stack([u_C, v_C, slope_NCX.sum(reduced_axes(slope_NCX))])
        dist.all_reduce(sums_3C, group=ctx.group)
        u_C, v_C, slope_C = sums_3C
        n = count.to(u_C.dtype)
        constant_C = u_C / n - v_C * slope_C / n
        return per_channel(constant_C, slope_NCX) + per_channel(v_C, slope_NCX) * slope_NCX, None, None


def joined_statistics(
    x_NCX: Tensor, statistic: JoinedStatistic, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and spread (C,) in float32 or wider, differentiable once, and the number n of elements per channel, 0-d.

    Args:
        x_NCX: the local part, floating point, (N, C, ...); may be empty as long as some process has elements.
        statistic: the family's.
        group: the processes; None for all.
    """
    wide_NCX = cast(x_NCX, accumulation_dtype(x_NCX.dtype))
    mean_C, spread_C, count = _JoinedStatistics.apply(wide_NCX, statistic, group)  # type: ignore[no-untyped-call]
    return mean_C, spread_C, count


class JoinedL1(JoinedStatistic):
    """S = sqrt(pi/2) * mean(|x - mean|) + eps in two exchanges."""

    def __init__(self, eps: float) -> None:
        self._eps = eps

    def measure(self, x_NCX: Tensor, group: dist.ProcessGroup | None) -> Joined:
        """A gather of (n, mean), a sum of |x - mean|."""
        counts_R, (means_RC,) = _gathered(x_NCX, [_mean(x_NCX)[:, None]], group)
        count, mean_C = counts_R.sum(), _weighted(means_RC[:, :, 0], counts_R)
        d_NCX = deviations(x_NCX, mean_C.to(x_NCX.dtype))
        sum_C = d_NCX.abs().sum(reduced_axes(x_NCX))
        dist.all_reduce(sum_C, group=group)
        scale_C = L1_CONSTANT * sum_C.double() / count + self._eps
        slope_NCX = d_NCX.sign() * (L1_CONSTANT / count).to(x_NCX.dtype)
        return Joined(count, mean_C.to(x_NCX.dtype), scale_C.to(x_NCX.dtype), slope_NCX)


class JoinedL2(JoinedStatistic):
    """The biased variance in one exchange; parts pooled as by Chan, Golub and LeVeque 1983."""

    def measure(self, x_NCX: Tensor, group: dist.ProcessGroup | None) -> Joined:
        """A gather of (n, mean, variance)."""
        mean_C = _mean(x_NCX)
        variance_C = l2_variance(x_NCX, mean_C) if x_NCX.numel() else mean_C
        counts_R, (means_RC, variances_RC) = _gathered(x_NCX, [mean_C[:, None], variance_C[:, None]], group)
        count, joined_C = counts_R.sum(), _weighted(means_RC[:, :, 0], counts_R)
        between_RC = (means_RC[:, :, 0].double() - joined_C).square()
        pooled_C = _weighted(variances_RC[:, :, 0].double() + between_RC, counts_R)
        mean_C = joined_C.to(x_NCX.dtype)
        slope_NCX = deviations(x_NCX, mean_C) * (2 / count).to(x_NCX.dtype)
        return Joined(count, mean_C, pooled_C.to(x_NCX.dtype), slope_NCX)


class JoinedTopK(JoinedStatistic):
    """S = C(n) * (mean of the k largest |x - mean|) + eps in one exchange; L-infinity is k = 1.

    Every process sends its k largest and its k smallest values. About the mean of all, the k largest deviations above
    it are among the former, those below it among the latter.
    """

    def __init__(self, k: int, eps: float) -> None:
        self._k = k
        self._eps = eps

    def measure(self, x_NCX: Tensor, group: dist.ProcessGroup | None) -> Joined:
        """A gather of (n, mean, k largest, k smallest); which of the local ones were chosen is the slope."""
        high_Ck, low_Ck, index_C2k = self._extremes(x_NCX)
        counts_R, (means_RC, high_RCk, low_RCk) = _gathered(x_NCX, [_mean(x_NCX)[:, None], high_Ck, low_Ck], group)
        count, mean_C = counts_R.sum(), _weighted(means_RC[:, :, 0], counts_R)
        mean_C = mean_C.to(x_NCX.dtype)
        # Deviations upwards and downwards; what is on the other side, and what fills short lists, becomes -1.
        up_RCk, down_RCk = high_RCk - mean_C[:, None], mean_C[:, None] - low_RCk
        up_RCk = torch.where(up_RCk < 0, -1.0, up_RCk)
        down_RCk = torch.where(down_RCk <= 0, -1.0, down_RCk)
        candidates_RC2k = torch.cat([up_RCk, down_RCk], 2)
        ranks, channels, width = candidates_RC2k.shape
        top = rows_by_channel(candidates_RC2k).topk(self._k)
        valid_Ck = ~(top.values < 0)  # NaN is valid: it must come out
        chosen = count.clamp(max=self._k)
        mean_of_top_C = torch.where(valid_Ck, top.values, 0.0).double().sum(1) / chosen
        constant = _constant(count)
        scale_C = constant * mean_of_top_C + self._eps
        share_Ck = torch.where(valid_Ck, top.values.sign(), 0.0) * (constant / chosen).to(x_NCX.dtype)
        share_RC2k = torch.zeros_like(rows_by_channel(candidates_RC2k)).scatter(1, top.indices, share_Ck)
        share_C2k = share_RC2k.reshape(channels, ranks, width)[:, dist.get_rank(group)]
        slope_NCX = self._spread_out(x_NCX, share_C2k, index_C2k)
        return Joined(count, mean_C, scale_C.to(x_NCX.dtype), slope_NCX)

    def _extremes(self, x_NCX: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The k largest, the k smallest (filled up with -inf and +inf), and the places of both in the rows."""
        rows_Cn = rows_by_channel(x_NCX)
        here = min(self._k, rows_Cn.shape[1])
        high, low = rows_Cn.topk(here), rows_Cn.topk(here, largest=False)
        fill = (0, self._k - here)
        pad = torch.nn.functional.pad
        return (
            pad(high.values, fill, value=-torch.inf),
            pad(low.values, fill, value=torch.inf),
            torch.cat([pad(high.indices, fill), pad(low.indices, fill)], 1),
        )

    def _spread_out(self, x_NCX: Tensor, share_C2k: Tensor, index_C2k: Tensor) -> Tensor:
        """The slope in the shape of x: + share where one of the largest was chosen, - share for the smallest."""
        rows_Cn = torch.zeros_like(rows_by_channel(x_NCX))
        if rows_Cn.numel():
            signed_C2k = torch.cat([share_C2k[:, : self._k], -share_C2k[:, self._k :]], 1)
            rows_Cn = rows_Cn.scatter_add(1, index_C2k, signed_C2k)
        channels, samples, *axes = x_NCX.transpose(0, 1).shape
        return rows_Cn.reshape(channels, samples, *axes).transpose(0, 1)


def _mean(x_NCX: Tensor) -> Tensor:
    return channel_mean(x_NCX) if x_NCX.numel() else x_NCX.new_zeros(x_NCX.shape[1])


def _gathered(x_NCX: Tensor, parts: list[Tensor], group: dist.ProcessGroup | None) -> tuple[Tensor, list[Tensor]]:
    """n (R,) in float64 and each (C, w) part of every rank (R, C, w), through one all_gather of one flat message."""
    count = x_NCX.new_full((1,), x_NCX.numel() // max(x_NCX.shape[1], 1))
    message = torch.cat([count, *(part.reshape(-1) for part in parts)])
    gathered = [torch.empty_like(message) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, message, group=group)
    all_R = torch.stack(gathered)
    pieces = torch.split(all_R[:, 1:], [part.numel() for part in parts], 1)
    return all_R[:, 0].double(), [
        piece.reshape(len(gathered), *part.shape) for piece, part in zip(pieces, parts, strict=True)
    ]


def _weighted(values_RC: Tensor, counts_R: Tensor) -> Tensor:
    """sum n_r value_r / n in float64."""
    return (values_RC.double() * counts_R[:, None]).sum(0) / counts_R.sum()


def _constant(count: Tensor) -> Tensor:
    """`linf_constant` of a count that is a tensor, without reading it: C(n) = C(2) * sqrt(ln 2 / ln n)."""
    return linf_constant(2) * (math.log(2) / count.log()).sqrt()
