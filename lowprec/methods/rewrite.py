"""Replacing modules inside a network without losing what hangs on them.

A replacement takes over the parameters (the objects, so that ties, dtype, device and requires_grad stay), the hooks,
the training flag and the attributes a user put there; a module that occurs several times is replaced by one object.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from lowprec.errors import ConfigError
from lowprec.methods.method import nearest_hint

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def modules_with_paths(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module object once, with all its paths joined by " = "; the root is called `(model)`."""
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path or "(model)")
    for module, names in paths.items():
        yield " = ".join(names), module


def modules_at(model: nn.Module, paths: Sequence[str], option: str) -> set[nn.Module]:
    """The modules at `paths` and all inside them; `option` names the list in errors.

    Raises:
        ConfigError: a path is not a module of the model.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if isinstance(paths, str):
        raise ConfigError(f"{option} is a list of module paths; write {option} = [{paths!r}]")
    for path in paths:
        if path not in modules:
            hint = nearest_hint(path, modules)
            raise ConfigError(f"{option} names {path!r}, which is not a module of the model{hint}")
    return {module for path in paths for module in modules[path].modules()}


def replace_module(root: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Puts `new` everywhere `old` is registered under `root`; returns the root, which is `new` if it was `old`."""
    for parent in list(root.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
    return new if root is old else root


def inherit(old: nn.Module, new: nn.Module) -> None:
    """Gives `new` the hooks, the training flag and the additional attributes of `old`."""
    own: dict[str, Any] = vars(new)
    for name, value in vars(old).items():
        if name in _HOOKS or name not in own:
            own[name] = value
    new.training = old.training
