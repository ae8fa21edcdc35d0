"""The fused norm in plain torch: what every kernel must compute, and what runs where there is none.

Forward, per channel over its n elements, with d = x - mean:

    S = sqrt(pi/2) * mean(|d|) + eps                       (k = 0: L1)
    S = C(n) * mean of the k largest |d| + eps             (k > 0: top-k; k = 1 is L-infinity)
    y = relu(weight * d / S + bias + residual)             (relu and residual where asked for)

Backward, with g = dL/dy (0 where the ReLU is), A = sum(g), T = weight * sum(g d) / S and sgn(0) = +1:

    dL/dbias = A        dL/dweight = T / weight        dL/dS = -T / S
    dL/dx = weight / S * (g - A / n) + dL/dS * dS/dx
    dS/dx_i = sqrt(pi/2) / n * (sgn d_i - mean(sgn d))             (L1)
    dS/dx_i = C(n) / k * ([i among the k] sgn d_i - sum_k(sgn d) / n)

T can be had from two tensors: from the input, as written, or **from the output** z of norm + ReLU, because g is 0
wherever z is:  T = sum(g z) - bias * A.  Then the input need not be kept, only z, which the next layer keeps anyway,
and one bit per element for sgn d. `lowprec.kernels.choice` says when that is accurate.

Every line is differentiable torch arithmetic, so this is also what double backward runs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lowprec.functional import (
    L1_CONSTANT,
    accumulation_dtype,
    cast,
    channel_mean,
    deviations,
    l1_scale,
    linf_constant,
    normalise,
    per_channel,
    reduced_axes,
    rows_by_channel,
)
from lowprec.kernels.layout import laid_out_as, pack, unpack


class Normalised(NamedTuple):
    """What the forward returns.

    Args:
        y: like x.
        mean: (C,), float32 or wider.
        scale: (C,), eps included.
        bits: uint8, one bit per element, as `layout.pack` orders them: sgn d >= 0 for an L1 backward from the output,
            y > 0 for a ReLU's backward from the input; else empty.
        extremes: (C, k) int64, the position of each of the k largest |d| in its channel, in (sample, place) order,
            the first of equals; ~position where d < 0. Empty for L1.
    """

    y: Tensor
    mean: Tensor
    scale: Tensor
    bits: Tensor
    extremes: Tensor


class Gradients(NamedTuple):
    """What the backward returns; `residual` is empty unless a ReLU stands between the residual and y."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    residual: Tensor


def norm_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    k: int,
    eps: float,
    relu: bool,
    from_output: bool,
) -> Normalised:
    """The forward of the module docstring; x in a canonical layout."""
    wide_NCX = cast(x, accumulation_dtype(x.dtype))
    mean_C = channel_mean(wide_NCX)
    extremes_Ck = torch.empty(0, dtype=torch.int64, device=x.device)
    if k == 0:
        scale_C = l1_scale(wide_NCX, mean_C, eps)
    else:
        scale_C, extremes_Ck = _top_k(deviations(wide_NCX, mean_C), k, eps)
    y_NCX = normalise(wide_NCX, mean_C, scale_C, weight, bias)
    if residual is not None:
        y_NCX = y_NCX + residual
    if relu:
        y_NCX = y_NCX.relu()
    y_NCX = laid_out_as(cast(y_NCX, x.dtype), x)
    if relu and not from_output:
        bits = pack(~(y_NCX <= 0), x)
    elif from_output and k == 0:
        bits = pack(wide_NCX >= per_channel(mean_C, x), x)
    else:
        bits = torch.empty(0, dtype=torch.uint8, device=x.device)
    return Normalised(y_NCX, mean_C, scale_C, bits, extremes_Ck)


def norm_backward(
    grad_y: Tensor,
    kept: Tensor,
    mean: Tensor,
    scale: Tensor,
    bits: Tensor,
    extremes: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    grad_mean: Tensor | None,
    grad_scale: Tensor | None,
    k: int,
    relu: bool,
    from_output: bool,
    has_residual: bool,
) -> Gradients:
    """The backward of the module docstring; `kept` is y when `from_output`, else x, in a canonical layout."""
    wide = accumulation_dtype(kept.dtype)
    count = kept.numel() // kept.shape[1]
    axes = reduced_axes(kept)
    kept_NCX, g_NCX = cast(kept, wide), cast(grad_y, wide)
    weight_C = torch.ones_like(scale) if weight is None else cast(weight, wide)
    if relu:
        active_NCX = ~(kept_NCX <= 0) if from_output else unpack(bits, kept)
        g_NCX = torch.where(active_NCX, g_NCX, 0.0)
    sum_C = g_NCX.sum(axes)
    if from_output:
        shifted_C = 0 if bias is None else cast(bias, wide) * sum_C
        moment_C = (g_NCX * kept_NCX).sum(axes) - shifted_C
        grad_weight_C = moment_C / weight_C
        above_NCX = unpack(bits, kept) if k == 0 else None
    else:
        d_NCX = deviations(kept_NCX, mean)
        grad_weight_C = (g_NCX * d_NCX).sum(axes) / scale
        moment_C = weight_C * grad_weight_C
        above_NCX = d_NCX >= 0 if k == 0 else None
    factor_C = weight_C / scale
    grad_spread_C = -moment_C / scale if grad_scale is None else grad_scale - moment_C / scale
    offset_C = -factor_C * sum_C if grad_mean is None else grad_mean - factor_C * sum_C
    if above_NCX is not None:
        signs_NCX = cast(above_NCX, wide) * 2 - 1
        step_C = grad_spread_C * (L1_CONSTANT / count)
        shift_C = offset_C / count - step_C * signs_NCX.mean(axes)
        dx_NCX = (
            per_channel(factor_C, kept) * g_NCX + per_channel(shift_C, kept) + per_channel(step_C, kept) * signs_NCX
        )
    else:
        signs_Ck = cast(extremes >= 0, wide) * 2 - 1
        step_C = grad_spread_C * (linf_constant(count) / extremes.shape[1])
        shift_C = (offset_C - step_C * signs_Ck.sum(1)) / count
        dx_NCX = per_channel(factor_C, kept) * g_NCX + per_channel(shift_C, kept)
        rows_Cn = rows_by_channel(dx_NCX).scatter_add(1, _positions(extremes), step_C[:, None] * signs_Ck)
        dx_NCX = rows_Cn.reshape(-1, kept.shape[0], *kept.shape[2:]).transpose(0, 1)
    residual_NCX = cast(g_NCX, kept.dtype) if has_residual and relu else kept.new_empty(0)
    return Gradients(laid_out_as(cast(dx_NCX, kept.dtype), kept), grad_weight_C, sum_C, residual_NCX)


def _top_k(d_NCX: Tensor, k: int, eps: float) -> tuple[Tensor, Tensor]:
    """The top-k scale and where its deviations are: the k largest, of equals the first."""
    d_Cn = rows_by_channel(d_NCX)
    places_Ck = d_Cn.detach().abs().sort(dim=1, descending=True, stable=True).indices[:, : min(k, d_Cn.shape[1])]
    largest_Ck = d_Cn.gather(1, places_Ck)
    scale_C = linf_constant(d_Cn.shape[1]) * largest_Ck.abs().mean(1) + eps
    return scale_C, torch.where(largest_Ck >= 0, places_Ck, ~places_Ck)


def _positions(extremes_Ck: Tensor) -> Tensor:
    return torch.where(extremes_Ck >= 0, extremes_Ck, ~extremes_Ck)
