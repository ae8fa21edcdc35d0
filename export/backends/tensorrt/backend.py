"""The backends "tensorrt-rtx" and "tensorrt": engines typed by their graph, audited, and bound to what they are for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowprec.errors import ConfigError, MissingDependencyError
from lowprec.export.backends.base import BuildOptions, EngineBackend, Session
from lowprec.export.backends.cuda import missing_driver
from lowprec.export.backends.tensorrt.library import Library
from lowprec.export.backends.tensorrt.sidecar import check_sidecar, sidecar_of
from lowprec.export.backends.tensorrt.worker import build_in_a_process
from lowprec.export.onnx_files import load_onnx
from lowprec.export.tensors import specs_of

_MARKS = {"tensorrt-rtx": ".rtx.", "tensorrt": ".trt."}  # in the names of engines


class TensorRT(EngineBackend):
    """Builds and runs engines of one library.

    Args:
        library: which.
        summary: one line for people.
    """

    suffixes = (".engine",)

    def __init__(self, library: Library, summary: str) -> None:
        self.name, self.summary, self.library = library.backend, summary, library
        self._own: set[str] = set()  # hashes of the engines that this process built

    def accepts(self, artefact: Any) -> bool:
        """An engine whose name does not say that it is another library's."""
        others = {mark for backend, mark in _MARKS.items() if backend != self.name}
        return super().accepts(artefact) and not any(mark in Path(artefact).name for mark in others)

    def unavailable(self) -> str | None:
        """Why the package cannot be imported, or None."""
        return self.library.unavailable()

    def cannot_build(self) -> str | None:
        """Why engines cannot be built here, or None."""
        return self.library.cannot_build()

    def cannot_run(self) -> str | None:
        """That there is no driver here, or None."""
        reason = missing_driver()
        return f"{reason}; engines can be built here, not run" if reason and self.library.builds_anywhere else reason

    def _open(self, artefact: str | Path) -> Session:
        from lowprec.export.backends.tensorrt.session import open_engine

        sidecar = check_sidecar(Path(artefact), self.library)
        return open_engine(self.library, Path(artefact), sidecar, trusted=sidecar["sha256"] in self._own)

    def build(self, onnx_path: Path, engine_path: Path, options: BuildOptions | None = None) -> dict[str, Any]:
        """Compiles an ONNX file; see `EngineBackend.build`."""
        options = options or BuildOptions()
        for reason in (self.unavailable(), self.cannot_build()):
            if reason is not None:
                raise MissingDependencyError(f"cannot build {engine_path.name}: {reason}")
        self._check(options)
        model = load_onnx(onnx_path)
        weights = {tensor.name for tensor in model.graph.initializer}
        inputs = specs_of([value for value in model.graph.input if value.name not in weights])
        profiles = options.profiles_of(inputs)
        facts = build_in_a_process(self.library, onnx_path, engine_path, profiles, options)
        sidecar = sidecar_of(self.library, onnx_path, engine_path, profiles, options, facts)
        self._own.add(sidecar["sha256"])
        return sidecar

    def _check(self, options: BuildOptions) -> None:
        for option in options.chosen:
            if option in self.library.lacks:
                raise ConfigError(
                    f"{self.library.label} has no option {option.replace('_', ' ')}: {self.library.lacks[option]}"
                )
            if option in self.library.needs_driver and (reason := missing_driver()):
                raise MissingDependencyError(
                    f"{self.library.label} builds {option} engines only where there is a GPU: {reason}"
                )
