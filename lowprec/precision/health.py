"""How near each layer is to the edges of the half range: what no loss curve shows until it is too late.

Every so many steps one step is measured: the largest output, weight and gradient of each layer against the largest half
number, the shares that are zero or subnormal, and the share of weights whose update is smaller than their rounding. All
of it stays on the device until it is read, so that a measured step waits for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lowprec.formats import BF16, FP16, FloatFormat
from lowprec.norm import is_norm
from lowprec.precision.arithmetic import tensors_in
from lowprec.precision.masters import master_of

KINDS = ("output", "weight", "gradient")
LOW_HEADROOM = 2.0
"""Bits below which a layer is named as a problem: the next growth of the loss scale or the learning rate takes one."""

_ADVICE = {"running_var": " (variances are squares; use method l1, or float32 statistics)"}


@dataclass(frozen=True)
class Row:
    """One tensor of one layer in one measured step.

    Args:
        name: of the module (outputs) or of the parameter (weights and gradients).
        layer: class of the module.
        kind: one of `KINDS`; gradients are scaled, as they are in half.
        headroom_bits: log2(largest finite number / largest magnitude); inf for zeros, -inf where not finite.
        zeros: share of the values.
        subnormals: likewise, with less than full precision; zeros are not among them.
        stalled: for weights, the share whose update is below the rounding of the half weight; NaN for others.
    """

    name: str
    layer: str
    kind: str
    headroom_bits: float
    zeros: float
    subnormals: float
    stalled: float = math.nan

    def figures(self) -> dict[str, float]:
        """The numbers that are finite, by name."""
        values = {key: getattr(self, key) for key in ("headroom_bits", "zeros", "subnormals", "stalled")}
        return {key: value for key, value in values.items() if math.isfinite(value)}


class Health:
    """What one step was measured to be. Numbers are read back from the device at the first look.

    Args:
        step: how many steps were attempted before it.
        scale: the loss scale in it.
        fmt: the half format whose range counts.
    """

    def __init__(self, step: int, scale: float | Tensor, fmt: FloatFormat) -> None:
        self.step = step
        self._scale = scale
        self._fmt = fmt
        self._measured: list[tuple[str, str, str, int, Tensor]] = []
        self._statistics: list[tuple[str, str, Tensor]] = []

    def add(self, name: str, layer: str, kind: str, tensor: Tensor, stalled: Tensor | None = None) -> None:
        """Measures a tensor; empty and sparse ones are left out."""
        if not tensor.numel() or tensor.layout != torch.strided:
            return
        magnitude = tensor.detach().abs().float()
        zeros = (magnitude == 0).sum()
        small = (magnitude < self._fmt.min_normal).sum() - zeros
        nan = torch.full_like(magnitude.flatten()[0], math.nan)
        figures = (magnitude.amax(), zeros.float(), small.float(), nan if stalled is None else stalled.float())
        self._measured.append((name, layer, kind, magnitude.numel(), torch.stack(figures)))

    def add_statistics(self, model: nn.Module) -> None:
        """Looks at the running buffers of norms."""
        for name, module in model.named_modules():
            if is_norm(module):
                for key, buffer in module.named_buffers(recurse=False):
                    if buffer.is_floating_point() and buffer.numel():
                        self._statistics.append((name, key, buffer.isfinite().all()))

    @cached_property
    def scale(self) -> float:
        """The loss scale in it."""
        return float(self._scale)

    @cached_property
    def rows(self) -> list[Row]:
        """One per tensor, in the order of the forward, then of the parameters."""
        if not self._measured:
            return []
        figures = torch.stack([entry[-1].to(self._measured[0][-1].device) for entry in self._measured]).tolist()
        rows = []
        for (name, layer, kind, count, _), (largest, zeros, small, stalled) in zip(
            self._measured, figures, strict=True
        ):
            rows.append(
                Row(name, layer, kind, self._fmt.headroom_bits(largest), zeros / count, small / count, stalled / count)
            )
        return rows

    @cached_property
    def problems(self) -> list[str]:
        """A sentence for each thing that will go wrong, or has: worst first."""
        found = [
            f"{name!r} has a {key} that is not finite: its evaluation is wrong{_ADVICE.get(key, '')}"
            for name, key, finite in self._statistics
            if not bool(finite)
        ]
        near = [row for row in self.rows if row.kind != "gradient" and row.headroom_bits < LOW_HEADROOM]
        for row in sorted(near, key=lambda row: row.headroom_bits):
            found.append(f"the {row.kind} of {row.name!r} ({row.layer}) {self._how_near(row.headroom_bits)}")
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain data for one JSON line; figures that are not finite are null."""
        rows = [{key: _plain(value) for key, value in asdict(row).items()} for row in self.rows]
        return {"step": self.step, "scale": self.scale, "problems": self.problems, "layers": rows}

    def _how_near(self, bits: float) -> str:
        if bits == -math.inf:
            return "is not finite"
        return f"is {bits:.1f} bits below the largest {self._fmt.name} number"


class HealthProbe:
    """Measures steps of a model.

    Args:
        model: the prepared root module.
        half: the half type whose range counts.
        every: of so many steps one is measured; 0 for none.
    """

    def __init__(self, model: nn.Module, half: torch.dtype, every: int) -> None:
        self._model = model
        self._half = half
        self._fmt = BF16 if half == torch.bfloat16 else FP16
        self._every = every
        self._current: Health | None = None
        self._seen: set[tuple[str, str]] = set()
        self.last: Health | None = None

    @contextmanager
    def forward(self, step: int, scale: float | Tensor) -> Iterator[None]:
        """While open, outputs of modules without children are measured, if it is this step's turn."""
        if self._every and step % self._every == 0 and torch.is_grad_enabled():
            self._current = self._current or Health(step, scale, self._fmt)
        with ExitStack() as stack:
            if self._current is not None:
                for name, module in self._model.named_modules():
                    if next(module.children(), None) is None:
                        stack.callback(module.register_forward_hook(self._output(name)).remove)
            yield

    @contextmanager
    def backward(self) -> Iterator[None]:
        """While open, gradients of parameters are measured as they arrive: of the last backward before a step."""
        with ExitStack() as stack:
            if self._current is not None:
                for name, param in self._model.named_parameters():
                    if param.requires_grad:
                        handle = param.register_post_accumulate_grad_hook(self._gradient(name))  # type: ignore[no-untyped-call]
                        stack.callback(handle.remove)
            yield

    @contextmanager
    def update(self, halves: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """While open the optimizer steps, in float32; weights are measured at its end.

        Args:
            halves: parameters that are half between steps, by name.
        """
        if self._current is None:
            yield
            return
        before = {name: master_of(param).detach().clone() for name, param in halves.items()}
        yield
        for name, param in self._model.named_parameters():
            weight, stalled = master_of(param).detach(), None
            if name in before:
                old = before[name]
                stalled = ((weight != old) & (weight.to(self._half) == old.to(self._half))).sum()
            self._current.add(name, self._layer(name), "weight", weight, stalled)

    def finish(self) -> None:
        """After a step, landed or not: what was measured becomes `last`."""
        if self._current is not None:
            self._current.add_statistics(self._model)
            self.last, self._current = self._current, None
            self._seen.clear()

    def _output(self, name: str) -> Any:
        def measure(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            floats = [tensor for tensor in tensors_in(output) if tensor.is_floating_point()]
            if self._current is not None and floats and self._first(name, "output"):
                self._current.add(name, type(module).__name__, "output", floats[0])

        return measure

    def _gradient(self, name: str) -> Any:
        def measure(param: Tensor) -> None:
            if self._current is not None and param.grad is not None and self._first(name, "gradient"):
                self._current.add(name, self._layer(name), "gradient", param.grad)

        return measure

    def _first(self, name: str, kind: str) -> bool:
        """Of several calls and micro-batches the first is measured."""
        new = (name, kind) not in self._seen
        self._seen.add((name, kind))
        return new

    def _layer(self, parameter: str) -> str:
        return type(self._model.get_submodule(parameter.rpartition(".")[0])).__name__


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
