"""Batches in, arguments of the model out; and what is changed on a network while data passes through it.

Everything temporary (modes, hooks, the way out of a forward) ends with the block that began it, so an interrupted pass
leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lowprec.errors import DataError

Progress = Callable[[int, int], None]


def arguments_of(batch: Any) -> tuple[Tensor, ...]:
    """The positional arguments that a batch stands for.

    A tensor is the one input. A tuple or list is all inputs, except that a pair whose second part is a 1-D tensor of
    integers, one per sample, is `(input, labels)` as a DataLoader makes it: the labels are dropped.
    """
    if isinstance(batch, Tensor):
        return (batch,)
    if not isinstance(batch, (tuple, list)) or not batch or not all(isinstance(part, Tensor) for part in batch):
        raise DataError(f"a batch must be a tensor or a tuple of tensors, not {_described(batch)}")
    if len(batch) == 2 and _looks_like_labels(batch[0], batch[1]):
        return (batch[0],)
    return tuple(batch)


def checked_batches(batches: Iterable[Any], model: nn.Module) -> Iterator[tuple[Tensor, ...]]:
    """The arguments of every batch, on the model's device; raises `DataError` for what is empty or not finite."""
    device = next((value.device for value in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    empty = True
    for index, batch in enumerate(batches):
        empty = False
        args = tuple(value.to(device) for value in arguments_of(batch))
        for position, value in enumerate(args):
            if value.numel() == 0:
                raise DataError(f"batch {index} is empty: input {position} has shape {tuple(value.shape)}")
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise DataError(
                    f"batch {index}: input {position} holds values that are not finite; clean the data first"
                )
        yield args
    if empty:
        raise DataError("there are no batches; at least one is needed")


def batch_total(batches: Iterable[Any]) -> int:
    """How many batches there are where they say so, else 0: unknown."""
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        return 0


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """All of `model` in evaluation mode and no gradients; every module's own flag comes back."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, flag in flags.items():
            module.training = flag


class _ReachedError(BaseException):
    """Leaves a forward once the layer that was waited for has its input; never seen outside `run_until`.

    Not an `Exception`, so that a network's own `except Exception` does not swallow it.
    """


def run_until(model: nn.Module, args: tuple[Tensor, ...], layer: nn.Module, take: Callable[[Tensor], None]) -> bool:
    """Runs `model` until `layer` is about to run, hands its input to `take`, and stops. False if it never ran."""

    def stop(_: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        take(next(value for value in (*inputs, *named.values()) if isinstance(value, Tensor)))
        raise _ReachedError

    handle = layer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(*args)
    except _ReachedError:
        return True
    finally:
        handle.remove()
    return False


def _looks_like_labels(first: Tensor, second: Tensor) -> bool:
    integers = not (second.is_floating_point() or second.is_complex())
    return integers and second.dim() == 1 and first.dim() >= 1 and len(second) == len(first)


def _described(batch: Any) -> str:
    if isinstance(batch, (tuple, list)):
        return f"a {type(batch).__name__} of ({', '.join(type(part).__name__ for part in batch)})"
    return f"a {type(batch).__name__}"
