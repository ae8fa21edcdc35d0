"""Compiles an ONNX file into an engine: parse, audit, configure, build; the same for every TensorRT.

It is called in a process of its own, see `worker`.

Networks are strongly typed: TensorRT 11 has no other kind, 10 has the flag. Precision is what the ONNX graph says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowprec.artifacts import sha256_of, write_bytes
from lowprec.errors import ArtifactError, ConfigError, UnsupportedError
from lowprec.export.backends.base import BuildOptions, Shapes
from lowprec.export.backends.tensorrt.audit import audit, typed_layers
from lowprec.export.backends.tensorrt.library import Library, recorder
from lowprec.export.onnx_files import module_path

# What TensorRT-RTX 1.7 builds for unasked, spelled out so that the sidecar can say it: Ampere, Ada, Blackwell. Turing
# (7.5) has to be asked for: it has no float32 matrix product there.
DEFAULT_TARGETS = ((8, 0), (8, 6), (8, 9), (12, 0))
_FLAGS = {"refittable": "REFIT", "stripped": "STRIP_PLAN", "weight_streaming": "WEIGHT_STREAMING", "tf32": "TF32",
          "version_compatible": "VERSION_COMPATIBLE"}  # fmt: skip
_LEVELS = {"ampere+": "AMPERE_PLUS", "same": "SAME_COMPUTE_CAPABILITY"}


@dataclass(frozen=True)
class Built:
    """An engine and what is known of it.

    Args:
        engine: its bytes.
        facts: for the sidecar.
    """

    engine: bytes
    facts: dict[str, Any]


def compile_engine(
    library: Library, model: Any, path: Path, profiles: Sequence[Mapping[str, Shapes]], options: BuildOptions
) -> Built:
    """Builds an engine.

    Args:
        library: which TensorRT.
        model: the ONNX model, for module paths in messages.
        path: its file.
        profiles: the shapes of every input, once per optimisation profile.
        options: the rest.

    Raises:
        ConfigError: the library refuses a profile or an option.
        UnsupportedError: it cannot read or build the graph, or would not compute in the precision asked for.
    """
    trt = library.load()
    logger = recorder(library)
    logger.errors.clear()
    builder = trt.Builder(logger)
    _no_errors(library, logger, "cannot be used here")
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)) or parser.num_errors or logger.errors:
        said = _complaint(trt, parser, logger.errors, model)
        raise UnsupportedError(f"{library.label} cannot read {path.name}: {said}")
    facts = audit(typed_layers(network), options)
    config = builder.create_builder_config()
    facts |= _configure(trt, library, builder, config, profiles, options)
    logger.errors.clear()  # what a setter had to say was read back from it
    monitor = None if options.progress is None else _monitor(trt, options.progress)
    config.progress_monitor = monitor
    blob = builder.build_serialized_network(network, config)
    if blob is None or logger.errors:
        said = logger.errors[0] if logger.errors else "no reason given"
        raise UnsupportedError(f"{library.label} cannot build {path.name}: {said}")
    facts |= _store_timing_cache(config, options)
    return Built(bytes(blob), facts)


def _no_errors(library: Library, logger: Any, what: str) -> None:
    if logger.errors:
        raise UnsupportedError(f"{library.label} {what}: {logger.errors[0]}")


def _complaint(trt: Any, parser: Any, logged: list[str], model: Any) -> str:
    """The parser's first error in one line, with the ONNX node that it is about and the module of that."""
    if not parser.num_errors:
        return logged[0] if logged else "no reason given"
    error = parser.get_error(0)
    paths = {node.name: module_path(node) for node in model.graph.node}
    path = paths.get(error.node_name())
    node = f"node {error.node_name()!r} ({error.node_operator()}{f' of {path!r}' if path else ''})"
    if error.code() == trt.ErrorCode.UNSUPPORTED_NODE:
        return f"{node} is not supported"
    # Without a driver every error trails one about the missing driver, which is not why parsing failed.
    lines = [line for line in error.desc().splitlines() if line.strip() and "catchCudaError" not in line]
    return f"{node}: {' '.join(lines) or 'no reason given'}"


def _configure(
    trt: Any,
    library: Library,
    builder: Any,
    config: Any,
    profiles: Sequence[Mapping[str, Shapes]],
    options: BuildOptions,
) -> dict[str, Any]:
    flags = []
    for option, flag in _FLAGS.items():
        if getattr(options, option):
            config.set_flag(getattr(trt.BuilderFlag, flag))
            flags.append(option)
        elif option == "tf32":  # on by default
            config.clear_flag(trt.BuilderFlag.TF32)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # so that the engine can be audited where it runs
    if options.builder_level is not None:
        config.builder_optimization_level = options.builder_level
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
    if options.hardware_compatible is not None:
        level = getattr(trt.HardwareCompatibilityLevel, _LEVELS[options.hardware_compatible])
        config.hardware_compatibility_level = level
    for shapes in profiles:
        profile = builder.create_optimization_profile()
        for name, three in shapes.items():
            profile.set_shape(name, *three)
        if config.add_optimization_profile(profile) < 0:
            raise ConfigError(f"{library.label} refuses the shape profile {dict(shapes)}")
    if options.timing_cache is not None:
        _use_timing_cache(trt, config, options.timing_cache)
    facts: dict[str, Any] = {
        "flags": flags,
        "tf32": bool(config.get_flag(trt.BuilderFlag.TF32)),
        "builder_level": options.builder_level,
        "hardware_compatible": options.hardware_compatible,
    }
    if "compute_capabilities" not in library.lacks:
        facts["compute_capabilities"] = _set_targets(trt, library, config, options)
    return facts


def _set_targets(trt: Any, library: Library, config: Any, options: BuildOptions) -> list[str]:
    """Sets the GPUs to build for and reads them back, as `8.6`."""
    known = trt.ComputeCapability.__members__
    names = [f"SM{major}{minor}" for major, minor in options.compute_capabilities or DEFAULT_TARGETS]
    unknown = [name for name in names if name not in known]
    if unknown:
        choice = ", ".join(f"{int(n[2:]) // 10}.{int(n[2:]) % 10}" for n in known if n.startswith("SM"))
        raise ConfigError(f"{library.label} does not build for {', '.join(unknown)}; it builds for {choice}")
    config.num_compute_capabilities = len(names)
    if not all(config.set_compute_capability(known[name], index) for index, name in enumerate(names)):
        raise ConfigError(f"{library.label} refuses to build one engine for {', '.join(names)} together")
    found = [int(config.get_compute_capability(index)) for index in range(config.num_compute_capabilities)]
    return [f"{value // 10}.{value % 10}" for value in found]


def _use_timing_cache(trt: Any, config: Any, path: Path) -> None:
    """A cache that is there pins the build: what it does not hold is an error. Else one is filled and written."""
    held = path.read_bytes() if path.exists() else b""
    config.set_flag(trt.BuilderFlag.EDITABLE_TIMING_CACHE)
    cache = config.create_timing_cache(held)
    if cache is None or not config.set_timing_cache(cache, False):
        raise ArtifactError(f"{path} is no timing cache of this version and this GPU; remove it to have a new one")
    if held:
        config.set_flag(trt.BuilderFlag.ERROR_ON_TIMING_CACHE_MISS)


def _store_timing_cache(config: Any, options: BuildOptions) -> dict[str, Any]:
    if options.timing_cache is None:
        return {}
    if not options.timing_cache.exists() or not options.timing_cache.stat().st_size:
        cache = config.get_timing_cache()
        write_bytes(options.timing_cache, bytes(cache.serialize()))
    return {"timing_cache_sha256": sha256_of(options.timing_cache)}


def _monitor(trt: Any, report: Callable[[int, int], None]) -> Any:
    """Adds up the steps of all phases; TensorRT names further phases while it builds."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self._steps: dict[str, int] = {}
            self._done: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name], self._done[phase_name] = num_steps, 0

        def phase_finish(self, phase_name: str) -> None:
            self._done[phase_name] = self._steps.get(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._done[phase_name] = step + 1
            report(sum(self._done.values()), sum(self._steps.values()))
            return True

    return Monitor()
