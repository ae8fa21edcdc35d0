"""Finds what a graph computes from sums of squares, which half precision cannot hold: a norm that was spelled out.

A half square is infinite from 256 on and 0 below 1.7e-4, and its mean over a map or a row decides the size of all that
is divided by it. On a CPU onnxruntime computes half in float32, so nothing shows there; a device does not. So a square
that is summed, its sum and what is computed of that alone stay wide, up to and including the node where it meets the
activations again. Operators that are a whole norm (LayerNormalization, RMSNormalization, ...) are defined with sums in
float32, and stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

_SUMS = frozenset({"ReduceMean", "ReduceSum", "GlobalAveragePool", "AveragePool"})
_SUMS_OF_SQUARES = frozenset({"ReduceL2", "ReduceSumSquare"})
# What may stand between the sum and its use: one value for each, by itself or with a constant.
_OF_ONE_VALUE = frozenset(
    {"Abs", "Add", "Cast", "Clip", "Div", "Expand", "Identity", "Max", "Mul", "Neg", "Pow", "Reciprocal", "Reshape"}
    | {"Sqrt", "Squeeze", "Sub", "Unsqueeze"}
)
_USES = frozenset({"Add", "Div", "Mul", "Sub"})


def sums_of_squares(model: onnx.ModelProto, is_float: Mapping[str, bool]) -> dict[str, str]:
    """By the first output of each node that has to do with a sum of squares, why it stays wide.

    Args:
        model: nodes in order of evaluation, constants as initializers.
        is_float: for each value, whether it is float32.
    """
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    wide: dict[str, str] = {}
    sums: set[str] = set()  # values that are computed of a sum of squares and constants alone
    for node in graph.node:
        if not is_float.get(node.output[0]):
            continue
        activations = [name for name in node.input if is_float.get(name) and name not in constants]
        if _is_square(node, constants) and any(one.op_type in _SUMS for one in readers.get(node.output[0], ())):
            wide[node.output[0]] = "squares values that are summed, and a half square overflows from 256 on"
            sums.update(reader.output[0] for reader in readers[node.output[0]] if reader.op_type in _SUMS)
        elif node.op_type in _SUMS_OF_SQUARES or _is_of_sums(node, activations, sums):
            sums.add(node.output[0])
        elif node.op_type in _USES and any(name in sums for name in activations):
            wide[node.output[0]] = "reads a sum of squares, which stays wide"
        if node.output[0] in sums:
            wide[node.output[0]] = "computes a sum of squares, or something of it, and half does not hold it"
    return wide


def _is_of_sums(node: onnx.NodeProto, activations: list[str], sums: set[str]) -> bool:
    return node.op_type in _OF_ONE_VALUE and bool(activations) and all(name in sums for name in activations)


def _is_square(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> bool:
    if node.op_type == "Mul":
        return bool(node.input[0] == node.input[1])
    if node.op_type != "Pow" or node.input[1] not in constants:
        return False
    exponent: NDArray[Any] = numpy_helper.to_array(constants[node.input[1]])
    return exponent.size == 1 and bool(exponent.item() == 2)
