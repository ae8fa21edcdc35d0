"""Reads the shape of a network: which norms follow a weight layer, where residual branches end, what the classifier is.

Read from a graph (torch.fx), not from names or from known model classes. fx and not torch.export: the answer must name
modules of the untraced network, which is then edited and trained, and no example input is at hand.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lowprec.errors import UnsupportedError
from lowprec.norm import ScaleBatchNorm, is_norm
from lowprec.report import Row

ADDITIONS: tuple[Any, ...] = (operator.add, operator.iadd, torch.add, "add", "add_")
_DROPOUT = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
# What may stand between the classifier and the output without changing what its logits mean.
_AFTER_LOGITS_MODULES = (*_DROPOUT, nn.Flatten, nn.Softmax, nn.LogSoftmax)
_AFTER_LOGITS: tuple[Any, ...] = (
    torch.flatten, torch.squeeze, torch.softmax, torch.log_softmax, F.softmax, F.log_softmax, F.dropout,
    "flatten", "squeeze", "softmax", "log_softmax", "float", "contiguous",
)  # fmt: skip


@dataclass(frozen=True)
class Branch:
    """A residual branch: the side of an addition that holds more convolutions.

    Args:
        name: of the addition in the graph, for messages.
        index: its number in the network, from 1, in order of execution.
        convs: how many convolutions it holds.
        last_conv: path of the convolution that it ends in; None when `reason` says why there is none to scale.
        reason: why no scalar can be multiplied into its end.
        shortcut: paths of the convolutions on the other side.
    """

    name: str
    index: int
    convs: int
    last_conv: str | None
    reason: str | None
    shortcut: tuple[str, ...] = ()


@dataclass(frozen=True)
class Structure:
    """What `read_structure` found; paths as in `named_modules`.

    Args:
        norms: path of each batch norm that follows a conv or linear layer at every use, and that layer's path.
        other_norms: the batch norms that do not, each with a reason.
        branches: the residual branches.
        classifier: path of the linear layer that makes the logits.
    """

    norms: dict[str, str]
    other_norms: list[Row]
    branches: list[Branch]
    classifier: str


def read_structure(model: nn.Module) -> Structure:
    """Reads a network by symbolic tracing.

    Raises:
        UnsupportedError: fx cannot trace it, or its output is not the logits of one linear layer.
    """
    graph = traced(model)
    reader = _Reader(graph, dict(model.named_modules()))
    norms, other_norms = reader.norms()
    return Structure(norms, other_norms, reader.branches(norms), reader.classifier())


def residual_branches(model: nn.Module) -> list[Branch]:
    """The residual branches alone, whatever the network ends in.

    Raises:
        UnsupportedError: fx cannot trace it.
    """
    reader = _Reader(traced(model), dict(model.named_modules()))
    return reader.branches(reader.norms()[0])


def layers_before(model: nn.Module, graph: fx.Graph) -> set[fx.Node]:
    """The nodes that read the output of a conv or linear layer, directly or not."""
    modules = dict(model.named_modules())
    found: set[fx.Node] = set()
    for node in graph.nodes:
        layers = [modules.get(str(other.target)) for other in node.all_input_nodes if other.op == "call_module"]
        if any(isinstance(layer, (_ConvNd, nn.Linear)) for layer in layers) or found & set(node.all_input_nodes):
            found.add(node)
    return found


def classifier_of(model: nn.Module, graph: fx.Graph) -> str:
    """The path of the linear layer that makes the logits. Raises `UnsupportedError` if there is none."""
    return _Reader(graph, dict(model.named_modules())).classifier()


class LayerTracer(fx.Tracer):
    """Keeps every layer that methods treat as a whole as one node."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether `m` is one node."""
        whole = isinstance(m, (nn.Linear, nn.PReLU, _ConvNd)) or is_norm(m)
        return whole or super().is_leaf_module(m, module_qualified_name)


def traced(model: nn.Module) -> fx.Graph:
    """The graph of the network's layers. Raises `UnsupportedError` where fx cannot trace it."""
    try:
        return LayerTracer().trace(model)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnsupportedError(
            f"torch.fx cannot trace {type(model).__name__}, so how its layers hang together is unknown: {reason}"
        ) from error


class _Reader:
    """Questions about one graph."""

    def __init__(self, graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
        self._nodes = list(graph.nodes)
        self._modules = modules
        self._uses = Counter(node.target for node in self._nodes if node.op == "call_module")
        self._bit = {node: 1 << index for index, node in enumerate(self._nodes)}
        self._ancestors: dict[fx.Node, int] = {}
        for node in self._nodes:
            inputs = node.all_input_nodes
            self._ancestors[node] = _union(self._ancestors[other] | self._bit[other] for other in inputs)
        given = _union(self._bit[node] for node in self._nodes if node.op == "placeholder")
        # The nodes that depend on the input: two sides that share only a parameter have no fork.
        self._data = _union(
            self._bit[node] for node in self._nodes if (self._ancestors[node] | self._bit[node]) & given
        )

    def module(self, node: fx.Node) -> nn.Module | None:
        return self._modules.get(str(node.target)) if node.op == "call_module" else None

    def norms(self) -> tuple[dict[str, str], list[Row]]:
        after: dict[str, str] = {}
        other: dict[str, str] = {}
        for node in self._nodes:
            if node.op == "call_function" and node.target in (F.batch_norm, torch.batch_norm):
                other[node.name] = "a functional batch norm is not a module and cannot be replaced; it stays"
            if not isinstance(self.module(node), (_BatchNorm, ScaleBatchNorm)):
                continue
            producer = self._before(node.all_input_nodes[0], self._passes)
            if isinstance(self.module(producer), (_ConvNd, nn.Linear)):
                after[str(node.target)] = str(producer.target)
            else:
                other[str(node.target)] = f"follows {self._describe(producer)}, not a conv or linear layer; it stays"
        return {path: after[path] for path in after if path not in other}, [Row(*item) for item in other.items()]

    def branches(self, removed: dict[str, str]) -> list[Branch]:
        found: list[Branch] = []
        for node in self._nodes:
            sides = [arg for arg in node.args if isinstance(arg, fx.Node)]
            if node.op not in ("call_function", "call_method") or node.target not in ADDITIONS or len(sides) != 2:
                continue
            convs = self._convs_per_side(sides[0], sides[1])
            if convs is None or not any(convs):
                continue
            counts = len(convs[0]), len(convs[1])
            end = sides[0] if counts[0] > counts[1] else sides[1]
            last = self._before(end, lambda n: self._passes(n) or (str(n.target) in removed and not self._has_relu(n)))
            reason = self._why_not_scalable(end, last)
            if counts[0] == counts[1]:
                reason = f"both sides of the sum hold {counts[0]} convolutions, so neither is the branch"
            path = None if reason else str(last.target)
            shortcut = () if counts[0] == counts[1] else tuple(str(conv.target) for conv in min(convs, key=len))
            found.append(Branch(node.name, len(found) + 1, max(counts), path, reason, shortcut))
        return found

    def classifier(self) -> str:
        (result,) = self._nodes[-1].args
        if not isinstance(result, fx.Node):
            raise UnsupportedError(
                "this method needs the logits of one classifier, but the network has several outputs"
            )
        node = self._before(result, self._keeps_logits)
        if not isinstance(self.module(node), nn.Linear):
            found = self._describe(node)
            raise UnsupportedError(f"this method needs the logits of a final Linear, but the network ends in {found}")
        if self._uses[node.target] > 1:
            raise UnsupportedError(f"{node.target!r} makes the logits, but the network calls it more than once")
        return str(node.target)

    def _convs_per_side(self, left: fx.Node, right: fx.Node) -> tuple[list[fx.Node], list[fx.Node]] | None:
        """Convolutions on either way from the fork to the sum; None when there is no fork, so no residual."""
        upto = [self._ancestors[side] | self._bit[side] for side in (left, right)]
        common = upto[0] & upto[1] & self._data
        if not common:
            return None
        fork = self._nodes[common.bit_length() - 1]
        before = self._ancestors[fork] | self._bit[fork]
        convs = [node for node in self._nodes if isinstance(self.module(node), _ConvNd) and self._bit[node] & ~before]
        left_convs, right_convs = ([node for node in convs if self._bit[node] & side] for side in upto)
        return left_convs, right_convs

    def _why_not_scalable(self, end: fx.Node, last: fx.Node) -> str | None:
        module = self.module(last)
        if not isinstance(module, _ConvNd) or isinstance(module, _ConvTransposeNd):
            return f"the branch ends in {self._describe(last)}, not in a convolution that could take the scalar"
        if type(module) not in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
            return f"the branch ends in {self._describe(last)}, which is not torch's own class"
        if self._uses[last.target] > 1:
            return f"{last.target!r} is used more than once"
        node = last
        while True:
            if len(node.users) > 1:
                return f"the output of {self._describe(node)} is used outside the branch"
            if node is end:
                return None
            node = next(iter(node.users))

    def _before(self, node: fx.Node, passes: Callable[[fx.Node], bool]) -> fx.Node:
        while passes(node) and node.all_input_nodes:
            node = node.all_input_nodes[0]
        return node

    def _passes(self, node: fx.Node) -> bool:
        return isinstance(self.module(node), _DROPOUT)

    def _keeps_logits(self, node: fx.Node) -> bool:
        if node.op in ("call_function", "call_method"):
            return node.target in _AFTER_LOGITS
        kept = isinstance(self.module(node), (*_AFTER_LOGITS_MODULES, _BatchNorm, ScaleBatchNorm))
        return kept and not self._has_relu(node)

    def _has_relu(self, node: fx.Node) -> bool:
        """Whether it is a norm with a ReLU inside, before any sum; a norm that awaits its residual has it after."""
        module = self.module(node)
        return isinstance(module, ScaleBatchNorm) and module.act is not None and not module.awaits_residual

    def _describe(self, node: fx.Node) -> str:
        module = self.module(node)
        if module is not None:
            return f"{node.target!r} ({type(module).__name__})"
        return "the input" if node.op == "placeholder" else str(node.name)


def _union(masks: Any) -> int:
    result = 0
    for mask in masks:
        result |= mask
    return result
