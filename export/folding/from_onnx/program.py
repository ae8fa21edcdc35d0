"""An ONNX model with what folding needs to know of it: which values are constants, and everything's type and shape.

Types and free axes come from onnx's shape inference, lengths from one evaluation on an example. Inference alone would
not do: it gives up behind a reshape whose target the graph computes, as many exporters write it. Nor would the example
alone: it does not tell a fixed length from one that happens to be 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from lowprec.errors import UnsupportedError
from lowprec.export.emit.rounding import FORMAT_OF, stored_tensor
from lowprec.export.external_data import array_of
from lowprec.export.float64 import Float64Graph
from lowprec.export.float64.widening import RANDOM_OPS, WIDENED, widened
from lowprec.export.folding.algebra import Array
from lowprec.export.folding.from_onnx.edits import attributes_of, live_nodes, names_read, rename_reads
from lowprec.export.folding.from_onnx.feeds import Feeds, run_on_example
from lowprec.export.folding.from_onnx.shapes import infer_shapes
from lowprec.export.onnx_files import check_sorted, nested_graphs

Shape = tuple[int | None, ...]

SHAPE_READERS = ("Shape", "Size")
# What they make of constants must not replace these: a file that stores int8 weights stores them on purpose.
_QUANTISERS = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
_NUMPYS_OWN = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE)
# Broadcasting was an attribute before.
_OLDEST_OPSET = 7


@dataclass(eq=False)
class OnnxProgram:
    """A private copy of a model, and facts about its values by name.

    Args:
        model: local functions inlined, nodes that only hand a value on taken out, no initializer among the inputs
            unless a caller may override it.

    Attributes:
        initializers: those that no caller may override.
        computed: values of nodes that read constants alone, floats in float64.
        types: element types.
        shapes: one entry per axis, None where the length is free or not known.
        lengths: shapes for the example.
        decided: values that shapes alone decide (the target of a reshape), for the example.
        example: the inputs that lengths were taken from.
    """

    model: onnx.ModelProto
    initializers: dict[str, TensorProto] = field(default_factory=dict)
    computed: dict[str, Any] = field(default_factory=dict)
    types: dict[str, int] = field(default_factory=dict)
    shapes: dict[str, Shape] = field(default_factory=dict)
    lengths: dict[str, tuple[int, ...]] = field(default_factory=dict)
    decided: dict[str, NDArray[Any]] = field(default_factory=dict)
    example: dict[str, NDArray[Any]] = field(default_factory=dict)

    @property
    def opset(self) -> int:
        """Version of ONNX's own operators."""
        return next((entry.version for entry in self.model.opset_import if entry.domain in ("", "ai.onnx")), 1)

    def is_constant(self, name: str) -> bool:
        """Whether a value depends on nothing that a caller gives."""
        return name in self.initializers or name in self.computed

    def constant(self, name: str) -> NDArray[Any] | None:
        """A constant's value, floats in float64; None for anything else."""
        if name in self.initializers:
            return widened(array_of(self.initializers[name]))
        value = self.computed.get(name)
        return value if isinstance(value, np.ndarray) else None

    def stored(self, name: str) -> NDArray[Any] | None:
        """A floating constant as it is held, in numpy's own types; what nodes compute is float64. None for others."""
        tensor = self.initializers.get(name)
        if tensor is None or tensor.data_type not in _NUMPYS_OWN:
            return self.float_constant(name)
        return array_of(tensor)

    def float_constant(self, name: str) -> Array | None:
        """A floating constant's value in float64; None for anything else."""
        value = self.constant(name)
        return value if value is not None and value.dtype == np.float64 else None

    def fixed(self, name: str) -> NDArray[Any] | None:
        """The value of a constant, or of what shapes alone decide, for the example; None for anything else."""
        return self.decided[name] if name in self.decided else self.constant(name)

    def is_float(self, name: str) -> bool:
        """Whether a value is a tensor of floating-point numbers that float64 widens."""
        return self.types.get(name) in WIDENED

    def shape(self, name: str) -> Shape:
        """Shape with None for every axis that is free or not known, or of which the example knows better."""
        lengths = self.lengths.get(name, ())
        found = self.shapes.get(name)
        if found is None or len(found) != len(lengths):
            return (None,) * len(lengths)
        return tuple(known if known == length else None for known, length in zip(found, lengths, strict=True))

    def rank(self, name: str) -> int:
        """Number of axes."""
        return len(self.lengths.get(name, ()))


def read_program(model: onnx.ModelProto, feeds: Feeds | None = None) -> OnnxProgram:
    """Prepares a model for folding; the model stays as it is.

    Args:
        model: sorted, weights included.
        feeds: an example input; drawn from the input's shapes when None.

    Raises:
        ArtifactError: the graph is cyclic or not sorted.
        UnsupportedError: onnx's reference cannot evaluate it.
    """
    check_sorted(model.graph, "the ONNX model")
    program = OnnxProgram(_private_copy(model))
    if program.opset < _OLDEST_OPSET:
        raise UnsupportedError(
            f"the ONNX model is of opset {program.opset}, lowprec folds from opset {_OLDEST_OPSET} on; "
            f"convert it with onnx.version_converter"
        )
    graph = program.model.graph
    given = {value.name for value in graph.input}
    program.initializers = {tensor.name: tensor for tensor in graph.initializer if tensor.name not in given}
    for value in (*graph.value_info, *graph.output):  # where inference gives up the file may know
        if value.type.tensor_type.elem_type:
            program.types[value.name] = value.type.tensor_type.elem_type
    _infer(program)
    _find_constants(program)
    _drop_hand_overs(program)
    _evaluate_example(program, feeds)
    return program


def _private_copy(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without local functions, in which an initializer that is also an input is one that may be overridden."""
    copied = onnx.ModelProto()
    copied.CopyFrom(onnx.inliner.inline_local_functions(model) if model.functions else model)
    if copied.ir_version < 4:  # where every initializer had to be listed as an input
        initializers = {tensor.name for tensor in copied.graph.initializer}
        inputs = [value for value in copied.graph.input if value.name not in initializers]
        del copied.graph.input[:]
        copied.graph.input.extend(inputs)
        copied.ir_version = 4
    return copied


def _infer(program: OnnxProgram) -> None:
    """Types and shapes, with all that is known so far."""
    constants: dict[str, TensorProto] = dict(program.initializers)
    for name, value in program.computed.items():
        if isinstance(value, np.ndarray) and name in program.types:
            constants[name] = _as_declared(value, program.types[name], name)
    found = infer_shapes(program.model, constants, program.computed)
    program.types.update(found.types)
    for name, dims in found.dims.items():
        program.shapes[name] = tuple(length if isinstance(length, int) else None for length in dims)


def _as_declared(value: NDArray[Any], element_type: int, name: str) -> TensorProto:
    """A constant in its own type, for inference."""
    if element_type in FORMAT_OF:
        return stored_tensor(value, element_type, name)
    return numpy_helper.from_array(value, name)


def _find_constants(program: OnnxProgram) -> None:
    """Evaluates all that reads constants alone, and all lengths that are fixed, until nothing new is found."""
    while True:
        found = _fixed_lengths(program)
        program.computed.update(found)
        nodes = _constant_nodes(program)
        program.computed.update(_evaluated(program, nodes))
        if not found and not nodes:
            return
        _infer(program)


def _constant_nodes(program: OnnxProgram) -> list[onnx.NodeProto]:
    """Nodes not evaluated yet that read constants alone, in order."""
    known, nodes = {"", *program.initializers, *program.computed}, []
    for node in program.model.graph.node:
        fixed = node.op_type not in RANDOM_OPS and node.op_type not in _QUANTISERS and not nested_graphs([node])
        if fixed and node.output[0] not in known and all(name in known for name in node.input):
            nodes.append(node)
            known |= set(node.output)
    return nodes


def _evaluated(program: OnnxProgram, nodes: list[onnx.NodeProto]) -> dict[str, Any]:
    """What nodes on constants compute, in float64."""
    if not nodes:
        return {}
    part = onnx.ModelProto()
    part.ir_version = program.model.ir_version
    part.opset_import.extend(program.model.opset_import)
    part.graph.name = "constants"
    part.graph.node.extend(nodes)
    made = {name for node in nodes for name in node.output}
    for name in dict.fromkeys(name for node in nodes for name in node.input if name and name not in made):
        value = program.constant(name)
        if value is None:
            raise UnsupportedError(f"the constant {name!r} is no tensor; only tensors can be read by other operations")
        part.graph.initializer.append(numpy_helper.from_array(value, name))
    values: dict[str, Any] = {}
    Float64Graph(part).run({}, watch=values.__setitem__)
    return {
        name: np.asarray(value) if isinstance(value, np.generic) else value
        for name, value in values.items()
        if name in made and name
    }


def _fixed_lengths(program: OnnxProgram) -> dict[str, NDArray[Any]]:
    """Lengths that the graph reads from shapes although they are fixed: all of a shape, or an entry of it."""
    lengths: dict[str, NDArray[Any]] = {}  # by name of a Shape's result, None among its entries
    found: dict[str, NDArray[Any]] = {}
    for node in program.model.graph.node:
        value = _lengths_read(program, node, lengths)
        if value is None or node.output[0] in program.computed:
            continue
        if node.op_type == "Shape":
            lengths[node.output[0]] = value
        if None not in value.reshape(-1).tolist():
            found[node.output[0]] = value.astype(np.int64)
    return found


def _lengths_read(
    program: OnnxProgram, node: onnx.NodeProto, lengths: Mapping[str, NDArray[Any]]
) -> NDArray[Any] | None:
    if node.op_type == "Shape" and node.input[0] in program.shapes:
        given = attributes_of(node)
        return np.array(program.shapes[node.input[0]][given.get("start", 0) : given.get("end")], object)
    if not node.input or node.input[0] not in lengths:
        return None
    shape = lengths[node.input[0]]
    arguments = [program.constant(name) for name in node.input[1:]]
    if node.op_type == "Gather" and arguments[0] is not None and (np.abs(arguments[0]) < len(shape)).all():
        return np.asarray(shape[arguments[0]], object)
    plain = len(arguments) in (2, 3) and all(value is not None and value.size == 1 for value in arguments)
    if node.op_type == "Slice" and plain:
        start, end = (int(value.reshape(-1)[0]) for value in arguments[:2] if value is not None)
        return shape[start:end]
    return None


def _drop_hand_overs(program: OnnxProgram) -> None:
    """Takes out nodes that hand a value on unchanged, so that rules see what stands before and behind them.

    And nodes that no output depends on: what they would demand of the network is asked for nothing.
    """
    graph = program.model.graph
    outputs = {value.name for value in graph.output}
    stands_for: dict[str, str] = {}
    kept: list[onnx.NodeProto] = []
    for node in graph.node:
        rename_reads(node, stands_for)
        if node.output[0] not in outputs and hands_over(program, node):
            stands_for[node.output[0]] = node.input[0]
        else:
            kept.append(node)
    kept = live_nodes(kept, outputs)
    del graph.node[:]
    graph.node.extend(kept)


def hands_over(program: OnnxProgram, node: onnx.NodeProto) -> bool:
    """Whether a node gives what it reads: an identity, a cast to the same type, dropout outside of training."""
    if program.is_constant(node.output[0]):
        return False
    if node.op_type == "Cast":
        return bool(program.types.get(node.input[0]) == attributes_of(node)["to"])
    if node.op_type == "Dropout":
        trains = program.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else np.False_
        return trains is not None and not trains.any() and not any(node.output[1:])
    return node.op_type == "Identity"


def _evaluate_example(program: OnnxProgram, feeds: Feeds | None) -> None:
    decided = _decided_by_shapes(program)

    def watch(name: str, value: Any) -> None:
        if isinstance(value, np.ndarray | np.generic):
            array = np.asarray(value)
            program.lengths[name] = array.shape
            if array.dtype == np.float64:
                program.types.setdefault(name, TensorProto.FLOAT)
            if name in decided:
                program.decided[name] = array

    for tensor in program.initializers.values():
        program.lengths[tensor.name] = tuple(tensor.dims)
    program.example = run_on_example(Float64Graph(program.model), feeds, watch)


def _decided_by_shapes(program: OnnxProgram) -> set[str]:
    """Names of values that depend on shapes and constants alone, and not on constants alone."""
    found: set[str] = set()
    for node in program.model.graph.node:
        read = names_read(node)
        fixed = all(name in found or program.is_constant(name) for name in read)
        if node.op_type in SHAPE_READERS or (read and fixed and node.op_type not in (*RANDOM_OPS, *_QUANTISERS)):
            found |= {name for name in node.output if name and not program.is_constant(name)}
    return found
