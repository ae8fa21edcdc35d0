"""Types and shapes of an ONNX graph: onnx's inference, helped where it gives up.

onnx leaves a length open that a reshape computes as "the rest" where a free length is on both sides, although that one
cancels. Views of a batch are written so by every exporter, and a channel axis of unknown length folds nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper

from lowprec.errors import UnsupportedError
from lowprec.export.onnx_files import first_line

Dims = tuple[int | str | None, ...]
"""A length, the name of a free one, or nothing known."""

# Constants up to this many elements take part in inference by value.
_SMALL = 1024


@dataclass(frozen=True)
class Inferred:
    """What inference found, by name.

    Args:
        types: element types.
        dims: lengths.
    """

    types: dict[str, int]
    dims: dict[str, Dims]


def infer_shapes(model: onnx.ModelProto, constants: Mapping[str, TensorProto], computed: Collection[str]) -> Inferred:
    """Types and shapes of all values.

    Args:
        model: its own value infos and the shapes of its outputs are not believed.
        constants: values that are known.
        computed: values whose nodes are left out, because they are known or of no interest.

    Raises:
        UnsupportedError: onnx finds the graph inconsistent.
    """
    nodes = [node for node in model.graph.node if node.output[0] not in computed]
    reshapes = [node for node in nodes if node.op_type == "Reshape"]
    known: dict[str, onnx.ValueInfoProto] = {}
    while True:
        found = _inferred(model, nodes, constants, known.values())
        count = len(known)
        for node in reshapes:
            name = node.output[0]
            before, after = found.dims.get(node.input[0]), found.dims.get(name)
            rest = _rest(before, after) if before and after and name not in known else None
            if rest is not None:
                known[name] = helper.make_tensor_value_info(name, found.types[name], rest)
        if len(known) == count:
            return found


def _inferred(
    model: onnx.ModelProto,
    nodes: list[onnx.NodeProto],
    constants: Mapping[str, TensorProto],
    known: Iterable[onnx.ValueInfoProto],
) -> Inferred:
    """onnx's inference on a copy without large constants, which it does not read."""
    copied = onnx.ModelProto()
    copied.ir_version = model.ir_version
    copied.opset_import.extend(model.opset_import)
    graph = copied.graph
    graph.name = "inferred"
    graph.node.extend(nodes)
    graph.input.extend(model.graph.input)
    for value in graph.input:
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if not dim.HasField("dim_value") and not dim.dim_param:
                dim.dim_param = f"{value.name}, axis {axis}"
    for value in model.graph.output:
        graph.output.add(name=value.name).type.tensor_type.elem_type = value.type.tensor_type.elem_type
    types: dict[str, int] = {name: tensor.data_type for name, tensor in constants.items()}
    dims: dict[str, Dims] = {name: tuple(tensor.dims) for name, tensor in constants.items()}
    for name, tensor in constants.items():
        if np.prod(tensor.dims) <= _SMALL:
            graph.initializer.add().CopyFrom(tensor)
        else:
            graph.input.append(helper.make_tensor_value_info(name, tensor.data_type, tensor.dims))
    graph.value_info.extend(known)
    try:
        inferred = onnx.shape_inference.infer_shapes(copied, data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError) as error:
        raise UnsupportedError(f"onnx cannot infer the shapes of this model: {first_line(error)}") from None
    for value in (*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output):
        kind = value.type.tensor_type
        if kind.elem_type:
            types[value.name] = kind.elem_type
        if kind.HasField("shape"):
            dims[value.name] = tuple(_length(dim) for dim in kind.shape.dim)
    return Inferred(types, dims)


def _length(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    return dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None


def _rest(before: Dims, after: Dims) -> Dims | None:
    """The result of a reshape with its one open length filled in; None where there is none, or it does not come out."""
    if None in before:
        return None
    open_axes = [axis for axis, length in enumerate(after) if not isinstance(length, int) and length not in before]
    if len(open_axes) != 1:
        return None
    names = Counter(length for length in before if isinstance(length, str))
    others = [length for axis, length in enumerate(after) if axis != open_axes[0]]
    taken = Counter(length for length in others if isinstance(length, str))
    total = math.prod(length for length in before if isinstance(length, int))
    size = math.prod(length for length in others if isinstance(length, int))
    left = [*(names - taken).elements()]
    if taken - names or not size or total % size or (left and (len(left) > 1 or total != size)):
        return None
    length = left[0] if left else total // size
    return tuple(length if axis == open_axes[0] else known for axis, known in enumerate(after))
