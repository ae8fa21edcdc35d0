"""Every command and every block of the README runs, in order, in one folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lowprec.export.emit.keep import read_keep_list

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def install_commands():
    return [block.strip() for language, block in BLOCKS if language == "bash" and "pip install" in block]


def test_the_first_two_commands_install_and_run():
    demo, tests = install_commands()
    assert re.fullmatch(r'python -m pip install -c constraints\.txt "\.\[cpu,rtx\]" && lowprec demo', demo)
    assert re.fullmatch(r'python -m pip install -c constraints\.txt -e "\.\[test\]" && python -m pytest', tests)


def test_ci_runs_the_readmes_own_test_command():
    script = (ROOT / ".ci" / "run").read_text()
    selected = subprocess.run(
        ["bash", "-c", re.search(r"^command=\$\((.*)\)$", script, re.MULTILINE)[1]],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert selected.stdout.strip() == install_commands()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with `lowprec` and `python` on the path, whether or not the package is installed."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "bin").mkdir()
    for name, command in (("lowprec", f"{sys.executable} -m lowprec"), ("python", sys.executable)):
        (folder / "bin" / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (folder / "bin" / name).chmod(0o755)
    return folder


def test_the_blocks_run_one_after_the_other(folder):
    """One test: the bundle of one block is verified by the next."""
    for index, (language, block) in enumerate(BLOCKS):
        if language == "json":
            (folder / "keep.json").write_text(block)
            assert len(read_keep_list(folder / "keep.json").entries) == 2
        elif "pip install" not in block:
            done = run_block(index, folder)
            assert done.returncode == 0, f"block {index}:\n{block}\n{done.stdout}{done.stderr}"


def run_block(index, folder):
    language, block = BLOCKS[index]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
    }
    if language == "bash":
        command = ["bash", "-euo", "pipefail", "-c", block]
    else:
        assert language == "python"
        earlier = [b for kind, b in BLOCKS[:index] if kind == "python"]
        command = [sys.executable, "-c", "\n".join([*earlier, block])]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
