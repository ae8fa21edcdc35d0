"""Decides, for every node of a float32 ONNX graph, which of its tensors become narrow.

The operators' own schemas say which types they take, so no list of "fp16-safe" operators is kept here: a list goes
stale with each opset, the schemas don't. What an operator may take as narrow it takes as narrow, unless asked to stay
wide; operations that only move data have no opinion and follow their input, so that two wide nodes with a reshape
between them are not rounded in passing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import onnx
from onnx import TensorProto
from onnx.defs import OpSchema

from lowprec.errors import UnsupportedError

Keep = Callable[[onnx.NodeProto], str | None]
"""Says why a node stays wide, or None."""

# They hand values on without arithmetic, so their type is that of the first float input.
MOVEMENTS = frozenset(
    {"Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Reshape"}
    | {"Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "TopK", "Transpose", "Unsqueeze"}
)
# Their result's type is an attribute whose change would change what they compute or draw.
_TYPED_BY_ATTRIBUTE = frozenset(
    {"Bernoulli", "EyeLike", "Multinomial", "QuantizeLinear", "DequantizeLinear"}
    | {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)
_GRAPH_ATTRIBUTES = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
# By the format's name: the element type in a graph, and the type as operator schemas spell it.
ELEMENT_TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
SCHEMA_TYPES = {"fp16": "tensor(float16)", "bf16": "tensor(bfloat16)"}


@dataclass
class Typing:
    """Which tensors of which nodes are narrow.

    Args:
        inputs: for each node, by position, whether each float input is taken as narrow; None for other inputs.
        outputs: likewise for the outputs.
        wide: why a node with float tensors stays wide, by its position.
    """

    inputs: list[list[bool | None]] = field(default_factory=list)
    outputs: list[list[bool | None]] = field(default_factory=list)
    wide: dict[int, str] = field(default_factory=dict)


def type_nodes(
    model: onnx.ModelProto,
    is_float: Mapping[str, bool],
    narrow: str,
    keep: Keep | None,
    narrow_edges: Collection[str] = (),
) -> Typing:
    """Types every node of a graph.

    Args:
        model: nodes in order of evaluation.
        is_float: for each value, whether it is float32 in the given model.
        narrow: the narrow type as schemas spell it (`tensor(float16)`).
        keep: nodes that stay wide.
        narrow_edges: inputs and outputs of the graph that are narrow.

    Raises:
        UnsupportedError: a node holds a graph of its own (If, Loop, Scan).
    """
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    reasons = {}
    for position, node in enumerate(model.graph.node):
        _refuse_inner_graphs(node)
        reasons[position] = _reason(node, _schema(node, opsets), narrow, keep) or _unknown_input(node, is_float)
    neighbours = _Neighbours(model, is_float, reasons, narrow_edges)
    typing = Typing()
    narrow_values: dict[str, bool | None] = {
        value.name: True if value.name in narrow_edges else None
        for value in model.graph.input
        if is_float.get(value.name)
    }
    for position, node in enumerate(model.graph.node):
        schema, reason = _schema(node, opsets), reasons[position]
        if reason is None and (_follows(node, is_float) or not any(map(is_float.get, node.input))):
            reason = neighbours.why_wide(node, narrow_values)
        inputs = _allowed(node.input, schema.inputs if schema else (), is_float, narrow, reason is None)
        outputs = _allowed(node.output, schema.outputs if schema else (), is_float, narrow, reason is None)
        narrow_values.update(
            (name, value) for name, value in zip(node.output, outputs, strict=True) if value is not None
        )
        typing.inputs.append(inputs)
        typing.outputs.append(outputs)
        if reason is not None and any(value is not None for value in (*inputs, *outputs)):
            typing.wide[position] = reason
    return typing


class _Neighbours:
    """What stands before and behind nodes that compute nothing: there values must not be rounded in passing."""

    def __init__(
        self,
        model: onnx.ModelProto,
        is_float: Mapping[str, bool],
        reasons: Mapping[int, str | None],
        narrow_edges: Collection[str],
    ) -> None:
        self._is_float = is_float
        self._outputs = {value.name: value.name not in narrow_edges for value in model.graph.output}
        self._readers: dict[str, list[tuple[onnx.NodeProto, bool]]] = {}
        for position, node in enumerate(model.graph.node):
            for name in dict.fromkeys(node.input):
                self._readers.setdefault(name, []).append((node, reasons[position] is not None))

    def why_wide(self, node: onnx.NodeProto, narrow_values: Mapping[str, bool | None]) -> str | None:
        """Why a node that computes nothing stays wide, or None.

        It follows its inputs where they agree, else its readers.

        Args:
            node: it.
            narrow_values: type of each value before it, None for an input of the graph that is there in either.
        """
        before = {name: narrow_values[name] for name in node.input if name in narrow_values}
        types = set(before.values())
        if types == {True}:
            return None
        wide = next((name for name, narrow in before.items() if narrow is False), None)
        if True not in types and wide is not None:
            return f"computes nothing from '{wide}', which is wide"
        makes_floats = any(self._is_float.get(name) for name in node.output)
        if (before and not makes_floats) or (makes_floats and all(map(self._read_wide, node.output))):
            return "computes nothing, and all that reads it is wide"
        return None

    def _read_wide(self, name: str) -> bool:
        readers = self._readers.get(name, [])
        wide = all(
            is_wide or (_follows(node, self._is_float) and all(map(self._read_wide, node.output)))
            for node, is_wide in readers
        )
        return wide and self._outputs.get(name, True) and bool(readers or name in self._outputs)


def _refuse_inner_graphs(node: onnx.NodeProto) -> None:
    if any(attribute.type in _GRAPH_ATTRIBUTES for attribute in node.attribute):
        raise UnsupportedError(
            f"node '{node.name}' ({node.op_type}) holds a graph of its own, which is not rounded to a narrower type; "
            f"export the network without control flow"
        )


def _follows(node: onnx.NodeProto, is_float: Mapping[str, bool]) -> bool:
    """Whether a node does no float arithmetic: it moves values, or makes decisions or integers of them."""
    makes_floats = any(is_float.get(name) for name in node.output)
    return node.op_type in MOVEMENTS or not makes_floats or is_idle_cast(node, is_float)


def is_idle_cast(node: onnx.NodeProto, is_float: Mapping[str, bool]) -> bool:
    """Whether a node casts float32 to float32."""
    return node.op_type == "Cast" and bool(is_float.get(node.input[0]) and is_float.get(node.output[0]))


def _unknown_input(node: onnx.NodeProto, is_float: Mapping[str, bool]) -> str | None:
    """A reason to stay wide where it is not known whether an input is a float."""
    unknown = [name for name in node.input if name and name not in is_float]
    return f"the type of its input '{unknown[0]}' is not known" if unknown else None


def _schema(node: onnx.NodeProto, opsets: Mapping[str, int]) -> OpSchema | None:
    domain = "" if node.domain == "ai.onnx" else node.domain
    try:
        return onnx.defs.get_schema(node.op_type, opsets.get(domain, 1), domain)
    except onnx.defs.SchemaError:
        return None


def _reason(node: onnx.NodeProto, schema: OpSchema | None, narrow: str, keep: Keep | None) -> str | None:
    """Why a node stays wide, or None."""
    if keep is not None and (said := keep(node)):
        return said
    if schema is None:
        return f"operator {node.domain or 'ai.onnx'}.{node.op_type} has no schema that says which types it takes"
    if node.op_type in _TYPED_BY_ATTRIBUTE:
        return f"operator {node.op_type} fixes its type by an attribute"
    formals = [*schema.inputs[:1], *schema.outputs[:1]]
    floats = [formal for formal in formals if "tensor(float)" in formal.types]
    if floats and not any(narrow in formal.types for formal in floats):
        return f"operator {node.op_type} of opset {schema.since_version} is not defined for {narrow}"
    return None


def _allowed(
    names: Sequence[str],
    formals: Sequence[OpSchema.FormalParameter],
    is_float: Mapping[str, bool],
    narrow: str,
    wanted: bool,
) -> list[bool | None]:
    """For each tensor: None unless it is float32, else whether it becomes narrow. The last formal may be variadic."""
    result: list[bool | None] = []
    for index, name in enumerate(names):
        if not is_float.get(name):
            result.append(None)
        else:
            result.append(wanted and bool(formals) and narrow in formals[min(index, len(formals) - 1)].types)
    return result
