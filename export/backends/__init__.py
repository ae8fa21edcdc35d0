"""Where an artefact can run: one interface, one table, and each backend says which arithmetic it really does."""

from __future__ import annotations

import difflib

from lowprec.errors import ConfigError
from lowprec.export.backends.base import Backend, BuildOptions, EngineBackend, Session
from lowprec.export.backends.eager import Eager
from lowprec.export.backends.ort import OnnxRuntime
from lowprec.export.backends.reference import Reference
from lowprec.export.backends.rtx import TensorRTRTX

__all__ = ["BACKENDS", "Backend", "BuildOptions", "EngineBackend", "Session", "backend_named"]

BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (Eager(), Reference(), OnnxRuntime(), TensorRTRTX())
}


def backend_named(name: str) -> Backend:
    """The backend called `name`; raises `ConfigError` that lists the valid names and the nearest."""
    if name in BACKENDS:
        return BACKENDS[name]
    near = difflib.get_close_matches(name, BACKENDS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(f"unknown backend {name!r}; {hint}choose one of {', '.join(BACKENDS)}")
