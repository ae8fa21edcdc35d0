"""What data says about a network's tensors: the ranges of inputs, of every module's output, and of the weights.

Read by forward hooks on the network as it is, not from an exported graph: the answer is wanted by module path, before
anything is exported, and in the arithmetic that the network runs in.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from lowprec.calibration.batches import Progress, batch_total, checked_batches, evaluating
from lowprec.calibration.ranges import RangeCounter
from lowprec.calibration.record import Calibration
from lowprec.errors import DataError


def calibrate(model: nn.Module, batches: Iterable[Any], progress: Progress | None = None) -> Calibration:
    """Runs `model` in evaluation mode on the data and collects the ranges of its tensors, at constant memory.

    The model is not changed; hooks and modes are put back, also after an error. One pass, so an iterator will do.

    Args:
        model: the trained network.
        batches: tensors, or tuples of the model's inputs, or `(input, labels)`.
        progress: called with batches done and batches in all (0 when unknown).

    Raises:
        DataError: no data, or a value in the data or in an output that is not finite.
    """
    names = _argument_names(model)
    total, samples, done = batch_total(batches), 0, 0
    fingerprint = hashlib.sha256()
    inputs: dict[str, RangeCounter] = {}
    with evaluating(model), _watching(model) as outputs:
        for args in checked_batches(batches, model):
            for position, value in enumerate(args):
                _add_to(fingerprint, value)
                name = names[position] if position < len(names) else str(position)
                if value.is_floating_point():
                    inputs.setdefault(name, RangeCounter()).update(value)
            model(*args)
            _check_finite(outputs, done)
            samples += len(args[0]) if args[0].dim() else 1
            done += 1
            if progress is not None:
                progress(done, total)
        weights = {path: counter.summary() for path, counter in _weights(model)}
    data = {"sha256": fingerprint.hexdigest(), "batches": done, "samples": samples}
    return Calibration(_summaries(inputs), _summaries(outputs), weights, data)


@contextmanager
def _watching(model: nn.Module) -> Iterator[dict[str, RangeCounter]]:
    """Inside, the outputs of all modules are counted under their paths."""
    counters: dict[str, RangeCounter] = {}

    def watch(path: str) -> Any:
        def count(_: nn.Module, __: Any, output: Any) -> None:
            for value in pytree.tree_leaves(output):
                if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
                    counters.setdefault(path, RangeCounter()).update(value)

        return count

    inside = {id(part) for module in model.modules() for part in _parametrisations(module)}
    handles = [
        module.register_forward_hook(watch(path or "(model)"))
        for path, module in model.named_modules()
        if id(module) not in inside
    ]
    try:
        yield counters
    finally:
        for handle in handles:
            handle.remove()


def _parametrisations(module: nn.Module) -> Iterator[nn.Module]:
    """The modules inside a layer that compute its weight; what they make is counted as the weight."""
    if parametrize.is_parametrized(module):
        lists = module.parametrizations
        assert isinstance(lists, nn.ModuleDict)
        yield from lists.modules()


def _weights(model: nn.Module) -> Iterator[tuple[str, RangeCounter]]:
    for path, module in model.named_modules():
        if ".parametrizations." in f".{path}.":
            continue
        names = [name for name, _ in module.named_parameters(recurse=False)]
        if parametrize.is_parametrized(module):
            names += list(module.parametrizations)
        for name in names:
            value = getattr(module, name)
            if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
                counter = RangeCounter()
                counter.update(value)
                yield f"{path}.{name}" if path else name, counter


def _check_finite(outputs: dict[str, RangeCounter], batch: int) -> None:
    if not outputs:
        return
    counts = [counter.nonfinite() for counter in outputs.values()]
    flags = (torch.stack([count.to(counts[0].device) for count in counts]) > 0).tolist()  # one synchronisation
    for path, bad in zip(outputs, flags, strict=True):
        if bad:
            raise DataError(f"batch {batch}: the output of {path!r} is not finite; the network overflows on this data")


def _summaries(counters: dict[str, RangeCounter]) -> dict[str, dict[str, Any]]:
    return {name: counter.summary() for name, counter in counters.items()}


def _argument_names(model: nn.Module) -> list[str]:
    parameters = inspect.signature(model.forward).parameters.values()
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _add_to(fingerprint: Any, value: Tensor) -> None:
    flat = value.detach().cpu().contiguous()
    fingerprint.update(f"{flat.dtype} {tuple(flat.shape)}\n".encode())
    fingerprint.update(flat.reshape(-1).view(torch.uint8).numpy().tobytes())
