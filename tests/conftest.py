"""What several test files share: one demo, trained and exported once per session."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

# Each worker gets its share of the cores, before anything imports torch; the processes that tests start inherit it.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ.setdefault("OMP_NUM_THREADS", str(share))

from lowprec.cli import main

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Finished:
    status: int
    stdout: str
    stderr: str
    seconds: float


def run_process(*args, cwd, timeout=300, before=""):
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
def process():
    return run_process


@pytest.fixture
def command(monkeypatch, capsys):
    """The same command line in this process: importing torch anew for every refusal would take minutes."""

    def run(*args, cwd):
        monkeypatch.chdir(cwd)
        started = time.monotonic()
        try:
            status = main([str(arg) for arg in args])
        except SystemExit as leaving:  # argparse's own way out
            status = leaving.code
        printed = capsys.readouterr()
        return Finished(status, printed.out, printed.err, time.monotonic() - started)

    return run


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The finished demo: (folder, how it went)."""
    folder = tmp_path_factory.mktemp("demo")
    done = run_process("demo", "-o", "out", cwd=folder)
    return folder / "out", done
