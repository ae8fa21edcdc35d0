"""How large signals are along a network at initialisation: idealised distributions over its graph.

Methods that take the norms out put constants in their place, and a constant is right when it is the reciprocal of what
the norm would have divided by. That is read from the graph, as if every layer gave independent normal values: then no
data is needed, and where only such values are added the numbers are those of the published recipes, exactly. What is
added to the output of an activation is not normal, so a signal keeps its shape: a trunk with a ReLU after every sum is
hardly touched by the next one, where a normal value would lose two thirds of its variance.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from lowprec.methods.structure import ADDITIONS

PUBLISHED_GAINS = {"relu": 1.7139588594436646, "gelu": 1.7015043497085571, "silu": 1.7881293296813965}
"""1 / std(act(z)) for z from N(0, 1) as DeepMind's code has it, estimated from samples there: ReLU's is 1.7129.

Kept to the digit, because weights that were trained with them are in use. Other activations get the exact value.
"""
_ACTIVATIONS: tuple[type[nn.Module], ...] = (
    nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.LogSigmoid,
    nn.Mish, nn.PReLU, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softshrink, nn.Softsign,
    nn.Tanh, nn.Tanhshrink, nn.Threshold,
)  # fmt: skip
# Functions and methods of one tensor and numbers, by name without the in-place underscore.
_ELEMENTWISE = (
    *(cls.__name__.lower() for cls in _ACTIVATIONS if cls is not nn.PReLU), "leaky_relu", "clamp", "abs", "neg",
    "add", "iadd", "sub", "isub", "mul", "imul", "div", "truediv", "itruediv", "square",
)  # fmt: skip
_PRODUCTS = ("mul", "imul")
# The middles of 2^16 equally likely parts of N(0, 1), brought to variance 1. The variance of an activation of them is
# off by less than 1e-5; between parts of a sum, which are paired at random, a share of 2^-8 of the shape is noise.
_COUNT = 2**16
_MIDDLES = torch.special.ndtri((torch.arange(_COUNT, dtype=torch.float64) + 0.5) / _COUNT)
_NORMAL = _MIDDLES / _MIDDLES.square().mean().sqrt()


@dataclass(frozen=True)
class Signal:
    """What an element is over the data.

    Args:
        mean: its mean.
        variance: its variance.
        shape: equally likely values of mean 0 and variance 1; None for a normal distribution.
    """

    mean: float = 0.0
    variance: float = 1.0
    shape: Tensor | None = None

    def values(self) -> Tensor:
        """Equally likely values."""
        return self.mean + math.sqrt(self.variance) * (_NORMAL if self.shape is None else self.shape)


Rule = Callable[[fx.Node, nn.Module | None, list[Signal]], Signal | None]


def propagate(model: nn.Module, graph: fx.Graph, rule: Rule) -> dict[fx.Node, Signal]:
    """The signal at every node that holds a tensor.

    Args:
        model: the network.
        graph: its trace.
        rule: the signal of a node from those of its inputs, or None for the usual: an addition adds independent
            signals; a parameter is what it is; what the network is given is N(0, 1); anything else mixes its inputs.
    """
    modules = dict(model.named_modules())
    found: dict[fx.Node, Signal] = {}
    for node in graph.nodes:
        inputs = [found[other] for other in node.all_input_nodes if other in found]
        if _is_size(node) or (node.all_input_nodes and not inputs):
            continue
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        found[node] = rule(node, module, inputs) or _usual(model, node, inputs)
    return found


def is_elementwise(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether the node is an activation, or arithmetic."""
    if module is not None:
        return type(module) in _ACTIVATIONS or isinstance(module, nn.PReLU)
    return _name(node, None) in _ELEMENTWISE


@torch.no_grad()
def after_elementwise(node: fx.Node, module: nn.Module | None, inputs: list[Signal]) -> Signal | None:
    """The signal after an activation, or arithmetic with numbers, or a product of two independent signals.

    None for other nodes.
    """
    name = _name(node, module)
    if name in _PRODUCTS and len(inputs) == 2:
        return _of_values(inputs[0].values() * _shuffled(inputs[1].values(), node))
    if len(inputs) != 1 or not is_elementwise(node, module):
        return None
    after = _of_values(_applied(node, module, inputs[0].values()))
    if name in PUBLISHED_GAINS:
        exact = _of_values(_applied(node, module, _NORMAL.clone())).variance
        return Signal(after.mean, after.variance / exact / PUBLISHED_GAINS[name] ** 2, after.shape)
    return after


def _applied(node: fx.Node, module: nn.Module | None, x: Tensor) -> Tensor:
    """What the node makes of `x`, which it may overwrite; a PReLU of many slopes with their mean."""
    if isinstance(module, nn.PReLU):
        return F.leaky_relu(x, float(module.weight.mean()))
    if module is not None:
        result: Tensor = type(module).forward(module, x)  # not __call__: hooks are for what a user runs
        return result
    args = fx.node.map_arg(node.args, lambda _: x)
    kwargs = fx.node.map_arg(node.kwargs, lambda _: x)
    function: Any = getattr(Tensor, node.target) if isinstance(node.target, str) else node.target
    return function(*args, **kwargs)  # type: ignore[no-any-return]


def _usual(model: nn.Module, node: fx.Node, inputs: list[Signal]) -> Signal:
    if node.op == "get_attr":
        return _of_parameter(model, str(node.target))
    if not inputs:
        return Signal()
    if node.target in ADDITIONS and len(inputs) == 2:
        mean, variance = sum(s.mean for s in inputs), sum(s.variance for s in inputs)
        shape = None
        if any(s.shape is not None for s in inputs):
            shape = _of_values(inputs[0].values() + _shuffled(inputs[1].values(), node)).shape
        return Signal(mean, variance, shape)
    return _mixture(inputs)


def _mixture(inputs: list[Signal]) -> Signal:
    """Of elements that are as likely one input as another."""
    if len({(s.mean, s.variance, s.shape) for s in inputs}) == 1:
        return inputs[0]
    mean = sum(s.mean for s in inputs) / len(inputs)
    variance = sum(s.variance + (s.mean - mean) ** 2 for s in inputs) / len(inputs)
    values = torch.stack([s.values() for s in inputs])
    numbers = torch.arange(_COUNT)
    return Signal(mean, variance, _of_values(values[numbers % len(inputs), numbers]).shape)


def _of_parameter(model: nn.Module, path: str) -> Signal:
    value: Any = model
    for part in path.split("."):
        value = getattr(value, part)
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return Signal()
    wide = value.detach().double()
    return Signal(float(wide.mean()), float(wide.var(correction=0)))


def _of_values(values: Tensor) -> Signal:
    mean, variance = float(values.mean()), float(values.var(correction=0))
    return Signal(mean, variance, (values - mean) / (math.sqrt(variance) or 1.0))


def _shuffled(values: Tensor, node: fx.Node) -> Tensor:
    """The values in an order that has nothing to do with another signal's, and is the same in every run."""
    order = torch.Generator().manual_seed(zlib.crc32(node.name.encode()))
    return values[torch.randperm(_COUNT, generator=order)]


def _name(node: fx.Node, module: nn.Module | None) -> str:
    if module is not None:
        return type(module).__name__.lower()
    return str(getattr(node.target, "__name__", node.target)).rstrip("_")


def _is_size(node: fx.Node) -> bool:
    """Whether the node is a number of dimensions or elements, as networks compute for `view`."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel")
    return node.target is getattr and node.args[1] in ("shape", "ndim")
