"""`export`: read -> fold -> emit -> round -> build -> judge, into one bundle.

The order is the order of the waterfall: each step is judged against the float64 truth at the limit that fits it, the
fold in float64, everything after it at the rounding-noise floor of its own precision. What differs between a module and
an ONNX file is the `Network` that stands at the beginning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from lowprec.artifacts import check_replaceable, new_folder, sha256_of, write_json, write_text
from lowprec.data import Samples
from lowprec.errors import ConfigError
from lowprec.export import bundle as layout
from lowprec.export.backends import BACKENDS, BuildOptions
from lowprec.export.backends.base import Precision
from lowprec.export.bundle import Bundle, is_bundle, open_bundle, provenance, write_manifest
from lowprec.export.emit import convert_precision
from lowprec.export.engines import ENGINE_TARGETS, build_engine, check_targets
from lowprec.export.external_data import write_model
from lowprec.export.float64 import Float64Graph
from lowprec.export.folding.accuracy import MAX_FLOAT64_ERROR
from lowprec.export.networks import Network, feeds_from, network_of
from lowprec.export.page import Part, render_page
from lowprec.export.parity import Check, Limits, ParityReport, Stage
from lowprec.export.stages import Artefact, run_stages
from lowprec.export.truth import golden_from
from lowprec.formats import format_named
from lowprec.report import ChangeReport

if TYPE_CHECKING:
    from torch import nn

Progress = Callable[[int, int], None]

TARGETS = ("onnx", *ENGINE_TARGETS)
DEFAULT_LIMITS = Limits()

_STEPS = 8


@dataclass(frozen=True)
class _Plan:
    """What was asked for, checked before the first slow step."""

    precisions: tuple[Precision, ...]
    engines: tuple[str, ...]


def export(
    model: nn.Module | str | Path | onnx.ModelProto,
    example_inputs: tuple[Any, ...] | None,
    folder: str | Path,
    precision: str | Sequence[str] = "fp16",
    targets: Sequence[str] = ("onnx",),
    calibration: Samples | Iterable[Any] | None = None,
    dynamic_shapes: Any = None,
    *,
    opset: int | None = None,
    facts: dict[str, Any] | None = None,
    limits: Limits = DEFAULT_LIMITS,
    progress: Progress | None = None,
) -> Bundle:
    """Writes a bundle and judges it; `bundle.parity` says how it stands.

    Args:
        model: a module in evaluation mode, an ONNX file, or an ONNX model in memory; untouched.
        example_inputs: as `torch.export` takes them; None for an ONNX model, whose inputs say what they are.
        folder: the bundle; an earlier bundle of that name is replaced, anything else refused.
        precision: `fp16`, `fp32`, or several; fp32 is always written.
        targets: `onnx`, `tensorrt-rtx`; an engine is built from the narrowest precision asked for.
        calibration: samples that the golden file and the ranges are taken from; when None the example inputs, and
            random ones where there are none.
        dynamic_shapes: for a module, as `torch.export` takes them or with names of axes, `{"x": {0: "batch", 2:
            "height"}}`; by default the leading axis is a dynamic batch.
        opset: the ONNX operator set to write: 18 or newer for a module (by default 20), by default a file's own.
        facts: provenance for the manifest.
        limits: the bands of the verdict.
        progress: called with (done, total) steps.

    Raises:
        ConfigError: an unknown precision or target.
        MissingDependencyError: a target's package is not installed.
        FoldError: the network cannot be traced.
        ArtifactError: the folder holds something else, or the ONNX file is damaged.
        UnsupportedError: the ONNX model is not float32, or cannot be evaluated.
    """
    folder = Path(folder)
    plan = _plan(precision, targets)
    check_replaceable(folder, "a bundle", is_bundle)
    step = _counter(progress)
    network = network_of(model, example_inputs, dynamic_shapes, opset)
    given = None if calibration is None else feeds_from(calibration, network.input_names)
    step()
    with new_folder(folder, "a bundle", is_bundle) as work:
        fold_report = network.fold(given, work)
        step()
        models = _rounded(network.emit(work / layout.ONNX_BY_PRECISION["fp32"]), plan)
        step()
        data = given or network.own_feeds()
        golden = golden_from(network.run, Float64Graph(models["fp32"]), data.inputs, data.labels, plan.precisions)
        step()
        artefacts = _write_models(work, models, plan)
        step()
        golden.save(work / layout.GOLDEN)
        write_json(work / layout.CALIBRATION, network.ranges(golden.inputs).to_dict())
        bound = {"model_onnx_sha256": sha256_of(work / "model.onnx"), "limit": MAX_FLOAT64_ERROR}
        write_json(work / layout.FOLD, fold_report.to_dict() | bound)
        step()
        stages = [_fold_stage(network, fold_report), *network.stages(golden, limits)]
        stages += run_stages(artefacts, golden, BACKENDS, limits)
        parity = ParityReport(tuple(stages), facts={"golden_samples": golden.samples})
        step()
        about = {"data": data.source, "data_fingerprint": _fingerprint(calibration)}
        origin = provenance(**(facts or {}) | about)
        write_json(work / layout.PARITY, parity.to_dict())
        write_text(work / layout.REPORT, render_page([Part(folder.name, parity, fold_report, origin)]))
        write_manifest(work, origin)
    step()
    return open_bundle(folder)


def _plan(precision: str | Sequence[str], targets: Sequence[str]) -> _Plan:
    asked = (precision,) if isinstance(precision, str) else tuple(precision)
    wanted = (targets,) if isinstance(targets, str) else tuple(targets)
    for name in asked:
        if name not in layout.ONNX_BY_PRECISION:
            raise ConfigError(f"unknown precision {name!r}; choose from {', '.join(layout.ONNX_BY_PRECISION)}")
    for name in wanted:
        if name not in TARGETS:
            raise ConfigError(f"unknown target {name!r}; choose from {', '.join(TARGETS)}")
    engines = tuple(name for name in ENGINE_TARGETS if name in wanted)
    check_targets(engines)
    precisions = tuple(name for name in layout.ONNX_BY_PRECISION if name == "fp32" or name in asked)
    return _Plan(precisions, engines)


def _rounded(model: onnx.ModelProto, plan: _Plan) -> dict[Precision, onnx.ModelProto]:
    models: dict[Precision, onnx.ModelProto] = {"fp32": model}
    for name in plan.precisions[1:]:
        models[name], _ = convert_precision(model, format_named(name))
    return models


def _write_models(work: Path, models: dict[Precision, onnx.ModelProto], plan: _Plan) -> list[Artefact]:
    artefacts = []
    for precision, model in models.items():
        name = layout.ONNX_BY_PRECISION[precision]
        write_model(work / name, model)
        artefacts.append(Artefact(name, work / name, precision))
    narrowest, source = plan.precisions[-1], artefacts[-1]
    artefacts += [build_engine(target, source, BuildOptions(precision=narrowest)) for target in plan.engines]
    return artefacts


def _fold_stage(network: Network, report: ChangeReport) -> Stage:
    error = float(report.facts["float64_error"])
    holds = error <= MAX_FLOAT64_ERROR
    text = f"folded against trained, both in float64: relative error {error:.1e}, limit {MAX_FLOAT64_ERROR:.0e}"
    check = Check("relative_error", "pass" if holds else "fail", error, MAX_FLOAT64_ERROR, text)
    artefact, backend = network.folded_from
    return Stage("fold", artefact, backend, "float64", status="ran", checks=(check,))


def _fingerprint(calibration: Any) -> str | None:
    return calibration.fingerprint if isinstance(calibration, Samples) else None


def _counter(progress: Progress | None) -> Callable[[], None]:
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, _STEPS)

    return step
