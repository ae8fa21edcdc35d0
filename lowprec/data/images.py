"""Pictures: folders of them by class, with or without parts of their own, and how any set of them becomes an array."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from lowprec.data.samples import Samples, listed
from lowprec.errors import DataError, MissingDependencyError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "PPM", "TIFF")  # no others: Pillow hands EPS, by its content, to Ghostscript
_IGNORED_FILES = ("thumbs.db", "desktop.ini")
_GREY_MODES = ("1", "L", "LA")
_WIDE_MODES = ("I", "F")  # 16- and 32-bit grey: their range is not stated in the file
_TRAIN = "train"
_TEST_NAMES = ("val", "test", "validation")


def load_image_folder(folder: Path, what: str) -> Samples:
    """Images in one sub-folder per class (sorted by name), float32 (N, C, H, W), 0 to 1; C is 1 if all are grey.

    `folder` holds the classes, or `train` and one of `val`, `test` and `validation` that hold them.
    """
    parts = _parts(folder, what)
    found = [_image_files(part, what) for part in parts]
    files = [path for paths, _ in found for path in paths]
    x_NCHW = stack_pictures(((str(path), path) for path in files), what)
    labels = np.concatenate([np.asarray(numbers, np.int64) for _, numbers in found])
    held_out = None if len(parts) == 1 else np.repeat([False, True], [len(paths) for paths, _ in found])
    return Samples.of({None: x_NCHW}, labels, str(folder), held_out)


def stack_pictures(pictures: Iterable[tuple[str, Path | IO[bytes]]], what: str) -> NDArray[np.float32]:
    """Pictures of one size as float32 (N, C, H, W), 0 to 1; C is 1 if all are grey.

    Args:
        pictures: name for messages, and the file.
        what: how messages call the data.

    Raises:
        DataError: one of them cannot be read, or is of another size than the first.
        MissingDependencyError: Pillow is not installed.
    """
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise MissingDependencyError("images need Pillow: pip install 'lowprec[data]'") from None
    read: list[Image.Image] = []
    first = ""
    for name, file in pictures:
        try:
            with Image.open(file, formats=_FORMATS) as picture:
                picture.load()
                read.append(picture.convert("L" if picture.mode in _GREY_MODES else _colour(picture.mode, name)))
        except UnidentifiedImageError:
            formats = listed(_FORMATS)
            raise DataError(f"{what}: {name} cannot be read as an image; it is none of {formats}, or damaged") from None
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{what}: {name} cannot be read as an image ({error})") from None
        first = first or name
        if read[-1].size != read[0].size:
            (width, height), (width0, height0) = read[-1].size, read[0].size
            raise DataError(
                f"{what}: {name} is {width}x{height}, {first} is {width0}x{height0}; sizes must agree: "
                "resize or crop all images to one size first"
            )
    mode = "L" if all(picture.mode == "L" for picture in read) else "RGB"
    x_NHWC = np.stack([np.atleast_3d(np.asarray(picture.convert(mode), np.uint8)) for picture in read])
    return np.ascontiguousarray(x_NHWC.transpose(0, 3, 1, 2)).astype(np.float32) / np.float32(255)


def _colour(mode: str, name: str) -> str:
    if mode.partition(";")[0] in _WIDE_MODES:
        raise DataError(f"{name} holds {mode} pixels, whose range is not known; store such data as an .npz")
    return "RGB"


def _parts(folder: Path, what: str) -> list[Path]:
    """The folders that hold the classes: `folder` itself, or its training and its test part.

    Sub-folders with the names of parts that hold files only are classes: there may be a class of trains.
    """
    inside = {entry.name: entry for entry in _sub_folders(folder)}
    named_as_parts = inside.keys() <= {_TRAIN, *_TEST_NAMES}
    if not named_as_parts or not any(_sub_folders(entry) for entry in inside.values()):
        return [folder]
    tests = [name for name in inside if name != _TRAIN]
    if _TRAIN not in inside or len(tests) != 1:
        raise DataError(
            f"{what} {folder} has the parts {listed(list(inside))}; leave {_TRAIN} and one of {listed(_TEST_NAMES)} "
            "there, or give the folder of one part"
        )
    parts = [inside[_TRAIN], inside[tests[0]]]
    train, test = ({entry.name for entry in _sub_folders(part)} for part in parts)
    if train != test:
        raise DataError(
            f"{what} {folder}: {len(train - test)} classes are in {_TRAIN} alone and {len(test - train)} in {tests[0]} "
            f"alone, the first of them {min(train ^ test)}; give both the same class sub-folders"
        )
    return parts


def _sub_folders(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _image_files(folder: Path, what: str) -> tuple[list[Path], list[int]]:
    classes = _sub_folders(folder)
    if not classes:
        raise DataError(f"{what} {folder} has no class sub-folders; put each class in a folder of its own")
    files: list[Path] = []
    labels: list[int] = []
    for label, entry in enumerate(classes):
        found = [
            path
            for path in sorted(entry.iterdir())
            if not path.name.startswith(".") and path.name.lower() not in _IGNORED_FILES
        ]
        if not found:
            raise DataError(f"{what}: the class folder {entry} is empty")
        for path in found:
            if path.suffix.lower() not in IMAGE_SUFFIXES:
                raise DataError(f"{what}: {path} is not an image (one of {listed(IMAGE_SUFFIXES)}); move it elsewhere")
        files += found
        labels += [label] * len(found)
    return files, labels
