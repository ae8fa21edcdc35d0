"""The artefacts of a network: one float32 graph in each precision that was asked for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import TensorProto
from onnx.external_data_helper import uses_external_data

from lowprec.export.emit.keep import DEFAULT_KEEP, KeepList
from lowprec.export.emit.precision import convert_precision
from lowprec.export.emit.quantise import quantise
from lowprec.export.external_data import external_path
from lowprec.export.weight_file import WeightFile
from lowprec.formats import BF16, FP16
from lowprec.report import ChangeReport


@dataclass(frozen=True)
class Narrowing:
    """What may be chosen about narrow artefacts.

    Args:
        keep: nodes that stay float32; None for none in fp16 and bf16, `DEFAULT_KEEP` in mixed and int8.
        narrow_io: floating inputs and outputs that are half in fp16, bf16 and mixed: all of them, or these.
    """

    keep: KeepList | None = None
    narrow_io: bool | str | Collection[str] = False

    def in_precision(
        self, precision: str, model: onnx.ModelProto, path: Path, feeds: Mapping[str, NDArray[Any]], target: Path
    ) -> tuple[onnx.ModelProto, ChangeReport]:
        """A narrow copy of a model, and which of its nodes stay float32 and why.

        Args:
            precision: fp16 and bf16, where a constant that overflows is an error; mixed, half but for what is kept,
                such constants among it; int8.
            model: float32.
            path: its file.
            feeds: samples that int8 takes its scales from.
            target: where the result will be written; where the weights of `model` are in a file, those of the result
                are put beside it right away.

        Raises:
            ConfigError: `narrow_io` names no floating input or output.
            MissingDependencyError: int8 without onnxruntime.
            UnsupportedError: the graph cannot be had in this precision.
        """
        if precision == "int8":
            return quantise(path, feeds, self.keep or DEFAULT_KEEP)
        keep = self.keep or (DEFAULT_KEEP if precision == "mixed" else KeepList())
        file = None
        if any(map(uses_external_data, model.graph.initializer)):
            file = WeightFile(target.parent)
            file.move_to(external_path(target))
        return convert_precision(
            model,
            BF16 if precision == "bf16" else FP16,
            keep.reason,
            narrow_edges=self._edges(model),
            keep_overflowing=precision == "mixed",
            file=file,
        )

    def _edges(self, model: onnx.ModelProto) -> Collection[str]:
        if isinstance(self.narrow_io, str):
            return (self.narrow_io,)
        if not isinstance(self.narrow_io, bool):
            return self.narrow_io
        weights = {tensor.name for tensor in model.graph.initializer}
        edges = [value for value in (*model.graph.input, *model.graph.output) if value.name not in weights]
        floats = [value.name for value in edges if value.type.tensor_type.elem_type == TensorProto.FLOAT]
        return floats if self.narrow_io else ()
