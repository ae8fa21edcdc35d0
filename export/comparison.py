"""`compare`: says whether two models are the same function, up to the rounding that the candidate is allowed.

The reference is evaluated in float64 and is the truth; its own rounding-noise floor at the candidate's precision is the
yardstick. The candidate is judged twice where that is possible: in float64 (is it the same algebra?) and as it really
runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowprec.artifacts import member_path, read_json, sha256_of
from lowprec.data import Samples, load_data
from lowprec.errors import ArtifactError, UnsupportedError
from lowprec.export.backends import BACKENDS
from lowprec.export.feeds import choose_samples
from lowprec.export.float64 import Float64Graph
from lowprec.export.golden import Golden
from lowprec.export.onnx_files import load_onnx
from lowprec.export.parity import Limits, ParityReport
from lowprec.export.parity.storage import Storage, format_of_precision
from lowprec.export.stages import Artefact, judged, run_batched, run_stages
from lowprec.export.storage import storage_of
from lowprec.export.truth import golden_from_onnx, golden_from_trace
from lowprec.formats import FORMATS, FP32

if TYPE_CHECKING:
    from torch import nn

    from lowprec.export.sources import Source

DEFAULT_LIMITS = Limits()


@dataclass(frozen=True)
class _Side:
    """One of the two models: an ONNX file, an engine or a module."""

    name: str
    onnx_path: Path | None = None
    engine: Path | None = None
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
        candidate: the same kinds, or an .engine with its sidecar.
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
    file = right.onnx_path or right.engine
    if file is not None:
        backends = BACKENDS if right.engine is None else {name: BACKENDS[name] for name in [_library(right.engine)]}
        stages = run_stages([Artefact(right.name, file, allowed)], golden, backends, limits, progress)
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
        if path.suffix in (".onnx", ".engine"):
            if not path.is_file():
                raise ArtifactError(f"the {role} {path} is missing: no such file")
            if path.suffix == ".onnx":
                return _Side(path.name, onnx_path=path)
            if role == "reference":
                raise UnsupportedError(f"{path} is an engine, which has no float64 truth; give it as the candidate")
            return _Side(path.name, engine=path)
    from lowprec.export.sources import Source, open_source

    if isinstance(model, str | Path):
        return _Side(str(model), source=open_source(str(model)))
    return _Side(type(model).__name__, source=Source(role, model))


def _sidecar(engine: Path) -> dict[str, Any]:
    content = read_json(engine.with_name(f"{engine.name}.json"), "the engine's sidecar")
    if not isinstance(content, dict) or not isinstance(content.get("precision"), str):
        raise ArtifactError(f"{engine}.json does not say what {engine.name} was built for; it is damaged")
    return content


def _library(engine: Path) -> str:
    """The backend that built an engine."""
    name = str(_sidecar(engine).get("backend"))
    if name not in BACKENDS:
        raise ArtifactError(f"{engine}.json names the backend {name!r}; the engine is of another version of lowprec")
    return name


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
    """How the candidate may store its values: in one format where that is named, else as it says itself.

    An engine stores them as the ONNX file does that it was built from, where that lies beside it.
    """
    if precision is not None and (precision in FORMATS or side.onnx_path is None):
        return Storage.of(format_of_precision(precision))
    if side.engine is not None:
        sidecar = _sidecar(side.engine)
        source = member_path(side.engine.parent, str(sidecar.get("source")))
        if source.is_file() and sha256_of(source) == sidecar.get("source_sha256"):
            return storage_of(load_onnx(source), sidecar["precision"])
        return Storage(sidecar["precision"], format_of_precision(sidecar["precision"]))
    if side.onnx_path is not None:
        return storage_of(load_onnx(side.onnx_path), precision)
    assert side.source is not None
    found = {str(parameter.dtype).removeprefix("torch.") for parameter in side.source.module.parameters()}
    names = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "float64": "fp64"}
    formats = [FORMATS[names[name]] for name in found if name in names]
    return Storage.of(min(formats, key=lambda fmt: fmt.precision, default=FP32))
