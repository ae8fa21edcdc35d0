"""Writes the edits of the neutral graph into a copy of the ONNX model that it was read from.

New constants belong to one node each, since a node that shares an old one with others has to leave it as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper

from lowprec.export.emit.rounding import stored_tensor
from lowprec.export.external_data import move_into
from lowprec.export.float64 import Float64Graph
from lowprec.export.folding.algebra import Array, Stored, transposed
from lowprec.export.folding.from_onnx.assembly import Fresh, Store, assemble
from lowprec.export.folding.from_onnx.operators import RUNNING_NORMS
from lowprec.export.folding.from_onnx.read import OnnxGraph
from lowprec.export.folding.graph import Affine, Linear, Node
from lowprec.export.weight_file import WeightFile

# Gemm needs a bias before this opset.
_GEMM_WITHOUT_BIAS = 11
# Not float64, of which onnxruntime has no convolution, nor bfloat16, of which ONNX has none before opset 22.
_DEPTHWISE_TYPES = (TensorProto.FLOAT, TensorProto.FLOAT16)


def write_onnx(view: OnnxGraph, file: WeightFile | None = None) -> onnx.ModelProto:
    """The model with every edit of the graph in it; equal graphs give equal bytes.

    Args:
        view: a graph that rules have edited; it stays as it is.
        file: where large new constants go, which the model then refers to.

    Raises:
        UnsupportedError: a folded constant overflows in its type.
    """

    def store(values: Stored, element_type: int, name: str) -> TensorProto:
        tensor = stored_tensor(values, element_type, name)
        if file is not None:
            move_into(file, tensor)
        return tensor

    return _Writer(view).run(store)


def exact_graph(view: OnnxGraph) -> Float64Graph:
    """The edited graph with nothing rounded, for a check; new constants are multiplied out where they are read."""
    held: dict[str, Stored] = {}

    def store(values: Stored, element_type: int, name: str) -> TensorProto:
        held[name] = values
        return TensorProto(name=name, data_type=TensorProto.DOUBLE, dims=values.shape)

    return Float64Graph(_Writer(view).run(store), held)


class _Writer:
    """One writing of one graph."""

    def __init__(self, view: OnnxGraph) -> None:
        self._view, self._program = view, view.program
        # What stands at the place of each of the model's nodes.
        self._nodes = [[_copy(node)] for node in view.program.model.graph.node]
        self._names = {name for node in view.program.model.graph.node for name in (*node.input, *node.output)}
        self._edited: set[str] = set()
        self._fresh: dict[str, Fresh] = {}
        self._stands_for: dict[str, str] = {}

    def run(self, store: Store) -> onnx.ModelProto:
        """The written model; `store` makes the tensors of new constants."""
        view = self._view
        for node in view.graph.nodes:
            changed = node in view.graph.changed
            if isinstance(node.op, Linear) and changed:
                self._replace(node, self._linear(node, node.op))
            elif isinstance(node.op, Affine) and (changed or _is_running_norm(node)):
                self._replace(node, self._affine(node, node.op))
        for node, source in view.graph.bypassed.items():
            self._stands_for[view.values[node]] = view.values[source]
            self._replace(node, [])
        nodes = [node for nodes in self._nodes for node in nodes]
        return assemble(self._program, nodes, self._stands_for, self._fresh, self._edited, store)

    def _replace(self, node: Node, fresh: list[onnx.NodeProto]) -> None:
        """Puts nodes where the last node of the model is that a node stands for, and nothing in place of the others."""
        origin = self._view.origin[node]
        for position in origin:
            self._nodes[position] = []
        self._nodes[origin[-1]] = fresh
        self._edited |= {name for made in fresh for name in made.output}

    def _protos(self, node: Node) -> list[onnx.NodeProto]:
        return [self._program.model.graph.node[position] for position in self._view.origin[node]]

    def _linear(self, node: Node, op: Linear) -> list[onnx.NodeProto]:
        old = self._protos(node)[0]
        if old.op_type == "MatMul":
            return self._product(node, op)
        if old.op_type == "Gather":
            table = self._constant(old.input[0], op.stored, old.input[0])
            return [_like(old, "Gather", [table, old.input[1]], old.output, old.attribute)]
        weight, bias = op.stored, op.bias
        # The factors of a Gemm are in the weight and the bias by now.
        attributes = [attribute for attribute in old.attribute if attribute.name not in ("alpha", "beta")]
        if old.op_type == "Gemm":
            weight = weight if any(a.name == "transB" and a.i for a in attributes) else transposed(weight)
            if bias is None and self._program.opset < _GEMM_WITHOUT_BIAS:
                bias = np.zeros(op.channels)
        constants = self._weight_and_bias(old, weight, bias, old.input[2] if len(old.input) > 2 else "")
        return [_like(old, old.op_type, [old.input[0], *constants], old.output, attributes)]

    def _product(self, node: Node, op: Linear) -> list[onnx.NodeProto]:
        """A matrix product, and an addition where it needs a bias; of matrices, both at once."""
        old, *adds = self._protos(node)
        output = self._view.values[node]
        bias_name = next((name for add in adds for name in add.input if name != old.output[0]), "")
        weight, *bias = self._weight_and_bias(old, transposed(op.stored), op.bias, bias_name)
        if not bias:
            return [_like(old, "MatMul", [old.input[0], weight], [output])]
        if not adds and op.axis == 1:
            return [_like(old, "Gemm", [old.input[0], weight, *bias], [output])]
        product = old.output[0] if adds else self._value(f"{output}_product")
        return [
            _like(old, "MatMul", [old.input[0], weight], [product]),
            _like(adds[0] if adds else old, "Add", [product, *bias], [output], suffix="" if adds else "_bias"),
        ]

    def _weight_and_bias(self, old: onnx.NodeProto, weight: Stored, bias: Array | None, bias_name: str) -> list[str]:
        name = old.input[1]
        stem = name.removesuffix("weight") if name.endswith("weight") else f"{name}."
        named = [self._constant(name, weight, name)]
        return named if bias is None else [*named, self._constant(bias_name or f"{stem}bias", bias, name)]

    def _affine(self, node: Node, op: Affine) -> list[onnx.NodeProto]:
        """An affine of images as a depthwise 1x1 convolution, any other as arithmetic: runtimes do these fastest.

        Measured: `python -m tests.benchmarks.leftovers`.
        """
        old, output, source = self._protos(node)[-1], self._view.values[node], self._view.values[node.inputs[0]]
        rank, place = len(node.shape), node.path or old.name or output
        channels = node.shape[1] if rank > 1 else None
        depthwise = 4 <= rank <= 5 and self._program.types[output] in _DEPTHWISE_TYPES
        if op.is_identity:
            self._stands_for[output] = source
            return []
        if depthwise and channels is not None and set(op.axes) <= {1}:
            affine = op.per_channel(channels)
            scale = self._constant(f"{place}.weight", affine.scale.reshape(channels, *[1] * (rank - 1)), output)
            shift = [self._constant(f"{place}.bias", affine.shift, output)] if op.shift.any() else []
            attributes = [helper.make_attribute("group", channels)]
            return [_like(old, "Conv", [source, scale, *shift], [output], attributes)]
        scales, shifts = bool((op.scale != 1).any()), bool(op.shift.any())
        scaled = self._value(f"{output}_scaled") if scales and shifts else output
        nodes = []
        if scales:
            scale = self._constant(f"{place}.weight", op.scale, output)
            nodes.append(_like(old, "Mul", [source, scale], [scaled], suffix="_scale" if shifts else ""))
        if shifts:
            shift = [self._constant(f"{place}.bias", op.shift, output)]
            nodes.append(_like(old, "Add", [scaled if scales else source, *shift], [output]))
        return nodes

    def _constant(self, wish: str, values: Stored, like: str) -> str:
        """The placeholder of a new constant of the same type as another value."""
        key = f"\0{len(self._fresh)}"
        self._fresh[key] = Fresh(wish, values, self._program.types[like])
        return key

    def _value(self, wish: str) -> str:
        """A name for a new value between two nodes."""
        while wish in self._names:
            wish += "_"
        self._names.add(wish)
        return wish


def _is_running_norm(node: Node) -> bool:
    """A norm that stays is written anew too: scale and shift lose less in half precision than its statistics do."""
    return node.kind in RUNNING_NORMS and isinstance(node.op, Affine) and node.op.is_finite


def _copy(node: onnx.NodeProto) -> onnx.NodeProto:
    copied = onnx.NodeProto()
    copied.CopyFrom(node)
    return copied


def _like(
    old: onnx.NodeProto,
    op_type: str,
    inputs: Sequence[str],
    outputs: Sequence[str],
    attributes: Iterable[onnx.AttributeProto] = (),
    suffix: str = "",
) -> onnx.NodeProto:
    """A node that takes the place of another one and says so: its name and its module path."""
    made = helper.make_node(op_type, inputs, outputs, name=f"{old.name}{suffix}" if old.name else "")
    made.attribute.extend(attributes)
    made.metadata_props.extend(old.metadata_props)
    return made
