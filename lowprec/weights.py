"""Weight maps as pure functions of tensors: norms per output channel, bounded and standardised weights, centring.

Apart from `lowprec.functional` because a weight has its own axes: what belongs to one output channel depends on the
kind of layer, and `output_rows` is the one place that knows. Norms and means are taken in float32 or wider, because
half squares of values below 2.4e-4 vanish; results are rounded once to the dtype of the weight. Gradients are
autograd's, and equal the closed forms (tests), so double backward works.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lowprec.formats import FP16
from lowprec.functional import accumulation_dtype, cast


def output_rows(weight: Tensor, groups: int = 1, transposed: bool = False) -> tuple[Tensor, tuple[int, ...]]:
    """A view of a weight in which the axes that feed one output channel are separate, and the numbers of those axes.

    Linear (O, I) and conv (O, I/groups, K...): viewed as (O, I K), axis 1. Embeddings and recurrent weights are laid
    out like linear ones. Transposed conv (I, O/groups, K...): output channel g * O/groups + j is fed by the rows of
    group g only, so it is viewed as (groups, I/groups, O/groups, K), axes 1 and 3.
    """
    if not transposed:
        return weight.reshape(weight.shape[0], -1), (1,)
    return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1), (1, 3)


def row_norms(rows: Tensor, axes: tuple[int, ...], p: float = 2.0, k: int | None = None) -> Tensor:
    """The norm over `axes` of a view made by `output_rows`, those axes kept with length 1.

    ||v||_p = (sum |v|^p)^(1/p), max|v| for p = inf; with `k` (p = inf only) the top-k norm, the mean of the min(k, n)
    largest |v|, which is the maximum for k = 1 and mean|v| for k = n. Computed in the dtype of `rows`. Where several
    values tie for the maximum, the gradient is split evenly for p = inf and goes to the k chosen ones for top-k.
    """
    if k is None:
        norm: Tensor = torch.linalg.vector_norm(rows, ord=p, dim=axes, keepdim=True)
        return norm
    flat = rows.abs().movedim(axes, tuple(range(-len(axes), 0))).flatten(-len(axes))
    mean = flat.topk(min(k, flat.shape[-1]), dim=-1).values.mean(-1)
    for axis in axes:
        mean = mean.unsqueeze(axis)
    return mean


def bounded_weight(
    v: Tensor,
    rho: Tensor | float,
    groups: int = 1,
    transposed: bool = False,
    *,
    p: float = 2.0,
    k: int | None = None,
) -> Tensor:
    """w_i = rho * v_i / ||v_i|| for every output channel i, with the norm of `row_norms`.

    Norms in float32 or wider, w rounded once to v's dtype. A row of zeros has no direction: it is treated as if its
    norm were 1, so w_i = 0 and the gradient of v_i is rho * dL/dw_i, finite, with which the row can leave zero. For
    every other row, with G = dL/dw_i and a the gradient of the norm at v_i (sign(v)|v|^(p-1) / ||v||_p^(p-1)),
    dL/dv_i = rho / ||v_i|| * (G - (v_i . G / ||v_i||) a), and v_i . dL/dv_i = 0.

    Args:
        v: weight of a linear, embedding, recurrent or conv layer, or of a transposed conv.
        rho: the norm of each row of w, one scalar per layer.
        groups: groups of a transposed conv.
        transposed: whether axis 0 of v counts inputs.
        p: 1, 2 or inf.
        k: with p = inf, for the top-k norm.

    Source: Hoffer et al., Norm matters, NeurIPS 2018, sections on bounded and Lp weight normalisation.
    """
    rows, axes = output_rows(cast(v, accumulation_dtype(v.dtype)), groups, transposed)
    factor = rho / _without_zeros(row_norms(rows, axes, p, k))
    return cast((rows * factor).reshape(v.shape), v.dtype)


def gained_weight(
    v: Tensor,
    gain_O: Tensor,
    bound: Tensor | float,
    groups: int = 1,
    transposed: bool = False,
    *,
    p: float = 2.0,
    k: int | None = None,
) -> Tensor:
    """w_i = v_i / ||v_i|| * gain_i * bound / ||gain||_2: the layer is bounded, channels may trade.

    Then sum_i ||w_i||^2 = bound^2 (with the norm of `row_norms`; rows of zeros count as in `bounded_weight`). Only the
    direction of `gain` counts, so the gradient of `gain` is orthogonal to it.

    Args:
        v: as in `bounded_weight`.
        gain_O: (O,), one factor per output channel.
        bound: the norm of the layer.
        groups: groups of a transposed conv.
        transposed: whether axis 0 of v counts inputs.
        p: 1, 2 or inf.
        k: with p = inf, for the top-k norm.

    Source: the authors' code to Hoffer et al., Norm matters, models/bwn.py.
    """
    rows, axes = output_rows(cast(v, accumulation_dtype(v.dtype, gain_O.dtype)), groups, transposed)
    norms = _without_zeros(row_norms(rows, axes, p, k))
    gain = cast(gain_O, rows.dtype)
    factor = (gain * (bound / torch.linalg.vector_norm(gain))).reshape(norms.shape) / norms
    return cast((rows * factor).reshape(v.shape), v.dtype)


def standardised_weight(v: Tensor, gain_O: Tensor, constant: Tensor | float = 1.0, eps: float = 1e-4) -> Tensor:
    """w_o = constant * gain_o * (v_o - mean(v_o)) / sqrt(max(n var(v_o), eps)) for every output channel o (axis 0).

    n is the fan-in, the number of elements in v_o, and var has no Bessel factor. So sum w_o = 0 and sum w_o^2 =
    (constant gain_o)^2: inputs of any common mean and of variance 1 give outputs of variance (constant gain_o)^2.
    `eps` is not added: it is reached only where v_o is next to constant, and there w_o and its gradient stay finite.
    Above eps, with G = dL/dw_o, dL/dv_o sums to 0 and is orthogonal to v_o.

    Args:
        v: weight of a linear or conv layer, (O, ...).
        gain_O: (O,).
        constant: a factor of the whole layer.
        eps: least n var.

    Returns:
        like v; moments in float32 or wider, rounded once.

    Source: Brock, De, Smith, Characterizing signal propagation to close the performance gap in unnormalized ResNets,
    arXiv 2101.08692, eq. 4, with the eps of DeepMind's code to Brock et al., arXiv 2102.06171.
    """
    rows = cast(v, accumulation_dtype(v.dtype, gain_O.dtype)).flatten(1)
    centred = rows - rows.mean(1, keepdim=True)
    squares = centred.square().sum(1, keepdim=True)  # n var
    factor = constant * cast(gain_O, rows.dtype)[:, None] * squares.clamp(min=eps).rsqrt()
    return cast((centred * factor).reshape(v.shape), v.dtype)


def initial_bound(
    v: Tensor, groups: int = 1, transposed: bool = False, *, p: float = 2.0, k: int | None = None
) -> Tensor:
    """rho: the root mean square of the row norms of v, which for p = 2 is ||V||_F / sqrt(C_out).

    The bound that keeps the size of the layer: for p = 2 its Frobenius norm, exactly. 0-d, float32 or wider.
    """
    norms = row_norms(*output_rows(cast(v, accumulation_dtype(v.dtype)), groups, transposed), p, k)
    norm: Tensor = torch.linalg.vector_norm(norms)
    return norm / math.sqrt(norms.numel())


def initial_gain(
    v: Tensor, groups: int = 1, transposed: bool = False, *, p: float = 2.0, k: int | None = None
) -> Tensor:
    """The gain with which `gained_weight` gives v itself: the row norms (O,), float32 or wider.

    A row of zeros gets the root mean square of the others: with gain 0 neither its v nor its gain would ever have a
    gradient.
    """
    norms_O = row_norms(*output_rows(cast(v, accumulation_dtype(v.dtype)), groups, transposed), p, k).flatten()
    others = norms_O.square().sum().div((norms_O != 0).sum()).sqrt()
    return torch.where(norms_O == 0, others, norms_O)


@torch.no_grad()
def centre_(weights: Sequence[Tensor]) -> None:
    """W_o <- W_o - mean(W_o) in place, for every output channel o (axis 0) of all weights: a linear projection.

    Means in float32 or wider, one per weight; all subtractions in one call.

    Source: Fei, Dai, Li, Zou, Xiong, MimicNorm, arXiv 2010.09278, modified weight mean.
    """
    means = [
        weight.mean(tuple(range(1, weight.dim())), keepdim=True, dtype=accumulation_dtype(weight.dtype))
        for weight in weights
    ]
    if weights:
        torch._foreach_sub_(list(weights), means)


@torch.no_grad()
def is_centred(weight: Tensor) -> bool:
    """Whether every row's mean is what rounding to half may leave of zero: 2^-11 of the mean of its absolute values."""
    rows = weight.reshape(weight.shape[0], -1)
    rows = cast(rows, accumulation_dtype(rows.dtype))
    return bool((rows.mean(1).abs() <= FP16.unit_roundoff * rows.abs().mean(1)).all())


def scale_weight(weight: Tensor, factor: Tensor) -> Tensor:
    """factor * weight for a scalar `factor` that may be wider than the weight; rounded once to the weight's dtype.

    Written out for the gradient: in `weight * factor` torch sums that of the factor over the weight in the weight's
    dtype, and a half sum has three digits.
    """
    wide = accumulation_dtype(weight.dtype, factor.dtype)
    return cast(cast(factor, wide) * cast(weight, wide), weight.dtype)


def scale_update(before: Tensor, after: Tensor, factor: Tensor, groups: int = 1, transposed: bool = False) -> Tensor:
    """before + factor_i * (after - before) for every output channel i: an optimizer step made longer or shorter.

    Args:
        before: the weight before the step, float32 or wider.
        after: the weight after it.
        factor: shaped like `row_norms` of the weight, or 0-d.
        groups: groups of a transposed conv.
        transposed: whether axis 0 counts inputs.
    """
    old, _ = output_rows(before, groups, transposed)
    new, _ = output_rows(after, groups, transposed)
    return (old + factor * (new - old)).reshape(before.shape)


def _without_zeros(norms: Tensor) -> Tensor:
    return torch.where(norms == 0, torch.ones_like(norms), norms)
