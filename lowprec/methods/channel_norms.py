"""Norms of output channels, and what the step methods do with them: pure functions of weights.

Behind a batch norm only the direction of a channel's weights counts: L(c w) = L(w), so grad L(c w) = grad L(w) / c, and
a step of size lr turns the direction by lr / ||w||^2. The norm is therefore a second learning rate, one per channel,
which weight decay holds down without anybody having set it. The functions here set it.

Axes: C output channels; `rows` views of `lowprec.weights.output_rows`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowprec.functional import accumulation_dtype, cast
from lowprec.weights import output_rows


def channel_norms(weight: Tensor, groups: int = 1, transposed: bool = False) -> Tensor:
    """||w_i||_2 of every output channel i, (C,), float32 or wider.

    Args:
        weight: of a linear or conv layer, or of a transposed conv.
        groups: groups of a transposed conv.
        transposed: whether axis 0 of the weight counts inputs.
    """
    rows, axes = output_rows(cast(weight, accumulation_dtype(weight.dtype)), groups, transposed)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=axes)
    return norms.reshape(-1)


def scale_channels(weight: Tensor, factor_C: Tensor, groups: int = 1, transposed: bool = False) -> Tensor:
    """factor_i * w_i for every output channel i; computed in float32 or wider, rounded once to the weight's dtype."""
    wide = accumulation_dtype(weight.dtype, factor_C.dtype)
    rows, _ = output_rows(cast(weight, wide), groups, transposed)
    shape = (groups, 1, -1, 1) if transposed else (-1, 1)
    return cast((rows * cast(factor_C, wide).reshape(shape)).reshape(weight.shape), weight.dtype)


def step_correction(norm_C: Tensor, recorded_C: Tensor, exponent: float = 2.0) -> Tensor:
    """(||w|| / ||w_WD||)^exponent per channel: what an update of w is multiplied by to turn it as w_WD would turn.

    With w = c w_WD plain SGD gives w - lr grad L(w) = c w_WD - (lr / c) grad L(w_WD), so the update has to be c^2 times
    as long to be c times that of w_WD: exponent 2, exactly. An optimizer that divides the gradient by its own size
    (Adam) makes the same update for every c, which has to be c times as long: exponent 1.

    1 where either norm is zero: such a channel has no direction that could turn.

    Source: Hoffer, Banner, Golan, Soudry, Norm matters, NeurIPS 2018, learning-rate correction.
    """
    defined_C = (norm_C > 0) & (recorded_C > 0)
    ratio_C = norm_C / torch.where(defined_C, recorded_C, torch.ones_like(recorded_C))
    return torch.where(defined_C, ratio_C**exponent, torch.ones_like(ratio_C))


def norm_correction(norm_C: Tensor, target_C: Tensor) -> Tensor:
    """target / ||w|| per channel; 1 where either is zero, because zeros have no direction to keep."""
    defined_C = (norm_C > 0) & (target_C > 0)
    ratio_C = target_C / torch.where(defined_C, norm_C, torch.ones_like(norm_C))
    return torch.where(defined_C, ratio_C, torch.ones_like(ratio_C))
