"""Tar shards: what is read, in which order, and every refusal."""

from __future__ import annotations

import io
import random
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lowprec.data import load_data
from lowprec.errors import DataError, MissingDependencyError

Members = list[tuple[str, bytes]]


def png(level: int, size: tuple[int, int] = (4, 3), kind: str = "PNG", mode: str = "L") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, level).save(file, kind)
    return file.getvalue()


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def write_tar(path: Path, members: Members) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


GOOD: Members = [("000.png", png(255)), ("000.cls", b"7"), ("001.png", png(51)), ("001.cls", b"2\n")]


def test_images_and_labels_are_grouped_by_name(tmp_path: Path) -> None:
    members: Members = [
        ("./b/0.PPM", png(255, kind="PPM")),
        ("./b/0.json", b"{}"),
        ("./b/0.seg.png", b"of another ending"),
        ("./b/0.cls", b" 11\n"),
        ("a.1/0.cls", b"0"),  # the dot of a folder ends no name; the order within a sample is free
        ("__index__", b""),
        ("._a.png", b"what macOS adds"),
        ("README", b""),
        ("a.1/0.jpg", png(51, kind="JPEG")),
    ]
    samples = load_data(write_tar(tmp_path / "s.tar", members))
    x = samples.inputs[None]
    assert (x.shape, x.dtype) == ((2, 1, 3, 4), np.float32)
    assert x[:, 0, 0, 0].tolist() == [1.0, np.float32(51) / np.float32(255)]
    assert samples.labels is not None
    assert samples.labels.tolist() == [11, 0]
    assert samples.labels.dtype == np.int64
    assert samples.held_out is None
    assert samples.source == str(tmp_path / "s.tar")


def test_a_folder_and_a_pattern_are_read_shard_by_shard(tmp_path: Path) -> None:
    for number in (9, 10, 11):
        write_tar(tmp_path / f"s-{number:03}.tar", [("0.npy", npy(np.full(2, number))), ("0.cls", b"%d" % number)])
    (tmp_path / "sizes.json").write_text("{}")
    by_folder, by_pattern = load_data(tmp_path), load_data(f"{tmp_path}/s-{{009..011}}.tar")
    assert by_folder.labels is not None
    assert by_folder.labels.tolist() == [9, 10, 11]
    assert by_folder.fingerprint == by_pattern.fingerprint
    assert by_folder.inputs[None].tolist() == [[9, 9], [10, 10], [11, 11]]
    assert load_data(f"{tmp_path}/s-{{010..010}}.tar").source.endswith("s-{010..010}.tar")
    assert len(load_data(f"{tmp_path}/s-0{{0..1}}{{9..9}}.tar".replace("{0..1}", "{0..0}"))) == 1


def test_numbers_of_a_pattern_are_padded_as_they_are_written(tmp_path: Path) -> None:
    for name in ("s9.tar", "s10.tar", "t09.tar", "t10.tar", "u11.tar", "u12.tar", "u21.tar", "u22.tar"):
        write_tar(tmp_path / name, [("0.npy", npy(np.ones(1))), ("0.cls", name[1:-4].encode())])
    for pattern, labels in [("s{9..10}", [9, 10]), ("t{09..10}", [9, 10]), ("u{1..2}{1..2}", [11, 12, 21, 22])]:
        samples = load_data(f"{tmp_path}/{pattern}.tar")
        assert samples.labels is not None
        assert samples.labels.tolist() == labels


def test_npy_members_keep_their_type_and_values(tmp_path: Path) -> None:
    arrays = [np.arange(6, dtype=np.float16).reshape(2, 3), -np.ones((2, 3), np.float16)]
    members = [m for i, a in enumerate(arrays) for m in ((f"{i}.npy", npy(a)), (f"{i}.cls", b"0"))]
    x = load_data(write_tar(tmp_path / "s.tar", members)).inputs[None]
    assert x.dtype == np.float16
    assert np.array_equal(x, arrays)


def test_an_archive_beside_class_folders_does_not_make_them_shards(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.png").write_bytes(png(9))
    write_tar(tmp_path / "cat.tar", GOOD)
    assert len(load_data(tmp_path)) == 1


BAD_MEMBERS: dict[str, tuple[Members, str]] = {
    "no label": ([("0.png", png(1))], r"s\.tar, sample '0' has no label; add a \.cls of that name"),
    "no image": ([("0.cls", b"1"), ("0.json", b"")], r"has no image and no \.npy \(found: 'cls', 'json'\)"),
    "two images": ([("0.png", png(1)), ("0.npy", b""), ("0.cls", b"1")], "has more than one input"),
    "twice": ([*GOOD, ("000.png", png(2))], r"holds '000\.png' twice"),
    "label in words": ([("0.png", png(1)), ("0.cls", b"cat")], "has the label b'cat'; its .cls must hold the number"),
    "negative label": ([("0.png", png(1)), ("0.cls", b"-1")], "has the label b'-1'"),
    "huge label": ([("0.png", png(1)), ("0.cls", b"9" * 9999)], "has the label b'9999"),
    "empty": ([], "holds no sample"),
    "damaged image": ([("0.png", b"\x89PNG no"), ("0.cls", b"1")], "sample '0' cannot be read as an image"),
    "sizes": ([*GOOD, ("2.png", png(1, (5, 3))), ("2.cls", b"1")], "'2' is 5x3, .*'000' is 4x3; .*resize or crop"),
    "postscript": (
        [("0.png", png(1, kind="EPS")), ("0.cls", b"1")],
        "cannot be read as an image; it is none of PNG, JPEG",
    ),
    "mixed": ([*GOOD, ("2.npy", npy(np.ones(2))), ("2.cls", b"1")], r"'000' is \.png, .*'2' is \.npy; give all"),
    "pickled npy": ([("0.npy", npy(np.array([{}]))), ("0.cls", b"1")], "holds pickled objects, which are never loaded"),
    "short npy": ([("0.npy", npy(np.ones(9))[:-1]), ("0.cls", b"1")], "its .npy cannot be read"),
    "shapes": (
        [("0.npy", npy(np.ones(2))), ("0.cls", b"1"), ("1.npy", npy(np.ones(3))), ("1.cls", b"1")],
        r"'1' is float64 \(3,\), .*'0' is float64 \(2,\); give all samples one type and shape",
    ),
    "nan": ([("0.npy", npy(np.array([np.nan]))), ("0.cls", b"1")], "is not finite, first in sample 0"),
    "text": ([("0.npy", npy(np.array(["a"]))), ("0.cls", b"1")], "is of type <U1; give numbers"),
    "pickle": ([*GOOD, ("0.pickle", b"")], r"holds '0\.pickle', a pickle, which is never loaded"),
    "pyd": ([*GOOD, ("0.pyd", b"")], "never loaded"),
    "pkl": ([*GOOD, ("0.PKL", b"")], "never loaded"),
    "pth": ([*GOOD, ("0.input.pth", b"")], "never loaded"),
    "pt": ([*GOOD, ("0.pt.gz", b"")], "never loaded"),
    "above": ([*GOOD, ("../0.png", png(1))], r"the name '\.\./0\.png' points outside the shard; refused"),
    "absolute": ([*GOOD, ("/etc/0.png", png(1))], "points outside the shard"),
}


@pytest.mark.parametrize("case", BAD_MEMBERS)
def test_a_shard_that_cannot_be_used_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    members, message = BAD_MEMBERS[case]
    write_tar(tmp_path / "s.tar", members)
    with pytest.raises(DataError, match=message) as caught:
        load_data(tmp_path / "s.tar", what="--data")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("--data")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (tarfile.SYMTYPE, "'1.png' is a link; store plain files"),
        (tarfile.LNKTYPE, "'1.png' is a link"),
        (tarfile.CHRTYPE, "neither a plain file nor a folder"),
        (tarfile.FIFOTYPE, "neither a plain file nor a folder"),
        (tarfile.GNUTYPE_SPARSE, "neither a plain file nor a folder"),
    ],
)
def test_links_devices_and_sparse_files_are_refused(kind: bytes, message: str, tmp_path: Path) -> None:
    write_tar(tmp_path / "s.tar", GOOD)
    with tarfile.open(tmp_path / "s.tar", "a") as archive:
        member = tarfile.TarInfo("1.png")
        member.type, member.linkname = kind, "/etc/passwd"
        archive.addfile(member)
    with pytest.raises(DataError, match=message):
        load_data(tmp_path / "s.tar")


def test_a_cut_shard_is_refused_wherever_it_was_cut(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", GOOD).read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512  # the last member is one block that ends in zeros
    path = tmp_path / "s.tar"
    for cut in {*range(0, end + 512, 100), *range(512, end + 512, 512), end + 511}:
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"s\.tar (ends without|cannot be read)") as caught:
            load_data(path)
        assert "\n" not in str(caught.value)
    path.write_bytes(whole[: end + 512])
    assert len(load_data(path)) == 2


def test_a_member_lost_to_damage_and_joined_shards_are_refused(tmp_path: Path) -> None:
    whole = bytearray(write_tar(tmp_path / "s.tar", GOOD).read_bytes())
    second = whole.index(b"000.cls")
    whole[second + 150] ^= 1  # in the checksum of its header, where tarfile alone would see the end of the archive
    (tmp_path / "s.tar").write_bytes(whole)
    with pytest.raises(DataError, match=f"is damaged at byte {second}, where a member should begin"):
        load_data(tmp_path / "s.tar")
    whole[second + 150] ^= 1
    (tmp_path / "s.tar").write_bytes(whole + whole)
    with pytest.raises(DataError, match="goes on behind the mark of its end"):
        load_data(tmp_path / "s.tar")


def refusal(source: Path) -> str:
    try:
        load_data(source)
    except DataError as error:
        return str(error)
    return ""


def test_no_damage_gives_another_error_than_one_line(tmp_path: Path) -> None:
    members = [("0.npy", npy(np.arange(3))), ("0.cls", b"1"), ("long/" * 30 + "1.npy", npy(np.arange(3)))]
    whole = write_tar(tmp_path / "s.tar", [*members, ("long/" * 30 + "1.cls", b"2")]).read_bytes()
    places = [i for i, byte in enumerate(whole) if byte]
    generator = random.Random(0)
    for _ in range(400):
        spoilt = bytearray(whole)
        for _ in range(generator.randint(1, 3)):
            spoilt[generator.choice(places)] = generator.randrange(256)
        (tmp_path / "s.tar").write_bytes(spoilt)
        assert "\n" not in refusal(tmp_path / "s.tar")


def test_what_is_no_plain_tar_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s.tar").write_bytes(b"not a tar")
    with pytest.raises(DataError, match="cannot be read as an uncompressed tar"):
        load_data(tmp_path / "s.tar")
    with tarfile.open(tmp_path / "s.tar", "w:gz"):
        pass
    with pytest.raises(DataError, match="cannot be read as an uncompressed tar"):
        load_data(tmp_path / "s.tar")


def test_patterns_that_name_no_shards_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "s0.tar", GOOD)
    for pattern, message in [
        ("s{0..999999999999}.tar", r"there is no shard .*s1\.tar; name the shards that are there"),
        ("s{a,b}.tar", r"braces hold a range of numbers, as in NAME-\{000\.\.003\}\.tar"),
        ("s{3..0}.tar", r"the range \{3\.\.0\} falls"),
    ]:
        with pytest.raises(DataError, match=message):
            load_data(f"{tmp_path}/{pattern}")


def test_pillow_is_named_where_images_need_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'lowprec\[data\]'"):
        load_data(write_tar(tmp_path / "s.tar", GOOD))
    load_data(write_tar(tmp_path / "n.tar", [("0.npy", npy(np.ones(2))), ("0.cls", b"0")]))
