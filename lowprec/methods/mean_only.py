"""The method `mean_only`: batch norms no longer divide, they only take off the mean.

Meant for networks whose weights have a fixed norm (`bounded_weight_norm`, before or after this), which is how the
paper trains: the weights hold the scale, so the variance has nothing left to do. On a trained network it changes the
function, because what was divided by is gone; the affine weight that went with it goes too, unless asked to stay.

Source: Hoffer, Banner, Golan, Soudry, Norm matters, NeurIPS 2018.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lowprec.errors import UnsupportedError
from lowprec.methods.rewrite import inherit, modules_with_paths, replace_module
from lowprec.norm import is_norm
from lowprec.norm.mean_only import MeanOnlyBatchNorm, MeanOnlyBatchNorm1d, MeanOnlyBatchNorm2d, MeanOnlyBatchNorm3d
from lowprec.report import ChangeReport

_MEAN_ONLY: dict[type[nn.Module], type[MeanOnlyBatchNorm]] = {
    nn.BatchNorm1d: MeanOnlyBatchNorm1d,
    nn.BatchNorm2d: MeanOnlyBatchNorm2d,
    nn.BatchNorm3d: MeanOnlyBatchNorm3d,
}


def convert_mean_only(model: nn.Module, report: ChangeReport, *, weight: bool = False) -> nn.Module:
    """Batch norms become mean-only batch norms; see `lowprec.norm.mean_only`.

    bias, running_mean and num_batches_tracked are kept: they mean the same. running_var is dropped, and so is the
    weight, which scaled what was divided. Only torch's own classes are replaced.

    Args:
        model: a private copy.
        report: gets a row per norm.
        weight: whether the norms keep their affine weight.

    Raises:
        UnsupportedError: there is nothing to replace.
    """
    for path, module in list(modules_with_paths(model)):
        if not is_norm(module):
            continue
        if type(module) not in _MEAN_ONLY or "forward" in vars(module):
            report.refuse(path, f"is a {type(module).__name__}, not a batch norm exactly as torch has it")
            continue
        assert isinstance(module, _BatchNorm)
        new = _from_batch_norm(module, weight)
        model = replace_module(model, module, new)
        dropped = [name for name in ("weight", "running_var") if getattr(module, name) is not None]
        if new.weight is not None:
            dropped.remove("weight")
        rest = f" without {' and '.join(dropped)}" if dropped else ""
        report.change(path, f"{type(module).__name__} became {type(new).__name__}{rest}")
    if not report.changed:
        found = f": {report.refused[0].name}: {report.refused[0].reason}" if report.refused else ""
        raise UnsupportedError(
            f"method 'mean_only' found no BatchNorm1d, 2d or 3d to replace in {type(model).__name__}{found}"
        )
    return model


def _from_batch_norm(old: _BatchNorm, weight: bool) -> MeanOnlyBatchNorm:
    """The mean-only norm with the bias and the running mean of `old`, the objects themselves."""
    new = _MEAN_ONLY[type(old)](
        old.num_features, old.eps, old.momentum, old.affine, old.running_mean is not None, "meta", weight=weight
    )
    new.bias = old.bias
    if new.weight is not None:
        new.weight = old.weight
    new.running_mean, new.num_batches_tracked = old.running_mean, old.num_batches_tracked
    new.track_running_stats = old.track_running_stats  # may have been switched on the object
    inherit(old, new)
    return new
