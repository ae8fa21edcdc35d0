"""Running statistics: how batches merge, the one function that writes them, and how they wait for an optimizer step.

Torch's norms write their buffers during forward, so a step that is skipped because its gradients overflowed has already
moved them, and a step of k micro-batches moves them k times. `HeldStatistics` keeps torch's own forward (no copied
batch-norm code, subclasses included): while it is active a norm writes into scratch buffers with momentum 1, which is
exactly the statistics of that batch, and the real buffers are written once, if the step lands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

Kind = Literal["mean", "variance", "scale"]

_BATCH_NORM: Mapping[str, Kind] = {"running_mean": "mean", "running_var": "variance"}
# Instance norm averages the variances of single samples; those of two batches merge as averages too.
_INSTANCE_NORM: Mapping[str, Kind] = {"running_mean": "mean", "running_var": "scale"}


def running_statistics(module: nn.Module) -> Mapping[str, Kind] | None:
    """Which buffers of `module` are running statistics and how they merge; None when it keeps none.

    A norm of this library, or of a user, says so in a class attribute `running_kinds`.
    """
    if isinstance(module, _InstanceNorm):
        kinds: Mapping[str, Kind] | None = _INSTANCE_NORM
    elif isinstance(module, _BatchNorm):
        kinds = _BATCH_NORM
    else:
        kinds = getattr(type(module), "running_kinds", None)
    if not kinds or any(getattr(module, name, None) is None for name in kinds):
        return None
    return kinds


@dataclass(frozen=True, eq=False)
class BatchStatistics:
    """What one batch leaves in the running buffers at momentum 1.

    Args:
        count: elements reduced per channel, n; a 0-d tensor where other processes had a part in it.
        values: (C,) per buffer name; a variance is the unbiased one (n - 1), as torch stores it.
    """

    count: int | Tensor
    values: dict[str, Tensor]


def merge(kinds: Mapping[str, Kind], parts: Sequence[BatchStatistics]) -> BatchStatistics:
    """The statistics of the union of several batches.

    mean: sum n_i m_i / n. variance: (sum (n_i - 1) v_i + sum n_i (m_i - m)^2) / (n - 1), Chan, Golub and LeVeque 1983;
    unbiased in and out, and exact, unlike E[x^2] - E[x]^2, which cancels. scale: sum n_i S_i / n, an average: the mean
    absolute deviation about the common mean is not determined by those about the parts' own.

    Computed in float64. One part comes back as it is.
    """
    if len(parts) == 1:
        return parts[0]
    counts = [int(part.count) for part in parts]
    count = sum(counts)
    share = [n / count for n in counts]
    means = {name: _weighted(parts, name, share) for name, kind in kinds.items() if kind == "mean"}
    values = {}
    for name, kind in kinds.items():
        if kind == "variance":
            values[name] = _pooled_variance(parts, name, means, count)
        else:
            values[name] = means[name] if kind == "mean" else _weighted(parts, name, share)
    return BatchStatistics(count, values)


def _weighted(parts: Sequence[BatchStatistics], name: str, share: Sequence[float]) -> Tensor:
    return torch.stack([part.values[name].double() * w for part, w in zip(parts, share, strict=True)]).sum(0)


def _pooled_variance(parts: Sequence[BatchStatistics], name: str, means: Mapping[str, Tensor], count: int) -> Tensor:
    (mean_name, mean_C), *_ = means.items()
    m2_C = torch.zeros_like(mean_C)
    for part in parts:
        if part.count > 1:  # the variance of one element is undefined, its contribution is nothing
            m2_C = m2_C + part.values[name].double() * (part.count - 1)
        m2_C = m2_C + (part.values[mean_name].double() - mean_C).square() * part.count
    return m2_C / max(count - 1, 1)


@torch.no_grad()
def write_statistics(module: nn.Module, batch: BatchStatistics, landed: bool | Tensor = True) -> None:
    """Moves the running buffers of `module` towards one batch: the only place where running buffers are written.

    buffer <- (1 - f) * buffer + f * value, f = momentum, or 1 / (batches so far + 1) for momentum None (a plain
    average), as torch has it. `num_batches_tracked` grows by one. Computed in float64, float32 into float32 in one
    float32 `lerp`; with every step rounded to the module's `stats_dtype` where it has
    one.

    Args:
        module: a module for which `running_statistics` is not None.
        batch: its statistics.
        landed: whether to move at all; a 0-d bool tensor is applied by `torch.where`, without a synchronisation.
    """
    if landed is False:
        return
    factor = _averaging_factor(module)
    narrow = getattr(module, "stats_dtype", None)
    for name, value in batch.values.items():
        buffer = getattr(module, name)
        plain = narrow is None and buffer.dtype == value.dtype == torch.float32 and buffer.device == value.device
        # At a factor of 1 an infinite value would come out of a lerp as NaN.
        if plain and isinstance(factor, float) and factor < 1:
            moved = torch.lerp(buffer, value, factor)
        else:
            dtype = narrow or torch.float64
            moved = ((1 - factor) * buffer.to(dtype) + factor * value.to(buffer.device, dtype)).to(buffer.dtype)
        buffer.copy_(moved if landed is True else torch.where(landed.to(buffer.device), moved, buffer))
    tracked = getattr(module, "num_batches_tracked", None)
    if tracked is not None and not isinstance(module, _InstanceNorm):
        tracked.add_(1 if landed is True else landed.to(tracked.dtype))


def _averaging_factor(module: nn.Module) -> float | Tensor:
    """Torch's exponential average factor for the next write."""
    momentum: float | None = getattr(module, "momentum", None)
    if momentum is not None:
        return momentum
    tracked: Tensor | None = getattr(module, "num_batches_tracked", None)
    if tracked is None or isinstance(module, _InstanceNorm):
        return 0.0
    return 1 / (tracked.double() + 1)


@torch.no_grad()
def overwrite_statistics(module: nn.Module, batch: BatchStatistics) -> None:
    """Puts `batch` in place of the running buffers; `num_batches_tracked` stays."""
    for name, value in batch.values.items():
        getattr(module, name).copy_(value)


@dataclass
class _Swapped:
    """The real state of a norm whose forward currently runs on scratch buffers."""

    buffers: dict[str, Tensor]
    momentum: float | None
    count: int


class HeldStatistics:
    """Keeps the batch statistics of a model's training-mode norms until it is known whether the step lands.

    >>> held = HeldStatistics(model)                                        # doctest: +SKIP
    >>> with held.forward():                                                # doctest: +SKIP
    ...     loss = criterion(model(x), y)
    >>> held.commit(landed)                                                 # doctest: +SKIP

    Norms in evaluation mode are untouched. A module that is called twice contributes two parts, and so do two
    micro-batches. Hooks exist only inside `forward()`.

    Args:
        model: the network; modules added later are found, because it is walked at every `forward()`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parts: dict[nn.Module, list[BatchStatistics]] = {}
        self._swapped: dict[nn.Module, _Swapped] = {}

    def forward(self) -> AbstractContextManager[None]:
        """Inside, norms in training mode leave their buffers alone and their statistics are collected."""
        return self._hooked(self._collect)

    def recomputation(self) -> AbstractContextManager[None]:
        """Inside, norms in training mode leave their buffers alone and nothing is collected.

        For the backward pass: activation checkpointing runs parts of the forward again there, on the same samples.
        """
        return self._hooked(lambda module, batch: None)

    @contextmanager
    def _hooked(self, take: Callable[[nn.Module, BatchStatistics], None]) -> Iterator[None]:
        def swap_out(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            batch = self._swap_out(module)
            measured = isinstance(output, Tensor)  # not when the forward raised, nor when a norm awaits its residual
            if batch is not None and measured and int(batch.count):
                take(module, batch)

        handles = []
        try:
            for module in self._model.modules():
                if running_statistics(module) is not None:
                    handles.append(module.register_forward_pre_hook(self._swap_in, with_kwargs=True))
                    handles.append(module.register_forward_hook(swap_out, prepend=True, always_call=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def commit(self, landed: bool | Tensor = True) -> None:
        """Merges what was collected, writes each module once if the step `landed`, and forgets it."""
        for module, parts in self._parts.items():
            kinds = running_statistics(module)
            if kinds is not None:
                write_statistics(module, merge(kinds, parts), landed)
        self.discard()

    def discard(self) -> None:
        """Forgets what was collected."""
        self._parts.clear()

    def _swap_in(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kinds = running_statistics(module)
        tracking = module.training and bool(getattr(module, "track_running_stats", True))
        if kinds is None or not tracking or module in self._swapped:
            return
        names = [*kinds, *(["num_batches_tracked"] if _buffer(module, "num_batches_tracked") is not None else [])]
        real = {name: module._buffers[name] for name in names}
        self._swapped[module] = _Swapped(
            {name: buffer for name, buffer in real.items() if buffer is not None},
            getattr(module, "momentum", None),
            _reduced_count(module, next(iter(real.values())), *args, *kwargs.values()),
        )
        for name, buffer in self._swapped[module].buffers.items():
            module._buffers[name] = torch.zeros_like(buffer)
        _set_momentum(module, 1.0)

    def _collect(self, module: nn.Module, batch: BatchStatistics) -> None:
        self._parts.setdefault(module, []).append(batch)

    def _swap_out(self, module: nn.Module) -> BatchStatistics | None:
        """Puts the real buffers back and returns what the scratch ones hold."""
        swapped = self._swapped.pop(module, None)
        if swapped is None:
            return None
        scratch = {name: module._buffers[name] for name in swapped.buffers}
        module._buffers.update(swapped.buffers)
        _set_momentum(module, swapped.momentum)
        kinds = running_statistics(module) or {}
        values = {name: value for name in kinds if (value := scratch[name]) is not None}
        joined = vars(module).get("joined_count")  # of all processes, where the module says so
        return BatchStatistics(swapped.count if joined is None else joined, values)


class CopiedStatistics:
    """Keeps copies of the running buffers of training-mode norms, and puts them back when a step is skipped.

    For compiled models, whose forward cannot be watched module by module. Several forwards before one step move the
    buffers one after the other. Same calls as `HeldStatistics`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._copies: list[tuple[Tensor, Tensor]] = []

    @contextmanager
    def forward(self) -> Iterator[None]:
        """The first one before a step takes the copies."""
        if not self._copies:
            self._copies = self._taken()
        yield

    @contextmanager
    def recomputation(self) -> Iterator[None]:
        """What moves inside is put back at its end."""
        copies = self._taken()
        try:
            yield
        finally:
            _restore(copies)

    def commit(self, landed: bool | Tensor = True) -> None:
        """Forgets the copies if the step `landed`, else puts them back."""
        with torch.no_grad():
            for buffer, copy in self._copies:
                buffer.copy_(torch.where(torch.as_tensor(landed, device=buffer.device), buffer, copy))
        self._copies = []

    def discard(self) -> None:
        """Puts the copies back and forgets them."""
        _restore(self._copies)
        self._copies = []

    def _taken(self) -> list[tuple[Tensor, Tensor]]:
        norms = [module for module in self._model.modules() if running_statistics(module) is not None]
        return [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)]


@torch.no_grad()
def _restore(copies: list[tuple[Tensor, Tensor]]) -> None:
    for buffer, copy in copies:
        buffer.copy_(copy)


def _set_momentum(module: Any, momentum: float | None) -> None:
    module.momentum = momentum


def _buffer(module: nn.Module, name: str) -> Tensor | None:
    return module._buffers.get(name)


def _reduced_count(module: nn.Module, buffer: Tensor | None, x: Tensor, *_: Any) -> int:
    """Elements per channel that one forward reduces, over all processes for a synchronised norm."""
    channels = 1 if buffer is None else max(buffer.numel(), 1)
    count = x.numel() // channels
    if isinstance(module, nn.SyncBatchNorm) and torch.distributed.is_available() and torch.distributed.is_initialized():
        count *= torch.distributed.get_world_size(module.process_group)
    return count
