"""Builds each engine in a process of its own, whose addresses are not randomised.

TensorRT orders some of what it writes by address, so two builds of one network in one process, or in two, differ in the
names of temporaries (int8 networks nearly always). In a fresh process without address space randomisation they are
byte-identical. It also means that Ctrl-C ends a build at once, and that a crash of the library is an error in one line.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lowprec import errors
from lowprec.artifacts import write_bytes
from lowprec.errors import LowprecError, UnsupportedError
from lowprec.export.backends.base import BuildOptions, Shapes
from lowprec.export.backends.tensorrt.build import compile_engine
from lowprec.export.backends.tensorrt.library import LIBRARIES, Library
from lowprec.export.onnx_files import load_onnx

_NO_RANDOMISATION = 0x0040000  # ADDR_NO_RANDOMIZE of personality(2)


def build_in_a_process(
    library: Library, source: Path, target: Path, profiles: Sequence[Mapping[str, Shapes]], options: BuildOptions
) -> dict[str, Any]:
    """Writes the engine of an ONNX file, whole or not at all.

    Returns:
        What is known of it, for the sidecar; `same_bytes_again` says whether randomisation could be switched off.

    Raises:
        LowprecError: what `compile_engine` raises.
        OSError: the disk is full.
        KeyboardInterrupt: Ctrl-C was pressed during the build, which is ended.
    """
    request = json.dumps(
        {
            "library": library.backend,
            "source": str(source),
            "target": str(target),
            "profiles": profiles,
            "options": _plain(options),
            "reports": options.progress is not None,
        }
    )
    found, ending = _converse(request, options.progress)
    if "facts" in found:
        return dict(found["facts"])
    if "error" in found:
        kind = getattr(errors, found["error"], OSError)
        raise kind(*found["arguments"])
    raise UnsupportedError(f"{library.label} died while it built {source.name}: {ending}")


def _converse(request: str, progress: Callable[[int, int], None] | None) -> tuple[dict[str, Any], str]:
    """What a new process has to say to a request, and how it ended."""
    found: dict[str, Any] = {}
    reading, writing = os.pipe()
    with os.fdopen(reading, encoding="utf-8") as lines, tempfile.TemporaryFile("w+", errors="replace") as noise:
        # Ctrl-C reaches this process alone: the child is of another session and is killed from here. Its noise goes to
        # a file, since a pipe that nobody reads fills up.
        child = subprocess.Popen(
            [sys.executable, "-m", __name__, str(writing)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=noise,
            pass_fds=(writing,),
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            text=True,
        )
        os.close(writing)
        with child:
            try:
                assert child.stdin is not None
                child.stdin.write(request)
                child.stdin.close()
                for line in map(json.loads, lines):
                    found |= line
                    if progress is not None and "step" in line:
                        progress(*line["step"])
            except BaseException:
                child.kill()
                raise
        noise.seek(0)
        return found, _last_words(child.returncode, noise.read())


def _last_words(status: int, said: str) -> str:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    return f"{how}{f', {lines[-1]}' if lines else ''}"


def _plain(options: BuildOptions) -> dict[str, Any]:
    values = {field.name: getattr(options, field.name) for field in dataclasses.fields(options)}
    values |= {"wide": sorted(options.wide), "profiles": [], "progress": None}
    return values | {"timing_cache": None if options.timing_cache is None else str(options.timing_cache)}


def _options(values: dict[str, Any], report: Any) -> BuildOptions:
    cache = values["timing_cache"]
    pairs = tuple((major, minor) for major, minor in values["compute_capabilities"])
    changed = {
        "batch": tuple(values["batch"]),
        "wide": frozenset(values["wide"]),
        "profiles": (),
        "timing_cache": None if cache is None else Path(cache),
        "compute_capabilities": pairs,
        "progress": report,
    }
    return BuildOptions(**values | changed)


def _work(request: dict[str, Any], say: Any) -> None:
    source, library = Path(request["source"]), LIBRARIES[request["library"]]
    report = (lambda done, total: say({"step": [done, total]})) if request["reports"] else None
    profiles = [{name: _shapes(*three) for name, three in shapes.items()} for shapes in request["profiles"]]
    try:
        built = compile_engine(library, load_onnx(source), source, profiles, _options(request["options"], report))
        write_bytes(Path(request["target"]), built.engine)
        say({"facts": built.facts | {"same_bytes_again": request["fixed"]}})
    except LowprecError as said:
        say({"error": type(said).__name__, "arguments": [str(said)]})
    except OSError as said:
        say({"error": "OSError", "arguments": [said.errno, said.strerror]})


def _shapes(low: list[int], likely: list[int], high: list[int]) -> Shapes:
    return tuple(low), tuple(likely), tuple(high)


def _main() -> None:
    """Switches randomisation off and starts anew, since it acts on the next program; then does the one job."""
    descriptor = int(sys.argv[1])
    system = ctypes.CDLL(None, use_errno=True)
    fixed = bool(system.personality(0xFFFFFFFF) & _NO_RANDOMISATION)
    if not fixed and "again" not in sys.argv:
        before = system.personality(0xFFFFFFFF)
        if system.personality(before | _NO_RANDOMISATION) >= 0:
            os.execv(sys.executable, [sys.executable, "-m", __spec__.name, str(descriptor), "again"])
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:

        def say(line: dict[str, Any]) -> None:
            stream.write(json.dumps(line) + "\n")
            stream.flush()

        _work({**json.load(sys.stdin), "fixed": fixed}, say)


if __name__ == "__main__":
    _main()
