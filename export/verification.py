"""`verify`: judges a bundle from what it carries, on every backend that runs here, without torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lowprec.errors import ArtifactError, ConfigError
from lowprec.export import bundle as layout
from lowprec.export.backends import Backend
from lowprec.export.bundle import Bundle, open_bundle
from lowprec.export.golden import Golden
from lowprec.export.onnx_files import load_onnx
from lowprec.export.parity import Check, Limits, ParityReport, Stage
from lowprec.export.stages import Artefact, choose_backends, run_stages
from lowprec.export.storage import storage_of
from lowprec.export.truth import golden_from_onnx

DEFAULT_LIMITS = Limits()


def verify(
    bundle: str | Path,
    backends: Sequence[str] | None = None,
    data: str | None = None,
    manifest_sha256: str | None = None,
    limits: Limits = DEFAULT_LIMITS,
    progress: Callable[[int, int], None] | None = None,
) -> ParityReport:
    """Checks hashes, then that the evidence speaks of these files, then every artefact against its reference.

    Args:
        bundle: the folder.
        backends: run these only; each must be able to run here. None runs all that can and lists the others.
        data: also judge on these samples (anything that `load_data` takes), model.onnx in float64 as the truth.
        manifest_sha256: the hash that the manifest must have.
        limits: the bands of the verdict.
        progress: called with (done, total).

    Raises:
        ArtifactError: not a bundle, or a file that is missing, damaged or changed.
        MissingDependencyError: a backend asked for by name cannot run here.
    """
    opened = open_bundle(bundle, manifest_sha256)
    chosen, named = choose_backends(backends), backends is not None
    golden = Golden.load(opened.path(layout.GOLDEN))
    artefacts = bundle_artefacts(opened)
    if backends is not None:
        _require_work(opened, artefacts, chosen)
    stages = [_evidence(opened), *run_stages(artefacts, golden, chosen, limits, progress, named=named)]
    if data is not None:
        storages = [
            storage_of(load_onnx(opened.path(name)), precision) for precision, name in opened.onnx_artefacts.items()
        ]
        wider = golden_from_onnx(opened.path("model.onnx"), data, storages)
        stages += run_stages(artefacts, wider, chosen, limits, progress, f" on {Path(data).name}", named)
    return ParityReport(tuple(stages), facts={"bundle": str(opened.folder), "manifest_sha256": opened.manifest_sha256})


def bundle_artefacts(opened: Bundle) -> list[Artefact]:
    """Everything in a bundle that can be run, with the precision that it is judged at."""
    found = [Artefact(name, opened.path(name), precision) for precision, name in opened.onnx_artefacts.items()]
    for name in opened.engines:
        found.append(Artefact(name, opened.path(name), _sidecar(opened, name)["precision"]))
    return found


def _sidecar(opened: Bundle, engine: str) -> dict[str, Any]:
    sidecar = opened.record(f"{engine}.json")
    if not all(isinstance(sidecar.get(key), str) for key in ("precision", "source", "source_sha256")):
        raise ArtifactError(f"{opened.folder}/{engine}.json does not say what {engine} was built from; it is damaged")
    return sidecar


def _evidence(opened: Bundle) -> Stage:
    """Whether the evidence in the bundle was taken on the files that are in it."""
    claims = [(layout.FOLD, "model.onnx", str(opened.record(layout.FOLD).get("model_onnx_sha256")))]
    for engine in opened.engines:
        sidecar = _sidecar(opened, engine)
        claims.append((f"{engine}.json", sidecar["source"], sidecar["source_sha256"]))
    checks = []
    for witness, subject, expected in claims:
        holds = opened.files.get(subject) == expected
        text = f"{witness} speaks of this {subject}" if holds else f"{witness} was made for another {subject}"
        checks.append(Check(f"{witness} binds", "pass" if holds else "fail", None, None, text))
    return Stage("evidence", "manifest.json", "-", "SHA-256", status="ran", checks=tuple(checks))


def _require_work(opened: Bundle, artefacts: list[Artefact], chosen: Mapping[str, Backend]) -> None:
    for name, backend in chosen.items():
        if not any(backend.accepts(artefact.path) for artefact in artefacts):
            raise ConfigError(f"the backend {name} runs nothing that {opened.folder} holds; export that target first")
