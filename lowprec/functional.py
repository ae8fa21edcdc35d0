"""The formulas as pure functions of tensors: statistics, normalisations, weight maps.

Modules, methods and later the fused kernels are shells around these; a kernel is right when it agrees with the function
of the same name. Gradients are left to autograd on purpose: every step below is a differentiable torch operation whose
derivative is the closed form (checked against it in the tests), so double backward works and there is no second
formula to keep in step.

Nothing is reduced in less than float32: half inputs are widened first, because a half accumulator stalls (a sum of 5000
ones gives 2048) and a half sum over n > 65504 elements overflows. Results are rounded once to the dtype of the input.

Axes: N batch, C channel, X any number of further axes (none, L, HW or DHW).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

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
    wide_NCX = cast(x_NCX, accumulation_dtype(x_NCX.dtype))
    mean_C = wide_NCX.mean(reduced_axes(x_NCX))
    return mean_C, l1_scale(wide_NCX, mean_C, eps)


def l1_scale(x_NCX: Tensor, mean_C: Tensor, eps: float) -> Tensor:
    """S = sqrt(pi/2) * mean(|x - mean|) + eps per channel, about a given mean."""
    deviation_NCX = cast(x_NCX, mean_C.dtype) - per_channel(mean_C, x_NCX)
    return L1_CONSTANT * deviation_NCX.abs().mean(reduced_axes(x_NCX)) + eps


def normalise(x_NCX: Tensor, mean_C: Tensor, scale_C: Tensor, weight_C: Tensor | None, bias_C: Tensor | None) -> Tensor:
    """y = weight * (x - mean) / scale + bias per channel.

    Computed in the widest of the dtypes, at least float32, and rounded once to x's dtype. The mean is subtracted before
    anything is multiplied: with x * (weight/scale) + shift a channel of mean 1000 and scale 1 would lose its digits.
    Strides (channels last) follow x.
    """
    wide = accumulation_dtype(x_NCX.dtype, mean_C.dtype)
    y_NCX = (cast(x_NCX, wide) - per_channel(cast(mean_C, wide), x_NCX)) / per_channel(cast(scale_C, wide), x_NCX)
    if weight_C is not None:
        y_NCX = y_NCX * per_channel(cast(weight_C, wide), x_NCX)
    if bias_C is not None:
        y_NCX = y_NCX + per_channel(cast(bias_C, wide), x_NCX)
    return cast(y_NCX, x_NCX.dtype)


def apply_channel_affine(
    x_NCX: Tensor, mean_C: Tensor, scale_C: Tensor, weight_C: Tensor | None, bias_C: Tensor | None
) -> Tensor:
    """The same map as `normalise`, as x * a + c with a = weight / scale and c = bias - mean * a: the inference form.

    a and c depend on parameters alone, so a tracer sees one multiplication and one addition by constants, which fold.
    Computed like `normalise` in at least float32, rounded once.
    """
    wide = accumulation_dtype(x_NCX.dtype, mean_C.dtype)
    factor_C = 1 / cast(scale_C, wide) if weight_C is None else cast(weight_C, wide) / cast(scale_C, wide)
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


def output_rows(weight: Tensor, groups: int = 1, transposed: bool = False) -> tuple[Tensor, tuple[int, ...]]:
    """A view of a weight in which the axes that feed one output channel are separate, and the numbers of those axes.

    Linear (O, I) and conv (O, I/groups, K...): viewed as (O, I K), axis 1. Transposed conv (I, O/groups, K...): output
    channel g * O/groups + j is fed by the rows of group g only, so it is viewed as (groups, I/groups, O/groups, K),
    axes 1 and 3.
    """
    if not transposed:
        return weight.reshape(weight.shape[0], -1), (1,)
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1), (1, 3)


def bounded_weight(v: Tensor, rho: Tensor | float, groups: int = 1, transposed: bool = False) -> Tensor:
    """w_i = rho * v_i / ||v_i||_2 for every output channel i.

    Norms in float32 or wider (half squares below 2.4e-4 vanish), w rounded once to v's dtype. A row of zeros has no
    direction: it is treated as if its norm were 1, so w_i = 0 and the gradient of v_i is rho * dL/dw_i, finite, with
    which the row can leave zero. For every other row v_i . dL/dv_i = 0.

    Args:
        v: weight of a linear or conv layer, or of a transposed conv.
        rho: the norm of each row of w, one scalar per layer.
        groups: groups of a transposed conv.
        transposed: whether axis 0 of v counts inputs.

    Source: Hoffer et al., Norm matters, NeurIPS 2018, section on bounded weight normalisation.
    """
    rows, axes = output_rows(cast(v, accumulation_dtype(v.dtype)), groups, transposed)
    norm = torch.linalg.vector_norm(rows, dim=axes, keepdim=True)
    factor = rho / torch.where(norm == 0, torch.ones_like(norm), norm)
    return cast((rows * factor).reshape(v.shape), v.dtype)


def initial_bound(v: Tensor, groups: int = 1, transposed: bool = False) -> Tensor:
    """rho = ||V||_F / sqrt(C_out): the bound that keeps the Frobenius norm of the layer. 0-d, float32 or wider."""
    outputs = v.shape[1] * groups if transposed else v.shape[0]
    norm: Tensor = torch.linalg.vector_norm(cast(v, accumulation_dtype(v.dtype)))
    return norm / math.sqrt(outputs)


def centre_weight(weight: Tensor, groups: int = 1, transposed: bool = False) -> Tensor:
    """W_o - mean(W_o) for every output channel o: a linear projection, the identity on what it made.

    Means in float32 or wider, result rounded once to the weight's dtype.

    Source: Fei, Dai, Li, Zou, Xiong, MimicNorm, arXiv 2010.09278, modified weight mean.
    """
    rows, axes = output_rows(cast(weight, accumulation_dtype(weight.dtype)), groups, transposed)
    return cast((rows - rows.mean(axes, keepdim=True)).reshape(weight.shape), weight.dtype)


def scale_weight(weight: Tensor, factor: Tensor) -> Tensor:
    """factor * weight for a scalar `factor` that may be wider than the weight; rounded once to the weight's dtype.

    Written out for the gradient: in `weight * factor` torch sums that of the factor over the weight in the weight's
    dtype, and a half sum has three digits.
    """
    wide = accumulation_dtype(weight.dtype, factor.dtype)
    return cast(cast(factor, wide) * cast(weight, wide), weight.dtype)
