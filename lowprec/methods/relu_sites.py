"""Finds, for every norm of a network, what its forward does with the norm's output: a ReLU, a sum and a ReLU, or else.

Read from graphs (torch.fx), in training and in evaluation mode: of the whole network, or where that cannot be traced of
the largest parts that can. A graph names modules of the network, which is then edited; it is made on a twin, so that a
forward with side effects leaves nothing behind. A `Sequential` that cannot be traced still says by its order what
follows what.
"""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd

from lowprec.methods.tracing import INPLACE_OPERATORS, graphs_of, is_hooked, is_plain_relu, is_plain_sequential
from lowprec.norm import is_norm

_RELUS: tuple[Any, ...] = (F.relu, torch.relu, torch.relu_, "relu", "relu_")
_SUMS: tuple[Any, ...] = (operator.add, operator.iadd, torch.add, "add", "add_")
_INPLACE_SUMS: tuple[Any, ...] = (operator.iadd, "add_")


@dataclass(frozen=True, eq=False)
class Site:
    """One call of a norm and what is done with its output.

    Args:
        norm: the norm.
        kind: "relu" and "sum" (an addition, then a ReLU) can be computed by the norm; None cannot.
        relu: the ReLU module of a `kind`.
        order: the Sequential in which the ReLU stands next to the norm, if that is why it follows; else None.
        reason: for kind None, why a ReLU that follows cannot be computed by the norm; None where none follows.
    """

    norm: nn.Module
    kind: Literal["relu", "sum"] | None
    relu: nn.Module | None = None
    order: nn.Module | None = None
    reason: str | None = None


@dataclass(frozen=True, eq=False)
class ReluCall:
    """One call of a ReLU module: after which site, None after none, and whether a Sequential made it in its order."""

    relu: nn.Module
    site: Site | None
    in_order: bool


@dataclass(eq=False)
class Calls:
    """What was read.

    Args:
        sites: calls of norms, of every graph.
        relus: calls of ReLU modules, of every graph.
        seen: modules whose own forward was read.
        unread: why a forward could not be, by its module.
    """

    sites: list[Site] = field(default_factory=list)
    relus: list[ReluCall] = field(default_factory=list)
    seen: set[nn.Module] = field(default_factory=set)
    unread: dict[nn.Module, str] = field(default_factory=dict)


def read_calls(model: nn.Module, norms: set[nn.Module]) -> Calls:
    """Reads what follows `norms`, the norms that may compute a ReLU, wherever `model` can be traced."""
    # The parameters themselves: a trace does not touch them, and copying them would cost the network's memory again.
    groups = (getattr(module, "process_group", None) for module in model.modules())
    kept = [*model.parameters(), *(group for group in groups if group is not None)]
    twin = copy.deepcopy(model, {id(value): value for value in kept})
    pairs = zip(twin.modules(), model.modules(), strict=True)
    reader = _Reader(dict(pairs), norms)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        reader.read(twin)
    for module in model.modules():
        if is_plain_sequential(module) and module not in reader.called:
            reader.read_order(module)
    return reader.calls


class _Reader:
    """Goes through a network from the top, part by part where it must."""

    def __init__(self, real: dict[nn.Module, nn.Module], norms: set[nn.Module]) -> None:
        self._real = real
        self._norms = norms
        self.calls = Calls()
        self.called: set[nn.Module] = set()

    def read(self, scope: nn.Module) -> None:
        """Reads a part of the twin, and what is hidden in it, if it holds norms."""
        holds = any(self._real[module] in self._norms for module in scope.modules())
        if not holds or self._real[scope] in self._norms:
            return
        graphs = graphs_of(scope)
        if isinstance(graphs, str):
            self.calls.unread[self._real[scope]] = graphs
            for child in scope.children():
                self.read(child)
            return
        inside: set[nn.Module] = set()
        opaque: dict[nn.Module, None] = {}
        for graph in graphs:
            nodes = _Nodes(graph, scope, self._real, self._norms)
            nodes.read(self.calls)
            self.called.update(self._real[module] for module in nodes.callers())
            for leaf in nodes.modules():
                inside.update(set(leaf.modules()) - {leaf})
                opaque.update({leaf: None} if any(leaf.children()) else {})
        hidden = inside.union(opaque)
        self.calls.seen.update(self._real[module] for module in scope.modules() if module not in hidden)
        for leaf in opaque:
            self.read(leaf)

    def read_order(self, scope: nn.Module) -> None:
        """What a Sequential of the network itself, which no graph calls, says by its order."""
        order = [child for child in scope._modules.values() if child is not None]
        self.calls.seen.add(scope)
        site = None
        for module, follower in zip_longest(order, order[1:]):
            if isinstance(module, nn.ReLU):
                self.calls.relus.append(ReluCall(module, site, in_order=True))
            site = None
            if module in self._norms:
                takes = follower is not None and is_plain_relu(follower)
                site = Site(module, "relu", follower, scope) if takes else None
                self.calls.sites.append(site or Site(module, None))


class _Nodes:
    """Questions about one graph."""

    def __init__(
        self, graph: fx.Graph, scope: nn.Module, real: dict[nn.Module, nn.Module], norms: set[nn.Module]
    ) -> None:
        self._nodes = list(graph.nodes)
        self._place = {node: index for index, node in enumerate(self._nodes)}
        self._scope, self._real, self._norms = scope, real, norms

    def modules(self) -> Iterator[nn.Module]:
        """The modules that are nodes."""
        for node in self._nodes:
            if node.op == "call_module":
                yield self._scope.get_submodule(str(node.target))

    def callers(self) -> Iterator[nn.Module]:
        """The modules whose forward was gone through."""
        yield self._scope
        for node in self._nodes:
            for path, _ in node.meta.get("nn_module_stack", {}).values():
                yield self._scope.get_submodule(path)

    def read(self, calls: Calls) -> None:
        """Adds the calls of norms and ReLUs."""
        ends: dict[fx.Node, Site] = {}
        for node in self._nodes:
            module = self._module(node)
            if module in self._norms:
                site, end = self._site(node, module)
                calls.sites.append(site)
                ends.update({} if end is None else {end: site})
        for node in self._nodes:
            module = self._module(node)
            if isinstance(module, nn.ReLU):
                in_order = is_plain_sequential(self._caller(node))
                calls.relus.append(ReluCall(module, ends.get(node), in_order))

    def _site(self, node: fx.Node, norm: nn.Module) -> tuple[Site, fx.Node | None]:
        """What follows one call of a norm, and the ReLU's node where the norm can compute it."""
        value, user = self._reader_of(node)
        if user is None:
            reason = f"its output is used {len(value.users)} times" if any(map(self._is_relu, value.users)) else None
            return Site(norm, None, reason=reason), None
        summed = self._is_sum(user) and value in user.args
        relu = self._reader_of(user)[1] if summed else user
        if relu is None or not self._is_relu(relu):
            return Site(norm, None), None
        reason = self._why_not(node, value, user if summed else None, relu)
        if reason is not None:
            return Site(norm, None, reason=reason), None
        caller = self._caller(relu)
        adjacent = not summed and value is node and caller is self._caller(node)
        kind: Literal["relu", "sum"] = "sum" if summed else "relu"
        order = self._real[caller] if adjacent and is_plain_sequential(caller) else None
        return Site(norm, kind, self._module(relu), order), relu

    def _why_not(self, node: fx.Node, value: fx.Node, total: fx.Node | None, relu: fx.Node) -> str | None:
        module = self._module(relu)
        if module is None:
            return "the ReLU after it is written as a function in forward, which convert does not edit"
        if not is_plain_relu(module):
            return f"the {type(module).__name__} after it is hooked, or not torch's own"
        return None if total is None else self._why_not_summed(node, value, total)

    def _why_not_summed(self, node: fx.Node, value: fx.Node, total: fx.Node) -> str | None:
        sides = self._sides(total)
        if sides is None or sides[0] is sides[1]:
            return "the sum after it is not of two tensors"
        if self._awaiting_side(total, sides) is not value:
            return "the other side of the sum is a norm too, and that one computes it"
        if total.target in _INPLACE_SUMS and sides[0] is not value:
            return "the sum after it is written into its other side"
        if node.meta["region"] != total.meta["region"]:
            return "it is checkpointed, or computed without gradients, and the sum after it is not"
        if self._overwritten(node, total):
            return "what it normalises may be overwritten before the sum"
        return None

    def _sides(self, total: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        sides = [arg for arg in total.args if isinstance(arg, fx.Node)]
        return (sides[0], sides[1]) if len(sides) == len(total.args) == 2 and not total.kwargs else None

    def _awaiting_side(self, total: fx.Node, sides: Sequence[fx.Node]) -> fx.Node:
        """The first side that is a norm; read through Identity, and not of what others read as well."""
        for side in sides:
            source = side
            while isinstance(self._module(source), nn.Identity):
                source = source.all_input_nodes[0]
            if self._module(source) in self._norms and self._reader_of(source) == (side, total):
                return side
        return sides[0]

    def _overwritten(self, node: fx.Node, total: fx.Node) -> bool:
        """Whether the norm's input may change between its call and the sum, which is when the norm is computed."""
        source = self._origin(node.all_input_nodes[0])
        between = self._nodes[self._place[node] + 1 : self._place[total]]
        written = [self._origin(other.all_input_nodes[0]) for other in between if self._writes(other)]
        return any(origin is source or not self._is_fresh(origin) for origin in written)

    def _writes(self, node: fx.Node) -> bool:
        if not node.all_input_nodes:
            return False
        if node.op == "call_module":
            return any(
                getattr(part, "inplace", False) for part in self._scope.get_submodule(str(node.target)).modules()
            )
        name = str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))
        ends = name.endswith("_") and not name.endswith("__")
        return ends or node.target in INPLACE_OPERATORS or bool(node.kwargs.get("inplace"))

    def _origin(self, node: fx.Node) -> fx.Node:
        """Back through all that may be a view, to what made the memory."""
        while not self._is_fresh(node) and node.all_input_nodes:
            node = node.all_input_nodes[0]
        return node

    def _is_fresh(self, node: fx.Node) -> bool:
        module = self._module(node)
        return module is not None and (isinstance(module, (nn.Linear, _ConvNd)) or is_norm(module))

    def _reader_of(self, node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
        """The only reader of a value, looking through Identity, and the value as it reads it; None of several."""
        while len(node.users) == 1:
            (user,) = node.users
            module = self._module(user)
            if type(module) is not nn.Identity or is_hooked(module):
                return node, user
            node = user
        return node, None

    def _is_relu(self, node: fx.Node) -> bool:
        if node.op in ("call_function", "call_method"):
            return node.target in _RELUS
        return isinstance(self._module(node), nn.ReLU)

    def _is_sum(self, node: fx.Node) -> bool:
        return node.op in ("call_function", "call_method") and node.target in _SUMS

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self._real[self._scope.get_submodule(str(node.target))] if node.op == "call_module" else None

    def _caller(self, node: fx.Node) -> nn.Module:
        """The twin's module whose forward makes the call."""
        stack = list(node.meta.get("nn_module_stack", {}).values())
        return self._scope.get_submodule(stack[-2][0]) if len(stack) > 1 else self._scope
