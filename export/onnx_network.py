"""An ONNX model on its way into a bundle: the file as it came is the truth, its folded copy the artefact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
from onnx.external_data_helper import uses_external_data

from lowprec.calibration.record import Calibration
from lowprec.errors import UnsupportedError
from lowprec.export.backends.arithmetic import half_types
from lowprec.export.emit.opset import in_opset
from lowprec.export.external_data import external_path, move_weights
from lowprec.export.feeds import Arrays, Feeds, collect_batches
from lowprec.export.float64 import Float64Graph
from lowprec.export.folding.from_onnx.feeds import random_samples
from lowprec.export.folding.from_onnx.fold import fold_onnx
from lowprec.export.golden import Golden
from lowprec.export.onnx_files import load_onnx
from lowprec.export.onnx_ranges import graph_ranges
from lowprec.export.parity import Limits, Stage
from lowprec.export.weight_file import PARTIAL
from lowprec.report import ChangeReport

_RANDOM_SAMPLES = 64


class OnnxNetwork:
    """An ONNX model.

    Args:
        model: a file, or a model in memory; untouched.
        example_inputs: arrays in the order of its inputs, taken where no other data is given; None for random ones.
        opset: the operator set to write, the model's own by default.

    Raises:
        ArtifactError: the file is missing, damaged or no ONNX model.
        UnsupportedError: the model is not float32, or cannot be evaluated in float64.
    """

    folded_from = ("the ONNX model as it came", "reference")

    def __init__(
        self, model: str | Path | onnx.ModelProto, example_inputs: Any = None, opset: int | None = None
    ) -> None:
        self._model = model if isinstance(model, onnx.ModelProto) else load_onnx(model)
        self._example_inputs, self._opset = example_inputs, opset
        _refuse_other_types(self._model)
        self._graph = Float64Graph(self._model)  # says which operators it cannot evaluate
        self._folded: onnx.ModelProto | None = None

    @property
    def input_names(self) -> list[str]:
        """Names of the graph's inputs."""
        return [spec.name for spec in self._graph.inputs]

    def own_feeds(self) -> Feeds:
        """The example inputs, else random ones."""
        if self._example_inputs is not None:
            return Feeds(*collect_batches([tuple(self._example_inputs)], self.input_names), "the example inputs")
        feeds = random_samples(self._graph, _RANDOM_SAMPLES)
        return Feeds(feeds, None, "random inputs, drawn from the shapes and types that the model states")

    def fold(self, data: Feeds | None, folder: Path) -> ChangeReport:
        """Folds the graph, checked on the caller's data or on random inputs."""
        is_large = any(map(uses_external_data, self._model.graph.initializer))
        feeds = None if data is None else data.inputs
        self._folded, report = fold_onnx(self._model, feeds, folder=folder if is_large else None)
        return report

    def emit(self, path: Path) -> onnx.ModelProto:
        """The folded graph."""
        assert self._folded is not None
        model = self._folded if self._opset is None else in_opset(self._folded, self._opset)
        move_weights(external_path(path), model)  # out of the model as it came, and of the file of the fold
        for file in path.parent.glob(PARTIAL):
            file.unlink()
        return model

    def run(self, feeds: Arrays) -> Arrays:
        """The model as it came, in float64."""
        return self._graph.run(feeds)

    def ranges(self, feeds: Arrays) -> Calibration:
        """Of every tensor of the model as it came, in float64."""
        return graph_ranges(self._model, self._graph, feeds)

    def stages(self, golden: Golden, limits: Limits) -> list[Stage]:
        """None: it runs where all ONNX artefacts run."""
        return []


def _refuse_other_types(model: onnx.ModelProto) -> None:
    """The float32 graph is what every other precision is rounded from, so one must be there."""
    others = half_types(model)
    kinds = {value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)}
    others |= {"float64"} if onnx.TensorProto.DOUBLE in kinds else set()
    if others:
        raise UnsupportedError(
            f"the model is of {' and '.join(sorted(others))}, and export starts from float32, of which it makes the "
            "narrower artefacts itself; give the float32 model that this one was made from"
        )
