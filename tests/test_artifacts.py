import errno
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from lowprec.artifacts import (
    member_path,
    new_folder,
    read_json,
    read_npz,
    write_bytes,
    write_json,
    write_npz,
)
from lowprec.errors import ArtifactError


def holds_marker(folder):
    return (folder / "marker").exists()


def test_a_folder_appears_whole_and_replaces_only_its_own_kind(tmp_path):
    final = tmp_path / "out"
    for content in ("first", "second"):
        with new_folder(final, "a thing", holds_marker) as work:
            (work / "marker").write_text(content)
            assert not final.exists() or (final / "marker").read_text() == "first"
        assert (final / "marker").read_text() == content
    (final / "marker").unlink()
    (final / "mine.txt").write_text("do not lose me")
    with (
        pytest.raises(ArtifactError, match="holds something else; choose another name"),
        new_folder(final, "a thing", holds_marker),
    ):
        pytest.fail("the work must not start when its result has no place to go")
    assert (final / "mine.txt").read_text() == "do not lose me"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_error_inside_leaves_the_old_folder_and_no_rubbish(tmp_path):
    final = tmp_path / "out"
    with new_folder(final, "a thing", holds_marker) as work:
        (work / "marker").write_text("old")
    with pytest.raises(OSError, match="No space"), new_folder(final, "a thing", holds_marker) as work:  # noqa: PT012
        (work / "marker").write_text("new")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert (final / "marker").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_killed_writer_leaves_nothing_under_the_name_and_the_next_one_cleans_up(tmp_path):
    script = """
        import sys, os, signal, pathlib
        from lowprec.artifacts import new_folder
        with new_folder(pathlib.Path(sys.argv[1]), "a thing", lambda f: False) as work:
            (work / "marker").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    final = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(final)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not final.exists()
    assert len(list(tmp_path.iterdir())) == 1
    with new_folder(final, "a thing", holds_marker) as work:
        (work / "marker").write_text("whole")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "value.json"
    write_json(path, {"b": 1, "a": "ü"})
    assert path.read_text(encoding="utf-8") == '{\n  "a": "ü",\n  "b": 1\n}\n'

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_bytes(path, b"replacement")
    assert read_json(path, "it") == {"a": "ü", "b": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["value.json"]


def test_json_refuses_what_json_cannot_say(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", {"a": float("nan")})


def test_unreadable_json_is_one_clear_line(tmp_path):
    path = tmp_path / "m.json"
    with pytest.raises(ArtifactError, match=r"the manifest is missing: no file .*m\.json"):
        read_json(path, "the manifest")
    path.write_text('{"a": ')
    with pytest.raises(ArtifactError, match=r"not valid JSON .* truncated or damaged"):
        read_json(path, "the manifest")


def test_npz_bytes_depend_on_the_arrays_alone(tmp_path):
    arrays = {"b": np.arange(3.0), "a": np.ones((2, 2), np.float16)}
    write_npz(tmp_path / "1.npz", arrays)
    write_npz(tmp_path / "2.npz", dict(reversed(arrays.items())))
    assert (tmp_path / "1.npz").read_bytes() == (tmp_path / "2.npz").read_bytes()
    back = read_npz(tmp_path / "1.npz", "it")
    assert back["a"].dtype == np.float16
    assert np.array_equal(back["b"], arrays["b"])


def test_npz_never_unpickles(tmp_path):
    path = tmp_path / "evil.npz"
    np.savez(path, x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ArtifactError, match="pickled objects, which are never loaded"):
        read_npz(path, "the data")


@pytest.mark.parametrize("damage", ["truncate", "text", "array"])
def test_a_damaged_npz_is_one_clear_line(tmp_path, damage):
    path = tmp_path / "d.npz"
    write_npz(path, {"x": np.arange(1000.0)})
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:200])
    elif damage == "text":
        path.write_text("hello")
    else:
        with path.open("wb") as file:
            np.save(file, np.arange(3))
    with pytest.raises(ArtifactError, match="the data"):
        read_npz(path, "the data")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "a\\b", "..", "", "a\0b"])
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    with pytest.raises(ArtifactError, match="points outside the folder"):
        member_path(tmp_path, name)


def test_a_symbolic_link_is_no_member(tmp_path):
    (tmp_path / "link").symlink_to("/etc/passwd")
    with pytest.raises(ArtifactError, match="symbolic link"):
        member_path(tmp_path, "link")
