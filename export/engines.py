"""Builds the engines of a bundle: each from one ONNX file in it, with a sidecar that says from which and how."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lowprec.artifacts import sha256_of, write_json
from lowprec.errors import MissingDependencyError
from lowprec.export.backends import BACKENDS, BuildOptions, EngineBackend
from lowprec.export.stages import Artefact

ENGINE_TARGETS = {"tensorrt-rtx": "model.rtx.engine", "tensorrt": "model.trt.engine"}
"""Engine file by target; the target's name is the name of the backend that builds it."""


def check_targets(targets: Sequence[str]) -> None:
    """Raises `MissingDependencyError` for a target that cannot be built here."""
    for name in targets:
        reason = engine_backend(name).unavailable() or engine_backend(name).cannot_build()
        if reason:
            raise MissingDependencyError(f"the target {name} was asked for and cannot be built here: {reason}")


def engine_backend(target: str) -> EngineBackend:
    """The backend that builds a target."""
    backend = BACKENDS[target]
    assert isinstance(backend, EngineBackend), f"ENGINE_TARGETS names {target}, which builds nothing"
    return backend


def build_engine(target: str, source: Artefact, options: BuildOptions) -> Artefact:
    """Compiles an ONNX artefact into the engine of a target, beside it, with its sidecar.

    Args:
        target: one of `ENGINE_TARGETS`.
        source: the ONNX file.
        options: what it is built for; their precision is that of the artefact.
    """
    backend = engine_backend(target)
    engine: Path = source.path.parent / ENGINE_TARGETS[target]
    sidecar = backend.build(source.path, engine, options)
    bound = {"precision": options.precision, "source": source.name, "source_sha256": sha256_of(source.path)}
    write_json(engine.parent / f"{engine.name}.json", sidecar | bound)
    return Artefact(engine.name, engine, options.precision)
