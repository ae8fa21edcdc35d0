"""Tar shards as webdataset writes them: `0001.png` and `0001.cls` are one sample; nothing is extracted to disk.

Python's tarfile reads them and not the webdataset package, which unpickles members by their ending, runs `pipe:` names
in a shell, and takes a shard cut between two members for a whole one. Only plain files are looked at; whatever
tarfile would skip or end at in silence is refused here.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from lowprec.data.images import IMAGE_SUFFIXES, stack_pictures
from lowprec.data.samples import Samples, check_array, listed
from lowprec.errors import DataError

_LABEL = "cls"
_ARRAY = "npy"
_INPUTS = (_ARRAY, *(suffix[1:] for suffix in IMAGE_SUFFIXES))
_PICKLED = frozenset(("pyd", "pickle", "pkl", "pth", "pt"))
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_BLOCK = 512


@dataclass(frozen=True)
class _Sample:
    """One sample as stored: its name for messages, the ending and bytes of its input, its class."""

    name: str
    ending: str
    data: bytes
    label: int


def shards_in(folder: Path) -> list[Path]:
    """The .tar files of a folder, by name; none if it has sub-folders: an archive may lie beside class folders."""
    entries = [entry for entry in sorted(folder.iterdir()) if not entry.name.startswith(".")]
    if any(entry.is_dir() for entry in entries):
        return []
    return [entry for entry in entries if entry.suffix.lower() == ".tar"]


def is_pattern(source: str) -> bool:
    """Whether `source` is spelt with braces, as in `shards-{000..003}.tar`."""
    return "{" in source and source.lower().endswith(".tar")


def shards_of_pattern(pattern: str, what: str) -> list[Path]:
    """The shards that `shards-{000..003}.tar` names; several ranges give every combination.

    Raises:
        DataError: a shard is missing, or the braces hold something else than a rising range.
    """
    shards = []
    for name in _expanded(pattern, what):
        if not Path(name).is_file():
            raise DataError(f"{what} {pattern}: there is no shard {name}; name the shards that are there")
        shards.append(Path(name))
    return shards


def _expanded(pattern: str, what: str) -> Iterator[str]:
    found = _RANGE.search(pattern)
    if found is None:
        if "{" in pattern:
            raise DataError(f"{what} {pattern}: braces hold a range of numbers, as in NAME-{{000..003}}.tar")
        yield pattern
        return
    first, last = found.groups()
    if int(first) > int(last):
        raise DataError(f"{what} {pattern}: the range {found[0]} falls; write the lower number first")
    padded = any(number.startswith("0") and len(number) > 1 for number in (first, last))
    width = max(len(first), len(last)) if padded else 0
    for number in range(int(first), int(last) + 1):
        yield from _expanded(f"{pattern[: found.start()]}{number:0{width}}{pattern[found.end() :]}", what)


def load_shards(shards: Iterable[Path], source: str, what: str) -> Samples:
    """The samples of all shards in their order: images as float32 (N, C, H, W), 0 to 1, or .npy arrays as they are.

    Args:
        shards: the .tar files.
        source: what the user called them.
        what: how messages call the data.

    Raises:
        DataError: a shard is damaged or unsafe, or a sample lacks its input or its label.
        MissingDependencyError: Pillow is not installed and the inputs are images.
    """
    samples = [sample for shard in shards for sample in _samples(shard, what)]
    if not samples:
        raise DataError(f"{what} {source} holds no sample; a sample is an image or .npy and a .cls of one name")
    is_array = [sample.ending == _ARRAY for sample in samples]
    if len(set(is_array)) > 1:
        other = samples[is_array.index(not is_array[0])]
        raise DataError(
            f"{what}: {samples[0].name} is .{samples[0].ending}, {other.name} is .{other.ending}; "
            "give all inputs as images or all as .npy"
        )
    if is_array[0]:
        x = _stack_arrays(samples, what)
    else:
        x = stack_pictures(((sample.name, io.BytesIO(sample.data)) for sample in samples), what)
    return Samples.of({None: x}, np.array([sample.label for sample in samples], np.int64), source)


def _samples(shard: Path, what: str) -> Iterator[_Sample]:
    for key, members in _members(shard, what).items():
        name = f"{shard}, sample {key!r}"
        inputs = [ending for ending in members if ending in _INPUTS]
        if len(inputs) != 1:
            found = listed([repr(ending) for ending in members])
            count = "no image and no .npy" if not inputs else "more than one input"
            raise DataError(f"{what}: {name} has {count} (found: {found}); give it one of {listed(_INPUTS)}")
        if _LABEL not in members:
            raise DataError(f"{what}: {name} has no label; add a .{_LABEL} of that name with the number of its class")
        text = members[_LABEL].strip()
        if not text.isdigit() or len(text) > 18:
            raise DataError(
                f"{what}: {name} has the label {text[:40]!r}; its .{_LABEL} must hold the number of a class"
            )
        yield _Sample(name, inputs[0], members[inputs[0]], int(text))


def _members(shard: Path, what: str) -> dict[str, dict[str, bytes]]:
    """What a shard holds, by sample and ending, in the order of the shard; contents only of inputs and labels."""
    samples: dict[str, dict[str, bytes]] = {}
    try:
        with shard.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                _check_member(member, f"{what} {shard}")
                key, ending = _key_and_ending(member.name)
                if not member.isreg() or not key or not ending:
                    continue
                if _PICKLED & set(ending.split(".")):
                    raise DataError(
                        f"{what} {shard} holds {member.name!r}, a pickle, which is never loaded; leave it out"
                    )
                if ending in samples.setdefault(key, {}):
                    raise DataError(f"{what} {shard} holds {member.name!r} twice; give every sample a name of its own")
                content = archive.extractfile(member) if ending in (_LABEL, *_INPUTS) else None
                samples[key][ending] = content.read() if content else b""
            _check_end(file, archive.offset, f"{what} {shard}")
    except (tarfile.TarError, OSError, ValueError, EOFError, RecursionError, OverflowError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{what} {shard} cannot be read as an uncompressed tar ({reason}); write it again") from None
    return samples


def _check_member(member: tarfile.TarInfo, where: str) -> None:
    """Raises `DataError` unless the member is a plain file or a folder, under a name that stays in the folder."""
    if member.name.startswith("/") or ".." in member.name.split("/"):
        raise DataError(f"{where}: the name {member.name!r} points outside the shard; refused")
    if member.issparse() or not (member.isreg() or member.isdir()):
        kind = "a link" if member.islnk() or member.issym() else "neither a plain file nor a folder"
        raise DataError(f"{where}: {member.name!r} is {kind}; store plain files (tar --dereference --hard-dereference)")


def _key_and_ending(name: str) -> tuple[str, str]:
    """`a/0001.seg.png` is the sample `a/0001` with the ending `seg.png`; hidden and `__meta__` files have no key."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    key, _, ending = base.partition(".")
    is_meta = re.match(r"__[^/]*__(/|$)", folder + slash + base) is not None
    return ("" if is_meta or not key else folder + slash + key), ending.lower()


def _check_end(file: IO[bytes], offset: int, where: str) -> None:
    """Raises `DataError` unless a block of zeros, and nothing but zeros, follows the last member at `offset`."""
    file.seek(offset)
    mark = file.read(_BLOCK)
    if len(mark) < _BLOCK:
        raise DataError(f"{where} ends without the mark of its end: it is truncated or not written yet; write it again")
    if any(mark):
        raise DataError(f"{where} is damaged at byte {offset}, where a member should begin; write it again")
    while rest := file.read(1 << 20):
        if rest.strip(b"\0"):
            raise DataError(
                f"{where} goes on behind the mark of its end; tar files that were joined must be kept apart"
            )


def _stack_arrays(samples: list[_Sample], what: str) -> NDArray[Any]:
    arrays: list[NDArray[Any]] = []
    for sample in samples:
        try:
            array = np.lib.format.read_array(io.BytesIO(sample.data), allow_pickle=False)
        except (ValueError, TypeError, SyntaxError, TokenError, OverflowError, MemoryError) as error:
            pickled = "it holds pickled objects, which are never loaded"
            reason = pickled if "allow_pickle" in str(error) else " ".join(str(error).split())
            raise DataError(f"{what}: {sample.name}: its .npy cannot be read: {reason}") from None
        arrays.append(array)
        if (array.shape, array.dtype) != (arrays[0].shape, arrays[0].dtype):
            raise DataError(
                f"{what}: {sample.name} is {array.dtype} {array.shape}, {samples[0].name} is {arrays[0].dtype} "
                f"{arrays[0].shape}; give all samples one type and shape"
            )
    x = np.stack(arrays)
    check_array(x, f"{what} {samples[0].name} and following")
    return x
