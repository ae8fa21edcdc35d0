"""Rounds a float32 ONNX graph to fp16 or bf16 by typing it: precision is what the graph says.

TensorRT 11 has no precision flags any more, and onnxruntime's and onnxconverter's float16 tools clip weights and keep
lists of operators. Here every tensor has one type, inputs and outputs stay float32 with one Cast each at the edge, and
a value that does not fit is an error that names its tensor.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from lowprec.errors import ConfigError, UnsupportedError
from lowprec.export.emit.node_types import ELEMENT_TYPES, MOVEMENTS, SCHEMA_TYPES, Keep, type_nodes
from lowprec.export.emit.opset import in_opset, opset_of
from lowprec.export.emit.retype import Rewriter
from lowprec.export.emit.rounding import tensor_loss
from lowprec.export.emit.squares import sums_of_squares
from lowprec.export.external_data import check_model
from lowprec.export.weight_file import WeightFile
from lowprec.formats import FloatFormat
from lowprec.report import ChangeReport

# Conv, pooling and resizing take bfloat16 from this opset on.
_BF16_OPSET = 22
# How a Constant node spells numbers that are no tensor.
_NUMBERS = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}


def convert_precision(
    model: onnx.ModelProto,
    fmt: FloatFormat,
    keep: Keep | None = None,
    *,
    narrow_edges: Collection[str] = (),
    keep_overflowing: bool = False,
    file: WeightFile | None = None,
) -> tuple[onnx.ModelProto, ChangeReport]:
    """A strongly typed copy of a float32 model in a narrower type.

    Args:
        model: float32; other element types in it stay.
        fmt: FP16 or BF16.
        keep: says which nodes stay float32, and why, besides sums of squares.
        narrow_edges: floating inputs and outputs of the graph that are of the narrow type; the others stay float32.
        keep_overflowing: keep the nodes that read a constant which overflows, instead of refusing it.
        file: where large rounded weights go, which the model then refers to.

    Returns:
        The new model; a report with a `changed` row per rounded constant that lost something, a `refused` row per node
        that stays wide, and facts `narrow_nodes`, `casts`, `subnormal`, `vanished` (counts) and `wide` (by the name of
        the node, why).

    Raises:
        ConfigError: `narrow_edges` names something else than a floating input or output.
        UnsupportedError: another format, control flow, or a constant that overflows.
    """
    if fmt.name not in ELEMENT_TYPES:
        raise UnsupportedError(
            f"a graph can be rounded to {' or '.join(ELEMENT_TYPES)}; found {fmt.name}, which needs no conversion or "
            f"another one"
        )
    source = _prepared(model, fmt)
    is_float = _float_values(source)
    _check_edges(source, is_float, narrow_edges)
    overflowing = _overflowing(source, is_float, fmt, all_of_them=keep_overflowing)
    squares = sums_of_squares(source, is_float)

    def stays(node: onnx.NodeProto) -> str | None:
        return (keep(node) if keep else None) or squares.get(node.output[0])

    typing = type_nodes(
        source, is_float, SCHEMA_TYPES[fmt.name], stays, narrow_edges, overflowing, keep_overflowing=keep_overflowing
    )
    rewriter = Rewriter(source, fmt, is_float, typing, narrow_edges, file)
    result = rewriter.run()
    check_model(result)
    return result, rewriter.report


def _prepared(model: onnx.ModelProto, fmt: FloatFormat) -> onnx.ModelProto:
    """A copy in an opset that knows the type, with every constant an initializer and no cast between equal types."""
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    if fmt.name == "bf16" and opset_of(copied) < _BF16_OPSET:
        copied = in_opset(copied, _BF16_OPSET)
    constants = {tensor.name for tensor in copied.graph.initializer}
    inputs = [value for value in copied.graph.input if value.name not in constants]
    del copied.graph.input[:]
    copied.graph.input.extend(inputs)
    _lift_constants(copied.graph)
    del copied.graph.value_info[:]
    return onnx.shape_inference.infer_shapes(copied)


def _check_edges(model: onnx.ModelProto, is_float: dict[str, bool], names: Collection[str]) -> None:
    edges = [value.name for value in (*model.graph.input, *model.graph.output) if is_float.get(value.name)]
    unknown = [name for name in names if name not in edges]
    if unknown:
        raise ConfigError(
            f"asked for {unknown[0]!r} to be narrow; the floating inputs and outputs are {', '.join(edges)}"
        )


def _overflowing(
    model: onnx.ModelProto, is_float: dict[str, bool], fmt: FloatFormat, all_of_them: bool
) -> dict[str, str]:
    """By the name of each constant that overflows, or of those that are moved, what is to be said of its readers."""
    moved = {name for node in model.graph.node if node.op_type in MOVEMENTS for name in node.input}
    tensors = [tensor for tensor in model.graph.initializer if is_float.get(tensor.name)]
    floats = [tensor for tensor in tensors if all_of_them or tensor.name in moved]
    return {t.name: f"its constant '{t.name}' overflows {fmt.name}" for t in floats if tensor_loss(t, fmt).overflow}


def _lift_constants(graph: onnx.GraphProto) -> None:
    """Constant nodes that hold numbers become initializers."""
    kept = []
    for node in graph.node:
        tensor = _constant(node) if node.op_type == "Constant" else None
        if tensor is None:
            kept.append(node)
        else:
            graph.initializer.add().CopyFrom(tensor)
            graph.initializer[-1].name = node.output[0]
    del graph.node[:]
    graph.node.extend(kept)


def _constant(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """The value of a Constant node, or None where it is sparse or text."""
    (attribute,) = node.attribute
    value = helper.get_attribute_value(attribute)
    if isinstance(value, onnx.TensorProto):
        return value
    kind = _NUMBERS.get(attribute.name)
    return None if kind is None else numpy_helper.from_array(np.asarray(value, kind))


def _float_values(model: onnx.ModelProto) -> dict[str, bool]:
    """For each value of known type, whether it is a float32 tensor."""
    graph = model.graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input, *graph.output)}
    types.update({tensor.name: tensor.data_type for tensor in graph.initializer})
    return {name: element == TensorProto.FLOAT for name, element in types.items()}
