"""Puts a model together again after its nodes were edited: names, what is still needed, constants.

New constants carry placeholders until all that is dead is gone, so that one can take the name of the constant it
replaces.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from lowprec.export.emit.rounding import FORMAT_OF, stored_tensor
from lowprec.export.folding.algebra import Stored
from lowprec.export.folding.from_onnx.edits import live_nodes, names_read, names_within, rename_reads, rename_results
from lowprec.export.folding.from_onnx.program import OnnxProgram
from lowprec.export.onnx_files import module_path

# A constant stays computed where it holds more numbers than all that it is computed from, unless it is small anyway.
_SMALL = 1024
# They hold or hand on a constant rather than compute one.
_HOLDERS = ("Constant", "Identity", "Cast")


@dataclass(frozen=True, eq=False)
class Fresh:
    """A new constant that has no name yet.

    Args:
        wish: the name that it gets where that is free.
        values: of any floating type, or not yet multiplied out.
        element_type: what it is rounded to.
    """

    wish: str
    values: Stored
    element_type: int


class Store(Protocol):
    """Takes a new constant and gives the tensor that stands for it in the model."""

    def __call__(self, values: Stored, element_type: int, name: str) -> TensorProto:
        """The tensor."""


def assemble(
    program: OnnxProgram,
    nodes: list[onnx.NodeProto],
    stands_for: Mapping[str, str],
    fresh: Mapping[str, Fresh],
    edited: Collection[str],
    store: Store = stored_tensor,
) -> onnx.ModelProto:
    """The model with these nodes; equal arguments give equal bytes.

    Args:
        program: the model as it was.
        nodes: in order; names in them are edited in place.
        stands_for: for each value that is gone, the value that is to be read instead.
        fresh: new constants by the placeholders under which nodes read them.
        edited: values whose making was edited.
        store: makes the tensors of new constants.

    Raises:
        UnsupportedError: a constant overflows in its type.
    """
    model = onnx.ModelProto()
    model.CopyFrom(program.model)
    graph = model.graph
    inputs, outputs = ([value.name for value in values] for values in (graph.input, graph.output))
    nodes = _with_named_outputs(nodes, outputs, stands_for)
    baked = bakeable(program) - set(outputs)
    nodes = live_nodes(nodes, outputs, baked)
    read = {name for node in nodes for name in names_read(node)}
    tensors = [tensor for tensor in graph.initializer if tensor.name in {*read, *outputs, *inputs}]
    results = [name for node in nodes for name in node.output]
    taken = {tensor.name for tensor in tensors} | {*inputs, *outputs, *results, *(read & baked)} | names_within(nodes)
    final = _settled(fresh, read, taken)
    for node in nodes:
        rename_reads(node, final)
    tensors += [store(fresh[key].values, fresh[key].element_type, name) for key, name in final.items()]
    tensors += [_computed_once(program, name, store) for name in program.computed if name in read & baked]
    kept = set(results) - set(edited)
    infos = [info for info in graph.value_info if info.name in kept]
    notes = [note for note in graph.quantization_annotation if note.tensor_name in kept]
    del graph.node[:], graph.initializer[:], graph.value_info[:], graph.quantization_annotation[:]
    graph.node.extend(nodes)
    graph.initializer.extend(tensors)
    graph.value_info.extend(infos)
    graph.quantization_annotation.extend(notes)
    return model


def _with_named_outputs(
    nodes: list[onnx.NodeProto], outputs: Collection[str], stands_for: Mapping[str, str]
) -> list[onnx.NodeProto]:
    """Lets everybody read what stands for a value that is gone, and gives the model's outputs their names back."""
    made = {name for node in nodes for name in node.output}
    claimed: dict[str, str] = {}
    copies = []
    for output in outputs:
        source = _standing(output, stands_for)
        if source == output:
            continue
        if source in made and source not in outputs and source not in claimed:
            claimed[source] = output
        else:
            read = claimed.get(source, source)
            copies.append(helper.make_node("Identity", [read], [output], name=f"copy_{output}"))
    names = {}
    for name in (*stands_for, *claimed):
        source = _standing(name, stands_for)
        names[name] = claimed.get(source, source)
    for node in nodes:
        rename_reads(node, names)
        rename_results(node, claimed)
    return nodes + copies


def _standing(name: str, stands_for: Mapping[str, str]) -> str:
    while name in stands_for:
        name = stands_for[name]
    return name


def _settled(fresh: Mapping[str, Fresh], read: Collection[str], taken: set[str]) -> dict[str, str]:
    """A name for each placeholder that is read: what it wishes, with a number where that is taken."""
    final = {}
    for key, constant in fresh.items():
        if key in read:
            numbered = (f"{constant.wish}_{number}" for number in itertools.count(1))
            names = itertools.chain([constant.wish], numbered)
            final[key] = next(name for name in names if name not in taken)
            taken.add(final[key])
    return final


def _computed_once(program: OnnxProgram, name: str, store: Store) -> onnx.TensorProto:
    value, element_type = program.computed[name], program.types[name]
    if element_type in FORMAT_OF:
        return store(value, element_type, name)
    return numpy_helper.from_array(value, name)


def bakeable(program: OnnxProgram) -> set[str]:
    """Constants that nodes compute and that can be stored instead."""
    sizes = {name: int(np.prod(tensor.dims)) for name, tensor in program.initializers.items()}
    found = set()
    for node in program.model.graph.node:
        if node.output[0] not in program.computed:
            continue
        read = sum(sizes.get(name, 0) for name in node.input)
        for name in node.output:
            value: Any = program.computed.get(name)
            held = node.op_type == "Constant"
            sizes[name] = int(np.size(value)) if held else read
            if not held and _can_be_stored(program, name, value, max(_SMALL, read)):
                found.add(name)
    return found


def _can_be_stored(program: OnnxProgram, name: str, value: Any, most: int) -> bool:
    if not isinstance(value, np.ndarray) or name not in program.types or value.size > most:
        return False
    return program.types[name] in FORMAT_OF or value.dtype.kind in "iub"


def baked_operations(program: OnnxProgram) -> dict[str, list[str]]:
    """For each module path where floats are computed from constants alone, the operators, in order."""
    stored = bakeable(program)
    found: dict[str, list[str]] = {}
    for node in program.model.graph.node:
        name = node.output[0]
        if name in stored and program.is_float(name) and node.op_type not in _HOLDERS:
            found.setdefault(module_path(node), []).append(node.op_type)
    return found
