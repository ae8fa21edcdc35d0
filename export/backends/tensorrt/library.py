"""The TensorRT libraries that one adapter serves, and where they differ."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from lowprec.export.backends.cuda import missing_driver
from lowprec.packages import is_installed


@dataclass(frozen=True, eq=False)
class Library:
    """One library with TensorRT's Python API.

    Args:
        backend: name of its backend.
        module: what is imported.
        label: what it is called.
        extra: what `pip install lowprec[...]` brings it.
        builds_anywhere: whether engines are built without a GPU.
        lacks: build options that it does not have, and why.
        needs_driver: build options that take an NVIDIA driver where others take none.
    """

    backend: str
    module: str
    label: str
    extra: str
    builds_anywhere: bool
    lacks: Mapping[str, str] = field(default_factory=dict)
    needs_driver: frozenset[str] = frozenset()

    def load(self) -> ModuleType:
        """The module."""
        return importlib.import_module(self.module)

    def unavailable(self) -> str | None:
        """Why it cannot be imported, or None."""
        return (
            None if is_installed(self.module) else f"{self.module} is not installed; pip install lowprec[{self.extra}]"
        )

    def cannot_build(self) -> str | None:
        """Why engines cannot be built on this machine, or None."""
        reason = None if self.builds_anywhere else missing_driver()
        return f"{reason}; {self.label} builds engines on the GPU that they are for" if reason else None


RTX = Library(
    "tensorrt-rtx",
    "tensorrt_rtx",
    "TensorRT-RTX",
    "rtx",
    builds_anywhere=True,
    lacks={
        "version_compatible": "its engines are bound to its version",
        "hardware_compatible": "it builds for the compute capabilities that are named",
        "timing_cache": "it times nothing while it builds",
    },
    needs_driver=frozenset({"refittable", "stripped"}),
)
TENSORRT = Library(
    "tensorrt",
    "tensorrt",
    "TensorRT",
    "tensorrt",
    builds_anywhere=False,
    lacks={"compute_capabilities": "it builds for the GPU of the machine"},
)
LIBRARIES = {library.backend: library for library in (RTX, TENSORRT)}


@functools.cache
def recorder(library: Library) -> Any:
    """The process's one logger of a library, which keeps the errors that it reports.

    A library reports errors to its logger and then returns something hollow, so a recorded error is a failure whatever
    was returned; and it keeps the first logger of the process for good.
    """
    trt: Any = library.load()

    class Recorder(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(" ".join(message.split()))

    return Recorder()
