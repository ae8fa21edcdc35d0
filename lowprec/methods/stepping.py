"""What methods that act around an optimizer step share: which weights they act on, and how many steps have landed.

The count of steps lives in the optimizer's `state_dict`, put in and taken out by torch's own hooks: a run that is
resumed goes on in its record where it was, with no file of its own and without touching the optimizer's live state
(Adam takes an empty state as the sign of a first step).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from lowprec.errors import ConfigError, UnsupportedError
from lowprec.methods.channel_norms import channel_norms, scale_channels
from lowprec.methods.rewrite import modules_at
from lowprec.parametrize import weight_layout
from lowprec.precision.masters import master_of


@dataclass(frozen=True, eq=False)
class Layer:
    """One weight that a step method acts on.

    Args:
        name: the parameter's name.
        module: the conv or linear layer.
    """

    name: str
    module: nn.Module

    @property
    def weight(self) -> Tensor:
        """What the optimizer moves: the float32 master where there is one by now, else the parameter."""
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return master_of(weight)

    @property
    def parameters(self) -> list[Tensor]:
        """The module's own parameters, and their masters."""
        own = list(self.module.parameters(recurse=False))
        return [*own, *(master_of(param) for param in own)]

    def norms(self, weight: Tensor) -> Tensor:
        """(C,) norms of a tensor with this weight's layout."""
        return channel_norms(weight, *weight_layout(self.module))

    def scaled(self, weight: Tensor, factor_C: Tensor) -> Tensor:
        """A tensor with this weight's layout, its channels multiplied by `factor_C`."""
        return scale_channels(weight, factor_C, *weight_layout(self.module))


def layers_of(model: nn.Module) -> list[Layer]:
    """Every conv and linear layer with a weight of its own, once; a tied weight counts where it comes first.

    Parametrised weights are left out: their norm is what the parametrisation says.
    """
    layers: dict[int, Layer] = {}
    for path, module in model.named_modules():
        if not isinstance(module, (nn.Linear, _ConvNd)) or parametrize.is_parametrized(module, "weight"):
            continue
        if not isinstance(module.weight, nn.UninitializedParameter):
            layers.setdefault(id(module.weight), Layer(f"{path}.weight" if path else "weight", module))
    return list(layers.values())


def modules_skipped(model: nn.Module, skip: Sequence[str] | None) -> set[nn.Module]:
    """The modules at and below the paths in `skip`; for None the conv or linear layer that is registered last.

    The last layer is the classifier as a rule; no norm follows it, so its norm means something.
    """
    if skip is None:
        return set([module for module in model.modules() if isinstance(module, (nn.Linear, _ConvNd))][-1:])
    return modules_at(model, skip, "skip")


def split_layers(model: nn.Module, skip: Sequence[str] | None) -> tuple[list[Layer], list[Layer]]:
    """`(acted on, left out)` by `skip`; a weight that is left out somewhere is left out everywhere."""
    skipped = modules_skipped(model, skip)
    weights = [module.weight for module in skipped if isinstance(module, (nn.Linear, _ConvNd))]
    acted_on: list[Layer] = []
    left_out: list[Layer] = []
    for layer in layers_of(model):
        is_skipped = any(weight is layer.module.weight for weight in weights)
        (left_out if is_skipped else acted_on).append(layer)
    return acted_on, left_out


def held_by(optimizer: torch.optim.Optimizer, layers: Sequence[Layer], what: str) -> list[Layer]:
    """Those of `layers` whose weights the optimizer moves.

    Raises:
        UnsupportedError: there are no layers.
        ConfigError: the optimizer holds none of them.
    """
    if not layers:
        raise UnsupportedError(f"{what} found no conv or linear layer to act on; see its option skip")
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    owned = [layer for layer in layers if id(layer.module.weight) in held or id(layer.weight) in held]
    if not owned:
        raise ConfigError(
            f"{what}: the optimizer holds none of the {len(layers)} weights to act on; "
            "make it from the parameters of this model"
        )
    return owned


class StepCount:
    """Landed steps of an optimizer, kept in its `state_dict` under `key`.

    Args:
        optimizer: the optimizer; a skipped step does not call it, so every call of its `step` counts.
        key: the name of the entry, beside the state of the first parameter.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, key: str) -> None:
        self.value = 0
        self._key = key
        self._handles = [
            optimizer.register_state_dict_post_hook(self._store),
            optimizer.register_load_state_dict_pre_hook(self._take),
        ]

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _store(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        if not self.value:
            return state_dict
        first = {**state_dict["state"].get(0, {}), self._key: self.value}
        return {**state_dict, "state": {**state_dict["state"], 0: first}}

    def _take(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        first = dict(state_dict["state"].get(0, {}))
        self.value = int(first.pop(self._key, self.value))
        rest = {index: state for index, state in state_dict["state"].items() if index != 0}
        return {**state_dict, "state": {0: first, **rest} if first else rest}


def around_step(
    optimizer: torch.optim.Optimizer, before: Callable[[], None], after: Callable[[], None]
) -> list[Callable[[], None]]:
    """Calls `before` and `after` around every step, without gradients; returns what takes the hooks off."""

    def quietly(act: Callable[[], None]) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            with torch.no_grad():
                act()

        return hook

    pre = optimizer.register_step_pre_hook(quietly(before))
    post = optimizer.register_step_post_hook(quietly(after))
    return [pre.remove, post.remove]
