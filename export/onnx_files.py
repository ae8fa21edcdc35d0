"""Reads ONNX files without trust: whole, inside their folder, sorted, or one line that says why not.

`onnx.load` alone is not enough: an empty file parses as an empty model, weights that live outside the file may point
anywhere on the disk, and a graph that is not in topological order fails much later with the evaluator's own words.
"""

from __future__ import annotations

import ast
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto
from onnx.external_data_helper import ExternalDataInfo, load_external_data_for_tensor, uses_external_data

from lowprec.errors import ArtifactError
from lowprec.export.external_data import check_model, refer
from lowprec.export.weight_file import LARGE, SMALLEST

MODULE_PATH = "module_path"
"""Metadata key of a node that names the module which it came from."""

# Types whose values take whole bytes, so that they can be mapped.
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
_TORCH_SCOPES = "pkg.torch.onnx.name_scopes"  # where torch.onnx says the same


def module_path(node: onnx.NodeProto) -> str:
    """The path of the module that a node came from, or an empty string."""
    said = {entry.key: entry.value for entry in node.metadata_props}
    return said[MODULE_PATH] if MODULE_PATH in said else _path_from_scopes(said.get(_TORCH_SCOPES, ""))


def _path_from_scopes(text: str) -> str:
    """The module path among torch.onnx's scopes, a list of strings: all of them but the last, the operation."""
    try:
        scopes = ast.literal_eval(text) if text.startswith("[") else []
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return ""
    return next((scope for scope in reversed(scopes[:-1]) if isinstance(scope, str) and scope), "")


def load_onnx(path: Path | str) -> onnx.ModelProto:
    """The model of an .onnx file, weights stored beside it included; large ones as references (see `external_data`).

    Args:
        path: the file. Weights in other files must lie in the same folder or below it.

    Raises:
        ArtifactError: the file is missing, truncated, no ONNX model, breaks ONNX's own rules, its nodes are cyclic or
            not sorted, or a weight lies outside the model's folder, is missing or is cut short.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ArtifactError(f"no ONNX model at {path}: there is no such file") from None
    except OSError as error:
        raise ArtifactError(f"the ONNX model {path} cannot be read: {error.strerror or error}") from None
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError:
        raise ArtifactError(f"{path} is not an ONNX model, or is truncated; export it again") from None
    if not model.ir_version or not model.graph.output:
        raise ArtifactError(f"{path} holds no ONNX graph with outputs; it is empty, truncated or another kind of file")
    _find_external_weights(model, path)
    check_sorted(model.graph, str(path))
    try:
        check_model(model, full=False)
    except onnx.checker.ValidationError as error:
        raise ArtifactError(f"{path} breaks the rules of ONNX: {first_line(error)}") from None
    return model


def first_line(error: BaseException) -> str:
    """The first non-empty line of an error's text, for messages of one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def graphs_of(model: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """The main graph and every graph nested in a node's attribute (If, Loop, Scan), outer ones first."""
    pending = [model.graph]
    while pending:
        graph = pending.pop(0)
        yield graph
        pending += nested_graphs(graph.node)
    for function in model.functions:
        inner = nested_graphs(function.node)
        while inner:
            graph = inner.pop(0)
            yield graph
            inner += nested_graphs(graph.node)


def nested_graphs(nodes: Iterable[onnx.NodeProto]) -> list[onnx.GraphProto]:
    """The graphs that are attributes of the nodes themselves, one level down."""
    found: list[onnx.GraphProto] = []
    for node in nodes:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                found.append(attribute.g)
            found += attribute.graphs
    return found


def check_sorted(graph: onnx.GraphProto, where: str, outer: frozenset[str] = frozenset()) -> None:
    """Raises `ArtifactError` if a node reads a name that nothing before it defines: a cycle, or a graph not sorted."""
    known = set(outer) | {""}
    known |= {value.name for value in graph.input}
    known |= {tensor.name for tensor in graph.initializer}
    known |= {tensor.values.name for tensor in graph.sparse_initializer}
    for node in graph.node:
        for name in node.input:
            if name not in known:
                raise ArtifactError(
                    f"{where}: node {node.name or node.op_type!r} reads {name!r}, which nothing before it defines; "
                    "the graph is cyclic, not sorted, or incomplete"
                )
        for inner in nested_graphs([node]):
            check_sorted(inner, where, frozenset(known))
        known |= set(node.output)
    for value in graph.output:
        if value.name not in known:
            raise ArtifactError(f"{where}: nothing computes the output {value.name!r}; the graph is incomplete")


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    for graph in graphs_of(model):
        yield from graph.initializer
    node_lists = [graph.node for graph in graphs_of(model)] + [function.node for function in model.functions]
    for nodes in node_lists:
        for node in nodes:
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.TENSOR:
                    yield attribute.t
                yield from attribute.tensors


def _find_external_weights(model: onnx.ModelProto, path: Path) -> None:
    """Loads weights that are in other files; where they are large together, refers to the large ones."""
    folder = Path(os.path.realpath(path.parent))
    external = [tensor for tensor in _tensors(model) if uses_external_data(tensor)]
    places = [_checked_place(tensor, folder, path) for tensor in external]
    if sum(length for _, _, length in places) >= LARGE:
        for tensor in model.graph.initializer:
            if uses_external_data(tensor) and tensor.data_type in _FLOATS:
                target, start, length = _checked_place(tensor, folder, path)
                if length >= SMALLEST:
                    refer(tensor, str(target), start, length)
    for tensor in external:
        if not os.path.isabs(ExternalDataInfo(tensor).location):
            _load(tensor, folder, path)


def _checked_place(tensor: onnx.TensorProto, folder: Path, path: Path) -> tuple[Path, int, int]:
    """File, offset and length of a weight, which lies in the folder and is whole."""
    info = ExternalDataInfo(tensor)
    target = Path(os.path.realpath(folder / info.location))
    if os.path.isabs(info.location) or not target.is_relative_to(folder):
        raise ArtifactError(
            f"{path}: the weight {tensor.name!r} points outside the model's folder ({info.location!r}); refused"
        )
    if not target.is_file():
        raise ArtifactError(f"{path}: the weight {tensor.name!r} is in {info.location!r}, which is not there")
    start, length = info.offset or 0, info.length or 0
    if tensor.data_type in _FLOATS:
        needed = math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        if length not in (0, needed):
            raise ArtifactError(f"{path}: the weight {tensor.name!r} takes {needed} bytes, its entry says {length}")
        length = needed
    if target.stat().st_size < start + length:
        raise ArtifactError(
            f"{path}: {info.location!r} is truncated: the weight {tensor.name!r} ends at byte {start + length}, "
            f"the file at {target.stat().st_size}"
        )
    return target, start, length


def _load(tensor: onnx.TensorProto, folder: Path, path: Path) -> None:
    try:
        load_external_data_for_tensor(tensor, str(folder))
    except (onnx.checker.ValidationError, ValueError, OSError) as error:
        raise ArtifactError(f"{path}: the weight {tensor.name!r} cannot be read: {first_line(error)}") from None
    tensor.data_location = onnx.TensorProto.DEFAULT
    del tensor.external_data[:]
