"""The sidecar of an engine: all that a later loader must check before TensorRT is asked."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowprec.artifacts import member_path, read_json, sha256_of
from lowprec.errors import ArtifactError, MissingDependencyError
from lowprec.export.backends.base import BuildOptions, Shapes
from lowprec.export.backends.cuda import Gpu, gpu_or_none
from lowprec.export.backends.tensorrt.library import Library

NOT_RUN = "built, not run"
_KEYS = ("min", "opt", "max")
_LEVELS = (None, "same", "ampere+")
_ABOUT_A_GPU = ("name", "capability", "driver")


def sidecar_of(
    library: Library,
    onnx_path: Path,
    engine_path: Path,
    profiles: Sequence[Mapping[str, Shapes]],
    options: BuildOptions,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Its content: what built it, where, from what, for what, and how far it was verified."""
    shapes = [{n: {k: list(s) for k, s in zip(_KEYS, three, strict=True)} for n, three in p.items()} for p in profiles]
    gpu = gpu_or_none()
    return {
        "backend": library.backend,
        "version": str(library.load().__version__),
        "system": f"{platform.system()} {platform.machine()}",
        "built_on": None if gpu is None else gpu.to_dict(),
        "engine": engine_path.name,
        "sha256": sha256_of(engine_path),
        "source": onnx_path.name,
        "source_sha256": sha256_of(onnx_path),
        "precision": options.precision,
        "profiles": shapes,
        **facts,
        "verification": NOT_RUN,
    }


def check_sidecar(file: Path, library: Library, gpu: Gpu | None = None) -> dict[str, Any]:
    """The sidecar of an engine that may be loaded here.

    Args:
        file: the engine; its sidecar is beside it, `.json` added.
        library: what is to load it.
        gpu: the one that it is to run on; the machine's by default.

    Raises:
        ArtifactError: there is no sidecar, or it speaks of another file or library.
        MissingDependencyError: the engine is for another version, system or GPU than is here.
    """
    if not file.is_file():
        raise ArtifactError(f"no engine at {file}: there is no such file")
    path = file.with_name(f"{file.name}.json")
    content = _read(path, library)
    if content["sha256"] != sha256_of(file):
        raise ArtifactError(f"{file} is not the file that {path.name} speaks of; build it again")
    here = {"version": str(library.load().__version__), "system": f"{platform.system()} {platform.machine()}"}
    newer = "version_compatible" in content["flags"] and _numbers(here["version"]) >= _numbers(content["version"])
    for key, found in here.items():
        if content[key] != found and not (key == "version" and newer):
            reach = " and newer" if key == "version" and "version_compatible" in content["flags"] else ""
            raise MissingDependencyError(
                f"{file.name} was built for {library.label} {key} {content[key]}{reach}, here is {found}; build it "
                "here with lowprec engine"
            )
    gpu = gpu or gpu_or_none()
    if gpu is not None:
        _check_gpu(file, content, gpu)
    return content


def _read(path: Path, library: Library) -> dict[str, Any]:
    """The content, whose every part that is looked at later is of the right kind."""
    content = read_json(path, "the engine's sidecar")
    if not isinstance(content, dict) or content.get("backend") != library.backend:
        raise ArtifactError(f"{path} is not the sidecar of a {library.label} engine")
    built, targets = content.get("built_on"), content.get("compute_capabilities")
    texts = [content.get(key) for key in ("version", "system", "precision", "source", "source_sha256", "sha256")]
    texts += [] if built is None else [built.get(k) for k in _ABOUT_A_GPU] if isinstance(built, dict) else [None]
    lists = [content.get("flags"), [] if targets is None else targets]
    texts += [text for held in lists for text in (held if isinstance(held, list) else [None])]
    if not all(isinstance(text, str) for text in texts) or content.get("hardware_compatible") not in _LEVELS:
        raise ArtifactError(f"{path} is damaged, or of another version of lowprec; build the engine again")
    return content


def source_of(file: Path, content: Mapping[str, Any]) -> Path:
    """The ONNX file beside an engine that it was built from; raises `ArtifactError` where that is not there."""
    source = member_path(file.parent, content["source"])
    if not source.is_file() or sha256_of(source) != content["source_sha256"]:
        raise ArtifactError(
            f"{file.name} holds no weights; they come from {source.name} beside it, which is not there or was changed"
        )
    return source


def _check_gpu(file: Path, content: Mapping[str, Any], gpu: Gpu) -> None:
    built = content.get("built_on") or {}
    driver = built.get("driver", "0.0")
    if _numbers(gpu.driver) < _numbers(driver):
        raise MissingDependencyError(
            f"{file.name} was built with a driver for CUDA {driver}, this machine's is for {gpu.driver}; update the "
            "driver, or build it here with lowprec engine"
        )
    targets = content.get("compute_capabilities")
    if targets is not None:
        if gpu.capability not in targets:
            raise MissingDependencyError(
                f"{file.name} was built for compute capability {', '.join(targets)}; this GPU, {gpu.name}, has "
                f"{gpu.capability}; build it here with lowprec engine"
            )
        return
    level = content.get("hardware_compatible")
    fits = {
        None: built.get("name") == gpu.name and built.get("capability") == gpu.capability,
        "same": built.get("capability") == gpu.capability,
        "ampere+": _numbers(gpu.capability) >= (8, 0),
    }[level]
    if not fits:
        kept = f", hardware compatible: {level}" if level else ""
        raise MissingDependencyError(
            f"{file.name} was built on {built.get('name')} (compute capability {built.get('capability')}{kept}); this "
            f"GPU is {gpu.name} ({gpu.capability}); build it here with lowprec engine"
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())
