"""What several test files share: one demo, trained and exported once per session."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Finished:
    status: int
    stdout: str
    stderr: str
    seconds: float


def lowprec(*args, cwd, timeout=300, before=""):
    """Runs the command line in a process of its own, as a user would; `before` is Python that runs ahead of it."""
    code = f"{before}\nimport sys\nfrom lowprec.cli import main\nsys.exit(main())"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    return Finished(done.returncode, done.stdout, done.stderr, time.monotonic() - started)


@pytest.fixture(scope="session")
def command():
    return lowprec


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The finished demo: (folder, how it went)."""
    folder = tmp_path_factory.mktemp("demo")
    done = lowprec("demo", "-o", "out", cwd=folder)
    return folder / "out", done
