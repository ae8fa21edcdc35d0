"""Evaluates every part of a program that depends on constants alone, once, in float64.

This is how parametrisations, weight standardisation, centring and branch scalars become plain weights: none of them is
recognised by name, they are simply computed. `torch.nn.utils.parametrize.remove_parametrizations`, the alternative,
knows only what was registered through it and computes in the weight's own type.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from lowprec.export.folding.traced.program import Program, operator_name, path_of

# The arguments of a linear operation that get the plain names of a layer's own tensors.
_LAYER_TENSORS = {1: "weight", 2: "bias"}


def bake_constants(program: Program) -> dict[str, list[str]]:
    """Replaces operations on constants by their result.

    Args:
        program: functional, float64; edited in place.

    Returns:
        For each module path where something was computed, the names of the operations, in order.
    """
    baked: dict[str, list[str]] = {}
    values: dict[fx.Node, Any] = {}
    for node in list(program.graph.nodes):
        if node.op == "get_attr":
            values[node] = program.tensor(str(node.target))
        elif node.op == "call_function" and all(value in values for value in node.all_input_nodes):
            # An operation without any tensor input (`arange`) is a constant too; one that makes no tensor is not.
            result = _evaluate(node, values)
            if isinstance(result, Tensor) or (isinstance(result, (list, tuple)) and node.all_input_nodes):
                values[node] = result
                baked.setdefault(path_of(node), []).append(operator_name(node))
    for node, value in values.items():
        readers = [user for user in node.users if user not in values]
        if node.op == "call_function" and readers and isinstance(value, Tensor):
            constant = program.add_constant(_name(node, readers), value.detach().clone(), before=node)
            constant.meta = dict(node.meta)
            node.replace_all_uses_with(constant)
    program.erase_dead()
    return baked


def _evaluate(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    args = fx.node.map_arg(node.args, lambda value: _wide(values[value]))
    kwargs = fx.node.map_arg(node.kwargs, lambda value: _wide(values[value]))
    assert callable(node.target)
    with torch.no_grad():
        return node.target(*args, **kwargs)


def _wide(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _name(node: fx.Node, readers: list[fx.Node]) -> str:
    """`conv.weight` for what a single layer reads as its weight, else the place and the operation that made it."""
    reader = readers[0]
    if len(readers) == 1 and path_of(reader) and is_linear(reader):
        position = next((index for index, value in enumerate(reader.args) if value is node), None)
        if position in _LAYER_TENSORS:
            return f"{path_of(reader)}.{_LAYER_TENSORS[position]}"
    path = path_of(node).replace(".parametrizations", "")
    return f"{path}.{node.name}" if path else node.name


def is_linear(node: fx.Node) -> bool:
    """Whether an operation is a convolution, a transposed convolution or a linear layer."""
    return operator_name(node).startswith(("conv", "linear"))
