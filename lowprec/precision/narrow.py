"""Makes a model half and its optimizer work in float32, in place.

In place because scripts hold references: to the model, to its layers, to parameters, to the optimizer and the
schedulers around it. `Parameter.data` is exchanged, so tied weights stay tied and parametrised weights parametrised;
the optimizer keeps its identity, groups and state and only sees other tensors in `params`. Everything that can be
refused is refused before the first change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.optim import Optimizer

from lowprec.errors import UnsupportedError
from lowprec.norm import is_norm
from lowprec.precision.masters import make_master


def narrow_(
    model: nn.Module,
    optimizer: Optimizer,
    half: torch.dtype,
    before: Callable[[dict[str, nn.Parameter]], None] | None = None,
) -> dict[str, nn.Parameter]:
    """Casts `model` to `half` except what stays wide.

    Wide, in float32 at least: parameters and buffers of norm layers, those a module names in `wide_parameters`, and
    buffers with values that the half type cannot hold (the -1e9 of an attention mask).

    Args:
        model: cast in place.
        optimizer: made from its parameters.
        half: the half type.
        before: called with what is returned, while the values are still wide and nothing can fail any more.

    Returns:
        the half parameters that the optimizer moves, by name; those that are not the model's are `optimizer.<n>`.

    Raises:
        UnsupportedError: a parameter is uninitialised or does not fit in the half type; nothing was changed.
    """
    wide = wide_tensors(model)
    for name, param in model.named_parameters():
        if isinstance(param, UninitializedParameter):
            raise UnsupportedError(f"parameter {name!r} has no shape yet; run one batch before prepare")
        if param.is_floating_point() and id(param) not in wide and not fits(param, half):
            raise UnsupportedError(
                f"parameter {name!r} holds {float(param.detach().abs().max()):.4g}, which overflows {_short(half)}; "
                "rescale it or list it in the module's wide_parameters"
            )
    names = {id(param): name for name, param in model.named_parameters()}
    owned = [param for group in optimizer.param_groups for param in group["params"]]
    moved: dict[str, nn.Parameter] = {}
    for index, param in enumerate(owned):
        becomes_half = id(param) in names and param.is_floating_point()
        is_half = param.dtype in (torch.float16, torch.bfloat16)
        if (becomes_half or is_half) and id(param) not in wide:
            moved[names.get(id(param), f"optimizer.{index}")] = param
    if before is not None:
        before(moved)
    for param in model.parameters():
        _cast_parameter(param, _target(param, id(param) in wide, half))
    _cast_buffers(model, wide, half)
    return moved


def wide_tensors(model: nn.Module) -> set[int]:
    """Ids of the parameters and buffers that stay float32: those of norms and of `wide_parameters`."""
    wide: set[int] = set()
    for module in model.modules():
        own = {**module._parameters, **module._buffers}
        kept = own if is_norm(module) else [name for name in getattr(module, "wide_parameters", ()) if name in own]
        wide.update(id(tensor) for name in kept if (tensor := own[name]) is not None)
    return wide


@torch.no_grad()
def fits(tensor: Tensor, half: torch.dtype) -> bool:
    """Whether every finite value of `tensor` is finite in `half`."""
    return bool((tensor.to(half).isfinite() | ~tensor.isfinite()).all())


def _target(tensor: Tensor, is_wide: bool, half: torch.dtype) -> torch.dtype:
    if not tensor.is_floating_point():
        return tensor.dtype
    return torch.promote_types(tensor.dtype, torch.float32) if is_wide else half


def _cast_parameter(param: nn.Parameter, dtype: torch.dtype) -> None:
    if param.dtype != dtype:
        param.grad = None
        param.data = param.data.to(dtype)


def _cast_buffers(model: nn.Module, wide: set[int], half: torch.dtype) -> None:
    done: dict[int, tuple[Tensor, Tensor]] = {}  # buffers shared between modules stay shared
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is None or isinstance(buffer, UninitializedBuffer) or not buffer.is_floating_point():
                continue
            if id(buffer) not in done:
                is_wide = id(buffer) in wide or not fits(buffer, half)
                done[id(buffer)] = (buffer, buffer.to(_target(buffer, is_wide, half)))
            module._buffers[name] = done[id(buffer)][1]


def swap_in_masters(optimizer: Optimizer, with_master: dict[str, nn.Parameter]) -> None:
    """Replaces parameters by new masters in groups and state; state that was half becomes float32."""
    exchange(optimizer, {id(param): make_master(param) for param in with_master.values()})
    widen_state(optimizer)


def exchange(optimizer: Optimizer, others: Mapping[int, nn.Parameter]) -> None:
    """Puts other parameters into the groups and the state of an optimizer, by the id of what they stand for."""
    for group in optimizer.param_groups:
        group["params"][:] = [others.get(id(param), param) for param in group["params"]]
    for param in list(optimizer.state):
        optimizer.state[others.get(id(param), param)] = optimizer.state.pop(param)


def widen_state(optimizer: Optimizer) -> None:
    """State that is half becomes float32."""
    for param, state in optimizer.state.items():
        optimizer.state[param] = {key: _wide_state(value) for key, value in state.items()}


def _wide_state(value: object) -> object:
    if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
        return value.float()
    return value


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
