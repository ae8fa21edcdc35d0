"""Samples: arrays and folders of images, the split, and every refusal."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from sklearn.datasets import load_digits

from lowprec.data import Samples, held_out_mask, load_data, part_of
from lowprec.errors import ConfigError, DataError, MissingDependencyError


def test_digits_are_what_scikit_learn_has() -> None:
    samples = load_data("digits")
    bunch = load_digits()
    (x,) = samples.inputs.values()
    assert (x.shape, x.dtype, len(samples)) == ((1797, 1, 8, 8), np.float32, 1797)
    assert np.array_equal(x[:, 0] * 16, bunch.images)  # sixteenths are exact in float32
    assert samples.labels is not None
    assert np.array_equal(samples.labels, bunch.target)
    assert samples.source == "digits"


def test_train_and_test_part_the_samples_and_stratify() -> None:
    everything, train, test = (load_data("digits", split) for split in ("all", "train", "test"))  # type: ignore[arg-type]
    assert (len(train), len(test)) == (1437, 360)
    assert everything.labels is not None
    assert test.labels is not None
    share = np.bincount(test.labels) / np.bincount(everything.labels)
    assert (np.abs(share - 0.2) <= 1 / np.bincount(everything.labels).min()).all()
    rows = {image.tobytes() for image in everything.inputs[None]}
    parts = [{image.tobytes() for image in part.inputs[None]} for part in (train, test)]
    assert parts[0] | parts[1] == rows
    assert parts[0].isdisjoint(parts[1])
    assert len({everything.fingerprint, train.fingerprint, test.fingerprint}) == 3


def test_the_split_never_moves() -> None:
    """A stored checkpoint knows its training samples by this fingerprint; another one means that test data leaked."""
    held_out = np.flatnonzero(held_out_mask(1797, load_data("digits").labels, 0.2))
    assert " ".join(map(str, held_out[:8])) == "2 3 11 13 15 20 21 32"
    assert load_data("digits", "test").fingerprint == load_data("digits", "test").fingerprint


def quotas(labels: list[int], fraction: float) -> dict[int, int]:
    """Largest remainders by a loop: whole parts first, then one more each by remainder, ties to the lower label."""
    counts = {name: labels.count(name) for name in sorted(set(labels))}
    quota = {name: math.floor(fraction * n) for name, n in counts.items()}
    order = sorted(counts, key=lambda name: (quota[name] - fraction * counts[name], name))
    for name in order[: math.ceil(fraction * len(labels)) - sum(quota.values())]:
        quota[name] += 1
    return quota


@given(hnp.arrays(np.int64, st.integers(1, 60), elements=st.integers(0, 4)), st.sampled_from([1, 5, 16, 32, 50, 63]))
def test_a_split_shares_the_held_out_samples_by_largest_remainder(labels: Any, parts: int) -> None:
    fraction = parts / 64  # exact products, so that a remainder is not a matter of rounding
    mask = held_out_mask(len(labels), labels, fraction)
    assert {name: int(mask[labels == name].sum()) for name in set(labels.tolist())} == quotas(labels.tolist(), fraction)


def test_feeds_give_arrays_by_input_name() -> None:
    unnamed = load_data("digits").take(3)
    assert list(unnamed.feeds(["x"], 1, 3)) == ["x"]
    assert len(unnamed.feeds(["x"], 1)["x"]) == 2
    with pytest.raises(DataError, match="holds one unnamed array, the model has inputs a, b"):
        unnamed.feeds(["a", "b"])
    named = Samples.of({"a": np.zeros((4, 2)), "b": np.ones((4, 3))}, None, "some.npz")
    assert [array.shape for array in named.feeds(["b", "a"], 1, 3).values()] == [(2, 3), (2, 2)]
    with pytest.raises(DataError, match=r"some.npz has no array for the model's input 'c'; it holds a, b"):
        named.feeds(["a", "c"])
    with pytest.raises(DataError, match="the array 'b' is neither an input of the model"):
        named.feeds(["a"])


def test_take_and_fingerprint_depend_on_content_alone() -> None:
    a = Samples.of({"x": np.arange(6.0).reshape(3, 2)}, np.array([0, 1, 2]), "one")
    b = Samples.of({"x": np.arange(6.0).reshape(3, 2).copy()}, np.array([0, 1, 2]), "two")
    assert a.fingerprint == b.fingerprint
    assert len(a.take(2)) == 2
    assert len(a.take(9)) == 3
    others = [
        Samples.of({"y": a.inputs["x"]}, a.labels, "one"),
        Samples.of({"x": a.inputs["x"].astype(np.float32)}, a.labels, "one"),
        Samples.of({"x": a.inputs["x"].reshape(3, 2, 1)}, a.labels, "one"),
        Samples.of(a.inputs, None, "one"),
        Samples.of(a.inputs, np.array([0, 1, 1]), "one"),
        a.take(2),
    ]
    assert len({a.fingerprint, *(other.fingerprint for other in others)}) == 7


def test_npz_gives_named_inputs_and_int64_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", x=np.ones((5, 2), np.float16), ids=np.arange(5), labels=np.arange(5, dtype=np.uint8))
    samples = load_data(tmp_path / "d.npz")
    assert list(samples.inputs) == ["x", "ids"]
    assert samples.labels is not None
    assert samples.labels.dtype == np.int64
    np.savez(tmp_path / "plain.npz", x=np.ones((5, 2)))
    assert load_data(tmp_path / "plain.npz", "test").labels is None
    assert len(load_data(tmp_path / "plain.npz", "test")) == 1


X = np.ones((4, 2))
BAD_ARRAYS: dict[str, tuple[dict[str, Any], str]] = {
    "object": ({"x": np.array([{}, 1], dtype=object)}, "holds pickled objects, which are never loaded"),
    "only labels": ({"labels": np.arange(4)}, "holds no input"),
    "lengths": ({"x": X, "labels": np.arange(3)}, r"differ in their number of samples \(x 4, labels 3\)"),
    "scalar": ({"x": np.float64(3)}, "'x' is a single number"),
    "text": ({"x": np.array(["a"])}, "'x' is of type <U1; give numbers"),
    "complex": ({"x": X.astype(complex)}, "'x' is of type complex128"),
    "nan": ({"x": np.array([[1.0], [np.nan]])}, "'x' is not finite, first in sample 1"),
    "infinite half": ({"x": np.array([np.inf, 1], np.float16)}, "'x' is not finite, first in sample 0"),
    "float labels": ({"x": X, "labels": np.ones(4)}, r"'labels' is float64 \(4,\); give one integer class"),
    "one-hot labels": ({"x": X, "labels": np.eye(4, dtype=int)}, r"'labels' is int64 \(4, 4\)"),
    "empty": ({"x": np.ones((0, 2))}, "holds 0 samples"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_an_npz_that_cannot_be_used_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    arrays, message = BAD_ARRAYS[case]
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(DataError, match=message) as caught:
        load_data(tmp_path / "d.npz", what="--data")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("--data ")


def test_missing_damaged_and_unknown_sources_are_refused(tmp_path: Path) -> None:
    understood = "give `digits`, an .npz file, .*images by class .*CIFAR-10 or CIFAR-100 folder, or tar shards"
    with pytest.raises(DataError, match=f"'nowhere' is not there: {understood}"):
        load_data("nowhere")
    (tmp_path / "d.npz").write_bytes(b"PK\x03\x04 but cut short")
    with pytest.raises(DataError, match=r"d\.npz is not .*npz"):
        load_data(tmp_path / "d.npz")
    (tmp_path / "d.csv").write_text("1,2")
    with pytest.raises(DataError, match=f"is a .csv file; {understood}"):
        load_data(tmp_path / "d.csv")
    with pytest.raises(ConfigError, match="unknown split 'dev'"):
        load_data("digits", "dev")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="test fraction is 1"):
        load_data("digits", "test", test_fraction=1.0)
    one = Samples.of({None: np.ones((1, 2))}, np.array([0]), "one")
    with pytest.raises(DataError, match="1 samples leave none for 'train'"):
        part_of(one, "train")


def _picture(path: Path, value: int = 128, mode: str = "L", size: tuple[int, int] = (4, 3)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


def test_a_folder_of_images_is_labelled_by_sorted_class_folders(tmp_path: Path) -> None:
    _picture(tmp_path / "b" / "1.png", 255)
    _picture(tmp_path / "a" / "1.png", 51)
    _picture(tmp_path / "a" / "2.bmp", 0)
    (tmp_path / "a" / ".DS_Store").write_bytes(b"")
    (tmp_path / ".cache").mkdir()
    samples = load_data(tmp_path)
    (x,) = samples.inputs.values()
    assert x.shape == (3, 1, 3, 4)
    assert x.dtype == np.float32
    assert x[:, 0, 0, 0].tolist() == [np.float32(0.2), 0.0, 1.0]
    assert samples.labels is not None
    assert samples.labels.tolist() == [0, 0, 1]


def test_one_colour_image_makes_all_of_them_rgb(tmp_path: Path) -> None:
    _picture(tmp_path / "a" / "1.png", 255)
    Image.new("RGBA", (4, 3), (255, 0, 0, 255)).save(tmp_path / "a" / "2.png")
    (x,) = load_data(tmp_path).inputs.values()
    assert x.shape == (2, 3, 3, 4)
    assert x[:, :, 0, 0].tolist() == [[1, 1, 1], [1, 0, 0]]


def _wide(folder: Path) -> None:
    Image.fromarray(np.ones((3, 4), np.uint16)).save(folder / "a" / "2.png")


BAD_FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "size": (
        lambda folder: _picture(folder / "a" / "2.png", size=(5, 3)),
        "2.png is 5x3, .*1.png is 4x3; .* resize or crop",
    ),
    "damaged": (lambda folder: (folder / "a" / "2.png").write_bytes(b"\x89PNG no"), "2.png cannot be read as an image"),
    "other file": (lambda folder: (folder / "a" / "notes.txt").write_text("x"), "notes.txt is not an image"),
    "empty class": (lambda folder: (folder / "b").mkdir(), "the class folder .*b is empty"),
    "16 bit": (_wide, "holds I;16 pixels, whose range is not known"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_folder_that_cannot_be_used_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    _picture(tmp_path / "a" / "1.png")
    spoil, message = BAD_FOLDERS[case]
    spoil(tmp_path)
    with pytest.raises(DataError, match=message) as caught:
        load_data(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_without_classes_is_refused(tmp_path: Path) -> None:
    Image.new("L", (4, 3)).save(tmp_path / "1.png")
    with pytest.raises(DataError, match="has no class sub-folders"):
        load_data(tmp_path)


def _parted(folder: Path, test: str = "val") -> Path:
    """Two classes in both parts, their pictures of different greys."""
    for number, name in enumerate(["train/b/1", "train/a/1", "train/a/2", f"{test}/a/1", f"{test}/b/1"]):
        _picture(folder / f"{name}.png", 51 * number)
    return folder


@pytest.mark.parametrize("test", ["val", "test", "validation"])
def test_a_folder_with_parts_of_its_own_keeps_them(test: str, tmp_path: Path) -> None:
    _parted(tmp_path, test)
    (tmp_path / "README.txt").write_text("x")
    (tmp_path / ".cache").mkdir()
    everything = load_data(tmp_path)
    assert everything.labels is not None
    assert everything.labels.tolist() == [0, 0, 1, 0, 1]
    assert (everything.inputs[None][:, 0, 0, 0] * 5).tolist() == pytest.approx([1, 2, 0, 3, 4])
    for fraction in (0.01, 0.99):
        train, held_out = (load_data(tmp_path, split, test_fraction=fraction) for split in ("train", "test"))  # type: ignore[arg-type]
        assert train.fingerprint == load_data(tmp_path / "train").fingerprint
        assert held_out.fingerprint == load_data(tmp_path / test).fingerprint
    assert load_data(tmp_path / "train").held_out is None


def test_a_colour_image_in_one_part_makes_both_rgb(tmp_path: Path) -> None:
    Image.new("RGB", (4, 3), (255, 0, 0)).save(_parted(tmp_path) / "val" / "b" / "2.png")
    assert load_data(tmp_path, "train").inputs[None].shape == (3, 3, 3, 4)


def test_classes_may_be_called_train_and_test(tmp_path: Path) -> None:
    for name in ("train", "test"):
        _picture(tmp_path / name / "1.png")
    samples = load_data(tmp_path)
    assert samples.labels is not None
    assert samples.labels.tolist() == [0, 1]
    assert samples.held_out is None


BAD_PARTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "three": (lambda folder: _picture(folder / "test" / "a" / "1.png"), "has the parts test, train, val; leave train"),
    "no train": (lambda folder: (folder / "train").rename(folder / "test"), "has the parts test, val; leave train and"),
    "train alone": (lambda folder: (folder / "val").rename(folder / ".val"), "has the parts train; leave train and"),
    "class": (
        lambda folder: (folder / "val" / "b").rename(folder / "val" / "c"),
        "1 classes are in train alone and 1 in val alone, the first of them b; give both the same class sub-folders",
    ),
    "unsorted": (
        lambda folder: (shutil.rmtree(folder / "val"), _picture(folder / "val" / "1.png")),
        "2 classes are in train alone and 0 in val alone",
    ),
    "size": (lambda folder: _picture(folder / "val" / "b" / "2.png", size=(5, 3)), "2.png is 5x3, .*1.png is 4x3"),
}


@pytest.mark.parametrize("case", BAD_PARTS)
def test_parts_that_do_not_fit_are_refused_in_one_line(case: str, tmp_path: Path) -> None:
    spoil, message = BAD_PARTS[case]
    spoil(_parted(tmp_path))
    with pytest.raises(DataError, match=message) as caught:
        load_data(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _picture(tmp_path / "a" / "1.png")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'lowprec\[data\]'"):
        load_data(tmp_path)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingDependencyError, match="pip install scikit-learn"):
        load_data("digits")


def test_the_module_loads_no_torch() -> None:
    code = "import sys, lowprec.data; sys.exit('torch' in sys.modules or 'sklearn' in sys.modules)"
    root = Path(__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(root)}).returncode == 0


def test_a_part_of_a_source_with_its_own_test_part_can_be_parted_again() -> None:
    samples = Samples.of({None: np.arange(20.0)[:, None]}, np.zeros(20, np.int64), "given", np.arange(20) >= 15)
    train = part_of(samples, "train")
    assert train.inputs[None][:, 0].tolist() == list(range(15))
    validation = part_of(train, "test", 0.2)
    assert len(validation) == 3
    assert set(validation.inputs[None][:, 0]) <= set(range(15))
