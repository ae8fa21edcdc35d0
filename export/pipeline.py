"""`export`: read -> fold -> emit -> round -> build -> judge, into one bundle.

Each step is judged against the float64 truth at the limit that fits it, the fold in float64, everything after it at
the rounding-noise floor of its own precision. What differs between a module and an ONNX file is the `Network` that
stands at the beginning; what differs between precisions is what `Narrowing` makes of the one float32 graph.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Collection, Iterable, Sequence
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
from lowprec.export.emit.keep import KeepList, keep_list
from lowprec.export.emit.narrowing import Narrowing
from lowprec.export.emit.quantise import check_quantiser
from lowprec.export.engines import ENGINE_TARGETS, build_engine, check_targets
from lowprec.export.external_data import write_model
from lowprec.export.feeds import Feeds, feeds_from
from lowprec.export.float64 import Float64Graph
from lowprec.export.folding.accuracy import MAX_FLOAT64_ERROR
from lowprec.export.networks import Network, network_of
from lowprec.export.page import Part, render_page
from lowprec.export.parity import Check, Limits, ParityReport, Stage
from lowprec.export.parity.storage import Storage
from lowprec.export.stages import Artefact, run_stages
from lowprec.export.storage import storage_of
from lowprec.export.truth import golden_from
from lowprec.report import ChangeReport

if TYPE_CHECKING:
    from torch import nn

Progress = Callable[[int, int], None]

TARGETS = ("onnx", *ENGINE_TARGETS)
DEFAULT_LIMITS = Limits()

_STEPS = 8


@dataclass(frozen=True)
class _Plan:
    """What was asked for, checked before the first slow step; engines are built from the precision named last."""

    precisions: tuple[Precision, ...]
    engines: tuple[str, ...]
    built_from: Precision
    narrowing: Narrowing


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
    keep: KeepList | str | Path | Sequence[str] | None = None,
    narrow_io: bool | str | Sequence[str] = False,
    build: BuildOptions | None = None,
    facts: dict[str, Any] | None = None,
    limits: Limits = DEFAULT_LIMITS,
    progress: Progress | None = None,
) -> Bundle:
    """Writes a bundle and judges it; `bundle.parity` says how it stands.

    Args:
        model: a module in evaluation mode, an ONNX file, or an ONNX model in memory; untouched.
        example_inputs: as `torch.export` takes them; None for an ONNX model, whose inputs say what they are.
        folder: the bundle; an earlier bundle of that name is replaced, anything else refused.
        precision: one or several of `fp32`, `fp16`, `bf16`, `mixed`, `int8`; fp32 is always written.
        targets: `onnx`, `tensorrt-rtx`, `tensorrt`; an engine is built from the precision that is named last.
        calibration: samples that the golden file and the ranges are taken from; when None the example inputs, and
            random ones where there are none, of which int8 is not made.
        dynamic_shapes: for a module, as `torch.export` takes them or with names of axes, `{"x": {0: "batch", 2:
            "height"}}`; by default the leading axis is a dynamic batch.
        opset: the ONNX operator set to write: 18 or newer for a module (by default 20), by default a file's own.
        keep: nodes that stay float32: a keep-list, its file, or entries such as `op:Softmax`; see `emit.keep`.
        narrow_io: the floating inputs and outputs that are half where the artefact is: all, or these.
        build: what engines are built for; its precision is that of their ONNX file.
        facts: provenance for the manifest.
        limits: the bands of the verdict.
        progress: called with (done, total) steps.

    Raises:
        ConfigError: an unknown precision or target, a keep-list that matches nothing, or int8 without any samples.
        MissingDependencyError: the package of a target, or of int8, is not installed.
        FoldError: the network cannot be traced.
        ArtifactError: the folder holds something else, or the ONNX file is damaged.
        UnsupportedError: the ONNX model is not float32, or cannot be evaluated.
    """
    folder = Path(folder)
    plan = _plan(precision, targets, Narrowing(None if keep is None else keep_list(keep), narrow_io))
    if "int8" in plan.precisions and calibration is None and example_inputs is None:
        raise ConfigError(
            "asked for int8, whose scales are taken from samples, and found none, since an ONNX file comes without; "
            "give some with --calibration DATA"
        )
    check_replaceable(folder, "a bundle", is_bundle)
    step = _counter(progress)
    network = network_of(model, example_inputs, dynamic_shapes, opset)
    given = None if calibration is None else feeds_from(calibration, network.input_names)
    step()
    with new_folder(folder, "a bundle", is_bundle) as work:
        fold_report = network.fold(given, work)
        step()
        model = network.emit(work / layout.ONNX_BY_PRECISION["fp32"])
        data = given or network.own_feeds()
        step()
        artefacts, storages, wide = _write_models(work, model, data, plan)
        artefacts += _build_engines(artefacts, plan, build or BuildOptions(), wide)
        step()
        golden = golden_from(network.run, Float64Graph(model), data.inputs, data.labels, storages)
        step()
        golden.save(work / layout.GOLDEN)
        keep_asked = None if plan.narrowing.keep is None else plan.narrowing.keep.to_dict()
        about_wide = {"wide": wide, "keep": keep_asked}
        write_json(work / layout.CALIBRATION, network.ranges(golden.inputs).to_dict() | about_wide)
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


def _plan(precision: str | Sequence[str], targets: Sequence[str], narrowing: Narrowing) -> _Plan:
    asked = (precision,) if isinstance(precision, str) else tuple(precision)
    wanted = (targets,) if isinstance(targets, str) else tuple(targets)
    _check_known("precision", asked, layout.ONNX_BY_PRECISION)
    _check_known("target", wanted, TARGETS)
    if "int8" in asked:
        check_quantiser()
    engines = tuple(name for name in ENGINE_TARGETS if name in wanted)
    check_targets(engines)
    precisions = tuple(name for name in layout.ONNX_BY_PRECISION if name == "fp32" or name in asked)
    last = next(name for name in layout.ONNX_BY_PRECISION if name == (asked[-1] if asked else "fp32"))
    return _Plan(precisions, engines, last, narrowing)


def _check_known(kind: str, asked: Sequence[str], known: Collection[str]) -> None:
    for name in asked:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(f"unknown {kind} {name!r}; {hint}choose from {', '.join(known)}")


def _write_models(
    work: Path, model: onnx.ModelProto, data: Feeds, plan: _Plan
) -> tuple[list[Artefact], list[Storage], dict[str, dict[str, str]]]:
    """Writes the graph in each precision; how each stores its values; which nodes stay float32, and why."""
    artefacts, storages, wide = [], [], dict[str, dict[str, str]]()
    first = work / layout.ONNX_BY_PRECISION["fp32"]
    if plan.narrowing.keep is not None:
        plan.narrowing.keep.check(model)
    for precision in plan.precisions:
        path = work / layout.ONNX_BY_PRECISION[precision]
        stored = model
        if precision != "fp32":
            stored, report = plan.narrowing.in_precision(precision, model, first, data.inputs, path)
            wide[precision] = report.facts["wide"]
        write_model(path, stored)
        artefacts.append(Artefact(path.name, path, precision))
        storages.append(storage_of(stored, precision))
    return artefacts, storages, wide


def _build_engines(
    artefacts: list[Artefact], plan: _Plan, options: BuildOptions, wide: dict[str, dict[str, str]]
) -> list[Artefact]:
    source = next(artefact for artefact in artefacts if artefact.precision == plan.built_from)
    kept = frozenset(wide.get(source.precision, {}))
    built_for = dataclasses.replace(options, precision=plan.built_from, wide=options.wide | kept)
    return [build_engine(target, source, built_for) for target in plan.engines]


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
