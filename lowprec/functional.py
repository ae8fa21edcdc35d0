"""The formulas as pure functions of tensors: statistics and normalisations.

Modules, methods and later the fused kernels are shells around these; a kernel is right when it agrees with the function
of the same name. Gradients are left to autograd on purpose: every step below is a differentiable torch operation whose
derivative is the closed form (checked against it in the tests), so double backward works and there is no second
formula to keep in step.

Unless true half statistics are asked for (`lowprec.norm.rounded`), nothing is reduced in less than float32: half inputs
are widened first, because a half accumulator stalls (a sum of 5000 ones gives 2048) and a half sum over n > 65504
elements overflows. Results are rounded once to the dtype of the input.

Axes: N batch, C channel, X any number of further axes (none, L, HW or DHW).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# From (N, C, ...) to the average (C,) over all axes but the channel axis.
Average = Callable[[Tensor], Tensor]

# E|N(0, s^2)| = s sqrt(2/pi); its reciprocal makes the L1 scale of normal data equal its standard deviation.
L1_CONSTANT = math.sqrt(math.pi / 2)


def accumulation_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype that operands of these dtypes are computed in: float64 if one of them is, else float32.

    In plain Python, because torch.export records `torch.promote_types` as a node of the graph.
    """
    return torch.float64 if torch.float64 in dtypes else torch.float32


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype`; x itself when it is that already, so that a traced graph holds no empty conversions."""
    return x if x.dtype == dtype else x.to(dtype)


def reduced_axes(x_NCX: Tensor) -> list[int]:
    """All axes but the channel axis 1."""
    return [axis for axis in range(x_NCX.dim()) if axis != 1]


def per_channel(value_C: Tensor, x_NCX: Tensor) -> Tensor:
    """`value_C` viewed so that it broadcasts against `x_NCX` along axis 1."""
    return value_C.reshape([1, -1] + [1] * (x_NCX.dim() - 2))


def rows_by_channel(x_NCX: Tensor) -> Tensor:
    """The elements of each channel in a row: (C, n)."""
    return x_NCX.transpose(0, 1).flatten(1)


def average(x_NCX: Tensor) -> Tensor:
    """The plain average per channel, in x's dtype."""
    return x_NCX.mean(reduced_axes(x_NCX))


def channel_mean(x_NCX: Tensor) -> Tensor:
    """The mean per channel, (C,), in float32, or float64 for float64 input.

    mu = a + mean(x - a) with a the first element of the channel: a constant channel gives that constant exactly,
    whatever its length (a plain float32 mean is off by some units in the last place, which a small eps blows up to a
    whole scale), and a channel far from zero keeps its digits.
    """
    wide_NCX = cast(x_NCX, accumulation_dtype(x_NCX.dtype))
    first_NCX = wide_NCX[:1].detach()
    for axis in range(2, x_NCX.dim()):
        first_NCX = first_NCX.narrow(axis, 0, 1)
    return first_NCX.flatten() + average(wide_NCX - first_NCX)


def deviations(x_NCX: Tensor, mean_C: Tensor) -> Tensor:
    """x - mean, in the dtype of the mean."""
    return cast(x_NCX, mean_C.dtype) - per_channel(mean_C, x_NCX)


def l1_statistics(x_NCX: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Mean and L1 scale per channel over the n other elements.

    mu = mean(x); S = sqrt(pi/2) * mean(|x - mu|) + eps. No Bessel factor: S estimates a first absolute moment, for
    which n/(n-1) is not the correction. The subgradient of |.| at 0 is 0.

    Args:
        x_NCX: floating point, (N, C, ...).
        eps: added after the constant, so that it bounds S itself from below.

    Returns:
        mean (C,) and scale (C,), in float32, or float64 for float64 input.

    Source: Hoffer, Banner, Golan, Soudry, Norm matters, NeurIPS 2018, section on L1 batch normalisation.
    """
    mean_C = channel_mean(x_NCX)
    return mean_C, l1_scale(x_NCX, mean_C, eps)


def l1_scale(x_NCX: Tensor, mean_C: Tensor, eps: float, average: Average = average) -> Tensor:
    """S = sqrt(pi/2) * mean(|x - mean|) + eps per channel, about a given mean."""
    return L1_CONSTANT * average(deviations(x_NCX, mean_C).abs()) + eps


def linf_constant(count: int) -> float:
    """C(n) = (1 + sqrt(pi ln 4)) / (2 sqrt(2 ln n)), which turns the largest of n deviations into a scale. n > 1.

    The average of the reciprocals of two bounds of the expected maximum of n normal values. It is not the reciprocal
    of the expectation: for normal data C * max is 1.4 to 1.5 standard deviations, which the learned weight takes up.

    Source: Hoffer et al., Norm matters, NeurIPS 2018, section on L-infinity batch normalisation.
    """
    return (1 + math.sqrt(math.pi * math.log(4))) / (2 * math.sqrt(2 * math.log(count)))


def linf_scale(x_NCX: Tensor, mean_C: Tensor, eps: float) -> Tensor:
    """S = C(n) * max(|x - mean|) + eps per channel; of equal maxima one gets the gradient (torch's choice)."""
    largest_C = rows_by_channel(deviations(x_NCX, mean_C).abs()).max(1).values
    return linf_constant(x_NCX.numel() // x_NCX.shape[1]) * largest_C + eps


def topk_scale(x_NCX: Tensor, mean_C: Tensor, k: int, eps: float, average: Average = average) -> Tensor:
    """S = C(n) * (average of the k largest |x - mean|) + eps per channel; of all n when k > n.

    The constant is that of L-infinity whatever k is. Of equal values at the border torch's choice gets the gradient.

    Source: Hoffer et al., Norm matters, NeurIPS 2018, Top(k) batch normalisation.
    """
    rows_Cn = rows_by_channel(deviations(x_NCX, mean_C).abs())
    largest_kC = rows_Cn.topk(min(k, rows_Cn.shape[1]), sorted=False).values.t()
    return linf_constant(rows_Cn.shape[1]) * average(largest_kC) + eps


def l2_variance(x_NCX: Tensor, mean_C: Tensor, average: Average = average) -> Tensor:
    """mean((x - mean)^2) per channel: what batch norm divides by, without n / (n - 1)."""
    return average(deviations(x_NCX, mean_C).square())


def normalise(
    x_NCX: Tensor, mean_C: Tensor, scale_C: Tensor | None, weight_C: Tensor | None, bias_C: Tensor | None
) -> Tensor:
    """y = weight * (x - mean) / scale + bias per channel; a scale of None is 1.

    Computed in the widest of the dtypes, at least float32, and rounded once to x's dtype. The mean is subtracted before
    anything is multiplied: with x * (weight/scale) + shift a channel of mean 1000 and scale 1 would lose its digits.
    Strides (channels last) follow x.
    """
    wide = accumulation_dtype(x_NCX.dtype, mean_C.dtype)
    y_NCX = cast(x_NCX, wide) - per_channel(cast(mean_C, wide), x_NCX)
    if scale_C is not None:
        y_NCX = y_NCX / per_channel(cast(scale_C, wide), x_NCX)
    if weight_C is not None:
        y_NCX = y_NCX * per_channel(cast(weight_C, wide), x_NCX)
    if bias_C is not None:
        y_NCX = y_NCX + per_channel(cast(bias_C, wide), x_NCX)
    return cast(y_NCX, x_NCX.dtype)


def apply_channel_affine(
    x_NCX: Tensor, mean_C: Tensor, scale_C: Tensor | None, weight_C: Tensor | None, bias_C: Tensor | None
) -> Tensor:
    """The same map as `normalise`, as x * a + c with a = weight / scale and c = bias - mean * a: the inference form.

    a and c depend on parameters alone, so a tracer sees one multiplication and one addition by constants, which fold.
    Computed like `normalise` in at least float32, rounded once.
    """
    wide = accumulation_dtype(x_NCX.dtype, mean_C.dtype)
    factor_C = torch.ones_like(mean_C, dtype=wide) if weight_C is None else cast(weight_C, wide)
    if scale_C is not None:
        factor_C = factor_C / cast(scale_C, wide)
    shift_C = -cast(mean_C, wide) * factor_C
    if bias_C is not None:
        shift_C = shift_C + cast(bias_C, wide)
    return cast(cast(x_NCX, wide) * per_channel(factor_C, x_NCX) + per_channel(shift_C, x_NCX), x_NCX.dtype)


def l1_batch_norm(
    x_NCX: Tensor, weight_C: Tensor | None = None, bias_C: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """L1 batch normalisation with the statistics of this batch: (y, mean, scale).

    y = weight * (x - mu) / S + bias with mu, S of `l1_statistics`. With g = weight * dL/dy, d = (x - mu) / S and
    s = sign(x - mu) autograd computes dL/dx = (g - mean(g) - sqrt(pi/2) * mean(g d) * (s - mean(s))) / S.

    Returns:
        y like x; the statistics, detached from the graph (they go into running buffers), (C,) float32 or wider.
    """
    mean_C, scale_C = l1_statistics(x_NCX, eps)
    return normalise(x_NCX, mean_C, scale_C, weight_C, bias_C), mean_C.detach(), scale_C.detach()
