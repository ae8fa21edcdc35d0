"""Reads ONNX models into the neutral graph: which node is which, and who reads whose values.

What is known of each operator is in `operators` and `moves`. A value that several nodes share is one node
here too; a node with several results gets one more node for each, as torch's traces have them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import onnx

from lowprec.export.folding.from_onnx.edits import attributes_of, names_read
from lowprec.export.folding.from_onnx.feeds import Feeds
from lowprec.export.folding.from_onnx.moves import MOVES, handed_over, part_of, read_move
from lowprec.export.folding.from_onnx.operators import OPERATIONS, RUNNING_NORMS, Call, read_biased_product
from lowprec.export.folding.from_onnx.program import SHAPE_READERS, OnnxProgram, hands_over, read_program
from lowprec.export.folding.graph import Affine, Graph, LiveNorm, MatrixProduct, Node, Op, Opaque, Product, Sum
from lowprec.export.onnx_files import module_path


@dataclass(frozen=True)
class OnnxGraph:
    """A neutral graph and what stands behind each of its nodes.

    Args:
        program: the model that was read.
        graph: its neutral view.
        origin: positions of the model's nodes that a node stands for: none for inputs and outputs, two for a matrix
            product and the bias that is added to it.
        values: name of the value that a node gives.
    """

    program: OnnxProgram
    graph: Graph
    origin: dict[Node, tuple[int, ...]]
    values: dict[Node, str]


def read_onnx(model: onnx.ModelProto, feeds: Feeds | None = None) -> OnnxGraph:
    """The neutral view of a model; see `read_program` for what it raises.

    Args:
        model: it stays as it is.
        feeds: an example input; a random one when None.
    """
    return view_of(read_program(model, feeds))


def view_of(program: OnnxProgram) -> OnnxGraph:
    """The neutral view of a model that is prepared.

    Constants do not appear as nodes: what reads them holds them. Nor do reads of a shape and what is computed from
    shapes alone, unless it is a tensor of floats.
    """
    reader = _Reader(program)
    graph = program.model.graph
    for value in graph.input:
        reader.add_input(value.name)
    biased = _biased_products(program)
    product_of = {adds: product for product, adds in biased.items()}
    for position, node in enumerate(graph.node):
        if position not in biased:
            reader.add_node(position, node, product_of.get(position))
    for value in graph.output:
        reader.add_output(value.name)
    return OnnxGraph(program, Graph(reader.nodes), reader.origin, reader.values)


@dataclass
class _Reader:
    """Collects nodes in order."""

    program: OnnxProgram
    nodes: list[Node] = field(default_factory=list)
    origin: dict[Node, tuple[int, ...]] = field(default_factory=dict)
    values: dict[Node, str] = field(default_factory=dict)
    made: dict[str, Node] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)

    def add_input(self, name: str) -> None:
        self._add(Node(self._unique([name]), "input", "", Opaque()), name)

    def add_output(self, name: str) -> None:
        if name in self.made:
            node = Node(self._unique([f"output {name}"]), "output", "", Opaque(), is_float=False, is_output=True)
            self._connect(node, [name])
            self._append(node, (), "")

    def add_node(self, position: int, node: onnx.NodeProto, product: int | None) -> None:
        """Adds a node of the model, together with the matrix product at `product` whose bias it adds, if any."""
        program = self.program
        outputs = [name for name in node.output if name]
        if node.op_type in SHAPE_READERS or all(program.is_constant(name) for name in outputs):
            return
        first = node if product is None else program.model.graph.node[product]
        sources = [name for name in names_read(first) if name in self.made]
        if not sources and not any(map(program.is_float, outputs)) and all(n in program.decided for n in outputs):
            return  # computed from shapes alone
        linear = None if product is None else read_biased_product(program, first, node)
        op = self._operation(node, sources) if linear is None else linear
        name = self._unique([first.name, outputs[0]])
        view = Node(name, first.op_type, module_path(first), op, norm=name if _is_norm(node, op) else None)
        self._connect(view, sources)
        origin = (position,) if product is None else (product, position)
        if len(outputs) == 1:
            self._add(view, outputs[0], origin)
            return
        view.is_float = any(map(program.is_float, outputs))
        self._append(view, origin, "")
        for index, output in enumerate(outputs):
            part = Node(self._unique([output]), node.op_type, view.path, part_of(index), inputs=[view])
            view.users.append(part)
            self._add(part, output, origin)

    def _operation(self, node: onnx.NodeProto, sources: list[str]) -> Op:
        program = self.program
        if node.domain not in ("", "ai.onnx"):
            return Opaque()
        if hands_over(program, node):
            return handed_over()
        if node.op_type in MOVES and not program.is_constant(node.input[0]):
            return read_move(program, node, sources)
        reader = OPERATIONS.get(node.op_type)
        if reader is None or not program.is_float(node.output[0]):
            return Opaque()
        op = reader(Call(program, node, attributes_of(node)))
        several = isinstance(op, LiveNorm) or len([name for name in node.output if name]) == 1
        reads = len(op.coefficients) if isinstance(op, Sum) else 2 if isinstance(op, Product | MatrixProduct) else 1
        return op if isinstance(op, LiveNorm) or (several and len(sources) == reads) else Opaque()

    def _connect(self, node: Node, sources: Iterable[str]) -> None:
        for name in sources:
            node.inputs.append(self.made[name])
            self.made[name].users.append(node)

    def _add(self, node: Node, value: str, origin: tuple[int, ...] = ()) -> None:
        node.shape, node.is_float = self.program.shape(value), self.program.is_float(value)
        self.made[value] = node
        self._append(node, origin, value)

    def _append(self, node: Node, origin: tuple[int, ...], value: str) -> None:
        self.nodes.append(node)
        self.origin[node], self.values[node] = origin, value

    def _unique(self, wishes: list[str]) -> str:
        """The first wish that is not empty and not taken, else the last with a number."""
        free = next((wish for wish in wishes if wish and wish not in self.names), None)
        number = 1
        while free is None:
            numbered = f"{wishes[-1]}_{number}"
            free, number = (numbered if numbered not in self.names else None), number + 1
        self.names.add(free)
        return free


def _is_norm(node: onnx.NodeProto, op: Op) -> bool:
    return isinstance(op, LiveNorm) or (node.op_type in RUNNING_NORMS and isinstance(op, Affine))


def _biased_products(program: OnnxProgram) -> dict[int, int]:
    """By position of a matrix product, the position of the addition of its bias, where nothing else reads it."""
    graph = program.model.graph
    readers: dict[str, list[int]] = {value.name: [-1] for value in graph.output}
    for position, node in enumerate(graph.node):
        for name in names_read(node):
            readers.setdefault(name, []).append(position)
    found = {}
    for position, node in enumerate(graph.node):
        alone = readers.get(node.output[0], []) if node.op_type == "MatMul" else []
        if len(alone) == 1 and alone[0] >= 0 and read_biased_product(program, node, graph.node[alone[0]]) is not None:
            found[position] = alone[0]
    return found
