"""Folds an ONNX model: the same rules as for traced networks, on a graph that somebody else wrote.

Nothing here needs torch. The truth is the model as it came, evaluated in float64; what rounding to its own type costs
is measured in onnxruntime where that is installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from lowprec.errors import UnsupportedError
from lowprec.export.backends import BACKENDS
from lowprec.export.backends.ort import OnnxRuntime
from lowprec.export.emit.rounding import FORMAT_OF
from lowprec.export.external_data import array_of
from lowprec.export.float64 import Float64Graph
from lowprec.export.float64.widening import widened
from lowprec.export.folding import RULES
from lowprec.export.folding.accuracy import Arrays, Run, Truth, refuse_wrong, rms
from lowprec.export.folding.attempts import Attempt, balance_graph, best_attempt, fold_graph, report_baked
from lowprec.export.folding.from_onnx.assembly import baked_operations
from lowprec.export.folding.from_onnx.feeds import Feeds, batches_to_measure
from lowprec.export.folding.from_onnx.program import OnnxProgram, read_program
from lowprec.export.folding.from_onnx.read import OnnxGraph, view_of
from lowprec.export.folding.from_onnx.write import exact_graph, write_onnx
from lowprec.export.folding.gauges.balance import leaves_range
from lowprec.export.folding.rules.rule import Rule
from lowprec.export.weight_file import WeightFile
from lowprec.formats import FP16
from lowprec.report import ChangeReport


def fold_onnx(
    model: onnx.ModelProto,
    feeds: Feeds | None = None,
    rules: Iterable[Rule] = tuple(RULES.values()),
    folder: Path | None = None,
) -> tuple[onnx.ModelProto, ChangeReport]:
    """Folds norms and other per-channel affines into the weights around them.

    Args:
        model: sorted, weights included, in ONNX's operators of opset 7 or newer; it stays as it is.
        feeds: inputs by name for the check, samples along axis 0; random ones when None.
        rules: in order of application.
        folder: where the folded weights of a model that refers to large ones are kept (see `external_data`).

    Returns:
        The folded model in the same types, and the report with the facts that `fold_traced` gives;
        `float32_error_ratio` is None where onnxruntime is not installed or cannot run the model.

    Raises:
        ArtifactError: the graph is cyclic or not sorted.
        UnsupportedError: the model cannot be evaluated in float64, or a folded constant overflows in its type.
        FoldError: the folded model is not the same function in float64, which is a defect of this library.
    """
    program = read_program(model, feeds)
    graph = Float64Graph(model)
    names = [spec.name for spec in graph.inputs]
    batches = batches_to_measure(graph, program.example, feeds)
    report = ChangeReport()
    report_baked(baked_operations(program), {}, report)
    inputs = [[batch[name] for name in names] for batch in batches]
    truth = Truth(_exact(graph), _rounded(model, names, inputs[0]), inputs)

    def attempt(chosen: list[Rule]) -> Attempt[onnx.ModelProto]:
        view = view_of(program)
        facts = fold_graph(view.graph, chosen, {})
        if leaves_range(view.graph, FP16):
            stored = exact_graph(view)
            balance_graph(view.graph, lambda see: _show(stored, batches, view, see), FP16, facts)
        file = None if folder is None else WeightFile(folder)
        folded = write_onnx(view, file)
        files.append((folded, file))
        measured = truth.measure(_exact(exact_graph(view)), _rounded(folded, names, inputs[0]))
        view.graph.forget()
        return Attempt.judged(folded, facts, measured, _weights(folded))

    files: list[tuple[onnx.ModelProto, WeightFile | None]] = []
    best = best_attempt(rules, attempt, lambda: _sizes(program, batches))
    for folded, file in files:
        if file is not None and folded is not best.folded:
            file.discard()
    refuse_wrong(best.measured)
    report.changed += best.report.changed
    report.refused += best.report.refused
    report.facts.update(best.report.facts)
    return best.folded, report


def _weights(model: onnx.ModelProto) -> Iterator[tuple[str, NDArray[Any]]]:
    for tensor in model.graph.initializer:
        if tensor.data_type in FORMAT_OF:
            yield tensor.name, widened(array_of(tensor))


def _exact(graph: Float64Graph) -> Run:
    names = [spec.name for spec in graph.inputs]
    return lambda arrays: list(graph.run(dict(zip(names, arrays, strict=True))).values())


def _rounded(model: onnx.ModelProto, names: list[str], batch: Arrays) -> Run | None:
    """The model in the types that it declares, on onnxruntime; None where that cannot run it."""
    backend = BACKENDS["onnxruntime"]
    assert isinstance(backend, OnnxRuntime)

    def run(arrays: Arrays) -> Arrays:
        return list(session.run(dict(zip(names, arrays, strict=True))).values())

    try:
        if backend.unavailable():
            return None
        session = backend.open_plain(model)
        run(batch)
    except (UnsupportedError, ValueError):  # protobuf cannot hand on more than 2 GiB
        return None
    return run


def _sizes(program: OnnxProgram, batches: Iterable[Feeds]) -> dict[str, float]:
    """rms of every float tensor in float64, by node, over a few inputs."""
    sizes: dict[str, float] = {}

    def see(name: str, value: NDArray[np.float64]) -> None:
        sizes[name] = max(sizes.get(name, 0.0), rms([value[np.isfinite(value)]]))

    _show(Float64Graph(program.model), batches, view_of(program), see)
    return sizes


def _show(
    graph: Float64Graph, batches: Iterable[Feeds], view: OnnxGraph, see: Callable[[str, NDArray[np.float64]], None]
) -> None:
    """Runs a model in float64 and shows every float tensor that a node of the view makes, with the node's name."""
    nodes = {value: node.name for node, value in view.values.items()}

    def watch(name: str, value: Any) -> None:
        if name in nodes and isinstance(value, np.ndarray) and value.dtype == np.float64:
            see(nodes[name], value)

    for batch in batches:
        graph.run(batch, watch=watch)
