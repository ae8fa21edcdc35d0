"""An ONNX graph in float64: the truth that every rounded run is measured against.

onnxruntime has no float64 convolution and torch is absent where bundles are verified, so the graph is evaluated by
onnx's own reference, widened throughout (float64_model) and with its slow operators replaced (float64_ops). Values are
dropped after their last use: memory is that of the widest point of the network, not of all its activations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from lowprec.errors import DataError, UnsupportedError
from lowprec.export.float64_model import FLOAT32_BY_DEFINITION, float64_model, size_names, terms_per_element, widened
from lowprec.export.float64_ops import float64_operators
from lowprec.export.onnx_files import first_line, load_onnx

__all__ = ["Float64Graph", "Kind", "TensorSpec", "Visit", "check_feeds", "load_onnx", "specs_of"]

Kind = Literal["input", "weight", "node"]
Visit = Callable[[str, Kind, NDArray[Any], int], NDArray[Any]]


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and element type of an input or output.

    Args:
        name: as in the graph.
        shape: one entry per axis, a name or None where the size is free; None when even the rank is.
        dtype: numpy's name of the element type, or `bfloat16`.
    """

    name: str
    shape: tuple[int | str | None, ...] | None
    dtype: str

    @property
    def batch_axis(self) -> int | None:
        """0 if the size of axis 0 is free, else None."""
        return 0 if self.shape and not isinstance(self.shape[0], int) else None

    @property
    def is_float(self) -> bool:
        """Whether the elements are floating-point numbers."""
        return self.dtype in ("float16", "bfloat16", "float32", "float64")


def specs_of(values: Any) -> tuple[TensorSpec, ...]:
    """The specs of a graph's inputs or outputs (onnx ValueInfoProto)."""
    found = []
    for value in values:
        kind = value.type.tensor_type
        if not value.type.HasField("tensor_type"):
            raise UnsupportedError(f"{value.name!r} is no tensor; only tensor inputs and outputs can be compared")
        shape = None
        if kind.HasField("shape"):
            shape = tuple(
                dim.dim_value if dim.HasField("dim_value") else (dim.dim_param or None) for dim in kind.shape.dim
            )
        found.append(TensorSpec(value.name, shape, str(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))))
    return tuple(found)


def check_feeds(specs: tuple[TensorSpec, ...], feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The feeds as arrays, one for each input and no other.

    Raises:
        DataError: an input is missing or unknown, or has the wrong rank, size or kind of number.
    """
    names = [spec.name for spec in specs]
    missing = [name for name in names if name not in feeds]
    unknown = [name for name in feeds if name not in names]
    if missing or unknown:
        raise DataError(
            f"the model takes the inputs {', '.join(names) or 'none'}; "
            f"missing: {', '.join(missing) or 'none'}, unknown: {', '.join(unknown) or 'none'}"
        )
    arrays = {spec.name: np.asarray(feeds[spec.name]) for spec in specs}
    for spec in specs:
        array = arrays[spec.name]
        if spec.shape is not None and (
            array.ndim != len(spec.shape)
            or any(isinstance(want, int) and want != size for want, size in zip(spec.shape, array.shape, strict=True))
        ):
            wanted = ", ".join("?" if size is None else str(size) for size in spec.shape)
            raise DataError(f"the input {spec.name!r} has shape {array.shape}; the model takes ({wanted})")
        if array.dtype.kind not in "fiub" or (array.dtype.kind == "f" and not spec.is_float):
            raise DataError(f"the input {spec.name!r} holds {array.dtype}; the model takes {spec.dtype}")
    return arrays


class Float64Graph:
    """A model evaluated in float64 whatever float types it declares.

    Args:
        model: the model, weights included; it is not changed.

    Raises:
        UnsupportedError: the graph draws random numbers, or holds an operator that onnx's reference lacks.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
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
        self._last_use = _last_uses(wide.graph)

    @property
    def batch_axis(self) -> int | None:
        """0 if axis 0 of every input is free, else None."""
        return 0 if self.inputs and all(spec.batch_axis == 0 for spec in self.inputs) else None

    def run(self, feeds: Mapping[str, NDArray[Any]], visit: Visit | None = None) -> dict[str, NDArray[Any]]:
        """Evaluates the graph.

        Args:
            feeds: one array per input; floats of any width.
            visit: called as `visit(name, kind, value, terms)` with each stored value: the inputs, the weights, then
                every output of every node of the main graph, in order of evaluation; what it returns takes the value's
                place. `terms` is 0 where values were only moved or selected, 1 for elementwise arithmetic, K for a
                reduction of length K. Values that decide shapes, and the inside of If, Loop and Scan, are not visited.

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
        for name, array in self._weights.items():
            values[name] = visit(name, "weight", array, 0) if visit and name not in self._sizes else array
        with np.errstate(all="ignore"):
            for index, node in enumerate(self._nodes):
                inputs = [values[name] for name in node.input]
                results = _evaluate(node, inputs, values)
                for name, result in zip(node.output, results, strict=False):
                    if visit and name and name not in self._sizes and isinstance(result, np.ndarray):
                        terms = terms_per_element(node.onnx_node, inputs, result)
                        result = visit(name, "node", result, terms)
                    values[name] = result
                for name in self._last_use.get(index, ()):
                    del values[name]
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
    """Names that may be dropped after each node; none in a graph with nested graphs, which read freely."""
    nested = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
    if any(attribute.type in nested for node in graph.node for attribute in node.attribute):
        return {}
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
