"""The backend "onnxruntime": ONNX on the CPU provider, with its real arithmetic said aloud.

onnxruntime does two things in silence: a provider that fails to load is replaced by the CPU, and half-precision
operators that the CPU lacks are computed in float32 between casts. So the providers are read back after loading, and
for models that hold half values the optimised graph is read to see what each product is really computed in.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from lowprec.errors import MissingDependencyError, UnsupportedError
from lowprec.export.backends.base import OnnxBackend, Session, narrowed, onnx_model
from lowprec.export.onnx_files import first_line, graphs_of
from lowprec.export.tensors import specs_of
from lowprec.packages import is_installed

# Operators whose sums decide the error of a network; Fused* are onnxruntime's own fusions of them.
PRODUCT_OPS = frozenset({"Conv", "ConvTranspose", "FusedConv", "FusedGemm", "FusedMatMul", "Gemm", "MatMul"})
HALVES = {TensorProto.FLOAT16: "float16", TensorProto.BFLOAT16: "bfloat16"}


class OrtSession(Session):
    """An onnxruntime session on one provider."""

    def __init__(self, session: Any, model: onnx.ModelProto, arithmetic: str) -> None:
        weights = {tensor.name for tensor in model.graph.initializer}
        inputs = specs_of([value for value in model.graph.input if value.name not in weights])
        super().__init__(inputs, specs_of(model.graph.output), arithmetic)
        self._session = session

    def _run(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        names = [spec.name for spec in self.outputs]
        cast = {spec.name: narrowed(feeds[spec.name], spec) for spec in self.inputs}
        try:
            values = self._session.run(names, cast)
        except Exception as error:  # onnxruntime's own errors derive from Exception alone
            raise UnsupportedError(f"onnxruntime cannot run this model on this batch: {first_line(error)}") from error
        return {name: np.asarray(value) for name, value in zip(names, values, strict=True)}


class OnnxRuntime(OnnxBackend):
    """onnxruntime on the CPU."""

    name = "onnxruntime"
    summary = "ONNX on onnxruntime's CPU provider"
    provider = "CPUExecutionProvider"

    def unavailable(self) -> str | None:
        """Why onnxruntime cannot be imported, or None."""
        if not is_installed("onnxruntime"):
            return "onnxruntime is not installed; pip install lowprec[cpu]"
        return None

    def _open(self, artefact: str | Path | onnx.ModelProto) -> Session:
        import onnxruntime

        model = onnx_model(artefact)
        source = model.SerializeToString() if isinstance(artefact, onnx.ModelProto) else str(artefact)
        halves = half_types(model)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors alone: it warns of every optimised graph that is written
        with tempfile.TemporaryDirectory() as folder:
            optimised = Path(folder) / "optimised.onnx"
            if halves:
                options.optimized_model_filepath = str(optimised)
            try:
                session = onnxruntime.InferenceSession(source, options, providers=[self.provider])
            except Exception as error:  # onnxruntime's own errors derive from Exception alone
                raise UnsupportedError(f"onnxruntime cannot load this model: {first_line(error)}") from error
            check_providers(self.provider, session.get_providers())
            computed = product_types(onnx.load(optimised, load_external_data=False)) if halves else Counter()
        return OrtSession(session, model, describe(halves, computed))

    def open_plain(self, model: onnx.ModelProto) -> Session:
        """A model in memory, without any optimisation: what its own operators compute, in the types it declares."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # a model that it cannot run is told by the exception
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[self.provider])
        except Exception as error:  # onnxruntime's own errors derive from Exception alone
            raise UnsupportedError(f"onnxruntime cannot load this model: {first_line(error)}") from error
        return OrtSession(session, model, "the types that the graph declares, on the CPU, not optimised")


def check_providers(asked: str, found: list[str]) -> None:
    """Raises `MissingDependencyError` unless the provider asked for is the one that onnxruntime loaded first."""
    if not found or found[0] != asked:
        raise MissingDependencyError(
            f"asked onnxruntime for {asked}, found {', '.join(found) or 'no provider'}: it fell back in silence; "
            "install the package and the driver that this provider needs"
        )


def half_types(model: onnx.ModelProto) -> set[str]:
    """Which half formats a model declares, in weights, inputs, outputs or casts."""
    found = set()
    for graph in graphs_of(model):
        found |= {tensor.data_type for tensor in graph.initializer}
        found |= {value.type.tensor_type.elem_type for value in [*graph.input, *graph.output, *graph.value_info]}
        for node in graph.node:
            found |= {attribute.i for attribute in node.attribute if node.op_type == "Cast" and attribute.name == "to"}
            found |= {attribute.t.data_type for attribute in node.attribute if attribute.HasField("t")}
    return {HALVES[kind] for kind in found if kind in HALVES}


def product_types(optimised: onnx.ModelProto) -> Counter[str]:
    """How many convolutions and matrix products of an optimised graph compute in each element type.

    The type of a node is that of its first input: of the weight, graph input or value of that name, else of the Cast
    that made it, else of whatever the operator before it computes in (same type in, same type out).
    """
    types: dict[str, int] = {tensor.name: tensor.data_type for tensor in optimised.graph.initializer}
    for value in [*optimised.graph.input, *optimised.graph.value_info, *optimised.graph.output]:
        types.setdefault(value.name, value.type.tensor_type.elem_type)
    found: Counter[str] = Counter()
    for node in optimised.graph.node:
        casts = [attribute.i for attribute in node.attribute if node.op_type == "Cast" and attribute.name == "to"]
        known = [types[name] for name in node.input if types.get(name)]
        kind = casts[0] if casts else known[0] if known else TensorProto.UNDEFINED
        for name in node.output:
            types[name] = types.get(name) or kind
        if node.op_type in PRODUCT_OPS:
            found[TensorProto.DataType.Name(known[0] if known else TensorProto.UNDEFINED).lower()] += 1
    return found


def describe(halves: set[str], computed: Counter[str]) -> str:
    """The arithmetic in words, from the half formats that are stored and the types that products compute in."""
    if not halves:
        return "the types that the graph declares, on the CPU"
    stored = " and ".join(sorted(halves))
    if not computed:
        return f"{stored} storage on the CPU; the graph holds no convolution or matrix product"
    counts = ", ".join(f"{count} in {kind}" for kind, count in sorted(computed.items()))
    if set(computed) == {"float"}:
        return f"{stored} storage, float32 arithmetic between casts, on the CPU (products: {counts})"
    return f"{stored} storage on the CPU (products: {counts})"
