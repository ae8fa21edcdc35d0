"""Checkpoints of the authors' own classes, read as this library's norms.

Their L1, top-k and Lp classes keep 1 / S in a buffer that they call `running_var`, average that reciprocal, and give
momentum the opposite meaning (`running = momentum * running + (1 - momentum) * new`, default 0.1: the last batch has
weight 0.9). One other class of theirs keeps S in `running_scale`. At inference they compute
(x - running_mean) * running_var * weight + bias, so S = 1 / running_var gives the same outputs; how the average came
about cannot be undone, `lowprec.calibration.recompute_batch_stats` makes a new one.

Source: the released code of Hoffer, Banner, Golan, Soudry, Norm matters, NeurIPS 2018.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lowprec.errors import DataError
from lowprec.norm.absolute import AbsoluteBatchNorm


def load_authors_state_dict(
    model: nn.Module, state: Mapping[str, Tensor], momentum: float | None = None
) -> dict[str, Tensor]:
    """Loads a state dict of the authors' classes into `model`, strictly.

    Args:
        model: the same network with norms of this library in place of theirs; changed in place.
        state: their state dict, same module paths.
        momentum: theirs, for training on: the norms get 1 - momentum, which is the same average. None leaves it.

    Returns:
        the state as it was loaded, in this library's terms.

    Raises:
        DataError: keys or shapes don't match the model, or a reciprocal scale is not a positive number, as in a
            checkpoint from before the first training step (theirs start at 0).
    """
    ours = state_from_authors(model, state)
    wanted = model.state_dict()
    for kind, keys in (("lacks", wanted.keys() - ours.keys()), ("has besides", ours.keys() - wanted.keys())):
        if keys:
            raise DataError(f"the authors' checkpoint {kind} {', '.join(sorted(keys)[:5])}; is it of another network?")
    for key, value in ours.items():
        if value.shape != wanted[key].shape:
            raise DataError(f"{key}: the checkpoint has {tuple(value.shape)}, the model {tuple(wanted[key].shape)}")
    model.load_state_dict(ours)
    if momentum is not None:
        for module in model.modules():
            if isinstance(module, AbsoluteBatchNorm):
                module.momentum = 1 - momentum
    return ours


def state_from_authors(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their state dict in this library's terms: running_scale = 1 / running_var, and a count of batches of 0.

    Only at the paths of this library's norms in `model`; everything else stays. Arguments and errors: see
    `load_authors_state_dict`.
    """
    ours = dict(state)
    for path, module in model.named_modules():
        if not isinstance(module, AbsoluteBatchNorm):
            continue
        prefix = f"{path}." if path else ""
        if f"{prefix}running_var" in ours:
            ours[f"{prefix}running_scale"] = _scale(ours.pop(f"{prefix}running_var"), f"{prefix}running_var")
        if module.num_batches_tracked is not None:
            ours.setdefault(f"{prefix}num_batches_tracked", torch.zeros_like(module.num_batches_tracked))
    return ours


def _scale(reciprocal_C: Tensor, key: str) -> Tensor:
    wide_C = reciprocal_C.double()
    if not bool(((wide_C > 0) & torch.isfinite(wide_C)).all()):
        raise DataError(
            f"{key}: a reciprocal scale must be a positive number, found {float(wide_C.min()):.3g} to "
            f"{float(wide_C.max()):.3g}; it was saved before training, or it is not of the authors' classes"
        )
    return (1 / wide_C).to(reciprocal_C.dtype)
