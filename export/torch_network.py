"""A module on its way into a bundle: traced, folded, and written as ONNX by torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from lowprec.calibration import calibrate
from lowprec.calibration.record import Calibration
from lowprec.export.backends import BACKENDS
from lowprec.export.emit import emit_onnx
from lowprec.export.emit.opset import DEFAULT_OPSET
from lowprec.export.external_data import external_path
from lowprec.export.feeds import Arrays, Feeds, collect_batches
from lowprec.export.folding import FoldedModule, fold_traced, trace
from lowprec.export.golden import Golden
from lowprec.export.parity import Limits, Stage
from lowprec.export.stages import judged, run_batched
from lowprec.export.truth import run_traced
from lowprec.export.weight_file import LARGE
from lowprec.report import ChangeReport


class TorchNetwork:
    """A traced module.

    Args:
        module: in evaluation mode; untouched.
        example_inputs: as `torch.export` takes them.
        dynamic_shapes: as `trace` takes them.
        opset: the operator set to write.
    """

    folded_from = ("traced graph", "torch")

    def __init__(
        self,
        module: nn.Module,
        example_inputs: tuple[torch.Tensor, ...],
        dynamic_shapes: Any = None,
        opset: int | None = None,
    ) -> None:
        self._module, self._example_inputs, self._opset = module, example_inputs, opset or DEFAULT_OPSET
        self._traced = trace(module, example_inputs, dynamic_shapes)
        constants = self._traced.program.constants
        self._is_large = sum(self._traced.program.tensor(name).nbytes for name in constants) >= LARGE
        self._folded: FoldedModule | None = None

    @property
    def input_names(self) -> list[str]:
        """Names of forward's arguments."""
        return list(self._traced.input_names)

    def own_feeds(self) -> Feeds:
        """The example inputs."""
        return Feeds(*collect_batches([self._example_inputs], self.input_names), "the example inputs")

    def fold(self, data: Feeds | None, folder: Path) -> ChangeReport:
        """Folds the trace; the check runs on the example inputs and random ones like them."""
        self._folded, report = fold_traced(self._traced, folder if self._is_large else None)
        return report

    def emit(self, path: Path) -> onnx.ModelProto:
        """The folded module through torch.onnx."""
        assert self._folded is not None
        if self._folded.file is not None:
            self._folded.file.move_to(external_path(path))
        return emit_onnx(self._folded, self._traced, self._opset)

    def run(self, feeds: Arrays) -> Arrays:
        """The traced module in float64."""
        return run_traced(self._traced, feeds)

    def ranges(self, feeds: Arrays) -> Calibration:
        """By hooks on the module, in the arithmetic that it runs in."""
        tensors = tuple(torch.from_numpy(np.ascontiguousarray(value)) for value in feeds.values())
        return calibrate(self._module, [tensors])

    def stages(self, golden: Golden, limits: Limits) -> list[Stage]:
        """The folded module in float32 on torch."""
        session = BACKENDS["torch"].open(self._folded)
        outputs = run_batched(session, golden.inputs)
        return [judged("fp32 on torch", "folded module", "torch", session.arithmetic, outputs, golden, "fp32", limits)]
