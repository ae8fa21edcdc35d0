"""Rounds a float32 ONNX graph to fp16 or bf16 by typing it: precision is what the graph says.

TensorRT 11 has no precision flags any more, and onnxruntime's and onnxconverter's float16 tools clip weights and keep
lists of operators. Here every tensor has one type, inputs and outputs stay float32 with one Cast each at the edge, and
a value that does not fit is an error that names its tensor.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto, version_converter

from lowprec.errors import UnsupportedError
from lowprec.export.emit.node_types import ELEMENT_TYPES, SCHEMA_TYPES, Keep, type_nodes
from lowprec.export.emit.retype import Rewriter
from lowprec.export.external_data import check_model
from lowprec.formats import FloatFormat
from lowprec.report import ChangeReport

# Conv, pooling and resizing take bfloat16 from this opset on.
_BF16_OPSET = 22


def convert_precision(
    model: onnx.ModelProto, fmt: FloatFormat, keep: Keep | None = None
) -> tuple[onnx.ModelProto, ChangeReport]:
    """A strongly typed copy of a float32 model in a narrower type.

    Args:
        model: float32; other element types in it stay.
        fmt: FP16 or BF16.
        keep: says which nodes stay float32.

    Returns:
        The new model; a report with a `changed` row per rounded constant that lost something, a `refused` row per node
        that stays wide, and facts `narrow_nodes`, `wide_nodes`, `casts`, `subnormal`, `vanished` (counts of values).

    Raises:
        UnsupportedError: another format, control flow, or a constant that overflows.
    """
    if fmt.name not in ELEMENT_TYPES:
        raise UnsupportedError(
            f"a graph can be rounded to {' or '.join(ELEMENT_TYPES)}; found {fmt.name}, which needs no conversion or "
            f"another one"
        )
    source = _prepared(model, fmt)
    is_float = _float_values(source)
    typing = type_nodes(source, is_float, SCHEMA_TYPES[fmt.name], keep)
    rewriter = Rewriter(source, fmt, is_float, typing)
    result = rewriter.run()
    check_model(result)
    return result, rewriter.report


def _prepared(model: onnx.ModelProto, fmt: FloatFormat) -> onnx.ModelProto:
    """A copy in an opset that knows the type, with every constant an initializer and no cast between equal types."""
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    opset = next((entry.version for entry in copied.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if fmt.name == "bf16" and opset < _BF16_OPSET:
        copied = _in_opset(copied, _BF16_OPSET)
    constants = {tensor.name for tensor in copied.graph.initializer}
    inputs = [value for value in copied.graph.input if value.name not in constants]
    del copied.graph.input[:]
    copied.graph.input.extend(inputs)
    _lift_constants(copied.graph)
    del copied.graph.value_info[:]
    return onnx.shape_inference.infer_shapes(copied)


def _in_opset(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """The model in a newer opset; onnx's converter drops the nodes' metadata, which is put back by node name."""
    try:
        converted: onnx.ModelProto = version_converter.convert_version(model, opset)
    except Exception as error:  # the converter's C++ raises several types without a common base
        raise UnsupportedError(
            f"bf16 needs opset {opset}, and onnx cannot convert the model to it: {str(error).splitlines()[0]}"
        ) from None
    metadata = {node.name: list(node.metadata_props) for node in model.graph.node}
    for node in converted.graph.node:
        if not node.metadata_props:
            node.metadata_props.extend(metadata.get(node.name, []))
    converted.producer_name, converted.producer_version = model.producer_name, model.producer_version
    return converted


def _lift_constants(graph: onnx.GraphProto) -> None:
    """Constant nodes that hold a tensor become initializers."""
    kept = []
    for node in graph.node:
        value = next((attribute.t for attribute in node.attribute if attribute.name == "value"), None)
        if node.op_type == "Constant" and value is not None:
            graph.initializer.add().CopyFrom(value)
            graph.initializer[-1].name = node.output[0]
        else:
            kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)


def _float_values(model: onnx.ModelProto) -> dict[str, bool]:
    """For each value of known type, whether it is a float32 tensor."""
    graph = model.graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input, *graph.output)}
    types.update({tensor.name: tensor.data_type for tensor in graph.initializer})
    return {name: element == TensorProto.FLOAT for name, element in types.items()}
