"""Writes the graph that a typing describes: constants rounded, casts where a tensor is wanted in its other type.

Every value exists at most once per type, and its cast is written where it is first wanted, so that there is one
cast per tensor and type and never a pair that cancels.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import onnx
from onnx import TensorProto, helper

from lowprec.export.emit.node_types import ELEMENT_TYPES, Typing, is_idle_cast
from lowprec.export.emit.rounding import round_tensor
from lowprec.export.external_data import move_into, weights_as_inputs, without_weights
from lowprec.export.onnx_files import module_path
from lowprec.export.weight_file import WeightFile
from lowprec.formats import FP32, FloatFormat
from lowprec.report import ChangeReport


class Rewriter:
    """One rewriting of one graph.

    Args:
        source: float32, every constant an initializer.
        fmt: the narrow format.
        is_float: for each value, whether it is float32 in the source.
        typing: what becomes narrow.
        narrow_edges: inputs and outputs that are narrow; the others stay float32.
        file: where rounded weights go that are worth a place in a file; None to keep them in the model.

    Attributes:
        report: rows and counts, complete after `run`.
    """

    def __init__(
        self,
        source: onnx.ModelProto,
        fmt: FloatFormat,
        is_float: dict[str, bool],
        typing: Typing,
        narrow_edges: Collection[str] = (),
        file: WeightFile | None = None,
    ) -> None:
        self._file = file
        self.report = ChangeReport()
        self._source = source
        self._fmt = fmt
        self._is_float = is_float
        self._typing = typing
        self._constants = {tensor.name: tensor for tensor in source.graph.initializer}
        self._edges = narrow_edges
        self._output_names = {value.name for value in source.graph.output}
        # Results of casts from float32 to float32 are other names of what they were cast from.
        self._aliases: dict[str, str] = {}
        self._taken = {name for node in source.graph.node for name in (*node.input, *node.output)} | set(
            self._constants
        )
        # (value of the source, narrow?) -> its name in the result.
        self._names: dict[tuple[str, bool], str] = {}
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._casts = 0
        self._losses = {"subnormal": 0, "vanished": 0}

    def run(self) -> onnx.ModelProto:
        """The rewritten model."""
        graph = self._source.graph
        for value in graph.input:
            if value.name in self._is_float:
                self._names[value.name, value.name in self._edges] = value.name
        for node, inputs, outputs in zip(graph.node, self._typing.inputs, self._typing.outputs, strict=True):
            self._write_node(node, inputs, outputs)
        for value in graph.output:
            self._write_output(value.name)
        wide = {}
        for position, reason in self._typing.wide.items():
            self.report.refuse(_place(graph.node[position]), reason)
            wide[graph.node[position].name] = reason
        narrow = sum(any(value is True for value in outputs) for outputs in self._typing.outputs)
        self.report.facts.update(narrow_nodes=narrow, wide=wide, casts=self._casts, **self._losses)
        return self._model()

    def _model(self) -> onnx.ModelProto:
        result = without_weights(self._source)
        del result.graph.node[:], result.graph.value_info[:]
        for edge in (*result.graph.input, *result.graph.output):
            if edge.name in self._edges:
                edge.type.tensor_type.elem_type = ELEMENT_TYPES[self._fmt.name]
        result.graph.node.extend(self._nodes)
        read = {name for node in self._nodes for name in node.input} | {value.name for value in result.graph.output}
        result.graph.initializer.extend(tensor for name, tensor in self._initializers.items() if name in read)
        self._initializers.clear()
        inferred = onnx.shape_inference.infer_shapes(weights_as_inputs(result))
        result.graph.value_info.extend(inferred.graph.value_info)
        return result

    def _write_node(self, node: onnx.NodeProto, inputs: Sequence[bool | None], outputs: Sequence[bool | None]) -> None:
        if is_idle_cast(node, self._is_float):
            self._aliases[node.output[0]] = self._aliases.get(node.input[0], node.input[0])
            return
        written = onnx.NodeProto()
        written.CopyFrom(node)
        written.input[:] = [
            name if narrow is None else self._value(name, narrow)
            for name, narrow in zip(node.input, inputs, strict=True)
        ]
        for index, (name, narrow) in enumerate(zip(node.output, outputs, strict=True)):
            if narrow is not None:
                written.output[index] = name if self._bears_name(name, narrow) else self._new_name(name, narrow)
                self._names[name, narrow] = written.output[index]
        if any(outputs):
            self._narrow_attributes(written)
        for name in node.input:
            if name in self._constants and not self._is_float.get(name):
                self._initializers[name] = self._constants[name]
        self._nodes.append(written)

    def _value(self, name: str, narrow: bool) -> str:
        """The name under which a float value is there in the wanted type; made on first use."""
        name = self._aliases.get(name, name)
        if (name, narrow) in self._names:
            return self._names[name, narrow]
        if name in self._constants:
            made = self._write_constant(name, narrow)
        else:
            made = self._new_name(name, narrow)
            self._write_cast(self._names[name, not narrow], made, narrow)
        self._names[name, narrow] = made
        return made

    def _write_constant(self, name: str, narrow: bool) -> str:
        tensor = self._constants[name]
        taken = (name, not narrow) in self._names or not self._bears_name(name, narrow)
        made = self._new_name(name, narrow) if taken else name
        if not narrow:
            self._initializers[made] = onnx.TensorProto()
            self._initializers[made].CopyFrom(tensor)
            self._initializers[made].name = made
            return made
        rounded, loss = round_tensor(tensor, self._fmt, made)
        if self._file is not None:
            move_into(self._file, rounded)
        self._initializers[made] = rounded
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

    def _bears_name(self, name: str, narrow: bool) -> bool:
        """Whether a value may bear its own name in a type: an output does so in the type that is asked of it."""
        return name not in self._output_names or narrow == (name in self._edges)

    def _write_output(self, name: str) -> None:
        """An output keeps its name, and has the type that is asked of it."""
        source, wanted = self._aliases.get(name, name), name in self._edges
        if not self._is_float.get(name) or self._names.get((source, wanted)) == name:
            return
        if (source, wanted) not in self._names and source not in self._constants:
            self._write_cast(self._names[source, not wanted], name, wanted)
            return
        available = self._value(source, wanted)
        if available != name:
            self._nodes.append(helper.make_node("Identity", [available], [name], name=f"output_{name}"))

    def _narrow_attributes(self, node: onnx.NodeProto) -> None:
        """A Cast or ConstantOfShape whose result becomes narrow says so; the latter makes float32 zeros by default."""
        if node.op_type == "ConstantOfShape" and not node.attribute:
            zero = helper.make_tensor("value", TensorProto.FLOAT, [1], [0.0])
            node.attribute.append(helper.make_attribute("value", zero))
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to":
                attribute.i = ELEMENT_TYPES[self._fmt.name]
            if node.op_type == "ConstantOfShape" and attribute.name == "value":
                rounded, _ = round_tensor(attribute.t, self._fmt, attribute.t.name)
                attribute.t.CopyFrom(rounded)

    def _new_name(self, name: str, narrow: bool) -> str:
        made = f"{name}_{(self._fmt if narrow else FP32).name}"
        while made in self._taken:
            made += "_"
        self._taken.add(made)
        return made


def _place(node: onnx.NodeProto) -> str:
    """The module path where the node has one, else its name."""
    return module_path(node) or node.name
