"""An ONNX graph in float64: the truth that every rounded run is measured against.

onnxruntime has no float64 convolution and torch is absent where bundles are verified, so the graph is evaluated by
onnx's own reference, widened throughout (widening.py) and with its slow operators replaced (operators.py). Values are
dropped after their last use and weights widened at their first: memory is that of the widest point of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from lowprec.errors import UnsupportedError
from lowprec.export.external_data import array_of
from lowprec.export.float64.operators import float64_operators
from lowprec.export.float64.widening import FLOAT32_BY_DEFINITION, float64_model, size_names, terms_per_element, widened
from lowprec.export.onnx_files import first_line, nested_graphs
from lowprec.export.tensors import check_feeds, specs_of

Kind = Literal["input", "weight", "node"]
Visit = Callable[[str, Kind, NDArray[Any], int], NDArray[Any]]
Watch = Callable[[str, Any], None]


class Float64Graph:
    """A model evaluated in float64 whatever float types it declares.

    Args:
        model: the model, weights included; it is not changed.
        held: values of weights that the model names and does not hold, made float64 where they are read.

    Raises:
        UnsupportedError: the graph draws random numbers, or holds an operator that onnx's reference lacks.
    """

    def __init__(self, model: onnx.ModelProto, held: Mapping[str, Any] | None = None) -> None:
        self._held = held or {}
        weights_in_inputs = {tensor.name for tensor in model.graph.initializer}
        graph_inputs = [value for value in model.graph.input if value.name not in weights_in_inputs]
        self.inputs = specs_of(graph_inputs)
        self.outputs = specs_of(model.graph.output)
        wide, self._weights = float64_model(model)
        self._sizes = size_names(model)
        try:
            self._nodes = ReferenceEvaluator(wide, new_ops=float64_operators(model)).rt_nodes_
        except (NotImplementedError, RuntimeError, TypeError, KeyError) as error:
            raise UnsupportedError(f"onnx's reference cannot evaluate this graph: {first_line(error)}") from None
        self._nested = any(nested_graphs([node]) for node in wide.graph.node)
        self._last_use = {} if self._nested else _last_uses(wide.graph)

    @property
    def batch_axis(self) -> int | None:
        """0 if axis 0 of every input is free, else None."""
        return 0 if self.inputs and all(spec.batch_axis == 0 for spec in self.inputs) else None

    def run(
        self, feeds: Mapping[str, NDArray[Any]], visit: Visit | None = None, watch: Watch | None = None
    ) -> dict[str, NDArray[Any]]:
        """Evaluates the graph.

        Args:
            feeds: one array per input; floats of any width.
            visit: called as `visit(name, kind, value, terms)` with each stored value: the inputs, then every weight
                before the first node that reads it, and every output of every node of the main graph, in order of
                evaluation; what it returns takes the value's place. `terms` is 0 where values were only moved or
                selected, 1 for elementwise arithmetic, K for a reduction of length K. Values that decide shapes, and
                the inside of If, Loop and Scan, are not visited.
            watch: called as `watch(name, value)` with every value of the main graph, those that decide shapes included.

        Returns:
            The outputs by name; floating-point ones in float64.

        Raises:
            DataError: the feeds do not fit the inputs.
            UnsupportedError: a node cannot be evaluated.
        """
        values: dict[str, Any] = {"": None}
        for name, array in check_feeds(self.inputs, feeds).items():
            spec = next(spec for spec in self.inputs if spec.name == name)
            wide = array.astype(np.float64) if spec.is_float else array.astype(spec.dtype)
            values[name] = visit(name, "input", wide, 0) if visit else wide
        if watch:
            for name, value in values.items():
                watch(name, value)

        def load(names: Iterable[str]) -> None:
            for name in names:
                if name not in values and name in self._weights:
                    found = self._held.get(name)
                    array = widened(array_of(self._weights[name])) if found is None else np.asarray(found, np.float64)
                    values[name] = visit(name, "weight", array, 0) if visit and name not in self._sizes else array
                    if watch:
                        watch(name, values[name])

        if self._nested:
            load(self._weights)
        with np.errstate(all="ignore"):
            for index, node in enumerate(self._nodes):
                load(node.input)
                inputs = [values[name] for name in node.input]
                results = _evaluate(node, inputs, values)
                for name, result in zip(node.output, results, strict=False):
                    if visit and name and name not in self._sizes and isinstance(result, np.ndarray):
                        terms = terms_per_element(node.onnx_node, inputs, result)
                        result = visit(name, "node", result, terms)
                    values[name] = result
                    if watch:
                        watch(name, result)
                for name in self._last_use.get(index, ()):
                    del values[name]
        load(spec.name for spec in self.outputs)
        return {spec.name: np.asarray(values[spec.name]) for spec in self.outputs}


def _evaluate(node: Any, inputs: list[Any], values: dict[str, Any]) -> tuple[Any, ...]:
    label = f"node {node.onnx_node.name or node.output[0]!r} ({node.op_type})"
    try:
        results = node.run(*inputs, context=values) if node.need_context() else node.run(*inputs)
    except Exception as error:  # the reference raises every kind; each becomes one line that names the node
        cause = error.__cause__ or error
        raise UnsupportedError(f"{label} cannot be evaluated in float64: {first_line(cause)}") from error
    for result in results:
        if getattr(result, "dtype", None) in (np.float16, np.float32) and node.op_type not in FLOAT32_BY_DEFINITION:
            raise UnsupportedError(f"{label} cannot be evaluated in float64: onnx's reference computes it in float32")
    return tuple(widened(result) if isinstance(result, np.ndarray) else result for result in results)


def _last_uses(graph: onnx.GraphProto) -> dict[int, list[str]]:
    """Names that may be dropped after each node of a graph without nested graphs, which would read freely."""
    kept = {value.name for value in graph.output} | {""}
    last: dict[str, int] = {}
    for index, node in enumerate(graph.node):
        for name in [*node.input, *node.output]:
            last[name] = index
    found: dict[int, list[str]] = {}
    for name, index in last.items():
        if name not in kept:
            found.setdefault(index, []).append(name)
    return found
