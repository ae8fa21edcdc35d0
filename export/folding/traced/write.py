"""Writes the edits of the neutral graph back into the traced program it was read from."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from lowprec.export.folding.algebra import Scaled, Stored
from lowprec.export.folding.graph import Affine, Linear, Node
from lowprec.export.folding.traced.program import PATH, Program, arguments_by_name, operator_name, path_of
from lowprec.export.folding.traced.read import RUNNING_NORMS, FxGraph

_CONVOLUTIONS = {3: torch.ops.aten.conv1d, 4: torch.ops.aten.conv2d, 5: torch.ops.aten.conv3d}


def write_graph(program: Program, view: FxGraph) -> None:
    """Writes every changed constant and takes out every bypassed node; what nobody reads is erased."""
    for node in view.graph.nodes:
        changed = node in view.graph.changed
        if isinstance(node.op, Linear) and changed:
            view.origin[node] = _write_linear(program, view.origin[node], node.op)
        elif isinstance(node.op, Affine) and (changed or _is_running_norm(node)):
            view.origin[node] = _write_affine(program, view, node, node.op)
    for node, source in view.graph.bypassed.items():
        view.origin[node].replace_all_uses_with(view.origin[_standing(view, source)])
    program.erase_dead()


def _standing(view: FxGraph, node: Node) -> Node:
    """The node that stands for one that may have been taken out itself."""
    while node in view.graph.bypassed:
        node = view.graph.bypassed[node]
    return node


def _write_linear(program: Program, node: fx.Node, op: Linear) -> fx.Node:
    """Gives a call its own constants; another call that shares the old ones keeps them."""
    given = arguments_by_name(node)
    name = operator_name(node)
    old = {"weight": given.get("weight", given.get("other", given.get("mat2"))), "bias": given.get("bias")}
    fresh = [
        program.add_constant(_constant_name(program, old[leaf], node, leaf), _tensor(array), before=node)
        for leaf, array in (("weight", op.stored), ("bias", op.bias))
        if array is not None
    ]
    if op.kind == "embedding":
        node.args = (*fresh, *node.args[1:])
    elif name in ("matmul", "mm"):
        node.target = torch.ops.aten.linear.default
        node.args, node.kwargs = (node.args[0], *fresh), {}
    else:
        node.args = (node.args[0], *fresh, *node.args[1 + len(fresh) :])
    node.kwargs = {key: value for key, value in node.kwargs.items() if key not in ("weight", "bias")}
    return node


def _constant_name(program: Program, value: Any, node: fx.Node, leaf: str) -> str:
    if not isinstance(value, fx.Node):
        return f"{path_of(node) or node.name}.{leaf}"
    return program.wanted.get(str(value.target), str(value.target))


def _is_running_norm(node: Node) -> bool:
    """A norm that stays is written anew too: scale and shift lose less in half precision than its statistics do."""
    return node.kind in RUNNING_NORMS and isinstance(node.op, Affine) and node.op.is_finite


def _write_affine(program: Program, view: FxGraph, node: Node, op: Affine) -> fx.Node:
    """An affine as one operation where there is one, a depthwise 1x1 convolution; emission knows where that is slow."""
    old, source = view.origin[node], view.origin[_standing(view, node.inputs[0])]
    rank = len(node.shape)
    channels = node.shape[1] if rank > 1 else None
    if rank in _CONVOLUTIONS and channels is not None and set(op.axes) <= {1}:
        affine = op.per_channel(channels)
        weight = program.add_constant(
            f"{node.label}.weight", _tensor(affine.scale.reshape(channels, *[1] * (rank - 1))), before=old
        )
        bias = program.add_constant(f"{node.label}.bias", _tensor(affine.shift), before=old) if op.shift.any() else None
        ones = [1] * (rank - 2)
        arguments = (source, weight, bias, ones, [0] * (rank - 2), ones, channels)
        fresh = _call(program, node, old, _CONVOLUTIONS[rank].default, arguments)
    else:
        fresh = source
        if (op.scale != 1).any():
            weight = program.add_constant(f"{node.label}.weight", _tensor(op.scale), before=old)
            fresh = _call(program, node, old, torch.ops.aten.mul.Tensor, (fresh, weight))
        if op.shift.any():
            bias = program.add_constant(f"{node.label}.bias", _tensor(op.shift), before=old)
            fresh = _call(program, node, old, torch.ops.aten.add.Tensor, (fresh, bias))
    old.replace_all_uses_with(fresh)
    return fresh


def _call(program: Program, node: Node, old: fx.Node, target: Any, arguments: tuple[Any, ...]) -> fx.Node:
    with program.graph.inserting_before(old):
        fresh = program.graph.create_node("call_function", target, arguments, name=target._schema.name[6:])
    fresh.meta = {**old.meta, PATH: node.path}
    return fresh


def _tensor(array: Stored) -> torch.Tensor | Scaled:
    """The same memory where it can be, since weights are large and nobody writes to either."""
    return array if isinstance(array, Scaled) else torch.from_numpy(np.require(array, requirements=["C", "W"]))
