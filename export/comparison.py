"""`compare`: says whether two models are the same function, up to the rounding that the candidate is allowed.

The reference is evaluated in float64 and is the truth; its own rounding-noise floor at the candidate's precision is the
yardstick. The candidate is judged twice where that is possible: in float64 (is it the same algebra?) and as it really
runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lowprec.data import Samples, load_data
from lowprec.errors import ArtifactError
from lowprec.export.backends import BACKENDS
from lowprec.export.float64 import Float64Graph
from lowprec.export.golden import Golden
from lowprec.export.onnx_files import load_onnx
from lowprec.export.parity import Limits, ParityReport
from lowprec.export.parity.storage import Storage, format_of_precision
from lowprec.export.stages import Artefact, judged, run_batched, run_stages
from lowprec.export.storage import storage_of
from lowprec.export.truth import choose_samples, golden_from_onnx, golden_from_trace
from lowprec.formats import FORMATS, FP32

if TYPE_CHECKING:
    from torch import nn

    from lowprec.export.sources import Source

DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class _Side:
    """One of the two models: an ONNX file or a module, never both."""

    name: str
    onnx_path: Path | None = None
    source: Source | None = None


def compare(
    reference: str | Path | nn.Module,
    candidate: str | Path | nn.Module,
    data: str | Samples,
    precision: str | None = None,
    limits: Limits = DEFAULT_LIMITS,
    progress: Callable[[int, int], None] | None = None,
) -> ParityReport:
    """Judges the candidate against the reference on data.

    Args:
        reference: an .onnx file, a run folder, MODULE:FACTORY, or a module in evaluation mode.
        candidate: the same kinds.
        data: samples; at most 256 of them are used.
        precision: what the candidate may be rounded to; read from its types when None.
        limits: the bands of the verdict.
        progress: called with (done, total).

    Raises:
        ArtifactError: a file is missing or not a model.
        DataError: the data does not fit the models.
        LowprecError: inputs or outputs of the two cannot be matched.
    """
    samples = data if isinstance(data, Samples) else load_data(data)
    left, right = _side(reference, "reference"), _side(candidate, "candidate")
    storage = _allowed(right, precision)
    golden, allowed = _golden(left, samples, storage), storage.name
    if right.onnx_path is not None:
        artefact = Artefact(right.name, right.onnx_path, allowed)
        stages = run_stages([artefact], golden, BACKENDS, limits, progress)
    else:
        assert right.source is not None
        session = BACKENDS["torch"].open(right.source.module)
        outputs = run_batched(session, golden.inputs)
        title = f"{allowed} on torch"
        stages = [judged(title, right.name, "torch", session.arithmetic, outputs, golden, allowed, limits)]
    facts = {"reference": left.name, "candidate": right.name, "precision": allowed, "samples": golden.samples}
    return ParityReport(tuple(stages), facts=facts)


def _side(model: str | Path | nn.Module, role: str) -> _Side:
    if isinstance(model, str | Path):
        path = Path(model)
        if path.suffix == ".onnx":
            if not path.is_file():
                raise ArtifactError(f"the {role} {path} is missing: no such file")
            return _Side(path.name, onnx_path=path)
    from lowprec.export.sources import Source, open_source

    if isinstance(model, str | Path):
        return _Side(str(model), source=open_source(str(model)))
    return _Side(type(model).__name__, source=Source(role, model))


def _golden(side: _Side, samples: Samples, storage: Storage) -> Golden:
    if side.onnx_path is not None:
        return golden_from_onnx(side.onnx_path, samples, [storage])
    from lowprec.export.emit import emit_onnx
    from lowprec.export.folding import fold_traced, trace

    assert side.source is not None
    traced = trace(side.source.module, side.source.inputs_for(samples))
    folded, _ = fold_traced(traced)
    feeds, labels = choose_samples(samples, traced.input_names)
    return golden_from_trace(traced, Float64Graph(emit_onnx(folded, traced)), feeds, labels, [storage])


def _allowed(side: _Side, precision: str | None) -> Storage:
    """How the candidate may store its values: in one format where that is named, else as it says itself."""
    if precision is not None and (precision in FORMATS or side.onnx_path is None):
        return Storage.of(format_of_precision(precision))
    if side.onnx_path is not None:
        return storage_of(load_onnx(side.onnx_path), precision)
    assert side.source is not None
    found = {str(parameter.dtype).removeprefix("torch.") for parameter in side.source.module.parameters()}
    names = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64"}
    formats = [FORMATS[names[name]] for name in found if name in names]
    return Storage.of(min(formats, key=lambda fmt: fmt.precision, default=FP32))
