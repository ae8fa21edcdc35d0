"""The ONNX operator set: chosen by the caller, and checked afterwards.

torch.onnx and onnx's converter leave a model in the opset that it was in where they cannot convert it, and say so in a
warning at most.
"""

from __future__ import annotations

import onnx
from onnx import version_converter

from lowprec.errors import UnsupportedError

DEFAULT_OPSET = 20  # of modules: the newest that torch.onnx writes by itself

# IR 10 is the newest that every supported onnxruntime (1.20 on) reads; later opsets need their own.
_IR_VERSION = 10


def opset_of(model: onnx.ModelProto) -> int:
    """The version of ONNX's own operator set that a model imports; 0 for none."""
    return next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)


def in_opset(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """The model in another operator set; itself where it is in it already.

    onnx's converter drops the nodes' metadata, which is put back by node name.

    Raises:
        UnsupportedError: onnx cannot convert it.
    """
    if opset_of(model) == opset:
        return model
    try:
        converted: onnx.ModelProto = version_converter.convert_version(model, opset)
    except Exception as error:  # the converter's C++ raises several types without a common base
        lines = str(error).splitlines() or [type(error).__name__]
        raise UnsupportedError(
            f"asked for opset {opset}, and onnx cannot convert the model to it from {opset_of(model)}: {lines[0]}"
        ) from None
    check_opset(converted, opset)
    metadata = {node.name: list(node.metadata_props) for node in model.graph.node}
    for node in converted.graph.node:
        if not node.metadata_props:
            node.metadata_props.extend(metadata.get(node.name, []))
    converted.producer_name, converted.producer_version = model.producer_name, model.producer_version
    converted.ir_version = ir_version_for(converted)
    return converted


def check_opset(model: onnx.ModelProto, opset: int) -> None:
    """Raises `UnsupportedError` if a model is in another operator set than was asked for."""
    if opset_of(model) != opset:
        raise UnsupportedError(
            f"asked for opset {opset}, and the model could not be converted to it from opset {opset_of(model)}; choose "
            f"one from there to {onnx.defs.onnx_opset_version()}"
        )


def ir_version_for(model: onnx.ModelProto) -> int:
    """The oldest version of the file format that is wanted: 10, or what the model's operator sets need."""
    needed = onnx.helper.find_min_ir_version_for(list(model.opset_import), ignore_unknown=True)
    return max(needed, min(model.ir_version, _IR_VERSION))
