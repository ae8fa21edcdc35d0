"""Rewrites an ONNX model so that every number it declares is float64, and says what each of its values is.

Why on the graph and not by casting feeds: a half model casts at its edges and a float32 model holds float32 constants,
so onnx's evaluator, which follows the declared types, would round at each of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from lowprec.errors import UnsupportedError
from lowprec.export.external_data import without_weights
from lowprec.export.onnx_files import graphs_of

WIDENED = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE})
RANDOM_OPS = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)
# onnx's reference computes these through float32 whatever it is given, so it has no float64 truth to offer.
NARROW_OPS = frozenset({"AffineGrid", "CausalConvWithState", "GridSample", "LinearAttention"})
# Operators whose definition makes an output float32 whatever comes in: the scale is rounded for every backend alike.
FLOAT32_BY_DEFINITION = frozenset({"DynamicQuantizeLinear"})
# Integer attributes that hold a type. (RMSNormalization's and LayerNormalization's stash_type is not among them: onnx's
# evaluator accepts 1 alone and computes in the type of its input.)
_TYPE_ATTRIBUTES = frozenset({"to", "dtype", "output_dtype", "output_datatype", "precision", "softmax_precision"})

# Operators that move, select or retype values: their results are stored values already and are not rounded again.
EXACT_OPS = frozenset(
    {
        "Abs", "Cast", "CastLike", "Ceil", "Clip", "Compress", "Concat", "ConcatFromSequence", "Constant",
        "ConstantOfShape", "DepthToSpace", "Expand", "EyeLike", "Flatten", "Floor", "Gather", "GatherElements",
        "GatherND", "GlobalMaxPool", "Identity", "Max", "MaxPool", "Min", "Neg", "NonZero",
        "OneHot", "Pad", "Range", "ReduceMax", "ReduceMin", "Relu", "Reshape", "ReverseSequence", "Round",
        "ScatterElements", "ScatterND", "SequenceAt", "SequenceConstruct", "Shape", "Sign", "Size", "Slice",
        "SpaceToDepth", "Split", "SplitToSequence", "Squeeze", "Tile", "TopK", "Transpose", "Trilu", "Unsqueeze",
        "Where",
    }
)  # fmt: skip
# Inputs that decide shapes or counts although they are floats: a relative error there changes the size of the result.
_SIZE_INPUTS = {"Range": (0, 1, 2), "Resize": (1, 2), "Upsample": (1,)}


def float64_model(model: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, TensorProto]]:
    """A float64 copy of the model without its weights, and the weights as they are.

    Local functions are inlined, so that each of their nodes is seen. Float32, float16, bfloat16 and float64 become
    float64; integers, booleans, strings and 8-bit floats stay.

    Raises:
        UnsupportedError: the graph draws random numbers, or holds an operator with no float64 evaluation.
    """
    inlined = onnx.inliner.inline_local_functions(model) if model.functions else model
    if inlined.graph.sparse_initializer:
        name = inlined.graph.sparse_initializer[0].values.name
        raise UnsupportedError(f"the weight {name!r} is stored sparsely, which onnx's reference cannot read; unpack it")
    weights = {tensor.name: tensor for tensor in inlined.graph.initializer}
    false = _says_false(inlined.graph)
    copy = without_weights(inlined)
    for graph in graphs_of(copy):
        for node in graph.node:
            _check_node(node, false)
            _widen_node(node)
        for index, tensor in enumerate(graph.initializer):
            graph.initializer[index].CopyFrom(_widened_tensor(tensor))
        for value in [*graph.input, *graph.output, *graph.value_info]:
            if value.type.tensor_type.elem_type in WIDENED:
                value.type.tensor_type.elem_type = TensorProto.DOUBLE
    return copy, weights


def widened(array: NDArray[Any]) -> NDArray[Any]:
    """The array in float64 if it holds float16, bfloat16, float32 or float64; the array itself otherwise."""
    return array.astype(np.float64) if onnx.helper.np_dtype_to_tensor_dtype(array.dtype) in WIDENED else array


def _says_false(graph: onnx.GraphProto) -> set[str]:
    """Constants that hold nothing but False and that no caller may override: the mode of a dropout that is off."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
            tensors[node.output[0]] = node.attribute[0].t
    for value in graph.input:
        tensors.pop(value.name, None)
    bools = {name: tensor for name, tensor in tensors.items() if tensor.data_type == TensorProto.BOOL}
    return {name for name, tensor in bools.items() if not numpy_helper.to_array(tensor).any()}


def _check_node(node: onnx.NodeProto, false: set[str]) -> None:
    name = node.name or (node.output[0] if node.output else "?")
    drops = node.op_type == "Dropout" and len(node.input) > 2 and node.input[2] not in {"", *false}
    if node.op_type in RANDOM_OPS or drops:
        raise UnsupportedError(
            f"node {name!r} ({node.op_type}) draws random numbers, so the network has no one answer to compare; "
            "export it in evaluation mode"
        )
    if node.op_type in NARROW_OPS and node.domain in ("", "ai.onnx"):
        raise UnsupportedError(
            f"node {name!r} ({node.op_type}) cannot be evaluated in float64: onnx's reference computes it in float32"
        )


def _widened_tensor(tensor: TensorProto) -> TensorProto:
    if tensor.data_type not in WIDENED:
        return tensor
    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name)


def _widen_node(node: onnx.NodeProto) -> None:
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.TENSOR:
            attribute.t.CopyFrom(_widened_tensor(attribute.t))
        elif attribute.name in _TYPE_ATTRIBUTES and attribute.i in WIDENED:
            attribute.i = TensorProto.DOUBLE
    if node.op_type == "Constant" and node.attribute and node.attribute[0].name in ("value_float", "value_floats"):
        value = np.asarray(onnx.helper.get_attribute_value(node.attribute[0]), np.float64)
        del node.attribute[:]
        node.attribute.append(onnx.helper.make_attribute("value", numpy_helper.from_array(value)))
    if node.op_type == "ConstantOfShape" and not node.attribute:
        node.attribute.append(onnx.helper.make_attribute("value", numpy_helper.from_array(np.zeros(1))))


def size_names(model: onnx.ModelProto) -> frozenset[str]:
    """Names of values that decide shapes and counts rather than being data: these are never perturbed.

    Backwards from every input that takes only whole numbers, or is listed as deciding a size, through everything that
    does not depend on the *values* of the graph's inputs (a shape read from an input is not a value of it).
    """
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    weights = {tensor.name for tensor in model.graph.initializer}
    data = {value.name for value in model.graph.input} - weights
    for node in model.graph.node:
        if node.op_type not in ("Shape", "Size") and any(name in data for name in node.input):
            data |= set(node.output)
    found: set[str] = set()
    for node in reversed(model.graph.node):
        reads_all = any(name in found for name in node.output) and node.op_type not in ("Shape", "Size")
        for index, name in enumerate(node.input):
            if name and name not in data and (reads_all or _decides_size(node, index, opsets)):
                found.add(name)
    return frozenset(found)


def _decides_size(node: onnx.NodeProto, index: int, opsets: dict[str, int]) -> bool:
    if index in _SIZE_INPUTS.get(node.op_type, ()):
        return True
    version = opsets.get(node.domain, opsets.get("", 0))
    try:
        inputs = onnx.defs.get_schema(node.op_type, version, node.domain).inputs
    except onnx.defs.SchemaError:
        return False
    # A variadic last input stands for all that follow.
    schema = inputs[min(index, len(inputs) - 1)] if inputs else None
    return schema is not None and not any("float" in kind or "double" in kind for kind in schema.types)


def terms_per_element(node: onnx.NodeProto, inputs: Sequence[Any], output: Any) -> int:
    """How many terms are added up for each element of a node's output.

    0: values are only moved or selected, nothing is rounded. 1: elementwise arithmetic. K > 1: a reduction of length K
    (products of a convolution or matrix product, the mean and variance of a norm, the denominator of a softmax).
    """
    if node.op_type in EXACT_OPS:
        return 0
    sizes = [tuple(int(size) for size in getattr(value, "shape", ())) for value in inputs]
    first = sizes[0] if sizes else ()
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    match node.op_type:
        case "Conv":
            return math.prod(sizes[1][1:])
        case "ConvTranspose":
            return math.prod(sizes[1]) // (sizes[1][1] * int(attributes.get("group", 1)))
        case "MatMul":
            return first[-1] if first else 1
        case "Gemm":
            return first[0 if attributes.get("transA") else -1]
        case "AveragePool" | "LpPool":
            return math.prod(attributes["kernel_shape"])
        case "Softmax" | "LogSoftmax":
            return first[attributes.get("axis", -1)] if first else 1
        case "LayerNormalization" | "RMSNormalization":
            return math.prod(first[attributes.get("axis", -1) :])
        case "InstanceNormalization" | "GroupNormalization":
            return math.prod(first[1:]) // max(1, int(attributes.get("num_groups", first[1])))
        case "LSTM" | "GRU" | "RNN":
            return first[0] * (sizes[1][2] + sizes[2][2])
        case "Attention":
            return first[-1] + sizes[1][-2]
        case "Einsum":
            return _einsum_terms(attributes["equation"].decode(), sizes)
        case name if name.startswith("Reduce") or name in ("GlobalAveragePool", "Mean", "Sum"):
            summed = sum(math.prod(size) for size in sizes[: _data_inputs(node)])
            return max(1, summed // max(1, int(np.size(output))))
        case "CumSum":
            return math.prod(first)
        case _:
            return 1


def _data_inputs(node: onnx.NodeProto) -> int:
    """How many of a reduction's inputs are data: all of a variadic sum's, the first of the others (then come axes)."""
    return len(node.input) if node.op_type in ("Mean", "Sum") else 1


def _einsum_terms(equation: str, shapes: Sequence[Sequence[int]]) -> int:
    left, _, right = equation.replace(" ", "").partition("->")
    if "..." in equation or not right:
        return 1
    sizes = {
        letter: size
        for letters, shape in zip(left.split(","), shapes, strict=True)
        for letter, size in zip(letters, shape, strict=True)
    }
    return math.prod(size for letter, size in sizes.items() if letter not in right)
