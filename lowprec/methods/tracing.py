"""Traces a network, or a part of it, so that the graph tells what fusing must know and torch.fx leaves out.

That is: sums written with `+=`, hooks, and whether two operations are in the same activation checkpoint.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
import torch.utils.checkpoint
from torch import fx, nn
from torch.fx.graph import inplace_methods
from torch.nn.utils import parametrize

from lowprec.methods.structure import LayerTracer

INPLACE_OPERATORS: tuple[Any, ...] = tuple(getattr(operator, name) for name in inplace_methods)
"""`operator.iadd` and its like."""


def is_plain_sequential(module: nn.Module) -> bool:
    """Whether `module` calls its children one after the other."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward and is_own(module)


def is_hooked(module: nn.Module) -> bool:
    """Whether something watches or changes what `module` takes, gives or lets back."""
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def is_plain_relu(module: nn.Module) -> bool:
    """Whether `module` is torch's own ReLU and nothing hangs on it."""
    return type(module) is nn.ReLU and is_own(module) and not is_hooked(module)


def is_own(module: nn.Module) -> bool:
    """Whether forward is the class's."""
    return "forward" not in vars(module)


class _Proxy(fx.Proxy):
    """A proxy that tells `a += b` from `a + b`."""


def _in_place(target: Any) -> Any:
    def method(self: fx.Proxy, *others: Any) -> Any:
        return self.tracer.create_proxy("call_function", target, (self, *others), {})

    return method


for _name in inplace_methods:
    setattr(_Proxy, f"__{_name}__", _in_place(getattr(operator, _name)))


class SiteTracer(LayerTracer):
    """Keeps norms, layers, and all that is hooked or parametrised as one node.

    Notes for each node in which region it is: with gradients or without, in which activation checkpoints.
    """

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether `m` is one node."""
        whole = isinstance(m, nn.ReLU) or is_hooked(m) or parametrize.is_parametrized(m)
        return whole or super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """What stands for the value of `node`."""
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """A node with its region."""
        node = super().create_node(*args, **kwargs)
        node.meta["region"] = (torch.is_grad_enabled(), *_checkpoints())
        return node


def _checkpoints() -> Iterator[FrameType]:
    """The calls of `torch.utils.checkpoint` that are open."""
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == torch.utils.checkpoint.__name__:
            yield frame
        frame = frame.f_back


def graphs_of(scope: nn.Module) -> list[fx.Graph] | str:
    """Graphs of `scope` in both modes and with its optional arguments given and not given; or why there is none."""
    if not is_own(scope):
        return "its forward was replaced on the object"
    given, defaults = _argument_variants(scope)
    graphs: list[fx.Graph] = []
    for training in (True, False):
        for module in scope.modules():
            vars(module)["training"] = training
        for arguments in (defaults, given) if defaults else (None,):
            try:
                with torch.set_grad_enabled(training):
                    graphs.append(SiteTracer().trace(scope, arguments))
            except Exception as error:  # user code and fx raise any type
                if arguments is not given:
                    return f"torch.fx cannot trace {type(scope).__name__}: {_first_line(error)}"
    return graphs


def _argument_variants(scope: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Optional arguments of forward: switches flipped and the rest unknown; and all at their defaults."""
    parameters = inspect.signature(type(scope).forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    return {name: not value for name, value in defaults.items() if isinstance(value, bool)}, defaults


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
