"""`lowprec doctor`: what is installed, what works here, and why the rest does not."""

from __future__ import annotations

import argparse
import os
import platform
from typing import Any

import lowprec
from lowprec.cli.terminal import print_json, print_table, say
from lowprec.packages import installed_versions, is_installed

_OPTIONAL = {
    "torch": "training, calibration, export",
    "onnx": "export, verify, compare",
    "onnxscript": "export",
    "onnxruntime": "running ONNX artefacts, int8: pip install 'lowprec[cpu]' or 'lowprec[gpu]'",
    "openvino": "running ONNX artefacts: pip install 'lowprec[openvino]'",
    "tensorrt_rtx": "TensorRT-RTX engines: pip install 'lowprec[rtx]'",
    "tensorrt": "TensorRT engines: pip install 'lowprec[tensorrt]'",
    "sklearn": "the embedded digits",
    "safetensors": "weights of runs",
    "rich": "tables and progress bars on a terminal",
    "jinja2": "report.html",
    "PIL": "folders and shards of images: pip install 'lowprec[data]'",
    "torchvision": "CIFAR in its pickled form: pip install 'lowprec[data]'",
    "tensorboard": "run.tensorboard: pip install 'lowprec[log]'",
    "lightning_fabric": "the Fabric plugin: pip install 'lowprec[fabric]'",
    "apex": "optim.name apex-sgd, apex-adam, apex-adamw: built from source, never needed",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `lowprec doctor`."""
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """Prints what was found; always 0, because every gap is a fact and no failure."""
    facts = examine()
    if args.json:
        print_json(facts)
        return 0
    say(f"lowprec {facts['lowprec']}, Python {facts['python']}, {facts['machine']}, {facts['cpus']} CPUs")
    say(f"devices: {facts['devices']}")
    say(f"NVIDIA driver: {facts['driver']}")
    say(f"norm kernels: {facts['kernels']}")
    packages = [(name, found["version"] or "not installed", found["use"]) for name, found in facts["packages"].items()]
    print_table(("package", "version", "used for"), packages)
    backends = [
        (name, found["builds_or_opens"], found["runs"], ", ".join(found["artefacts"]))
        for name, found in facts["backends"].items()
    ]
    print_table(("backend", "usable", "runs here", "takes"), backends)
    return 0


def examine() -> dict[str, Any]:
    """Everything that `doctor` prints, as data."""
    return {
        "lowprec": lowprec.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "devices": _devices(),
        "driver": _driver(),
        "kernels": _kernels(),
        "packages": {name: {"version": _version(name), "use": use} for name, use in _OPTIONAL.items()},
        "backends": _backends(),
    }


def _version(module: str) -> str | None:
    if not is_installed(module):
        return None
    from importlib import metadata

    distributions = metadata.packages_distributions().get(module, [module])
    return installed_versions(distributions).get(distributions[0], "unknown version")


def _cannot_build(backend: Any) -> str | None:
    from lowprec.export.backends import EngineBackend

    return backend.cannot_build() if isinstance(backend, EngineBackend) else None


def _driver() -> str:
    if not is_installed("onnx") or not is_installed("numpy"):
        return "onnx or numpy is not installed, so none was looked for"
    from lowprec.export.backends.cuda import gpu_or_none

    gpu = gpu_or_none()
    return f"{gpu.name}, compute capability {gpu.capability}, CUDA {gpu.driver}" if gpu else "none here"


def _devices() -> str:
    if not is_installed("torch"):
        return "torch is not installed, so none were looked for"
    import torch

    if not torch.cuda.is_available():
        return "CPU; no CUDA device that torch can use"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def _kernels() -> str:
    if not is_installed("torch"):
        return "torch is not installed, so none were looked for"
    from lowprec.kernels import native

    reason = native.why_not()
    cpu = (
        f"{reason}; until then torch computes them" if reason else f"CPU, compiled for {native.instruction_sets()[-1]}"
    )
    return f"{cpu}; for CUDA devices Triton {_version('triton')}" if is_installed("triton") else cpu


def _backends() -> dict[str, dict[str, Any]]:
    if not is_installed("onnx") or not is_installed("numpy"):
        return {}
    from lowprec.export.backends import BACKENDS

    return {
        name: {
            "builds_or_opens": backend.unavailable() or _cannot_build(backend) or "yes",
            "runs": backend.unavailable() or backend.cannot_run() or "yes",
            "artefacts": list(backend.suffixes) or ["modules"],
        }
        for name, backend in BACKENDS.items()
    }
