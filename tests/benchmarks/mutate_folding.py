"""Plants every defect of `tests/mutations.py` into a copy of the repository and runs the fold's tests on it.

    python -m tests.benchmarks.mutate_folding [--only TEXT] [--jobs N]

A defect is caught if a test fails. Exit status 1: one survived.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.mutations import MUTATIONS, Mutation

ROOT = Path(__file__).parents[2]
TESTS = [
    "tests/test_fold_algebra.py",
    "tests/test_fold.py",
    "tests/test_fold_onnx.py",
    "tests/test_read_onnx.py",
    "tests/test_balance.py",
    "tests/test_fold_random.py",
    "tests/test_architectures.py",
]
IGNORED = shutil.ignore_patterns(".git", "*.pyc", "__pycache__", ".hypothesis", ".mypy_cache", ".ruff_cache", "build")


def caught_by(mutation: Mutation) -> str | None:
    """The first test that fails with a defect planted, or None."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "repository"
        shutil.copytree(ROOT, copy, symlinks=True, ignore=IGNORED)
        path = copy / "export" / "folding" / mutation.file
        path.write_text(path.read_text().replace(mutation.old, mutation.new, 1))
        environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *TESTS]
        command += ["-k", "not planted_defect"]  # that test only asks whether the text is there
        done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return None
        lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        return lines[0].split(" ", 1)[1].split(" - ")[0] if lines else f"pytest left with {done.returncode}"


def main() -> int:
    """Plants them all, a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="defects whose file or text contains this")
    parser.add_argument("--jobs", type=int, default=2, help="at once (default 2)")
    arguments = parser.parse_args()
    chosen = [m for m in MUTATIONS if arguments.only in m.file or arguments.only in m.old]
    started, survived = time.monotonic(), 0
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for mutation, test in zip(chosen, pool.map(caught_by, chosen), strict=True):
            survived += test is None
            place = f"{mutation.file}: {mutation.old.strip().splitlines()[0][:70]}"
            print(f"{'SURVIVED' if test is None else 'caught  '}  {place}  {test or ''}", flush=True)
    print(f"{len(chosen) - survived} of {len(chosen)} caught, {time.monotonic() - started:.0f} s")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
