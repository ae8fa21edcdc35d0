"""The backend "openvino": ONNX on OpenVINO's CPU device, held to the types that the graph declares.

Left to itself OpenVINO computes float32 networks in bfloat16 where the CPU can, so the precision is pinned, and what
each layer really ran in is read from its runtime model.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from lowprec.errors import UnsupportedError
from lowprec.export.backends.arithmetic import narrow_storage
from lowprec.export.backends.base import OnnxBackend, Session, decoded, narrowed, onnx_model
from lowprec.export.onnx_files import first_line
from lowprec.export.tensors import specs_of
from lowprec.packages import is_installed

_PRODUCTS = frozenset({"Convolution", "Deconvolution", "FullyConnected", "MatMul"})
_TYPES = {"f32": "float", "f16": "float16", "i8": "int8", "u8": "int8"}


class OpenVINOSession(Session):
    """A compiled model."""

    def __init__(self, compiled: Any, model: onnx.ModelProto, arithmetic: str, placement: dict[str, int]) -> None:
        weights = {tensor.name for tensor in model.graph.initializer}
        inputs = specs_of([value for value in model.graph.input if value.name not in weights])
        super().__init__(inputs, specs_of(model.graph.output), arithmetic, placement)
        self._compiled = compiled

    def _run(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        cast = {spec.name: narrowed(feeds[spec.name], spec) for spec in self.inputs}
        try:
            values = self._compiled(cast)
        except Exception as error:  # OpenVINO raises RuntimeError and its own kinds
            raise UnsupportedError(f"OpenVINO cannot run this model on this batch: {first_line(error)}") from error
        return {spec.name: decoded(np.array(values[spec.name]), spec) for spec in self.outputs}


class OpenVINO(OnnxBackend):
    """OpenVINO on the CPU."""

    name = "openvino"
    summary = "ONNX on OpenVINO's CPU device"

    def unavailable(self) -> str | None:
        """Why openvino cannot be imported, or None."""
        return None if is_installed("openvino") else "openvino is not installed; pip install lowprec[openvino]"

    def copies_weights(self, precision: str) -> bool:
        """It lays all weights out anew."""
        return True

    def _open(self, artefact: str | Path | onnx.ModelProto) -> Session:
        import openvino

        model = onnx_model(artefact)
        stored = narrow_storage(model)
        try:
            core = openvino.Core()
            read = core.read_model(
                model.SerializeToString() if isinstance(artefact, onnx.ModelProto) else str(artefact)
            )
            compiled = core.compile_model(
                read, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
            )
            layers = [_layer(node) for node in compiled.get_runtime_model().get_ordered_ops()]
        except Exception as error:  # OpenVINO raises RuntimeError and its own kinds
            raise UnsupportedError(f"OpenVINO cannot load this model: {first_line(error)}") from error
        computing = [kind for layer, kind in layers if layer in _PRODUCTS]
        return OpenVINOSession(compiled, model, describe(stored, Counter(computing)), {"CPU": len(layers)})


def _layer(node: Any) -> tuple[str, str]:
    """Kind and precision of a layer of the runtime model."""
    about = node.get_rt_info()
    kind, precision = (about[key].astype(str) for key in ("layerType", "runtimePrecision"))
    return kind, _TYPES.get(precision, precision)


def describe(stored: set[str], computed: Counter[str]) -> str:
    """The arithmetic in words, from what the model declares and the types that products compute in."""
    storage = " and ".join(sorted(stored) or ["float32"])
    counts = ", ".join(f"{count} in {kind}" for kind, count in sorted(computed.items()))
    return f"{storage} storage on the CPU" + (f" (products: {counts})" if counts else "")
