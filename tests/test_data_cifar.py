"""CIFAR from small files in its published formats, written here byte by byte."""

from __future__ import annotations

import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowprec.data import load_data, part_of
from lowprec.errors import DataError, MissingDependencyError

CIFAR10_FILES = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]


def value(seed: int, position: int) -> int:
    """The byte at a position of the pixels of an image: some function that no other layout of axes repeats."""
    return (seed * 37 + position * 11 + position // 256) % 256


def record(labels: list[int], seed: int) -> bytes:
    return bytes(labels) + bytes(value(seed, position) for position in range(3072))


def cifar10(folder: Path) -> Path:
    """Two images in each file; image i has the label i % 10."""
    folder.mkdir(parents=True)
    for number, name in enumerate(CIFAR10_FILES):
        (folder / name).write_bytes(b"".join(record([i % 10], i) for i in (2 * number, 2 * number + 1)))
    (folder / "batches.meta.txt").write_text("airplane\nautomobile\n")
    return folder


def cifar100(folder: Path) -> Path:
    """Three training images and one test image, fine labels 0, 33, 66, 99 and coarse ones 0, 6, 13, 19."""
    folder.mkdir(parents=True)
    records = [record([i * 99 // 3 // 5, i * 33], i) for i in range(4)]
    (folder / "train.bin").write_bytes(b"".join(records[:3]))
    (folder / "test.bin").write_bytes(records[3])
    (folder / "fine_label_names.txt").write_text("apple\n")
    return folder


def test_cifar_10_is_read_from_its_binary_files_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torch", "torchvision", "PIL"):
        monkeypatch.setitem(sys.modules, name, None)
    samples = load_data(cifar10(tmp_path / "any name"))
    x = samples.inputs[None]
    assert (x.shape, x.dtype) == ((12, 3, 32, 32), np.float32)
    for image, channel, row, column in [(0, 0, 0, 0), (0, 0, 0, 1), (3, 0, 1, 0), (7, 1, 0, 0), (11, 2, 31, 30)]:
        expected = np.float32(value(image, channel * 1024 + row * 32 + column)) / np.float32(255)
        assert x[image, channel, row, column] == expected
    assert samples.labels is not None
    assert samples.labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert samples.labels.dtype == np.int64


def test_cifar_100_has_its_fine_labels(tmp_path: Path) -> None:
    samples = load_data(cifar100(tmp_path / "cifar-100-binary"))
    assert samples.labels is not None
    assert samples.labels.tolist() == [0, 33, 66, 99]
    assert samples.inputs[None][2, 1, 0, 5] == np.float32(value(2, 1029)) / np.float32(255)


def test_the_parts_are_the_official_ones_whatever_the_fraction(tmp_path: Path) -> None:
    folder = cifar10(tmp_path / "c")
    everything = load_data(folder)
    for fraction in (0.01, 0.2, 0.99):
        train, test = (load_data(folder, split, test_fraction=fraction) for split in ("train", "test"))  # type: ignore[arg-type]
        assert np.array_equal(train.inputs[None], everything.inputs[None][:10])
        assert np.array_equal(test.inputs[None], everything.inputs[None][10:])
        assert test.labels is not None
        assert test.labels.tolist() == [0, 1]
    trained_on = everything.take(10)
    with pytest.raises(DataError, match="10 samples leave none for 'test' in the parts that the source"):
        part_of(trained_on, "test")
    assert len(part_of(train, "test", 0.2)) == 2  # a part is parted by a draw
    assert len(part_of(everything.take(11), "test")) == 1
    assert len(part_of(everything.subset(np.array([11, 3, 10])), "test")) == 2


def test_the_folder_above_is_enough_unless_it_holds_two(tmp_path: Path) -> None:
    inside = cifar10(tmp_path / "cifar-10-batches-bin")
    assert load_data(tmp_path).fingerprint == load_data(inside).fingerprint
    cifar100(tmp_path / "cifar-100-binary")
    with pytest.raises(DataError, match=r"more than once: .*batches-bin \(CIFAR-10 binary\), .*100-binary"):
        load_data(tmp_path)


BAD_BINARIES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda c: (c / "data_batch_3.bin").unlink(), r"is CIFAR-10 binary without data_batch_3\.bin; unpack"),
    "cut": (
        lambda c: (c / "test_batch.bin").write_bytes((c / "test_batch.bin").read_bytes()[:-1]),
        r"test_batch\.bin has 6145 bytes, CIFAR-10 binary has records of 3073; it is truncated",
    ),
    "empty": (lambda c: (c / "data_batch_1.bin").write_bytes(b""), r"data_batch_1\.bin has 0 bytes"),
    "label": (
        lambda c: (c / "data_batch_2.bin").write_bytes(record([9], 1) + record([10], 1)),
        r"data_batch_2\.bin: record 1 has the label 10, CIFAR-10 binary has 10 classes",
    ),
}


@pytest.mark.parametrize("case", BAD_BINARIES)
def test_a_damaged_copy_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    folder = cifar10(tmp_path / "c")
    spoil, message = BAD_BINARIES[case]
    spoil(folder)
    with pytest.raises(DataError, match=message) as caught:
        load_data(folder, what="--data")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("--data ")


def test_a_coarse_label_beyond_the_twenty_is_refused(tmp_path: Path) -> None:
    folder = cifar100(tmp_path / "c")
    (folder / "test.bin").write_bytes(record([20, 3], 0))
    with pytest.raises(DataError, match="record 0 has the label 20, 3, CIFAR-100 binary has 20, 100 classes"):
        load_data(folder)


class Bomb:
    """What runs when a pickle that holds it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a file was unpickled",))


def pickled(folder: Path, names: list[str]) -> Path:
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_bytes(pickle.dumps(Bomb()))
    return folder


CIFAR10_PICKLES = [*(name.removesuffix(".bin") for name in CIFAR10_FILES), "batches.meta"]
PICKLES = {"cifar-10-batches-py": CIFAR10_PICKLES, "cifar-100-python": ["train", "test", "meta"]}


@pytest.mark.parametrize("name", PICKLES)
def test_the_pickled_version_is_refused_without_torchvision(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    folder = pickled(tmp_path / name, PICKLES[name])
    message = r"python, which is pickled, .* pip install 'lowprec\[data\]'; the binary version of CIFAR needs nothing"
    with pytest.raises(MissingDependencyError, match=message) as caught:
        load_data(folder)
    assert "\n" not in str(caught.value)


def test_a_torchvision_of_another_torch_is_named_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / "torchvision"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms\\ndoes not exist')")
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    monkeypatch.syspath_prepend(str(package.parent))
    folder = pickled(tmp_path / "cifar-100-python", PICKLES["cifar-100-python"])
    with pytest.raises(
        MissingDependencyError, match=r"cannot be imported here \(operator torchvision::nms does not exist\)"
    ):
        load_data(folder)


def stand_in(monkeypatch: pytest.MonkeyPatch, whole: bool) -> list[tuple[str, str, bool, bool]]:
    """Puts a torchvision in place that serves the images of `cifar10`, and returns the list of calls to come.

    The real one cannot run in these tests: it reads only files with the published MD5 sums, which are the whole data
    set. The stand-in has its signature, its attributes and its error (torchvision 0.29, datasets/cifar.py).
    """
    calls = []

    class CIFAR10:
        def __init__(
            self,
            root: str,
            train: bool = True,
            transform: Any = None,
            target_transform: Any = None,
            download: bool = False,
        ) -> None:
            calls.append((type(self).__name__, root, train, download))
            if not whole:
                raise RuntimeError("Dataset not found or corrupted. You can use download=True to download it")
            images = range(10) if train else range(10, 12)
            rows = [[value(image, position) for position in range(3072)] for image in images]
            self.data = np.array(rows, np.uint8).reshape(-1, 3, 32, 32).transpose((0, 2, 3, 1))
            self.targets = [image % 10 for image in images]

    class CIFAR100(CIFAR10):
        pass

    module = types.ModuleType("torchvision")
    module.datasets = types.SimpleNamespace(CIFAR10=CIFAR10, CIFAR100=CIFAR100)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", module)
    return calls


def test_the_pickled_version_is_read_by_torchvision_and_equals_the_binary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = stand_in(monkeypatch, whole=True)
    folder = pickled(tmp_path / "cifar-10-batches-py", CIFAR10_PICKLES)
    samples = load_data(folder)
    assert calls == [("CIFAR10", str(tmp_path), True, False), ("CIFAR10", str(tmp_path), False, False)]
    binary = load_data(cifar10(tmp_path / "binary"))
    assert samples.fingerprint == binary.fingerprint
    assert load_data(folder, "test").fingerprint == part_of(binary, "test").fingerprint
    load_data(pickled(tmp_path / "cifar-100-python", PICKLES["cifar-100-python"]))
    assert calls[-1] == ("CIFAR100", str(tmp_path), False, False)


def test_what_torchvision_refuses_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, whole=False)
    folder = pickled(tmp_path / "cifar-10-batches-py", CIFAR10_PICKLES)
    with pytest.raises(DataError, match="another MD5 sum than published, and such a file is never unpickled; unpack"):
        load_data(folder)
    with pytest.raises(DataError, match="torchvision reads CIFAR-10 python from cifar-10-batches-py only; rename it"):
        load_data(folder.rename(tmp_path / "mine"))
