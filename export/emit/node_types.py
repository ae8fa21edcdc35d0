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
# What the schemas allow and TensorRT's parser (RTX 1.7) refuses in a strongly typed network.
_NOT_TAKEN = {("HardSwish", "tensor(bfloat16)"): "TensorRT takes no HardSwish in bfloat16"}
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
    overflowing: Mapping[str, str] | None = None,
    keep_overflowing: bool = False,
) -> Typing:
    """Types every node of a graph.

    Args:
        model: nodes in order of evaluation.
        is_float: for each value, whether it is float32 in the given model.
        narrow: the narrow type as schemas spell it (`tensor(float16)`).
        keep: nodes that stay wide. Those that only move values lose nothing in either type, so their neighbours decide
            first.
        narrow_edges: inputs and outputs of the graph that are narrow.
        overflowing: what is to be said of those who read a constant that overflows, by the constant's name.
        keep_overflowing: those nodes stay wide, also where they read it moved.

    Raises:
        UnsupportedError: a node holds a graph of its own (If, Loop, Scan), or would take such a constant as narrow
            after it was moved.
    """
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    reasons: dict[int, str | None] = {}
    kept: dict[int, str | None] = {}
    overflows = dict(overflowing or {})
    for position, node in enumerate(model.graph.node):
        _refuse_inner_graphs(node)
        kept[position] = keep(node) if keep else None
        found = next((overflows[name] for name in node.input if name in overflows), None)
        if found and node.op_type in MOVEMENTS:
            overflows.update(dict.fromkeys(node.output, found))
        if not keep_overflowing and node.op_type not in MOVEMENTS:
            found = None
        forced = found or _reason(node, _schema(node, opsets), narrow) or _unknown_input(node, is_float)
        reasons[position] = forced if node.op_type in MOVEMENTS else kept[position] or forced
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
            reason = neighbours.why_wide(node, narrow_values, kept[position])
        inputs = _allowed(node.input, schema.inputs if schema else (), is_float, narrow, reason is None)
        outputs = _allowed(node.output, schema.outputs if schema else (), is_float, narrow, reason is None)
        narrow_values.update(
            (name, value) for name, value in zip(node.output, outputs, strict=True) if value is not None
        )
        _refuse_moved_overflow(node, inputs, {name: why for name, why in overflows.items() if name in narrow_values})
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
        # Of each value, whether there are readers that take it wide (True), narrow (False), or both; decisions and
        # readers that are not there ask for nothing, movements for what is asked of their results.
        self._asked = {value.name: {value.name not in narrow_edges} for value in model.graph.output}
        for position, node in reversed(list(enumerate(model.graph.node))):
            asked = {reasons[position] is not None}
            if reasons[position] is None and _follows(node, is_float):
                asked = self._asked_of(node)
            for name in node.input:
                self._asked.setdefault(name, set()).update(asked)

    def _asked_of(self, node: onnx.NodeProto) -> set[bool]:
        floats = (name for name in node.output if self._is_float.get(name))
        return set().union(*(self._asked.get(name, set()) for name in floats))

    def why_wide(
        self, node: onnx.NodeProto, narrow_values: Mapping[str, bool | None], kept: str | None = None
    ) -> str | None:
        """Why a node that computes nothing stays wide, or None.

        It follows its inputs where they agree. Where they don't, or are there in either type as constants and inputs of
        the graph are, it is wide if anything reads it so: to widen loses nothing. Decisions are wide likewise.

        Args:
            node: it.
            narrow_values: type of each value before it that is no constant, None for an input of the graph.
            kept: why it should be wide where that leaves the choice.
        """
        before = {name: narrow_values[name] for name in node.input if name in narrow_values}
        types, asked = set(before.values()), self._asked_of(node)
        if types == {True}:
            return None
        wide = next((name for name, narrow in before.items() if narrow is False), None)
        if wide is not None and True not in types:
            return f"computes nothing from '{wide}', which is wide"
        decides = bool(before) and not any(map(self._is_float.get, node.output))
        if decides or True in asked:
            return "computes nothing, and what it stands between is wide in part"
        if types == {None}:
            return kept or (None if asked else "computes nothing, and nothing that reads it is narrow")
        return None


def _refuse_inner_graphs(node: onnx.NodeProto) -> None:
    if any(attribute.type in _GRAPH_ATTRIBUTES for attribute in node.attribute):
        raise UnsupportedError(
            f"node '{node.name}' ({node.op_type}) holds a graph of its own, which is not rounded to a narrower type; "
            f"export the network without control flow"
        )


def _refuse_moved_overflow(node: onnx.NodeProto, inputs: Sequence[bool | None], moved: Mapping[str, str]) -> None:
    """A constant itself is refused where it is rounded; one that was moved first would be cast to infinity there."""
    for name, narrow in zip(node.input, inputs, strict=True):
        if narrow and name in moved:
            raise UnsupportedError(
                f"node '{node.name}' ({node.op_type}) cannot be narrow: {moved[name]}; keep that node wide, or ask "
                "for mixed, which does"
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


def _reason(node: onnx.NodeProto, schema: OpSchema | None, narrow: str) -> str | None:
    """Why a node cannot be narrow, or None."""
    if schema is None:
        return f"operator {node.domain or 'ai.onnx'}.{node.op_type} has no schema that says which types it takes"
    if node.op_type in _TYPED_BY_ATTRIBUTE:
        return f"operator {node.op_type} fixes its type by an attribute"
    formals = [*schema.inputs[:1], *schema.outputs[:1]]
    floats = [formal for formal in formals if "tensor(float)" in formal.types]
    if floats and (node.op_type, narrow) in _NOT_TAKEN:
        return _NOT_TAKEN[node.op_type, narrow]
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
