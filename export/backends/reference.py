"""The backend "reference": the ONNX graph in float64, the one that rounding is measured from.

Why beside onnxruntime: it has no float64 convolution, and an exporter's mistake must be seen free of any rounding.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
from numpy.typing import NDArray

from lowprec.export.backends.base import OnnxBackend, Session, onnx_model
from lowprec.export.float64 import Float64Graph


class ReferenceSession(Session):
    """A Float64Graph as a session."""

    def __init__(self, graph: Float64Graph) -> None:
        super().__init__(graph.inputs, graph.outputs, "float64 throughout (onnx's reference evaluation)")
        self.graph = graph

    def _run(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return self.graph.run(feeds)


class Reference(OnnxBackend):
    """Runs ONNX files, and models in memory, in float64 on the CPU."""

    name = "reference"
    summary = "the ONNX graph in float64, through onnx's reference evaluation"

    def unavailable(self) -> str | None:
        """None: onnx is a dependency."""
        return None

    def _open(self, artefact: str | Path | onnx.ModelProto) -> Session:
        return ReferenceSession(Float64Graph(onnx_model(artefact)))
