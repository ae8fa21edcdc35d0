"""A traced network as plain data: an fx graph of aten operations and a table of constants.

The constants live in a dict and not on a module while the graph is worked on, so that edits neither alias the user's
parameters nor leave dead ones behind; `FoldedModule` gives them their final names. torch's own `ExportedProgram` is not
used for this because its module aliases the parameters, keeps replaced weights and guards the example's batch size.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from lowprec.export.folding.algebra import Scaled, Stored
from lowprec.export.weight_file import WeightFile

# What a constant's or an operation's place in the network is kept under, on fx nodes.
PATH = "module_path"
CALL = "module_call"


@dataclass(frozen=True)
class NormLayer:
    """What the report says about a norm layer that does not fold.

    Args:
        training: whether it is in training mode.
    """

    training: bool


@dataclass
class Program:
    """An fx graph whose `get_attr` targets are keys of `constants`.

    Args:
        graph: placeholders (the tensor inputs, flat), `get_attr`, `call_function`, output (a flat tuple).
        constants: by name, float ones in any floating type; whoever computes with them does so in float64. They may be
            the user's own parameters, so edits replace them and change none. Folded weights are not multiplied out
            before they are rounded.
        norms: the norm layers of the network by module path.
        wanted: the name that a constant should get when the names are settled, where it differs.
        file: where the constants are kept once they are rounded; None for in memory.
    """

    graph: fx.Graph
    constants: dict[str, Tensor | Scaled]
    norms: dict[str, NormLayer] = field(default_factory=dict)
    wanted: dict[str, str] = field(default_factory=dict)
    file: WeightFile | None = None

    def copy(self) -> Program:
        """A program that can be edited without changing this one; the tensors are shared, edits replace them."""
        graph = fx.Graph()
        result = graph.graph_copy(self.graph, {})
        if result is not None:
            graph.output(result)
        return Program(graph, dict(self.constants), self.norms, dict(self.wanted))

    def calls(self) -> Iterator[fx.Node]:
        """The operations in order; the list is taken first, so that the graph may be edited on the way."""
        yield from [node for node in self.graph.nodes if node.op == "call_function"]

    def constant(self, value: object) -> Tensor | None:
        """The tensor that an argument stands for, if it is a constant."""
        if isinstance(value, fx.Node) and value.op == "get_attr":
            return self.tensor(str(value.target))
        return None

    def tensor(self, name: str) -> Tensor:
        """A constant by its name."""
        value = self.constants[name]
        return torch.from_numpy(np.asarray(value)) if isinstance(value, Scaled) else value

    def stored(self, value: object) -> Stored | None:
        """The constant that an argument stands for, as it is held and without a copy, if it is one."""
        if not isinstance(value, fx.Node) or value.op != "get_attr":
            return None
        held = self.constants[str(value.target)]
        return held if isinstance(held, Scaled) else held.detach().numpy()

    def add_constant(self, name: str, tensor: Tensor | Scaled, before: fx.Node) -> fx.Node:
        """Adds a constant and its `get_attr` node just before another node; it gets `name` when names are settled."""
        unique = _unique(name, self.constants)
        self.constants[unique], self.wanted[unique] = tensor, name
        with self.graph.inserting_before(before):
            return self.graph.create_node("get_attr", unique)

    def round_constants(self, dtype: torch.dtype, others: Program) -> None:
        """Rounds the constants to a type, and copies those that are another program's own; into `file` if there is one.

        One after the other, so that two copies of all are never held.
        """
        foreign = {value.data_ptr() for value in others.constants.values() if isinstance(value, Tensor)}
        for name, value in list(self.constants.items()):
            if isinstance(value, Scaled):
                rounded = torch.from_numpy(value.rounded(str(dtype).removeprefix("torch.")))
            else:
                rounded = value.to(dtype) if is_float(value) else value
            if self.file is not None:
                rounded = torch.from_numpy(self.file.add(rounded.detach().numpy()))
            self.constants[name] = rounded.clone() if rounded.data_ptr() in foreign else rounded

    def erase_dead(self) -> None:
        """Erases operations whose result nobody reads, then constants that nobody names."""
        for node in reversed(list(self.graph.nodes)):
            if node.op in ("call_function", "get_attr") and not node.users:
                self.graph.erase_node(node)
        live = {str(node.target) for node in self.graph.nodes if node.op == "get_attr"}
        self.constants = {name: tensor for name, tensor in self.constants.items() if name in live}

    def settle_names(self) -> None:
        """Gives each constant the name it should have, with a number where two want the same.

        A name that a module cannot hold, because it is one of torch's own attributes or the path of something with
        tensors of its own, gets the ending `_value`.
        """
        final: dict[str, str] = {}
        parents = {parent for name in self.constants for parent in _parents(self.wanted.get(name, name))}
        for name in self.constants:
            wish = self.wanted.get(name, name)
            if wish in parents or hasattr(nn.Module, wish.rpartition(".")[2]):
                wish = f"{wish}_value"
            final[name] = _unique(wish, set(final.values()))
        for node in self.graph.nodes:
            if node.op == "get_attr":
                node.target = final[str(node.target)]
        self.constants = {final[name]: tensor for name, tensor in self.constants.items()}
        self.wanted = {}


def _unique(name: str, taken: Container[str]) -> str:
    """`name`, or the first of `name_1`, `name_2`, ... that is free."""
    return next(candidate for candidate in itertools.chain([name], _numbered(name)) if candidate not in taken)


def _numbered(name: str) -> Iterator[str]:
    return (f"{name}_{number}" for number in itertools.count(1))


def _parents(name: str) -> Iterator[str]:
    """`a`, `a.b` for `a.b.c`."""
    parts = name.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts)))


def is_float(value: object) -> bool:
    """Whether an fx node or a tensor holds floating-point values."""
    tensor = value.meta.get("val") if isinstance(value, fx.Node) else value
    return isinstance(tensor, Tensor) and tensor.is_floating_point()


def path_of(node: fx.Node) -> str:
    """The module path of an operation, empty at the root."""
    return str(node.meta.get(PATH, ""))


def place(node: fx.Node) -> str:
    """How messages name where an operation comes from."""
    return f"'{path_of(node)}'" if path_of(node) else "the network's own forward"


def operator_name(node: fx.Node) -> str:
    """`conv2d` for `aten.conv2d.default`; operations of other libraries keep their namespace."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        namespace, _, name = target._schema.name.partition("::")
        return name if namespace == "aten" else f"{namespace}.{name}"
    return getattr(target, "__name__", str(target))


def arguments_by_name(node: fx.Node) -> dict[str, Any]:
    """The arguments of an aten operation by the names in its schema, defaults included."""
    schema = node.target._schema  # type: ignore[union-attr]
    given = {argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()}
    given.update({argument.name: value for argument, value in zip(schema.arguments, node.args, strict=False)})
    given.update(node.kwargs)
    return given
