"""What a half model does at its own boundary: narrow inputs, half arithmetic inside, float32 outputs.

Hooks on the root module, not a wrapper around it: attributes, state_dict keys and the class stay the user's. They work
in evaluation and outside of any context, and hold no reference to masters or optimizer, so a deep copy of a prepared
model is a half model that evaluates and nothing more.

Outputs are cast to float32 because of the loss: a sum or an exponential of half outputs overflows early, and the first
gradient of a scaled loss is the scale itself, 2^16, which a half cannot hold.
"""

from __future__ import annotations

from contextlib import ExitStack
from itertools import chain
from typing import Any

import torch
from torch import nn

from lowprec.precision.arithmetic import HalfArithmetic, cast_floats, tensors_in
from lowprec.precision.masters import weights_were_loaded


class HalfHooks:
    """The hooks that `prepare` puts on the root module.

    Args:
        dtype: the half type.
        autocast: weights stay float32 and are narrowed where they are used; inputs are left alone.
    """

    def __init__(self, dtype: torch.dtype, autocast: bool) -> None:
        self.dtype = dtype
        self.autocast = autocast
        self._open: list[ExitStack] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> HalfHooks:
        # Hooks are copied as bound methods of one object: all copies of one model share one copy.
        return memo.setdefault(id(self), HalfHooks(self.dtype, self.autocast))  # type: ignore[no-any-return]

    def __getstate__(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "autocast": self.autocast, "_open": []}

    def install(self, model: nn.Module) -> None:
        """Registers the hooks on `model`; the cast of inputs comes before hooks that are there already."""
        model.register_forward_pre_hook(self.enter, with_kwargs=True, prepend=True)
        model.register_forward_hook(self.leave, always_call=True)
        model.register_load_state_dict_post_hook(self.loaded)  # type: ignore[no-untyped-call]

    def arithmetic(self, device: torch.device) -> ExitStack:
        """The arithmetic of this mode on `device`, opened; close it by leaving the returned context."""
        with ExitStack() as stack:
            if self.autocast and device.type != "cpu":
                stack.enter_context(torch.autocast(device.type, self.dtype))
            else:
                stack.enter_context(HalfArithmetic(self.autocast, self.dtype))
            return stack.pop_all()

    def enter(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook."""
        if not self.autocast:
            args, kwargs = cast_floats((args, kwargs), self.dtype)
        self._open.append(self.arithmetic(device_of(module, (args, kwargs))))
        return args, kwargs

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook, called also when the forward raised."""
        if self._open:
            self._open.pop().close()
        return cast_floats(output, torch.float32)

    def loaded(self, module: nn.Module, incompatible_keys: Any) -> None:
        """After `load_state_dict`: masters and Kahan terms follow the weights that were loaded."""
        weights_were_loaded(module.parameters())


def device_of(module: nn.Module, inputs: Any = ()) -> torch.device:
    """The device of the first parameter or buffer, else of the first input, else the CPU."""
    tensor = next(chain(module.parameters(), module.buffers(), tensors_in(inputs)), None)
    return torch.device("cpu") if tensor is None else tensor.device


def without_half_hooks(model: nn.Module) -> nn.Module:
    """Removes what `Precision.prepare` hooked onto `model` and its children, in place; weights stay as they are.

    For deep copies that are traced or evaluated in another precision.

    Returns:
        the same module.
    """
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks, module._load_state_dict_post_hooks):
            for key in [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), HalfHooks)]:
                del hooks[key]
                for flags in (
                    module._forward_pre_hooks_with_kwargs,
                    module._forward_hooks_with_kwargs,
                    module._forward_hooks_always_called,
                ):
                    flags.pop(key, None)
    return model


def has_half_hooks(model: nn.Module) -> bool:
    """Whether `model` or a child of it carries the hooks of `prepare`."""
    return any(
        isinstance(getattr(hook, "__self__", None), HalfHooks)
        for module in model.modules()
        for hook in module._forward_hooks.values()
    )
