"""The methods `l1`, `linf`, `topk` and `l2_half`: every batch norm becomes one of another family.

One replacement for all families, because what has to survive it (parameters, running statistics that mean the same,
hooks, flags, sharing) does not depend on the formula. Only torch's own classes are replaced: a subclass may compute
something else, and what it computes cannot be read off its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from lowprec.errors import ConfigError, UnsupportedError
from lowprec.methods.fuse import fuse_relus
from lowprec.methods.method import nearest_hint
from lowprec.methods.rewrite import inherit, modules_with_paths, replace_module
from lowprec.methods.tracing import is_hooked
from lowprec.norm import (
    NORMS,
    AbsoluteBatchNorm,
    KalmanBatchNorm1d,
    KalmanBatchNorm2d,
    KalmanBatchNorm3d,
    ScaleBatchNorm,
    SyncKalmanBatchNorm,
    SyncL1BatchNorm,
    SyncL2BatchNorm,
    SyncLInfBatchNorm,
    SyncTopKBatchNorm,
    is_norm,
)
from lowprec.norm.sync import SyncBatchNorm
from lowprec.report import ChangeReport
from lowprec.statistics import running_statistics

_DIMENSIONS: dict[type[nn.Module], int] = {nn.BatchNorm1d: 1, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}
NORM_CLASSES: dict[str, Mapping[int, type[ScaleBatchNorm]]] = {
    **{name: family.classes for name, family in NORMS.items()},
    "kalman": {1: KalmanBatchNorm1d, 2: KalmanBatchNorm2d, 3: KalmanBatchNorm3d},
}
"""What takes the place of torch's, by family and number of spatial dimensions."""
_SYNCHRONISED: dict[str, type[ScaleBatchNorm]] = {
    "l1": SyncL1BatchNorm,
    "linf": SyncLInfBatchNorm,
    "topk": SyncTopKBatchNorm,
    "l2": SyncL2BatchNorm,
    "kalman": SyncKalmanBatchNorm,
}
_NARROW: dict[str, torch.dtype] = {"float16": torch.float16, "bfloat16": torch.bfloat16}
# What torch's batch norms keep; a norm that has a buffer of the same name means the same by it, and takes it over.
_TORCH_STATISTICS = ("running_mean", "running_var")


def convert_l1(
    model: nn.Module,
    report: ChangeReport,
    *,
    stats_dtype: str | torch.dtype | None = None,
    accumulation: str = "tree",
    fuse: bool = True,
) -> nn.Module:
    """Batch norms become L1 batch norms.

    Weight, bias, running_mean and num_batches_tracked are kept. `running_var` has no counterpart: it says nothing exact
    about a mean absolute deviation, so `running_scale` starts at 1 and is learned in training, or computed by
    `lowprec.calibration.recompute_batch_stats`.

    Args:
        model: a private copy.
        report: gets a row per norm.
        stats_dtype: None for statistics in float32 or wider; "float16" or "bfloat16" for truly narrow ones.
        accumulation: of narrow statistics, "tree" or "naive".
        fuse: whether the new norms compute the ReLU, or the addition and the ReLU, that follows them, wherever these
            can be taken out of the network (see `lowprec.methods.fuse`): the same numbers in less time and memory. The
            report says where, and where not. Not with narrow statistics and not in synchronised norms. A forward hook
            put on such a norm later sees what comes out of the ReLU, and before an addition no tensor at first.

    Raises:
        UnsupportedError: there is nothing to replace.
        ConfigError: a `stats_dtype` or `accumulation` that there is not.
    """
    return replace_norms(model, report, "l1", "l1", _narrow(stats_dtype), accumulation, fuse)


def convert_linf(
    model: nn.Module,
    report: ChangeReport,
    *,
    stats_dtype: str | torch.dtype | None = None,
    accumulation: str = "tree",
    fuse: bool = True,
) -> nn.Module:
    """Batch norms become L-infinity batch norms; see `convert_l1`."""
    return replace_norms(model, report, "linf", "linf", _narrow(stats_dtype), accumulation, fuse)


def convert_topk(
    model: nn.Module,
    report: ChangeReport,
    *,
    k: int = 10,
    stats_dtype: str | torch.dtype | None = None,
    accumulation: str = "tree",
    fuse: bool = True,
) -> nn.Module:
    """Batch norms become top-k batch norms over the `k` largest deviations of a batch; see `convert_l1`."""
    return replace_norms(model, report, "topk", "topk", _narrow(stats_dtype), accumulation, fuse, k=k)


def convert_l2_half(model: nn.Module, report: ChangeReport, *, accumulation: str = "tree") -> nn.Module:
    """Batch norms keep their formula and compute their statistics in true half arithmetic, to show what that does.

    All running statistics mean the same and are kept, rounded to half; see `convert_l1` for the rest.
    """
    return replace_norms(model, report, "l2_half", "l2", torch.float16, accumulation, fuse=False)


def synchronise_norms(model: nn.Module) -> nn.Module:
    """Torch's SyncBatchNorms, which need a GPU, become this library's, which do not; in place where there are any."""
    if not any(type(module) is nn.SyncBatchNorm for module in model.modules()):
        return model
    return replace_norms(model, ChangeReport(), "sync", "l2", None, "tree", fuse=False)


def replace_norms(
    model: nn.Module,
    report: ChangeReport,
    method: str,
    norm: str,
    stats_dtype: torch.dtype | None,
    accumulation: str,
    fuse: bool,
    **options: Any,
) -> nn.Module:
    """Puts norms of the family `norm` in the place of torch's; `method` is what errors call it."""
    options = {"stats_dtype": stats_dtype, "accumulation": accumulation, **options}
    NORM_CLASSES[norm][1](1, **options)  # refuses options that there are not before anything is changed
    replaced: dict[str, tuple[ScaleBatchNorm, str]] = {}
    for path, module in list(modules_with_paths(model)):
        if not is_norm(module):
            continue
        reason = why_not_replaced(module, stats_dtype)
        if reason is not None:
            report.refuse(path, reason)
            continue
        assert isinstance(module, _BatchNorm)
        new, fresh = _from_batch_norm(module, norm, options)
        model = replace_module(model, module, new)
        replaced[path] = new, _sentence(module, new, fresh)
    if not replaced:
        found = f": {report.refused[0].name}: {report.refused[0].reason}" if report.refused else ""
        raise UnsupportedError(
            f"method {method!r} found no BatchNorm1d, 2d, 3d or SyncBatchNorm to replace in "
            f"{type(model).__name__}{found}"
        )
    fused = _fused(model, [new for new, _ in replaced.values()]) if fuse and stats_dtype is None else {}
    for path, (new, sentence) in replaced.items():
        report.change(path, f"{sentence}; {fused[new]}" if new in fused else sentence)
    return model


def _fused(model: nn.Module, norms: list[ScaleBatchNorm]) -> dict[nn.Module, str]:
    """Fuses the ReLUs after `norms`; a sentence for each norm about which there is something to say."""
    reasons: dict[nn.Module, str] = {}
    for norm in norms:
        if isinstance(norm, SyncBatchNorm):
            reasons[norm] = "not fused: joined statistics have no kernel"
        elif not isinstance(norm, AbsoluteBatchNorm) or norm.kernel_k() is None:
            reasons[norm] = "not fused: there is no kernel for it"
        elif is_hooked(norm):
            reasons[norm] = "not fused: there are hooks on it, which would see the output of the ReLU instead"
    return reasons | fuse_relus(model, [norm for norm in norms if norm not in reasons])


def why_not_replaced(module: nn.Module, stats_dtype: torch.dtype | None = None) -> str | None:
    """Why a norm is not one of torch's own batch norms, or its statistics leave `stats_dtype`; None if neither."""
    kind = type(module)
    if kind in _DIMENSIONS or kind is nn.SyncBatchNorm:
        if "forward" in vars(module):
            return "its forward was replaced on the object"
        if kind is nn.SyncBatchNorm and stats_dtype is not None:
            return "is a SyncBatchNorm; the processes exchange wide statistics only"
        return _why_not_narrow(module, stats_dtype)
    if isinstance(module, ScaleBatchNorm):
        return f"is a {kind.__name__}, one of this library's already; convert the network it came from"
    if isinstance(module, _BatchNorm) and isinstance(module, LazyModuleMixin):
        return f"is a {kind.__name__} that knows no channels yet; run one batch through the model first"
    if isinstance(module, _BatchNorm):
        return f"is a {kind.__name__}, a subclass of a torch batch norm that may compute something else"
    return f"is a {kind.__name__}, not a batch norm"


def _why_not_narrow(module: nn.Module, stats_dtype: torch.dtype | None) -> str | None:
    if stats_dtype is None:
        return None
    for name in _TORCH_STATISTICS:
        buffer = module._buffers.get(name)
        if buffer is None or buffer.is_meta:
            continue
        if not bool((buffer.to(stats_dtype).isfinite() | ~buffer.isfinite()).all()):
            short = str(stats_dtype).removeprefix("torch.")
            return f"its {name} holds {float(buffer.abs().max()):.4g}, which overflows {short}"
    return None


def _from_batch_norm(old: _BatchNorm, norm: str, options: dict[str, Any]) -> tuple[ScaleBatchNorm, list[str]]:
    """The norm that takes the place of `old`, and the names of its running statistics that start afresh."""
    make: type[ScaleBatchNorm]
    if isinstance(old, nn.SyncBatchNorm):
        make, options = _SYNCHRONISED[norm], {**options, "process_group": old.process_group}
    else:
        make = NORM_CLASSES[norm][_DIMENSIONS[type(old)]]
    tracked = old.running_mean is not None
    like = next((value for value in (old.running_mean, old.weight) if value is not None), torch.empty(0))
    new = make(old.num_features, old.eps, old.momentum, old.affine, tracked, like.device, like.dtype, **options)
    new.weight, new.bias = old.weight, old.bias
    new.track_running_stats = old.track_running_stats  # may have been switched on the object
    new.num_batches_tracked = old.num_batches_tracked
    fresh = []
    for name in running_statistics(new) or {}:
        buffer, start = old._buffers.get(name), new._buffers[name]
        if buffer is None or start is None:
            fresh.append(name)
        else:
            new._buffers[name] = buffer.to(start.dtype)  # the same object in wide statistics
    inherit(old, new)
    return new, fresh


def _sentence(old: nn.Module, new: ScaleBatchNorm, fresh: list[str]) -> str:
    text = f"{type(old).__name__} became {type(new).__name__}"
    if not fresh:
        return text
    stays = "; it is in evaluation mode, so recompute it before use" if not new.training else ""
    return f"{text} and {' and '.join(fresh)} starts at 1{stays}"


def _narrow(stats_dtype: str | torch.dtype | None) -> torch.dtype | None:
    if not isinstance(stats_dtype, str):
        return stats_dtype
    if stats_dtype not in _NARROW:
        hint = nearest_hint(stats_dtype, _NARROW)
        raise ConfigError(f"stats_dtype is {stats_dtype!r}; choose one of {', '.join(_NARROW)}{hint}")
    return _NARROW[stats_dtype]
