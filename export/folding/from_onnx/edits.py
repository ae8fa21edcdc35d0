"""Small edits of ONNX nodes that reach into the graphs nested in them (If, Loop, Scan)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import onnx

from lowprec.export.onnx_files import nested_graphs


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    """Attributes by name, text decoded."""
    found = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in found.items()}


def names_read(node: onnx.NodeProto) -> list[str]:
    """Values of the outer graph that a node reads, once per reading; what nested graphs capture is read too."""
    found = [name for name in node.input if name]
    for graph in nested_graphs([node]):
        found += _captured(graph)
    return found


def _captured(graph: onnx.GraphProto) -> list[str]:
    own = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    own |= {name for node in graph.node for name in node.output}
    read = [name for node in graph.node for name in names_read(node)] + [value.name for value in graph.output]
    return [name for name in read if name not in own]


def live_nodes(
    nodes: Sequence[onnx.NodeProto], outputs: Iterable[str], given: Collection[str] = ()
) -> list[onnx.NodeProto]:
    """The nodes that an output depends on, where the `given` values need no node."""
    needed, live = set(outputs), []
    for node in reversed(nodes):
        if any(name in needed for name in node.output):
            live.append(node)
            needed.update(name for name in names_read(node) if name not in given)
    return live[::-1]


def names_within(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """Every name in the graphs nested in some nodes."""
    found: set[str] = set()
    for graph in nested_graphs(nodes):
        found |= {value.name for value in (*graph.input, *graph.output, *graph.initializer)}
        found |= {name for node in graph.node for name in (*node.input, *node.output)} | names_within(graph.node)
    return found


def rename_reads(node: onnx.NodeProto, names: Mapping[str, str]) -> None:
    """Makes a node, and the graphs nested in it, read values under other names; in place."""
    for index, name in enumerate(node.input):
        if name in names:
            node.input[index] = names[name]
    for graph in nested_graphs([node]):
        for inner in graph.node:
            rename_reads(inner, names)
        for value in graph.output:
            if value.name in names:
                value.name = names[value.name]


def rename_results(node: onnx.NodeProto, names: Mapping[str, str]) -> None:
    """Makes a node give its results other names; in place."""
    for index, name in enumerate(node.output):
        if name in names:
            node.output[index] = names[name]
