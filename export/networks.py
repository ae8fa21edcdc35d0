"""What is exported: a module or an ONNX file, behind one interface, so that the pipeline is the same for both.

Each knows how to fold itself, what the truth is, and what its own framework adds to the waterfall. The rest of the way
needs no torch, so that an ONNX file takes it where torch is absent.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import onnx

from lowprec.calibration.record import Calibration
from lowprec.errors import ConfigError
from lowprec.export.feeds import Arrays, Feeds
from lowprec.export.golden import Golden
from lowprec.export.parity import Limits, Stage
from lowprec.report import ChangeReport

if TYPE_CHECKING:
    from torch import nn


class Network(Protocol):
    """A trained network on its way into a bundle.

    Attributes:
        folded_from: what the fold is judged against, and on which backend: the artefact and backend of its stage.
    """

    folded_from: tuple[str, str]

    @property
    def input_names(self) -> list[str]:
        """Names of its inputs, in order."""

    def own_feeds(self) -> Feeds:
        """The samples that stand in where the caller gives no data."""

    def fold(self, data: Feeds | None, folder: Path) -> ChangeReport:
        """Folds it; before that there is no `emit` and no `stages`.

        Args:
            data: what the caller gave, for a check on real inputs.
            folder: where weights may be kept that are too large to be in memory twice.
        """

    def emit(self, path: Path) -> onnx.ModelProto:
        """The folded network in float32, which is to be written to `path`; see `external_data`."""

    def run(self, feeds: Arrays) -> Arrays:
        """The truth: outputs of the network as it was, in float64."""

    def ranges(self, feeds: Arrays) -> Calibration:
        """Ranges of the tensors of the network as it was."""

    def stages(self, golden: Golden, limits: Limits) -> list[Stage]:
        """How the folded network holds in its own framework, where that is not ONNX."""


def network_of(
    model: nn.Module | str | Path | onnx.ModelProto,
    example_inputs: Any,
    dynamic_shapes: Any = None,
    opset: int | None = None,
) -> Network:
    """The network that a caller gave.

    Args:
        model: a module in evaluation mode, an ONNX file, or an ONNX model in memory.
        example_inputs: a tuple of inputs in order; a module needs it.
        dynamic_shapes: as `trace` takes them; an ONNX model knows its own.
        opset: the operator set to write; by default a file's own, and `DEFAULT_OPSET` for a module.

    Raises:
        ConfigError: free axes for an ONNX model.
        FoldError: a module that cannot be traced.
        ArtifactError: a file that is missing, damaged or no ONNX model.
        UnsupportedError: an ONNX model that is not float32.
    """
    if isinstance(model, str | Path | onnx.ModelProto):
        from lowprec.export.onnx_network import OnnxNetwork

        if dynamic_shapes is not None:
            raise ConfigError(
                "free axes can be chosen for a module; an ONNX model says itself which of its axes are free"
            )
        return OnnxNetwork(model, example_inputs, opset)
    from lowprec.export.torch_network import TorchNetwork

    return TorchNetwork(model, example_inputs, dynamic_shapes, opset)
