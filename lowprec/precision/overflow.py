"""Says where an overflow began.

A skipped step tells nothing by itself: by the time the loss scale hits its floor every gradient is NaN. The order in
which gradients arrive in the backward costs nothing and names the parameter nearest the loss that is not finite. For
the forward, a skipped step runs it once more, on the same inputs and random numbers with every module watched: the
first module to *finish* with a non-finite output is the innermost one that made it. Steps that land pay nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lowprec.norm.sync import SyncBatchNorm
from lowprec.precision.arithmetic import tensors_in
from lowprec.precision.hooks import device_of
from lowprec.precision.masters import master_of

_SYNCHRONISED = (SyncBatchNorm, nn.SyncBatchNorm)


class OverflowWatch:
    """Collects, during one step, what is needed to name the origin of an overflow.

    Args:
        model: the prepared root module.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        # The last calls only: a loop that never steps must not fill the memory.
        self._calls: deque[tuple[tuple[Any, ...], dict[str, Any], list[Tensor]]] = deque(maxlen=32)
        self._arrived: list[str] = []
        self._loss: Tensor | None = None

    def reset(self) -> None:
        """Forgets the step."""
        self._calls.clear()
        self._arrived.clear()
        self._loss = None

    @contextmanager
    def forward(self) -> Iterator[None]:
        """While open, notes what the model is called with."""
        handle = self._model.register_forward_pre_hook(self._note_call, with_kwargs=True, prepend=True)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def backward(self, loss: Tensor, arrived: Callable[[str], None]) -> Iterator[None]:
        """While open, notes the order in which gradients arrive, and calls `arrived` with each name."""
        self._arrived.clear()
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()
        with ExitStack() as stack:
            for name, param in self._model.named_parameters():
                if param.requires_grad:
                    stack.callback(self._on_arrival(param, name, arrived).remove)
            yield

    def explain(self, scale: float) -> str:
        """One phrase that names where the overflow of this step began; to be called before gradients are dropped."""
        if origin := self._origin_in_forward():
            return origin
        if self._loss is not None and not bool(torch.isfinite(self._loss).all()):
            return f"the loss, which is {float(self._loss):g} before scaling, while every layer's output is finite"
        params = dict(self._model.named_parameters())
        return self.gradient_phrase(next((name for name in self._arrived if _overflowed(params[name])), None), scale)

    def order(self) -> list[str]:
        """Names of the parameters in the order in which their gradients arrived."""
        return list(self._arrived)

    def gradient_phrase(self, name: str | None, scale: float) -> str:
        """What is said of the parameter whose gradient is the nearest to the loss that is not finite."""
        if name is None:
            return f"a gradient that no parameter of the model owns, at scale {scale:g}"
        kind = type(self._model.get_submodule(name.rpartition(".")[0])).__name__
        return f"the gradient of {name!r} ({kind}), the nearest to the loss not finite, at scale {scale:g}"

    @torch.no_grad()
    def _origin_in_forward(self) -> str | None:
        """Where values first left the range when the calls of this step are repeated."""
        if (
            any(isinstance(module, (SyncBatchNorm, nn.SyncBatchNorm)) for module in self._model.modules())
            and _in_company()
        ):
            return None  # the other processes do not come along
        found: list[str] = []
        device = device_of(self._model)
        with ExitStack() as stack, torch.random.fork_rng([device] if device.type == "cuda" else []):
            stack.callback(self._model.register_forward_pre_hook(_input_check(found), with_kwargs=True).remove)
            for name, module in self._model.named_modules():
                stack.callback(module.register_forward_hook(_output_check(name, found)).remove)
            for args, kwargs, state in self._calls:
                _set_random_state(state, device)
                self._model(*args, **kwargs)
        return found[0] if found else None

    def _note_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            self._calls.append((args, kwargs, _random_state(device_of(module))))

    def _on_arrival(self, param: Tensor, name: str, arrived: Callable[[str], None]) -> RemovableHandle:
        def arrive(param: Tensor) -> None:
            self._arrived.append(name)
            arrived(name)

        handle: RemovableHandle = param.register_post_accumulate_grad_hook(arrive)  # type: ignore[no-untyped-call]
        return handle


def _input_check(found: list[str]) -> Any:
    def check(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not found and not _finite((args, kwargs)):
            found.append("the model's input as it enters the first layer")

    return check


def _output_check(name: str, found: list[str]) -> Any:
    def check(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not found and not _finite(output):
            what = f"the output of {name!r}" if name else "the model's output"
            found.append(f"{what} ({type(module).__name__}) in the forward")

    return check


def _overflowed(param: Tensor) -> bool:
    grad = master_of(param).grad
    return grad is not None and not bool(torch.isfinite(grad).all())


def _finite(tree: Any) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors_in(tree) if tensor.is_floating_point())


def _random_state(device: torch.device) -> list[Tensor]:
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_random_state(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


def _in_company() -> bool:
    available = torch.distributed.is_available() and torch.distributed.is_initialized()
    return available and torch.distributed.get_world_size() > 1
