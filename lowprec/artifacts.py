"""Files on disk: written whole or not at all, read without trust.

Nothing here, and nothing that calls it, unpickles. A folder appears under its name only when everything in it is
written and synced, so a killed process or a full disk leaves the old state and at most a hidden temporary folder, which
the next writer of the same name removes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from lowprec.errors import ArtifactError


def write_bytes(path: Path, data: bytes) -> None:
    """Writes `data` to `path` whole or not at all."""
    with written_whole(path) as file:
        file.write(data)


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes its name when the block ends without an error: temporary beside it, fsync, rename."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~umask())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode("utf-8"))


def json_text(value: Any) -> str:
    """Deterministic JSON: sorted keys, two-space indent, no NaN or infinity literals (they are not JSON)."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Writes `json_text(value)` atomically."""
    write_text(path, json_text(value))


def write_npz(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    """Writes an uncompressed .npz whose bytes depend on the arrays alone (fixed order and time stamps), atomically."""
    import io

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(arrays):
            member = io.BytesIO()
            np.lib.format.write_array(member, np.ascontiguousarray(arrays[name]), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0)), member.getvalue())
    write_bytes(path, buffer.getvalue())


def read_json(path: Path, what: str) -> Any:
    """Parses a JSON file; `what` names it in errors (`the manifest`). Raises `ArtifactError`."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{what} is missing: no file {path}") from None
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{what} {path} is not valid JSON ({error}); it is truncated or damaged") from None
    except OSError as error:
        raise ArtifactError(f"{what} {path} cannot be read: {error.strerror or error}") from None


def read_npz(path: Path, what: str) -> dict[str, NDArray[Any]]:
    """All arrays of an .npz, never unpickling. Raises `ArtifactError`."""
    if not path.is_file():
        raise ArtifactError(f"{what} is missing: no file {path}")
    if not zipfile.is_zipfile(path):
        raise ArtifactError(f"{what} {path} is not an .npz, or it is truncated; give an .npz with named arrays")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, KeyError, NotImplementedError) as error:
        reason = "it holds pickled objects, which are never loaded" if "allow_pickle" in str(error) else str(error)
        raise ArtifactError(f"{what} {path} is not a readable .npz: {reason}") from None


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in lowercase hex, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def member_path(folder: Path, name: str) -> Path:
    """`folder / name`, refusing a name that leaves the folder (separators, `..`, absolute, symbolic links)."""
    if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name or os.path.isabs(name):
        raise ArtifactError(f"{folder}: the file name {name!r} points outside the folder; refused")
    path = folder / name
    if path.is_symlink():
        raise ArtifactError(f"{path} is a symbolic link; a bundle holds plain files only; refused")
    return path


@contextlib.contextmanager
def new_folder(final: Path, what: str, is_ours: Callable[[Path], bool]) -> Iterator[Path]:
    """Yields a temporary folder beside `final` that takes its name when the block ends without an error.

    An existing `final` is replaced only if it is empty or `is_ours(final)`.

    Args:
        final: the folder to make.
        what: what it is, for messages (`a bundle`).
        is_ours: says whether an existing folder is an earlier result of the same kind.

    Raises:
        ArtifactError: `final` exists and holds something else, or its parent is not a folder.
    """
    final = Path(os.path.abspath(final))
    check_replaceable(final, what, is_ours)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"cannot make {final.parent}: {error.strerror or error}") from None
    for stale in final.parent.glob(f".{final.name}.*.partial"):
        if not _alive(stale):
            shutil.rmtree(stale, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".{final.name}.{os.getpid()}-", suffix=".partial", dir=final.parent))
    try:
        os.chmod(work, 0o777 & ~umask())
        yield work
        check_replaceable(final, what, is_ours)
        _swap_in(work, final)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def check_replaceable(final: Path, what: str, is_ours: Callable[[Path], bool]) -> None:
    """Raises `ArtifactError` if `final` exists and is neither an empty folder nor one that `is_ours`."""
    if final.is_symlink() or (final.exists() and not final.is_dir()):
        raise ArtifactError(f"cannot write {what} to {final}: a file of that name is there; choose another name")
    if final.is_dir() and any(final.iterdir()) and not is_ours(final):
        raise ArtifactError(f"cannot write {what} to {final}: the folder holds something else; choose another name")


def _swap_in(work: Path, final: Path) -> None:
    if not final.exists():
        os.rename(work, final)
        return
    retired = Path(tempfile.mkdtemp(prefix=f".{final.name}.{os.getpid()}-", suffix=".partial", dir=final.parent))
    os.rename(final, retired / "old")
    try:
        os.rename(work, final)
    except BaseException:
        os.rename(retired / "old", final)
        raise
    finally:
        shutil.rmtree(retired, ignore_errors=True)


def _alive(partial: Path) -> bool:
    """Whether the process that made a `.NAME.PID-xxxx.partial` folder still runs."""
    pid = partial.name.removesuffix(".partial").rpartition(".")[2].partition("-")[0]
    if not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def umask() -> int:
    """The permissions that new files of this process lack."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
