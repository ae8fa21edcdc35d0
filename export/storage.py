"""Reads from an ONNX model how it stores its values: which are half, which float32, which are multiples of a step."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from lowprec.errors import UnsupportedError
from lowprec.export.external_data import array_of, weights_as_inputs
from lowprec.export.float64 import EXACT_OPS
from lowprec.export.parity.storage import Storage, format_of_precision
from lowprec.formats import BF16, FP16, FP32, FP64, FloatFormat

_FORMATS: dict[int, FloatFormat] = {
    TensorProto.DOUBLE: FP64,
    TensorProto.FLOAT: FP32,
    TensorProto.FLOAT16: FP16,
    TensorProto.BFLOAT16: BF16,
}


def storage_of(model: onnx.ModelProto, precision: str | None = None) -> Storage:
    """How a model stores its values, by the names that they have in the float32 model that it was made from.

    A value that is there in two types counts as narrow, since half of its readers see it so. `lowprec` calls the second
    copy of a value `NAME_fp16` (see `emit.retype`); Q/DQ pairs stand behind the value that they quantise.

    Args:
        model: weights included.
        precision: what it is called; by default int8 where it quantises, else the narrowest type that it stores.

    Raises:
        UnsupportedError: a quantisation step that is computed, or of blocks.
    """
    types = _types(model)
    steps = _steps(model)
    narrowest = min({_FORMATS[kind] for kind in types.values()} or {FP32}, key=lambda fmt: fmt.precision)
    name = precision or ("int8" if steps else narrowest.name)
    stored = format_of_precision(name)
    if stored in (FP32, FP64):
        return Storage(name, stored, steps=steps)
    narrow = _narrow_names(model, types, stored)
    wide = frozenset(value for value, kind in types.items() if kind == TensorProto.FLOAT and value not in narrow)
    return Storage(name, stored, wide, steps)


def _types(model: onnx.ModelProto) -> dict[str, int]:
    """Element type of every floating value."""
    graph = onnx.shape_inference.infer_shapes(weights_as_inputs(model)).graph
    found = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input, *graph.output)}
    found |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    return {name: kind for name, kind in found.items() if kind in _FORMATS}


def _narrow_names(model: onnx.ModelProto, types: dict[str, int], stored: FloatFormat) -> set[str]:
    found = {name for name, kind in types.items() if _FORMATS[kind] is stored}
    suffix = f"_{stored.name}"
    found |= {name.rstrip("_").removesuffix(suffix) for name in found}
    for node in model.graph.node:
        if node.op_type == "Cast" and (node.input[0] in found or node.output[0] in found):
            found |= {node.input[0], node.output[0]}
    return found


def _steps(model: onnx.ModelProto) -> dict[str, NDArray[np.float64]]:
    """The steps of values that are quantised; not of those that come, unchanged, from one of the same step."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    ranks = {tensor.name: len(tensor.dims) for tensor in model.graph.initializer}
    found: dict[str, NDArray[np.float64]] = {}
    quantised: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            found[node.input[0]] = _step(node, constants, ranks.get(node.input[0], 0))
            quantised[node.output[0]] = node.input[0]
        elif node.op_type == "DequantizeLinear" and node.input[0] in quantised:
            found[node.output[0]] = found[quantised[node.input[0]]]  # an output of the network bears its name here
        elif node.op_type == "DequantizeLinear" and node.input[0] in constants:
            # Of a weight that is stored quantised the float32 model has the values under the result's name, or the
            # name that onnxruntime's quantiser derives the stored one from.
            step = _step(node, constants, ranks[node.input[0]])
            found[node.output[0]] = found[node.input[0].removesuffix("_quantized")] = step
    makers = {name: node for node in model.graph.node for name in node.output}
    return {name: step for name, step in found.items() if not _comes_quantised(name, step, found, makers)}


def _step(node: onnx.NodeProto, constants: dict[str, TensorProto], rank: int) -> NDArray[np.float64]:
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    if node.input[1] not in constants or attributes.get("block_size"):
        raise UnsupportedError(
            f"node {node.name!r} ({node.op_type}) has a scale that is computed, or one per block, and its rounding "
            "noise is not known; quantise per tensor or per channel, with constants"
        )
    scale = np.asarray(array_of(constants[node.input[1]]), np.float64)
    if scale.size == 1:
        return scale.reshape(())
    axis = int(attributes.get("axis", 1)) % max(rank, 1)
    return scale.reshape([-1 if index == axis else 1 for index in range(rank)])


def _comes_quantised(
    name: str, step: NDArray[np.float64], found: dict[str, NDArray[np.float64]], makers: dict[str, Any]
) -> bool:
    """Whether a value was only moved or selected from one that is stored in the same steps already."""
    node = makers.get(name)
    if node is None or node.op_type not in EXACT_OPS:
        return False
    source = makers.get(node.input[0])
    if source is None or source.op_type != "DequantizeLinear" or source.input[0] not in makers:
        return False
    before = found.get(makers[source.input[0]].input[0])
    return before is not None and np.array_equal(before, step)
