"""What a backend is: where an artefact runs, whether that is possible here, and which arithmetic it really is.

Two questions are kept apart on purpose. A package that is not installed (`unavailable`) is mended by pip; a device that
is not there (`cannot_run`) is not, and the artefact can still be built and shipped, as "built, not run here".
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray

from lowprec.errors import ArtifactError, ConfigError, MissingDependencyError
from lowprec.export.onnx_files import load_onnx
from lowprec.export.tensors import TensorSpec, check_feeds, fixed_batch


class Session(ABC):
    """An opened artefact, ready to run.

    Args:
        inputs: what it takes.
        outputs: what it returns.
        arithmetic: the arithmetic of this very artefact on this backend, in words.
        placement: how many nodes run where, by device or execution provider; empty where nobody says.
    """

    def __init__(
        self,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        arithmetic: str,
        placement: Mapping[str, int] | None = None,
    ) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self.arithmetic = arithmetic
        self.placement = dict(placement or {})

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Outputs by name for one batch.

        Raises:
            DataError: the feeds do not fit the inputs.
            UnsupportedError: the backend fails on this batch.
        """
        return self._run(check_feeds(self.inputs, feeds))

    def batches(self, feeds: Mapping[str, NDArray[Any]]) -> tuple[range, ...]:
        """How many samples it takes at a time, in rising order.

        Args:
            feeds: samples along axis 0, of which only the shape of one matters.

        Raises:
            UnsupportedError: it takes samples of another shape.
        """
        fixed = fixed_batch(self.inputs)
        return (range(1, sys.maxsize) if fixed is None else range(fixed, fixed + 1),)

    def batch_near(self, feeds: Mapping[str, NDArray[Any]], count: int) -> int:
        """The largest batch that it takes up to `count` samples, else the smallest that it takes."""
        ranges = self.batches(feeds)
        return max((min(sizes[-1], count) for sizes in ranges if sizes[0] <= count), default=ranges[0][0])

    @abstractmethod
    def _run(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Runs feeds that fit the inputs in names, shapes and kinds of number, but may be of another width."""


class Backend(ABC):
    """One way to run artefacts. Packages are imported when asked, not with this module.

    Args:
        name: the name on the command line and in reports.
        summary: one line for people.
        suffixes: file endings that it opens; empty if it takes no files.
    """

    name: str
    summary: str
    suffixes: tuple[str, ...]

    @abstractmethod
    def unavailable(self) -> str | None:
        """Why its package cannot be used here and what to install, or None."""

    @abstractmethod
    def cannot_run(self) -> str | None:
        """Why artefacts cannot be run here although the package is there (no such device), or None."""

    @abstractmethod
    def _open(self, artefact: Any) -> Session:
        """Opens an artefact that it accepts, with the package there and the device able to run."""

    def copies_weights(self, precision: str) -> bool:
        """Whether it holds weights of this precision, where they are mapped from a file, a second time."""
        return False

    def accepts(self, artefact: Any) -> bool:
        """Whether it opens this kind of artefact: a path by its ending; a model in memory where that makes sense."""
        return isinstance(artefact, str | Path) and Path(artefact).suffix in self.suffixes

    def open(self, artefact: Any) -> Session:
        """Opens an artefact for running.

        Raises:
            ArtifactError: it is missing, damaged or of another kind.
            MissingDependencyError: the package or the device is not here.
            UnsupportedError: the backend cannot run this artefact.
        """
        if not self.accepts(artefact):
            shown = artefact if isinstance(artefact, str | Path) else type(artefact).__name__
            kinds = ", ".join(self.suffixes) or "modules in memory"
            raise ArtifactError(f"backend {self.name!r} cannot open {shown}; it takes {kinds}")
        reason = self.unavailable() or self.cannot_run()
        if reason is not None:
            raise MissingDependencyError(f"backend {self.name!r} cannot run here: {reason}")
        return self._open(artefact)


class OnnxBackend(Backend):
    """A backend that takes ONNX, as a file or as a model in memory, and runs it on any CPU."""

    suffixes = (".onnx",)

    def cannot_run(self) -> str | None:
        """None: it runs on any CPU."""
        return None

    def accepts(self, artefact: Any) -> bool:
        """An .onnx file or a ModelProto."""
        return isinstance(artefact, onnx.ModelProto) or super().accepts(artefact)


Precision = Literal["fp32", "fp16", "bf16", "mixed", "int8"]


Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Smallest, most likely and largest full shape of an input."""


@dataclass(frozen=True)
class BuildOptions:
    """What an engine is built for.

    Args:
        precision: what the graph is meant to compute in, which the audit holds the typed network against; fp32 and
            mixed claim nothing about narrow layers.
        batch: smallest, most likely and largest size of a free batch axis.
        profiles: optimisation profiles, each with the shapes of some inputs; the others go by `batch`. One by default.
        wide: names of ONNX nodes that stay in float32 on purpose.
        builder_level: how long the builder may search, 0 to 5; its own default when None.
        workspace: bytes of scratch memory that the builder may plan with; the library's own default when None.
        timing_cache: a file that pins the builder's choices: written if it is not there, else a miss is an error.
        version_compatible: whether newer versions of the library may load the engine.
        hardware_compatible: `ampere+` for every GPU from Ampere on, `same` for those of the same compute capability,
            None for this GPU alone.
        refittable: whether weights can be exchanged later.
        stripped: whether weights are left out, to be put in where the engine is loaded.
        weight_streaming: whether weights may stay in host memory.
        tf32: whether float32 products may be computed in TF32.
        compute_capabilities: GPUs to build for, as (8, 6); empty for the backend's own choice.
        progress: called with (done, total) steps, of which the total grows.
    """

    precision: Precision = "fp32"
    batch: tuple[int, int, int] = (1, 16, 256)
    profiles: tuple[Mapping[str, Shapes], ...] = ()
    wide: frozenset[str] = frozenset()
    builder_level: int | None = None
    workspace: int | None = None
    timing_cache: Path | None = None
    version_compatible: bool = False
    hardware_compatible: Literal["ampere+", "same"] | None = None
    refittable: bool = False
    stripped: bool = False
    weight_streaming: bool = False
    tf32: bool = False
    compute_capabilities: tuple[tuple[int, int], ...] = ()
    progress: Callable[[int, int], None] | None = None

    def __post_init__(self) -> None:
        low, likely, high = self.batch
        if not 1 <= low <= likely <= high:
            raise ConfigError(f"batch profile {self.batch}: needed are 1 <= min <= opt <= max")
        if self.builder_level is not None and not 0 <= self.builder_level <= 5:
            raise ConfigError(f"builder level {self.builder_level}: it goes from 0 to 5")
        for name, (small, opt, large) in ((n, three) for profile in self.profiles for n, three in profile.items()):
            fits = len(small) == len(opt) == len(large)
            if not fits or not all(1 <= a <= b <= c for a, b, c in zip(small, opt, large, strict=True)):
                raise ConfigError(
                    f"the profile of {name!r} goes from {small} over {opt} to {large}; needed are shapes of one rank "
                    "with 1 <= min <= opt <= max on every axis"
                )

    @property
    def chosen(self) -> list[str]:
        """Names of the options that differ from their defaults."""
        return [item.name for item in fields(self) if getattr(self, item.name) != item.default]

    def profiles_of(self, inputs: Sequence[TensorSpec]) -> list[dict[str, Shapes]]:
        """The shapes of every input, once per profile.

        Raises:
            ConfigError: a free axis besides the batch is not given, or a profile names no input or does not fit it.
        """
        names = [spec.name for spec in inputs]
        for profile in self.profiles:
            for name in profile:
                if name not in names:
                    raise ConfigError(f"a profile names the input {name!r}; the model takes {', '.join(names)}")
        return [{spec.name: self._shapes(spec, profile) for spec in inputs} for profile in self.profiles or ({},)]

    def _shapes(self, spec: TensorSpec, profile: Mapping[str, Shapes]) -> Shapes:
        if spec.name in profile:
            fixed = zip(spec.shape or (), *profile[spec.name], strict=False)
            rank = spec.shape is None or len(spec.shape) == len(profile[spec.name][0])
            if not rank or any(isinstance(size, int) and {size} != set(given) for size, *given in fixed):
                raise ConfigError(
                    f"the profile of {spec.name!r}, {profile[spec.name]}, does not fit its shape {spec.shape}"
                )
            return profile[spec.name]
        if spec.shape is None or any(not isinstance(size, int) for size in spec.shape[1:]):
            raise ConfigError(
                f"the input {spec.name!r} has free axes besides the batch, {spec.shape}; "
                "give its smallest, likely and largest shape with --profile"
            )
        rest = tuple(size for size in spec.shape[1:] if isinstance(size, int))
        if spec.batch_axis is None:
            fixed_shape = tuple(size for size in spec.shape if isinstance(size, int))
            return fixed_shape, fixed_shape, fixed_shape
        low, likely, high = self.batch
        return (low, *rest), (likely, *rest), (high, *rest)


class EngineBackend(Backend):
    """A backend whose artefacts are compiled from ONNX first."""

    @abstractmethod
    def cannot_build(self) -> str | None:
        """Why engines cannot be built on this machine although the package is there, or None."""

    @abstractmethod
    def build(self, onnx_path: Path, engine_path: Path, options: BuildOptions | None = None) -> dict[str, Any]:
        """Compiles an ONNX file into an engine file, written whole or not at all.

        Returns:
            The content of its sidecar JSON: versions, targets, profiles, hashes, audit, and how far it was verified.

        Raises:
            ArtifactError: the ONNX file is missing or damaged.
            MissingDependencyError: the package is not here.
            UnsupportedError: the graph cannot be built, or would not compute in the precision asked for.
        """


def onnx_model(artefact: str | Path | onnx.ModelProto) -> onnx.ModelProto:
    """The model of a file, or the model itself."""
    return artefact if isinstance(artefact, onnx.ModelProto) else load_onnx(artefact)


def narrowed(array: NDArray[Any], spec: TensorSpec) -> NDArray[Any]:
    """The array in the element type of an input, contiguous."""
    return np.ascontiguousarray(array, dtype=np.dtype(spec.dtype))


def decoded(array: NDArray[Any], spec: TensorSpec) -> NDArray[Any]:
    """An output as numpy knows it: bfloat16, whatever its bits were handed out as, becomes float32, exactly."""
    return array.view(np.dtype(spec.dtype)).astype(np.float32) if spec.dtype == "bfloat16" else array
