"""What onnxruntime really computes in, read from the graph that it made of a model.

It computes half-precision operators that a device lacks in float32 between casts, and it fuses Q/DQ pairs into integer
operators or leaves them, without a word.
"""

from __future__ import annotations

from collections import Counter

import onnx
from onnx import TensorProto

from lowprec.export.onnx_files import graphs_of

# Operators whose sums decide the error of a network; Fused* are onnxruntime's own fusions of them.
FLOAT_PRODUCTS = frozenset({"Conv", "ConvTranspose", "FusedConv", "FusedGemm", "FusedMatMul", "Gemm", "MatMul"})
INTEGER_PRODUCTS = frozenset({"ConvInteger", "MatMulInteger", "QGemm", "QLinearConv", "QLinearMatMul"})
PRODUCT_OPS = FLOAT_PRODUCTS | INTEGER_PRODUCTS
_HALVES = {TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}


def half_types(model: onnx.ModelProto) -> set[str]:
    """Which half formats a model declares, in weights, inputs, outputs or casts."""
    found = set()
    for graph in graphs_of(model):
        found |= {tensor.data_type for tensor in graph.initializer}
        found |= {value.type.tensor_type.elem_type for value in [*graph.input, *graph.output, *graph.value_info]}
        for node in graph.node:
            found |= {attribute.i for attribute in node.attribute if node.op_type == "Cast" and attribute.name == "to"}
            found |= {attribute.t.data_type for attribute in node.attribute if attribute.HasField("t")}
    return {_HALVES[kind] for kind in found if kind in _HALVES}


def narrow_storage(model: onnx.ModelProto) -> set[str]:
    """What a model declares to store values in beside float32 and wider: half formats, and int8 behind Q/DQ pairs."""
    quantises = any(node.op_type == "DequantizeLinear" for graph in graphs_of(model) for node in graph.node)
    return half_types(model) | ({"int8"} if quantises else set())


def product_types(optimised: onnx.ModelProto) -> Counter[str]:
    """How many convolutions and matrix products of an optimised graph compute in each element type.

    The type of a node is that of its first input: of the weight, graph input or value of that name, else of the Cast
    that made it, else of whatever the operator before it computes in (same type in, same type out).
    """
    types: dict[str, int] = {tensor.name: tensor.data_type for tensor in optimised.graph.initializer}
    for value in [*optimised.graph.input, *optimised.graph.value_info, *optimised.graph.output]:
        types.setdefault(value.name, value.type.tensor_type.elem_type)
    found: Counter[str] = Counter()
    for node in optimised.graph.node:
        casts = [attribute.i for attribute in node.attribute if node.op_type == "Cast" and attribute.name == "to"]
        known = [types[name] for name in node.input if types.get(name)]
        kind = casts[0] if casts else known[0] if known else TensorProto.UNDEFINED
        for name in node.output:
            types[name] = types.get(name) or kind
        if node.op_type in INTEGER_PRODUCTS:
            found["int8"] += 1
        elif node.op_type in FLOAT_PRODUCTS:
            found[TensorProto.DataType.Name(known[0] if known else TensorProto.UNDEFINED).lower()] += 1
    return found


def describe(stored: set[str], computed: Counter[str] | None, device: str = "on the CPU") -> str:
    """The arithmetic in words.

    Args:
        stored: the narrow formats that the model declares.
        computed: how many products compute in each element type; None where that could not be read.
        device: where.
    """
    if not stored:
        return f"the types that the graph declares, {device}"
    storage = " and ".join(sorted(stored))
    if computed is None:
        return f"{storage} storage {device}; the graph is too large to read back what its products compute in"
    if not computed:
        return f"{storage} storage {device}; the graph holds no convolution or matrix product"
    counts = ", ".join(f"{count} in {kind}" for kind, count in sorted(computed.items()))
    between = "Q/DQ pairs" if stored == {"int8"} else "casts"
    if set(computed) == {"float"}:
        return f"{storage} storage, float32 arithmetic between {between}, {device} (products: {counts})"
    return f"{storage} storage {device} (products: {counts})"
