"""Says where an overflow began.

A skipped step tells nothing by itself: by the time the loss scale hits its floor every gradient is NaN. Two things are
cheap enough to watch. The order in which gradients arrive in the backward names the parameter nearest the loss that is
not finite. Forward outputs cost a reduction each, so they are watched only when the last step overflowed or the next
overflow would be the last: then the first module to *finish* with a non-finite output is the innermost one that made
it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lowprec.precision.arithmetic import tensors_in
from lowprec.precision.masters import master_of


class OverflowWatch:
    """Collects, during one step, what is needed to name the origin of an overflow.

    Args:
        model: the prepared root module.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._arrived: list[str] = []
        self._loss: Tensor | None = None
        self._forward_origin: str | None = None

    def reset(self) -> None:
        """Forgets the step."""
        self._arrived.clear()
        self._loss = None
        self._forward_origin = None

    @contextmanager
    def forward(self, armed: bool) -> Iterator[None]:
        """While open and `armed`, records the first module whose output is not finite."""
        with ExitStack() as stack:
            if armed:
                for name, module in self._model.named_modules():
                    if name == "":
                        stack.callback(module.register_forward_pre_hook(self._check_input, with_kwargs=True).remove)
                    stack.callback(module.register_forward_hook(self._output_check(name)).remove)
            yield

    @contextmanager
    def backward(self, loss: Tensor) -> Iterator[None]:
        """While open, moves each gradient of a half parameter to its master as it arrives, and notes the order.

        Moving at once means that a half gradient lives only until its parameter is done.
        """
        self._arrived.clear()
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()
        with ExitStack() as stack:
            for name, param in self._model.named_parameters():
                if param.requires_grad:
                    stack.callback(self._on_arrival(param, name).remove)
            yield

    def explain(self, scale: float) -> str:
        """One phrase that names where the overflow of this step began; to be called before gradients are dropped."""
        if self._forward_origin is not None:
            return f"{self._forward_origin} (in the forward)"
        if self._loss is not None and not bool(torch.isfinite(self._loss).all()):
            return f"the loss, which is {float(self._loss):g} before scaling (all layer outputs finite or not watched)"
        params = dict(self._model.named_parameters())
        for name in self._arrived:
            grad = master_of(params[name]).grad
            if grad is not None and not bool(torch.isfinite(grad).all()):
                return f"the gradient of {name!r}, the nearest to the loss that is not finite, at scale {scale:g}"
        return f"a gradient that no parameter of the model owns, at scale {scale:g}"

    def _check_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._forward_origin is None and not _finite((args, kwargs)):
            self._forward_origin = "the model's input as it enters the first layer"

    def _output_check(self, name: str) -> Any:
        def check(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if self._forward_origin is None and not _finite(output):
                self._forward_origin = f"the output of {name!r}" if name else "the model's output"

        return check

    def _on_arrival(self, param: Tensor, name: str) -> RemovableHandle:
        def arrive(param: Tensor) -> None:
            self._arrived.append(name)
            master = master_of(param)
            if master is not param and param.grad is not None:
                grad = param.grad.to(master.dtype)
                master.grad = grad if master.grad is None else master.grad.add_(grad)
                param.grad = None

        handle: RemovableHandle = param.register_post_accumulate_grad_hook(arrive)  # type: ignore[no-untyped-call]
        return handle


@torch.no_grad()  # isfinite is made of differentiable parts, which a checkpoint would count among what it saved
def _finite(tree: Any) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors_in(tree) if tensor.is_floating_point())
