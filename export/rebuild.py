"""Adds an engine to a bundle, on the machine that has its GPU: build, audit, run, judge, renew.

The new bundle is written beside the old one and takes its place when it is whole, so that a full disk or a killed
process leaves the old one.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import cast

from lowprec.artifacts import new_folder, read_json, write_json, write_text
from lowprec.data import Samples
from lowprec.errors import ConfigError
from lowprec.export import bundle as layout
from lowprec.export.backends import BACKENDS, BuildOptions
from lowprec.export.backends.base import Precision
from lowprec.export.backends.cuda import gpu_or_none
from lowprec.export.bundle import Bundle, is_bundle, open_bundle, provenance, write_manifest
from lowprec.export.engines import ENGINE_TARGETS, build_engine, check_targets
from lowprec.export.golden import Golden
from lowprec.export.metamorphic import metamorphic_checks
from lowprec.export.onnx_files import load_onnx
from lowprec.export.page import Part, render_page
from lowprec.export.parity import Limits, ParityReport, Stage
from lowprec.export.stages import Artefact, run_stages
from lowprec.export.storage import storage_of
from lowprec.export.truth import golden_from_onnx

DEFAULT_LIMITS = Limits()


def add_engine(
    bundle: str | Path,
    target: str = "tensorrt-rtx",
    precision: str | None = None,
    options: BuildOptions | None = None,
    data: str | Samples | None = None,
    limits: Limits = DEFAULT_LIMITS,
    progress: Callable[[int, int], None] | None = None,
) -> Bundle:
    """Builds an engine from a bundle's ONNX file, verifies it where it can run, and renews the bundle.

    An engine of the same target is replaced. What the bundle's report says of other artefacts stays.

    Args:
        bundle: the folder.
        target: `tensorrt-rtx` or `tensorrt`.
        precision: of the ONNX file that it is built from; that of the engine that is replaced, else the narrowest.
        options: what it is built for; its precision and the nodes that are wide on purpose are the file's own.
        data: samples beside the golden ones that the engine is judged on.
        limits: the bands of the verdict.
        progress: called with (done, total).

    Raises:
        ArtifactError: not a bundle, or damaged.
        ConfigError: an unknown target, or a precision that the bundle does not hold.
        MissingDependencyError: the engine cannot be built here.
        UnsupportedError: the library cannot build it, or it would not compute in its precision.
    """
    opened = open_bundle(bundle)
    if target not in ENGINE_TARGETS:
        raise ConfigError(f"unknown target {target!r}; engines are built for {', '.join(ENGINE_TARGETS)}")
    check_targets([target])
    source = _source(opened, target, precision)
    golden = Golden.load(opened.path(layout.GOLDEN))
    with new_folder(opened.folder, "a bundle", is_bundle) as work:
        _link(opened, work, ENGINE_TARGETS[target])
        wide = opened.record(layout.CALIBRATION).get("wide", {}).get(source.precision, {})
        chosen = dataclasses.replace(
            options or BuildOptions(),
            precision=cast("Precision", source.precision),
            wide=frozenset(wide),
            progress=progress,
        )
        built = dataclasses.replace(source, path=work / source.name)
        engine = build_engine(target, built, chosen)
        stages = _judge(engine, target, golden, limits)
        if data is not None:
            storage = storage_of(load_onnx(built.path), source.precision)
            wider = golden_from_onnx(work / "model.onnx", data, [storage])
            backend = {target: BACKENDS[target]}
            stages += run_stages([engine], wider, backend, limits, suffix=" on further data")
        _note_run(engine, stages)
        before = opened.parity
        kept = [stage for stage in before.stages if stage.artefact != engine.name]
        parity = ParityReport((*kept, *stages), before.facts)
        about = {"renewed": {"engine": engine.name, "target": target, **provenance()}}
        origin = opened.manifest["provenance"] | about
        write_json(work / layout.PARITY, parity.to_dict())
        write_text(work / layout.REPORT, render_page([Part(opened.folder.name, parity, opened.fold_report, origin)]))
        write_manifest(work, origin)
    return open_bundle(opened.folder)


def _source(opened: Bundle, target: str, precision: str | None) -> Artefact:
    held = opened.onnx_artefacts
    sidecar = f"{ENGINE_TARGETS[target]}.json"
    if precision is None:
        precision = str(opened.record(sidecar).get("precision")) if sidecar in opened.files else list(held)[-1]
    if precision not in held:
        raise ConfigError(f"asked for a {precision} engine; {opened.folder} holds {', '.join(held)}; export that first")
    return Artefact(held[precision], opened.path(held[precision]), precision)


def _link(opened: Bundle, work: Path, engine: str) -> None:
    """Every file that stays, as a second name of the same one where the file system has that."""
    made_anew = {engine, f"{engine}.json", layout.PARITY, layout.REPORT}
    for name in opened.files:
        if name not in made_anew:
            try:
                os.link(opened.path(name), work / name)
            except OSError:
                shutil.copyfile(opened.path(name), work / name)


def _judge(engine: Artefact, target: str, golden: Golden, limits: Limits) -> list[Stage]:
    """The engine against the golden samples, and against itself where it ran."""
    (stage,) = run_stages([engine], golden, {target: BACKENDS[target]}, limits)
    if stage.status != "ran":
        return [stage]
    session = BACKENDS[target].open(engine.path)
    checks = metamorphic_checks(session, golden, engine.precision, limits)
    title = f"{engine.precision} on {target}, asked in other ways"
    return [stage, Stage(title, engine.name, target, session.arithmetic, checks=checks)]


def _note_run(engine: Artefact, stages: list[Stage]) -> None:
    """The sidecar says where the engine was run and how it stood."""
    ran = [stage for stage in stages if stage.status == "ran"]
    if not ran:
        return
    path = engine.path.with_name(f"{engine.name}.json")
    gpu = gpu_or_none()
    where = f"{gpu.name}, compute capability {gpu.capability}, driver {gpu.driver}" if gpu else "this machine"
    found = {"verification": f"run on {where}: {ParityReport(tuple(ran)).verdict}", "arithmetic": ran[0].arithmetic}
    write_json(path, read_json(path, "the engine's sidecar") | found)
