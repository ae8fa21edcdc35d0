"""Moments travel from norm to norm: a torch function mode that is open while a network trains.

What lies between two norms is read off the operations as they run: every tensor that a known operation makes from a
tensor with a state gets a state itself (`lowprec.norm.moment_states`). So it works for residual sums, widening
shortcuts and control flow alike, and needs no graph. An operation that is not known ends the way: the next norm
measures and predicts nothing, like the first one.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lowprec.norm.moment_states import CASTS, DROPOUTS, RELUS, Call, Carried, set_state, state_of

_KINDS: dict[str, tuple[Any, ...]] = {
    "elementwise": (
        F.relu6, F.leaky_relu, F.hardtanh, F.hardswish, F.hardsigmoid, F.gelu, F.silu, F.mish, F.elu, F.selu,
        F.celu, F.softplus, F.tanh, F.sigmoid, torch.tanh, torch.sigmoid, torch.prelu,
        torch.Tensor.tanh, torch.Tensor.sigmoid, *RELUS,
    ),
    "weighted": (F.conv1d, F.conv2d, F.conv3d, F.linear),
    "added": (torch.add, torch.Tensor.add, torch.Tensor.add_),
    "same": (
        F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d,
        F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.adaptive_max_pool2d, *CASTS, *DROPOUTS,
    ),
    "picked": (torch.Tensor.__getitem__,),
    "shuffled": (F.channel_shuffle,),
    "padded": (F.pad,),
    "joined": (torch.cat, torch.concat),
    "flattened": (torch.flatten, torch.Tensor.flatten),
}  # fmt: skip
_METHODS = {func: kind for kind, funcs in _KINDS.items() for func in funcs}


class MomentFlow(TorchFunctionMode):
    """Gives states to what known operations make of tensors that have one."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        kind = _METHODS.get(func)
        first = args[0] if args else None
        state = state_of(first[0] if kind == "joined" and first else first)
        out = func(*args, **kwargs)
        if state is None or not isinstance(out, Tensor):
            return out
        if kind is None:
            if isinstance(first, Tensor) and out is first:  # changed in place, by what is not known
                set_state(out, None)
            return out
        with _plainly(out):
            new = getattr(state, kind)(Call(func, args, kwargs, out))
        fits = new is not None and out.dim() > 1 and (isinstance(new, Carried) or new.channels == out.shape[1])
        set_state(out, new if fits else None)
        return out


def _plainly(out: Tensor) -> ExitStack:
    """Without modes and without autocast."""
    stack = ExitStack()
    stack.enter_context(torch._C.DisableTorchFunction())
    stack.enter_context(torch.autocast(out.device.type, enabled=False))
    return stack


class FlowHooks:
    """Opens a flow around the training forwards of a network."""

    def __init__(self) -> None:
        self._open: list[MomentFlow] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> FlowHooks:
        return memo.setdefault(id(self), FlowHooks())  # type: ignore[no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        return {"_open": []}

    @property
    def is_open(self) -> bool:
        """Whether a flow is open."""
        return bool(self._open)

    def install(self, model: nn.Module) -> None:
        """After hooks that are there, so that operations are seen as the network's code calls them."""
        model.register_forward_pre_hook(self.enter)
        model.register_forward_hook(self.leave, always_call=True)

    def enter(self, module: nn.Module, args: Any) -> None:
        """Opens."""
        if module.training and torch.is_grad_enabled():
            self._open.append(MomentFlow())
            self._open[-1].__enter__()  # type: ignore[no-untyped-call]

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """Closes."""
        if self._open:
            self._open.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]
