"""Rounds a float32 ONNX graph to fp16 or bf16 by typing it: precision is what the graph says.

TensorRT 11 has no precision flags any more, and onnxruntime's and onnxconverter's float16 tools clip weights and keep
lists of operators. Here every tensor has one type, inputs and outputs stay float32 with one Cast each at the edge, and
a value that does not fit is an error that names its tensor.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from onnx import TensorProto, helper, version_converter

from lowprec.errors import UnsupportedError
from lowprec.export.emit.network import MODULE_PATH
from lowprec.export.emit.rounding import round_tensor
from lowprec.export.emit.typing import ELEMENT_TYPES, SCHEMA_TYPES, Keep, Typing, type_nodes
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
    rewriter = _Rewriter(source, fmt, is_float, typing)
    result = rewriter.run()
    onnx.checker.check_model(result, full_check=True)
    return result, rewriter.report


def _prepared(model: onnx.ModelProto, fmt: FloatFormat) -> onnx.ModelProto:
    """A copy in an opset that knows the type, with every constant an initializer and no cast between equal types."""
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    opset = next((entry.version for entry in copied.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if fmt.name == "bf16" and opset < _BF16_OPSET:
        paths = {node.name: list(node.metadata_props) for node in copied.graph.node}
        copied = version_converter.convert_version(copied, _BF16_OPSET)
        copied.producer_name, copied.producer_version = model.producer_name, model.producer_version
        for node in copied.graph.node:
            if not node.metadata_props:
                node.metadata_props.extend(paths.get(node.name, []))
    for index, node in enumerate(copied.graph.node):
        node.name = node.name or f"node_{index}"
    _lift_constants(copied.graph)
    del copied.graph.value_info[:]
    return onnx.shape_inference.infer_shapes(copied)


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


class _Rewriter:
    """Writes the typed graph: renames, casts where a tensor is wanted in its other type, and rounds constants."""

    def __init__(self, source: onnx.ModelProto, fmt: FloatFormat, is_float: dict[str, bool], typing: Typing) -> None:
        self.report = ChangeReport()
        self._source = source
        self._fmt = fmt
        self._is_float = is_float
        self._typing = typing
        self._constants = {tensor.name: tensor for tensor in source.graph.initializer}
        self._taken = {name for node in source.graph.node for name in (*node.input, *node.output)} | set(self._constants)
        # (value of the source, narrow?) -> its name in the result.
        self._names: dict[tuple[str, bool], str] = {}
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._casts = 0
        self._losses = {"subnormal": 0, "vanished": 0}

    def run(self) -> onnx.ModelProto:
        """The rewritten model."""
        graph = self._source.graph
        self._names.update({(value.name, False): value.name for value in graph.input if value.name in self._is_float})
        for node, inputs, outputs in zip(graph.node, self._typing.inputs, self._typing.outputs, strict=True):
            self._write_node(node, inputs, outputs)
        for value in graph.output:
            self._write_output(value.name)
        for node in graph.node:
            if node.name in self._typing.wide:
                self.report.refuse(_place(node), self._typing.wide[node.name])
        wide = len(self._typing.wide)
        narrow = sum(any(value is True for value in outputs) for outputs in self._typing.outputs)
        self.report.facts.update(narrow_nodes=narrow, wide_nodes=wide, casts=self._casts, **self._losses)
        return self._model()

    def _model(self) -> onnx.ModelProto:
        result = onnx.ModelProto()
        result.CopyFrom(self._source)
        del result.graph.node[:], result.graph.initializer[:], result.graph.value_info[:]
        result.graph.node.extend(self._nodes)
        read = {name for node in self._nodes for name in node.input} | {value.name for value in result.graph.output}
        result.graph.initializer.extend(tensor for name, tensor in self._initializers.items() if name in read)
        inferred: onnx.ModelProto = onnx.shape_inference.infer_shapes(result)
        return inferred

    def _write_node(
        self, node: onnx.NodeProto, inputs: Sequence[bool | None], outputs: Sequence[bool | None]
    ) -> None:
        source = node.input[0] if node.input else ""
        if node.op_type == "Cast" and self._is_float.get(source) and self._is_float.get(node.output[0]):
            # Both sides were float32: the cast did nothing, and its readers ask for the type that they want.
            self._alias(source, node.output[0])
            return
        written = onnx.NodeProto()
        written.CopyFrom(node)
        written.input[:] = [
            name if narrow is None else self._value(name, narrow) for name, narrow in zip(node.input, inputs, strict=True)
        ]
        for index, (name, narrow) in enumerate(zip(node.output, outputs, strict=True)):
            if narrow is not None:
                written.output[index] = self._new_name(name) if narrow and self._is_output(name) else name
                self._names[name, narrow] = written.output[index]
        if any(outputs):
            self._narrow_attributes(written)
        for name in node.input:
            if name in self._constants and not self._is_float.get(name):
                self._initializers[name] = self._constants[name]
        self._nodes.append(written)

    def _alias(self, source: str, name: str) -> None:
        if source in self._constants:
            self._constants[name] = self._constants[source]
            return
        for narrow in (False, True):
            if (source, narrow) in self._names:
                self._names[name, narrow] = self._names[source, narrow]

    def _value(self, name: str, narrow: bool) -> str:
        """The name under which a float value is there in the wanted type; made on first use."""
        if (name, narrow) in self._names:
            return self._names[name, narrow]
        if name in self._constants:
            made = self._write_constant(name, narrow)
        else:
            made = self._new_name(name)
            self._write_cast(self._names[name, not narrow], made, narrow)
        self._names[name, narrow] = made
        return made

    def _write_constant(self, name: str, narrow: bool) -> str:
        tensor = self._constants[name]
        made = name if (name, not narrow) not in self._names else self._new_name(name)
        if not narrow:
            self._initializers[made] = onnx.TensorProto()
            self._initializers[made].CopyFrom(tensor)
            self._initializers[made].name = made
            return made
        self._initializers[made], loss = round_tensor(tensor, self._fmt, made)
        self._losses["subnormal"] += loss.subnormal
        self._losses["vanished"] += loss.vanished
        if loss:
            self.report.change(
                name, f"rounded to {self._fmt.name}: {loss.subnormal} values turned subnormal, {loss.vanished} vanished"
            )
        return made

    def _write_cast(self, source: str, target: str, narrow: bool) -> None:
        element = ELEMENT_TYPES[self._fmt.name] if narrow else TensorProto.FLOAT
        self._nodes.append(helper.make_node("Cast", [source], [target], name=f"cast_{target}", to=element))
        self._casts += 1

    def _write_output(self, name: str) -> None:
        """An output keeps its name and its type."""
        if not self._is_float.get(name) or self._names.get((name, False)) == name:
            return
        if name in self._constants:
            self._write_constant(name, narrow=False)
        elif (name, False) in self._names:
            self._nodes.append(helper.make_node("Identity", [self._names[name, False]], [name], name=f"output_{name}"))
        else:
            self._write_cast(self._names[name, True], name, narrow=False)

    def _narrow_attributes(self, node: onnx.NodeProto) -> None:
        """A Cast or ConstantOfShape whose result becomes narrow says so."""
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to":
                attribute.i = ELEMENT_TYPES[self._fmt.name]
            if node.op_type == "ConstantOfShape" and attribute.name == "value":
                rounded, _ = round_tensor(attribute.t, self._fmt, attribute.t.name)
                attribute.t.CopyFrom(rounded)

    def _is_output(self, name: str) -> bool:
        return any(value.name == name for value in self._source.graph.output)

    def _new_name(self, name: str) -> str:
        made = f"{name}_{self._fmt.name}"
        while made in self._taken:
            made += "_"
        self._taken.add(made)
        return made


def _place(node: onnx.NodeProto) -> str:
    """The module path where the node has one, else its name."""
    return next((entry.value for entry in node.metadata_props if entry.key == MODULE_PATH), node.name)
