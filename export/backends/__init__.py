"""Where an artefact can run: one interface, one table, and each backend says which arithmetic it really does."""

from __future__ import annotations

import difflib

from lowprec.errors import ConfigError
from lowprec.export.backends.base import Backend, BuildOptions, EngineBackend, Session
from lowprec.export.backends.eager import Eager
from lowprec.export.backends.openvino import OpenVINO
from lowprec.export.backends.ort import OnnxRuntime
from lowprec.export.backends.reference import Reference
from lowprec.export.backends.tensorrt import RTX, TENSORRT, TensorRT

__all__ = ["BACKENDS", "Backend", "BuildOptions", "EngineBackend", "Session", "backend_named"]

_ALL: tuple[Backend, ...] = (
    Eager(),
    Reference(),
    OnnxRuntime("onnxruntime", "ONNX on onnxruntime's CPU provider", "CPUExecutionProvider", "cpu"),
    OnnxRuntime(
        "onnxruntime-cuda",
        "ONNX on onnxruntime's CUDA provider, TF32 off",
        "CUDAExecutionProvider",
        "gpu",
        {"use_tf32": "0"},
        "on the GPU, no TF32",
    ),
    OnnxRuntime(
        "onnxruntime-tensorrt",
        "ONNX on onnxruntime's TensorRT provider",
        "TensorrtExecutionProvider",
        "gpu",
        device="on the GPU, by TensorRT",
    ),
    OpenVINO(),
    TensorRT(
        RTX, "TensorRT-RTX engines: built on any machine, run on an NVIDIA GPU of compute capability 7.5 to 8.9, 12.x"
    ),
    TensorRT(TENSORRT, "TensorRT engines, 10.16 and newer: built and run on the GPU that they are for"),
)
BACKENDS: dict[str, Backend] = {backend.name: backend for backend in _ALL}


def backend_named(name: str) -> Backend:
    """The backend called `name`; raises `ConfigError` that lists the valid names and the nearest."""
    if name in BACKENDS:
        return BACKENDS[name]
    near = difflib.get_close_matches(name, BACKENDS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(f"unknown backend {name!r}; {hint}choose one of {', '.join(BACKENDS)}")
