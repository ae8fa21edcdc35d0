"""Rewrites in-place operations of an exported graph as ordinary ones.

torch.export keeps `relu_` and `add_` as they were written, and a fold that rewires a graph with live mutations is wrong
without notice. Its own cure, `run_decompositions`, also rewrites batch norms and hard-codes view sizes, and takes
seconds; the few cases that networks contain are plain renaming, and the others are refused.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, fx

from lowprec.errors import FoldError
from lowprec.export.folding.traced.program import Program, operator_name, place

# In-place operations on what autograd knows about a tensor, not on its values.
_VALUE_KEEPING = ("detach_", "requires_grad_")


def functionalise(program: Program) -> dict[str, str]:
    """Replaces each in-place operation by its out-of-place form and lets later readers read the new value.

    Args:
        program: as exported, with each node's `meta["val"]`; edited in place.

    Returns:
        The constants that the network changes as it runs, and where it does.

    Raises:
        FoldError: part of a tensor is overwritten that is read again later.
    """
    names = _Names(program.graph)
    changed: dict[str, str] = {}
    for node in program.calls():
        if _is_in_place(node):
            if operator_name(node) not in _VALUE_KEEPING:
                changed.update({buffer: place(node) for buffer in names.constants_of(node)})
            _replace(program, names, node)
    return changed


class _Names:
    """Which nodes are names of the same memory, and the order in which things happen."""

    def __init__(self, graph: fx.Graph) -> None:
        self.order = {node: index for index, node in enumerate(graph.nodes)}
        self._groups: dict[object, list[fx.Node]] = defaultdict(list)
        for node in graph.nodes:
            self._groups[self._storage(node)].append(node)

    def of(self, node: fx.Node) -> list[fx.Node]:
        """All nodes that name the memory of `node`, itself included."""
        return self._groups[self._storage(node)]

    def constants_of(self, node: fx.Node) -> list[str]:
        """The constants in the memory that an in-place operation writes."""
        written = node.args[0]
        assert isinstance(written, fx.Node)
        return [str(name.target) for name in self.of(written) if name.op == "get_attr"]

    def readers_after(self, name: fx.Node, moment: fx.Node) -> list[fx.Node]:
        """Who reads `name` after `moment`, in order."""
        later = [user for user in name.users if self.order.get(user, -1) > self.order[moment]]
        return sorted(later, key=lambda user: self.order[user])

    def exchange(self, node: fx.Node, fresh: fx.Node) -> None:
        """Puts `fresh` in the place of `node`."""
        group = self.of(node)
        group[group.index(node)] = fresh
        self.order[fresh] = self.order.pop(node)

    @staticmethod
    def _storage(node: fx.Node) -> object:
        value = node.meta.get("val")
        return value.untyped_storage()._cdata if isinstance(value, Tensor) else node


def _is_in_place(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.arguments:
        return False
    alias = target._schema.arguments[0].alias_info
    return alias is not None and bool(alias.is_write)


def _replace(program: Program, names: _Names, node: fx.Node) -> None:
    written = node.args[0]
    assert isinstance(written, fx.Node)
    stale = [name for name in names.of(written) if name is not node and names.readers_after(name, node)]
    stale = [name for name in stale if names.order[name] < names.order[node]]
    for name in stale:
        if not _same_elements(name, written):
            reader = names.readers_after(name, node)[0]
            raise FoldError(
                f"{place(node)} overwrites part of a tensor in place ({operator_name(node)}) that {place(reader)} "
                f"reads again ({operator_name(reader)}); write it with an out-of-place operation"
            )
    with program.graph.inserting_before(node):
        fresh = program.graph.create_node(
            "call_function", _out_of_place(node), node.args, node.kwargs, name=operator_name(node).rstrip("_")
        )
    fresh.meta = dict(node.meta)
    for name in stale:
        for user in names.readers_after(name, node):
            user.replace_input_with(name, fresh)
    node.replace_all_uses_with(fresh)
    names.exchange(node, fresh)
    program.graph.erase_node(node)


def _same_elements(first: fx.Node, second: fx.Node) -> bool:
    """Whether two names of one memory are the same elements in the same shape and type."""
    a, b = first.meta["val"], second.meta["val"]
    return first is second or all(
        str(x) == str(y)
        for x, y in (
            (a.dtype, b.dtype),
            (a.shape, b.shape),
            (a.stride(), b.stride()),
            (a.storage_offset(), b.storage_offset()),
        )
    )


def _out_of_place(node: fx.Node) -> torch._ops.OpOverload:
    """`aten.relu.default` for `aten.relu_.default`."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    name = target._schema.name.removeprefix("aten::").removesuffix("_")
    overload = getattr(getattr(torch.ops.aten, name, None), target._overloadname, None)
    if not target._schema.name.startswith("aten::") or not isinstance(overload, torch._ops.OpOverload):
        raise FoldError(
            f"{place(node)} uses {target}, an in-place operation with no out-of-place form; "
            f"write it with an out-of-place operation"
        )
    return overload
