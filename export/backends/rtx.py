"""The backend "tensorrt-rtx": engines built anywhere, typed by their graph, and audited before they are trusted.

TensorRT-RTX compiles for GPUs that are not here, so an engine can be built, and its layers' types read, on any machine.
Running one takes a GPU that it targets; that is not part of this backend yet, and what was only built is called so.

Two habits of the library are guarded against. It reports errors to its logger and then returns something hollow, so a
recorded error is a failure whatever was returned. And it keeps the first logger of the process for good, so there is
one recorder for all builds.
"""

from __future__ import annotations

import ctypes
import functools
import re
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowprec.artifacts import sha256_of, write_bytes
from lowprec.errors import ConfigError, MissingDependencyError, UnsupportedError
from lowprec.export.backends.base import BuildOptions, EngineBackend, Session
from lowprec.export.onnx_files import load_onnx
from lowprec.export.tensors import specs_of
from lowprec.packages import is_installed

# What TensorRT-RTX 1.7 builds for unasked, spelled out so that the sidecar can say it: Ampere, Ada, Blackwell. Turing
# (7.5) has to be asked for: it has no float32 matrix product there.
DEFAULT_TARGETS = ((8, 0), (8, 6), (8, 9), (12, 0))
NOT_RUN = "built, not run"
# Layer types that compute; the others move, retype or hold values.
COMPUTE_LAYERS = frozenset(
    {
        "ACTIVATION", "ATTENTION_INPUT", "CONVOLUTION", "CUMULATIVE", "DECONVOLUTION", "EINSUM", "ELEMENTWISE",
        "LRN", "MATRIX_MULTIPLY", "NORMALIZATION", "PARAMETRIC_RELU", "POOLING", "REDUCE", "RESIZE", "SCALE",
        "SOFTMAX", "UNARY",
    }
)  # fmt: skip
_NARROW = {"fp16": "HALF", "bf16": "BF16"}
_BUILDING = threading.Lock()


@dataclass(frozen=True)
class TypedLayer:
    """One layer of a typed network: its name, its kind, the ONNX nodes it came from, the type it computes in."""

    name: str
    kind: str
    nodes: tuple[str, ...]
    dtype: str


def audit(layers: Iterable[TypedLayer], options: BuildOptions) -> dict[str, Any]:
    """Holds the types of a network's layers against the precision asked for.

    fp16 and bf16: every computing layer is of that type but those named as wide. mixed: at least one is half. int8: at
    least one layer quantises. fp32: nothing is claimed.

    Returns:
        `layer_types`, counts per type of computing layers, and `wide_layers`, the names of float32 ones.

    Raises:
        UnsupportedError: float32 was found where a narrow type was asked for; names the layers.
    """
    layers = list(layers)
    computing = [layer for layer in layers if layer.kind in COMPUTE_LAYERS]
    counts = Counter(layer.dtype for layer in computing)
    wide = [layer for layer in computing if layer.dtype == "FLOAT"]
    asked = options.precision
    if asked in _NARROW:
        odd = [layer.name for layer in wide if not options.wide & {layer.name, *layer.nodes}]
        if odd or not counts[_NARROW[asked]]:
            shown = ", ".join(odd[:5]) + (f" and {len(odd) - 5} more" if len(odd) > 5 else "")
            raise UnsupportedError(
                f"asked for a {asked} engine, found float32 in {shown or 'every layer'}; "
                f"convert the ONNX graph to {asked} first, or name these nodes as wide"
            )
    if asked == "mixed" and not (counts["HALF"] or counts["BF16"]):
        raise UnsupportedError("asked for a mixed engine, found no half layer; convert the ONNX graph first")
    if asked == "int8" and not any(layer.kind == "QUANTIZE" for layer in layers):
        raise UnsupportedError("asked for an int8 engine, found no quantising layer; quantise the ONNX graph first")
    return {"layer_types": dict(sorted(counts.items())), "wide_layers": [layer.name for layer in wide]}


class TensorRTRTX(EngineBackend):
    """Builds strongly typed TensorRT-RTX engines."""

    name = "tensorrt-rtx"
    summary = (
        "TensorRT-RTX engines: built on any machine, run on an NVIDIA GPU of compute capability 8.0 to 8.9 or 12.x"
    )
    suffixes = (".engine",)

    def unavailable(self) -> str | None:
        """Why the package cannot be imported, or None."""
        if not is_installed("tensorrt_rtx"):
            return "tensorrt-rtx is not installed; pip install lowprec[rtx]"
        return None

    def cannot_run(self) -> str | None:
        """Why engines are not run here: no driver, or, with one, that this version builds engines and runs none."""
        try:
            ctypes.CDLL("libcuda.so.1")
        except OSError:
            return "no NVIDIA driver (libcuda.so.1) on this machine; engines can be built here, not run"
        return "this version of lowprec builds TensorRT-RTX engines and does not run them"

    def _open(self, artefact: str | Path) -> Session:
        raise MissingDependencyError(f"{artefact} cannot be run: {self.cannot_run()}")

    def build(self, onnx_path: Path, engine_path: Path, options: BuildOptions | None = None) -> dict[str, Any]:
        """Compiles an ONNX file; see `EngineBackend.build`."""
        reason = self.unavailable()
        if reason is not None:
            raise MissingDependencyError(f"cannot build {engine_path.name}: {reason}")
        options = options or BuildOptions()
        model = load_onnx(onnx_path)
        weights = {tensor.name for tensor in model.graph.initializer}
        inputs = specs_of([value for value in model.graph.input if value.name not in weights])
        profile = {spec.name: options.shapes_of(spec) for spec in inputs}
        with _BUILDING:
            engine, found = _compile(onnx_path, profile, options)
        write_bytes(engine_path, engine)
        import tensorrt_rtx

        keys = ("min", "opt", "max")
        shapes = {n: {k: list(s) for k, s in zip(keys, three, strict=True)} for n, three in profile.items()}
        return {
            "backend": self.name,
            "version": str(tensorrt_rtx.__version__),
            "engine": engine_path.name,
            "sha256": sha256_of(engine_path),
            "source": onnx_path.name,
            "source_sha256": sha256_of(onnx_path),
            "precision": options.precision,
            "profiles": [shapes],
            **found,
            "verification": NOT_RUN,
        }


@functools.cache
def _recorder() -> Any:
    """The process's one logger: it keeps the errors that TensorRT-RTX reports."""
    import tensorrt_rtx as trt

    class Recorder(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(" ".join(message.split()))

    return Recorder()


def _compile(
    onnx_path: Path, profile: Mapping[str, tuple[tuple[int, ...], ...]], options: BuildOptions
) -> tuple[bytes, dict[str, Any]]:
    import tensorrt_rtx as trt

    logger = _recorder()
    logger.errors.clear()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx_path)) or parser.num_errors or logger.errors:
        raise UnsupportedError(f"TensorRT-RTX cannot read {onnx_path.name}: {_complaint(parser, logger.errors)}")
    found = audit(_typed_layers(network), options)
    config = _configure(builder, profile, options)
    targets = _set_targets(config, options.compute_capabilities or DEFAULT_TARGETS)
    blob = builder.build_serialized_network(network, config)
    if blob is None or logger.errors:
        said = logger.errors[0] if logger.errors else "no reason given"
        raise UnsupportedError(f"TensorRT-RTX cannot build {onnx_path.name}: {said}")
    tf32 = bool(config.get_flag(trt.BuilderFlag.TF32))
    return bytes(blob), {**found, "compute_capabilities": targets, "tf32": tf32}


def _complaint(parser: Any, logged: list[str]) -> str:
    """The parser's first error in one line, with the ONNX node it is about."""
    import tensorrt_rtx as trt

    if not parser.num_errors:
        return logged[0] if logged else "no reason given"
    error = parser.get_error(0)
    node = f"node {error.node_name()!r} ({error.node_operator()})"
    if error.code() == trt.ErrorCode.UNSUPPORTED_NODE:
        return f"{node} is not supported"
    # Without a driver every error trails one about the missing driver, which is not why parsing failed.
    lines = [line for line in error.desc().splitlines() if line.strip() and "catchCudaError" not in line]
    return f"{node}: {' '.join(lines) or 'no reason given'}"


def _configure(builder: Any, profile: Mapping[str, tuple[tuple[int, ...], ...]], options: BuildOptions) -> Any:
    import tensorrt_rtx as trt

    config = builder.create_builder_config()
    if not options.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    shapes = builder.create_optimization_profile()
    for name, three in profile.items():
        shapes.set_shape(name, *three)
    if config.add_optimization_profile(shapes) < 0:
        raise ConfigError(f"TensorRT-RTX refuses the shape profile {profile}")
    return config


def _set_targets(config: Any, targets: tuple[tuple[int, int], ...]) -> list[str]:
    """Sets the GPUs to build for and reads them back, as `8.6`."""
    import tensorrt_rtx as trt

    known = trt.ComputeCapability.__members__
    names = [f"SM{major}{minor}" for major, minor in targets]
    unknown = [name for name in names if name not in known]
    if unknown:
        choice = ", ".join(f"{int(n[2:]) // 10}.{int(n[2:]) % 10}" for n in known if n.startswith("SM"))
        raise ConfigError(f"TensorRT-RTX does not build for {', '.join(unknown)}; it builds for {choice}")
    config.num_compute_capabilities = len(names)
    if not all(config.set_compute_capability(known[name], index) for index, name in enumerate(names)):
        raise ConfigError(f"TensorRT-RTX refuses to build one engine for {', '.join(names)} together")
    found = [int(config.get_compute_capability(index)) for index in range(config.num_compute_capabilities)]
    return [f"{value // 10}.{value % 10}" for value in found]


def _typed_layers(network: Any) -> list[TypedLayer]:
    layers = []
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        nodes = tuple(re.findall(r"\[ONNX Layer: ([^\]]*)\]", layer.metadata or ""))
        dtype = layer.get_output(0).dtype.name if layer.num_outputs else "NONE"
        layers.append(TypedLayer(layer.name, layer.type.name, nodes, dtype))
    return layers
