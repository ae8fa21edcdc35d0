"""The method `l1`: every batch norm becomes an L1 batch norm.

Only torch's own classes are replaced: a subclass may compute something else, and what it computes cannot be read off
its name.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lowprec.errors import UnsupportedError
from lowprec.methods.rewrite import inherit, modules_with_paths, replace_module
from lowprec.norm import L1BatchNorm1d, L1BatchNorm2d, L1BatchNorm3d, ScaleBatchNorm, is_norm
from lowprec.report import ChangeReport

_REPLACEMENT: dict[type[nn.Module], type[ScaleBatchNorm]] = {
    nn.BatchNorm1d: L1BatchNorm1d,
    nn.BatchNorm2d: L1BatchNorm2d,
    nn.BatchNorm3d: L1BatchNorm3d,
}


def convert_l1(model: nn.Module, report: ChangeReport) -> nn.Module:
    """Replaces BatchNorm1d, 2d and 3d by their L1 forms; weight, bias, running_mean, num_batches_tracked are kept.

    `running_var` has no counterpart: it says nothing exact about a mean absolute deviation, so `running_scale` starts
    at 1 and is learned in training, or computed by `lowprec.calibration.recompute_batch_stats`.

    Raises:
        UnsupportedError: there is nothing to replace.
    """
    for path, module in list(modules_with_paths(model)):
        if not is_norm(module):
            continue
        reason = _why_not(module)
        if reason is not None:
            report.refuse(path, reason)
            continue
        new = _l1_from_batch_norm(module)
        model = replace_module(model, module, new)
        started = " and running_scale starts at 1" if new.track_running_stats else ""
        report.change(path, f"{type(module).__name__} became {type(new).__name__}{started}")
    if not report.changed:
        found = f": {report.refused[0].name}: {report.refused[0].reason}" if report.refused else ""
        raise UnsupportedError(
            f"method 'l1' found no BatchNorm1d, 2d or 3d to replace in {type(model).__name__}{found}"
        )
    return model


def _why_not(module: nn.Module) -> str | None:
    kind = type(module)
    if kind in _REPLACEMENT:
        return "its forward was replaced on the object" if "forward" in vars(module) else None
    if isinstance(module, ScaleBatchNorm):
        return f"is a {kind.__name__} already"
    if isinstance(module, nn.SyncBatchNorm):
        return "is a SyncBatchNorm; there is no synchronised L1 form yet"
    if isinstance(module, _BatchNorm):
        return f"is a {kind.__name__}, a subclass of a torch batch norm that may compute something else"
    return f"is a {kind.__name__}, not a batch norm"


def _l1_from_batch_norm(old: nn.Module) -> ScaleBatchNorm:
    assert isinstance(old, _BatchNorm)
    new = _REPLACEMENT[type(old)](
        old.num_features, old.eps, old.momentum, old.affine, old.track_running_stats, device="meta"
    )
    new.weight, new.bias = old.weight, old.bias
    new.running_mean, new.num_batches_tracked = old.running_mean, old.num_batches_tracked
    new.running_scale = None if old.running_var is None else torch.ones_like(old.running_var)
    inherit(old, new)
    return new
