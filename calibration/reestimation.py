"""Exact running statistics: what one batch of the whole data set would have left, at constant memory.

An average of the batches' own statistics is something else: with every norm still in training mode each batch is
normalised by itself, the variances of small batches are averaged, and the shift between batches is lost. Here the norms
are taken in the order in which they run; each sees inputs that all earlier norms have produced from their own pooled
statistics, and its moments are pooled in float64. The price is one pass over the data per norm (two for norms
whose scale needs the mean first), each stopped as soon as the norm is reached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lowprec.calibration.batches import Progress, checked_batches, evaluating, run_until
from lowprec.errors import DataError, UnsupportedError
from lowprec.functional import reduced_axes
from lowprec.norm import AbsoluteBatchNorm, ScaleBatchNorm, is_norm, running_statistics
from lowprec.report import ChangeReport
from lowprec.statistics import BatchStatistics, merge, overwrite_statistics


def recompute_batch_stats(
    model: nn.Module, batches: Iterable[Any], progress: Progress | None = None
) -> tuple[nn.Module, ChangeReport]:
    """Running statistics as one training forward over all the data at once would leave them at momentum 1.

    Dropout and all else stay in evaluation mode. While a later norm is measured, earlier ones normalise as in training,
    by the biased variance (n); the unbiased one (n - 1), which torch stores, is put in place at the end.
    For torch's batch norms: running_mean = mean, running_var = the unbiased variance; for this library's norms
    running_scale = the scale about the pooled mean. Moments accumulate in float64 (Chan's merge) and are rounded once
    to the buffers. `num_batches_tracked` and the training flags stay.

    Args:
        model: stays as it is.
        batches: tensors, or tuples of the model's inputs, or `(input, labels)`; gone through several times, so a list
            or a DataLoader (without shuffling and random augmentation, which would differ between passes).
        progress: called with norms done and norms in all.

    Returns:
        a copy of the model, and a report with a row per norm.

    Raises:
        DataError: the batches can be read only once, are empty, differ between passes, or give non-finite moments.
        UnsupportedError: there is no norm to re-estimate.
    """
    if iter(batches) is batches:
        raise DataError(
            "the batches can be read only once, but every norm needs a pass of its own; give a list or a DataLoader"
        )
    copy, report = deepcopy(model), ChangeReport()
    paths = {module: path or "(model)" for path, module in copy.named_modules()}
    with evaluating(copy):
        order = _norms_in_order(copy, batches, paths, report)
        estimates: dict[nn.Module, BatchStatistics] = {}
        for index, norm in enumerate(order):
            estimate = estimates[norm] = _pooled_statistics(copy, norm, batches, paths[norm])
            report.change(paths[norm], f"{estimate.count} elements per channel; {_drift(norm, estimate)}")
            overwrite_statistics(norm, _as_in_training(estimate))
            if progress is not None:
                progress(index + 1, len(order))
        for norm, estimate in estimates.items():
            overwrite_statistics(norm, estimate)
    report.facts["norms"] = len(order)
    return copy, report


def _norms_in_order(
    model: nn.Module, batches: Iterable[Any], paths: dict[nn.Module, str], report: ChangeReport
) -> list[nn.Module]:
    """The norms that can be re-estimated, in order of their first call; refuses the others."""
    candidates = [norm for norm in model.modules() if is_norm(norm) and _estimable(norm, paths[norm], report)]
    if not candidates:
        found = f" ({report.refused[0].name}: {report.refused[0].reason})" if report.refused else ""
        raise UnsupportedError(f"{type(model).__name__} has no batch norm with running statistics to recompute{found}")
    calls: list[nn.Module] = []
    handles = [norm.register_forward_pre_hook(lambda module, _: calls.append(module)) for norm in candidates]
    try:
        model(*next(checked_batches(batches, model)))
    finally:
        for handle in handles:
            handle.remove()
    for norm in candidates:
        if calls.count(norm) > 1:
            report.refuse(
                paths[norm], f"runs {calls.count(norm)} times in one forward, so no one batch has its statistics"
            )
        elif norm not in calls:
            report.refuse(paths[norm], "does not run in a forward of the model")
    return [norm for norm in calls if calls.count(norm) == 1]


def _estimable(norm: nn.Module, path: str, report: ChangeReport) -> bool:
    if isinstance(norm, (_BatchNorm, ScaleBatchNorm)) and running_statistics(norm) is not None:
        return True
    why = "keeps no running statistics" if running_statistics(norm) is None else "normalises single samples"
    report.refuse(path, f"is a {type(norm).__name__} that {why}")
    return False


def _pooled_statistics(model: nn.Module, norm: nn.Module, batches: Iterable[Any], path: str) -> BatchStatistics:
    moments: list[BatchStatistics] = []

    def add_moments(x_NCX: Tensor) -> None:
        part = _moments(x_NCX)
        moments[:] = [merge({"mean": "mean", "variance": "variance"}, [*moments, part])]

    _pass(model, norm, batches, add_moments)
    count, mean_C = moments[0].count, moments[0].values["mean"]
    found = {"mean": mean_C, "variance": moments[0].values["variance"]}
    if isinstance(norm, AbsoluteBatchNorm):
        estimator, seen = norm.scale_estimator(mean_C), [0]

        def add_deviations(x_NCX: Tensor) -> None:
            estimator.update(x_NCX)
            seen[0] += x_NCX.numel() // x_NCX.shape[1]

        _pass(model, norm, batches, add_deviations)
        if seen[0] != count:
            raise DataError(
                f"{path}: one pass gave {count} elements per channel and the next {seen[0]}; fix the batches"
            )
        found["scale"] = estimator.scale()
    if count < 2:
        raise DataError(f"{path}: one element per channel has no spread; give more samples")
    values = {name: found[kind] for name, kind in (running_statistics(norm) or {}).items()}
    if not all(bool(torch.isfinite(value).all()) for value in values.values()):
        raise DataError(f"{path}: its input is not finite, so it has no statistics; the network overflows before it")
    return BatchStatistics(count, values)


def _drift(norm: nn.Module, estimate: BatchStatistics) -> str:
    """How far the running statistics were from the exact ones, the mean in multiples of the channel's own spread."""
    (mean_name, mean_C), *spreads = estimate.values.items()
    old_mean_C = getattr(norm, mean_name).double()
    if not spreads:
        return f"the running mean was off by up to {float((old_mean_C - mean_C).abs().max()):.3g}"
    spread_name, spread_C = spreads[0]
    old_spread_C = getattr(norm, spread_name).double()
    power = 0.5 if spread_name == "running_var" else 1.0
    tiny = torch.finfo(torch.float64).tiny  # a constant channel has no spread to measure by
    off = float(((old_mean_C - mean_C).abs() / spread_C.clamp_min(tiny) ** power).max())
    ratio_C = (old_spread_C.clamp_min(tiny) / spread_C.clamp_min(tiny)) ** power
    return (
        f"the running mean was off by up to {off:.3g} spreads, "
        f"the running spread by a factor of {float(ratio_C.min()):.3g} to {float(ratio_C.max()):.3g}"
    )


def _as_in_training(unbiased: BatchStatistics) -> BatchStatistics:
    """The same statistics with the variance that a forward in training divides by: M2 / n instead of M2 / (n - 1)."""
    biased = (unbiased.count - 1) / unbiased.count
    values = {name: value * biased if name == "running_var" else value for name, value in unbiased.values.items()}
    return BatchStatistics(unbiased.count, values)


def _moments(x_NCX: Tensor) -> BatchStatistics:
    """Mean and unbiased variance of one batch in float64, two-pass; the variance of a single element counts as 0."""
    wide_NCX = x_NCX.double()
    count = x_NCX.numel() // x_NCX.shape[1]
    variance_C, mean_C = torch.var_mean(wide_NCX, reduced_axes(x_NCX), correction=0)
    return BatchStatistics(count, {"mean": mean_C, "variance": variance_C * (count / max(count - 1, 1))})


def _pass(model: nn.Module, norm: nn.Module, batches: Iterable[Any], take: Callable[[Tensor], None]) -> None:
    for args in checked_batches(batches, model):
        if not run_until(model, args, norm, take):
            raise DataError("a norm that ran on the first batch does not run on another; fix the batches or the model")
