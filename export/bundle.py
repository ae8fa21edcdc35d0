"""The bundle: one folder that carries the artefacts, the evidence and the hashes that tie them together.

    manifest.json     schema, provenance, SHA-256 of every other file
    model*.onnx, model.*.engine with a sidecar each, golden.npz, calibration.json, fold.json, parity.json, report.html

A bundle is opened only when every file that the manifest lists is there and hashes to what the manifest says. The
manifest itself is what a signature covers: `--manifest-sha256` pins it.
"""

from __future__ import annotations

import datetime
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lowprec
from lowprec.artifacts import member_path, read_json, sha256_of, write_json
from lowprec.errors import ArtifactError
from lowprec.packages import installed_versions
from lowprec.report import ChangeReport

if TYPE_CHECKING:
    from lowprec.export.backends.base import Precision
    from lowprec.export.parity import ParityReport

SCHEMA = 1
KIND = "lowprec-bundle"
MANIFEST = "manifest.json"
GOLDEN = "golden.npz"
CALIBRATION = "calibration.json"
FOLD = "fold.json"
PARITY = "parity.json"
REPORT = "report.html"

ONNX_BY_PRECISION: dict[Precision, str] = {
    "fp32": "model.onnx",
    "fp16": "model.fp16.onnx",
    "bf16": "model.bf16.onnx",
    "mixed": "model.mixed.onnx",
    "int8": "model.int8.onnx",
}
"""File name of the ONNX artefact of each precision; fp32 is always written."""

_PACKAGES = ("torch", "numpy", "onnx", "onnxscript", "onnxruntime", "tensorrt-rtx", "safetensors")
_GIT = ("git", "-c", "core.fsmonitor=false")  # the one setting by which a repository makes these two run a program
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Bundle:
    """An opened bundle: every file it lists has been hashed and matches.

    Args:
        folder: where it is.
        manifest: the parsed manifest.
        manifest_sha256: hash of the manifest file itself.
    """

    folder: Path
    manifest: dict[str, Any]
    manifest_sha256: str

    @property
    def files(self) -> dict[str, str]:
        """SHA-256 by file name."""
        files: dict[str, str] = self.manifest["files"]
        return files

    def path(self, name: str) -> Path:
        """Path of a listed file; raises `ArtifactError` when the bundle does not list it."""
        if name not in self.files:
            raise ArtifactError(f"the bundle {self.folder} has no {name}; it lists {', '.join(sorted(self.files))}")
        return member_path(self.folder, name)

    def record(self, name: str) -> dict[str, Any]:
        """A listed JSON file, parsed; raises `ArtifactError` when it does not hold an object."""
        content = read_json(self.path(name), name)
        if not isinstance(content, dict):
            raise ArtifactError(f"{self.folder / name} does not hold a JSON object; it is damaged")
        return content

    @property
    def onnx_artefacts(self) -> dict[str, str]:
        """File name by precision of the ONNX artefacts in this bundle, fp32 first."""
        return {precision: name for precision, name in ONNX_BY_PRECISION.items() if name in self.files}

    @property
    def parity(self) -> ParityReport:
        """The parity report that was taken when the bundle was made; `verify` takes a new one."""
        from lowprec.export.parity import ParityReport

        return ParityReport.from_dict(self.record(PARITY))

    @property
    def fold_report(self) -> ChangeReport:
        """What was folded, what was not, and why."""
        return ChangeReport.from_dict(self.record(FOLD))

    @property
    def engines(self) -> list[str]:
        """File names of the engines in this bundle."""
        return sorted(name for name in self.files if name.endswith(".engine"))


def open_bundle(folder: str | Path, manifest_sha256: str | None = None) -> Bundle:
    """Reads the manifest and checks the hash of every file it lists.

    Args:
        folder: the bundle.
        manifest_sha256: the hash the manifest must have, when the caller was given one.

    Raises:
        ArtifactError: not a bundle, a file is missing, or a hash does not match.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ArtifactError(f"no bundle at {folder}: " + ("it is a file" if folder.exists() else "no such folder"))
    path = folder / MANIFEST
    if not path.exists():
        raise ArtifactError(f"{folder} is not a bundle: it has no {MANIFEST}; give the folder that export wrote")
    manifest = read_json(path, "the manifest")
    _check_schema(path, manifest)
    digest = sha256_of(path)
    if manifest_sha256 is not None and digest != manifest_sha256.lower():
        raise ArtifactError(f"{path} has SHA-256 {digest}, asked for was {manifest_sha256}; this is another bundle")
    for name, expected in manifest["files"].items():
        file = member_path(folder, name)
        if not file.is_file():
            raise ArtifactError(f"{file} is missing; the manifest lists it, so the bundle is incomplete: export again")
        found = sha256_of(file)
        if found != expected:
            raise ArtifactError(
                f"{file} was changed: SHA-256 {found[:12]}…, the manifest says {expected[:12]}…; export again"
            )
    return Bundle(folder, manifest, digest)


def _check_schema(path: Path, manifest: Any) -> None:
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        raise ArtifactError(f"{path} is not the manifest of a lowprec bundle")
    if manifest.get("schema") != SCHEMA:
        raise ArtifactError(f"{path} has schema {manifest.get('schema')!r}; this version reads schema {SCHEMA}")
    files = manifest.get("files")
    needed = {ONNX_BY_PRECISION["fp32"], GOLDEN, FOLD}
    if (
        not isinstance(files, dict)
        or not all(isinstance(digest, str) and _SHA256.fullmatch(digest) for digest in files.values())
        or not needed <= set(files)
    ):
        listed = ", ".join(sorted(needed))
        raise ArtifactError(f"{path} does not list {listed} with a SHA-256 each; it is damaged")


def is_bundle(folder: Path) -> bool:
    """Whether a folder looks like an earlier bundle (its manifest says so), so that a new one may replace it."""
    try:
        manifest = read_json(folder / MANIFEST, "the manifest")
    except ArtifactError:
        return False
    return isinstance(manifest, dict) and manifest.get("kind") == KIND


def write_manifest(folder: Path, provenance: dict[str, Any]) -> None:
    """Hashes every other file of the folder and writes manifest.json, last of all."""
    names = sorted(path.name for path in folder.iterdir() if path.name != MANIFEST)
    files = {name: sha256_of(member_path(folder, name)) for name in names}
    write_json(folder / MANIFEST, {"kind": KIND, "schema": SCHEMA, "provenance": provenance, "files": files})


def provenance(**facts: Any) -> dict[str, Any]:
    """Where an artefact comes from: versions, git commit of the current folder, time, and what the caller knows."""
    return {
        "lowprec": lowprec.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "packages": installed_versions(_PACKAGES),
        "git_commit": _git_commit(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **facts,
    }


def _git_commit() -> str | None:
    """Commit of the working folder, with `+changes` when it has uncommitted ones; None outside a repository."""
    try:
        head = subprocess.run([*_GIT, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        status = subprocess.run(
            [*_GIT, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+changes" if status.stdout.strip() else "")
