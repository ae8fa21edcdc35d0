"""Two processes over gloo: DistributedDataParallel, FSDP2, torchrun, a worker that is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lowprec.errors import UnsupportedError
from lowprec.precision import MODES, Precision
from tests import parallel_worker

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
CONFIG = """
[model]
args = {{ width = 4, blocks = 1 }}
[data]
batch_size = 64
[optim]
ema = 0.9
[precision]
mode = "{mode}"
[run]
epochs = {epochs}
device = "cpu"
statistics = "{statistics}"
checkpoint_every_steps = 5
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both processes of parallel_worker saved."""
    folder = tmp_path_factory.mktemp("pair")
    command = [sys.executable, "-m", "tests.parallel_worker", str(folder)]
    workers = [
        subprocess.Popen([*command, str(rank), "2", ",".join(MODES)], cwd=ROOT, env=ENVIRONMENT) for rank in range(2)
    ]
    assert [worker.wait(timeout=300) for worker in workers] == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_train_as_one_does_on_the_joined_batch(mode: str, pair: list[dict[str, Any]]) -> None:
    alone = parallel_worker.train(mode, 4)
    for process in pair:
        assert process[mode]["landed"] == alone["landed"] == [True] * 4
        # Gradients of norm 1 at most are averaged in another order: float32 sums, or halves rounded once more; weights
        # up to 1 are then rounded to half in four steps in the modes that keep no more.
        rounding = 2.0**-24 if mode == "fp32" else 2.0**-8 if mode == "bf16" else 2.0**-11
        steps = 8.0 if MODES[mode].update in ("nearest", "stochastic") else 0.0
        assert largest_difference(process[mode]["weights"], alone["weights"]) <= (8 + steps) * rounding
    if MODES[mode].update != "stochastic":  # which draws in each process
        assert largest_difference(pair[0][mode]["weights"], pair[1][mode]["weights"]) == 0


@pytest.mark.parametrize("mode", ["fp32", "fp16-master"])
def test_preconditioned_processes_do_not_drift_apart_and_are_one_on_the_joined_batch(
    mode: str, pair: list[dict[str, Any]]
) -> None:
    alone = parallel_worker.preconditioned(mode)
    for kind in ("weights", "statistics"):
        assert largest_difference(pair[0][f"bnp {mode}"][kind], pair[1][f"bnp {mode}"][kind]) == 0
        # As above; gradients are multiplied by 1 / variance, of inputs of variance 1 and of halved normal ones (0.3).
        rounding = 4 * (2.0**-24 if mode == "fp32" else 2.0**-11)
        assert largest_difference(pair[0][f"bnp {mode}"][kind], alone[kind]) <= 8 * rounding
    assert largest_difference(*(process["bnp apart"]["weights"] for process in pair)) > 0


def test_kalman_norms_of_two_processes_predict_the_same_and_are_one_on_the_joined_batch(
    pair: list[dict[str, Any]],
) -> None:
    alone = parallel_worker.filtered(True)
    for kind in ("kalman", "kalman drawn"):  # noise of both processes counts for both
        assert largest_difference(pair[0][kind], pair[1][kind]) == 0
    # Sums in another order through two norms and three steps of gradients of norm about 1.
    assert largest_difference(pair[0]["kalman"], alone) <= 2**6 * 2.0**-24
    assert largest_difference(pair[0]["kalman drawn"], alone) > 2**6 * 2.0**-24


@pytest.mark.parametrize("mode", [name for name, mode in MODES.items() if mode.scaled])
def test_an_overflow_in_one_process_skips_the_step_in_both(mode: str, pair: list[dict[str, Any]]) -> None:
    for process in pair:
        found = process[f"{mode} overflow"]
        assert found["landed"] == [True, True, False, True]
        assert "(Linear)" in found["overflow"] or "the loss" in found["overflow"]
        assert all(weight.isfinite().all() for weight in found["weights"].values())


def test_half_gradients_are_averaged_without_overflow_and_without_loss_of_the_smallest(
    pair: list[dict[str, Any]],
) -> None:
    """60000 + 60000 is infinite in half, and 2^-24 / 2 is zero."""
    for process in pair:
        assert process["half"].tolist() == [[float(torch.tensor(60000.0).half()), 2.0**-24]]


def test_what_cannot_be_averaged_is_refused(pair: list[dict[str, Any]]) -> None:
    wrapped, local = pair[0]["refused"]
    assert wrapped == "the model is in DistributedDataParallel already"
    assert "no_sync() would lose the gradients of the other processes" in local
    precision = Precision()
    precision.prepare(model := nn.Linear(2, 2), torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(UnsupportedError, match="needs a process group"):
        precision.data_parallel()


def test_fsdp_works_where_weights_stay_float32_and_is_refused_in_one_line_elsewhere(pair: list[dict[str, Any]]) -> None:
    for mode in ("fp16-autocast", "fp32", "bf16"):
        assert pair[0][f"sharded {mode}"]["landed"] == [True, True, not MODES[mode].scaled, True]
    sharded, alone = pair[0]["sharded fp16-autocast"], pair[1]["sharded fp16-autocast"]
    assert largest_difference(sharded["weights"], alone["weights"]) == 0
    assert all(weight.isfinite().all() for weight in sharded["weights"].values())
    for mode in ("fp16-master", "fp16-pure"):
        assert pair[0][f"sharded {mode}"].startswith(f"{mode} keeps half weights, and FSDP shards float32 ones; use")


# --- torchrun --------------------------------------------------------------------------------------------------------


def torchrun(folder: Path, name: str, *more: str, restarts: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts), "-m", "lowprec", "train", "config.toml", "-o", name, *more]
    return subprocess.Popen(
        command, cwd=folder, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finished(process: subprocess.Popen[str]) -> str:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    return out


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def newest(run: Path) -> int:
    names = [path.name for path in run.glob("checkpoints/step-*")]
    return max((int(name.removeprefix("step-")) for name in names), default=0)


def test_a_killed_worker_goes_on_from_the_last_checkpoint_to_the_same_bits(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(CONFIG.format(mode="fp16-master", epochs=12, statistics="reduce"))
    out = finished(torchrun(tmp_path, "whole", "--resume"))
    assert out.count("held-out accuracy") == 1  # one process talks
    process = torchrun(tmp_path, "killed", "--resume", restarts=3)
    ends = time.monotonic() + 120
    while newest(tmp_path / "killed") < 20:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < ends
        time.sleep(0.01)
    os.kill(children(process.pid)[1], signal.SIGKILL)
    finished(process)
    for name in ("model.safetensors", "metrics.jsonl", "health.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    rows = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["test_accuracy"] > 0.5
    alone = subprocess.run(
        [sys.executable, "-m", "lowprec", "train", "config.toml", "-o", "whole", "--resume"],
        cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert alone.returncode == 2
    assert "is of a run of 2 processes, here are 1; start as many" in alone.stderr


def test_a_process_that_meets_nobody_ends_so_that_torchrun_can_start_anew() -> None:
    code = "from lowprec.train import processes as p; p._MEETING_SECONDS = 1\nwith p.joined('cpu'): pass"
    alone = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT | alone, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        2, "lowprec: the processes did not meet within 1 s; leaving",
    )  # fmt: skip


def test_synchronised_statistics_are_those_of_the_joined_batch(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(CONFIG.format(mode="fp32", epochs=1, statistics="sync"))
    finished(torchrun(tmp_path, "both"))
    command = [sys.executable, "-m", "lowprec", "train", "config.toml", "-o", "alone"]
    subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, check=True, capture_output=True)
    from safetensors.torch import load_file

    both, alone = (load_file(tmp_path / name / "model.safetensors") for name in ("both", "alone"))
    assert both.keys() == alone.keys()
    # 23 steps of float32 sums in another order; the statistics of half a batch would differ by a tenth and more
    for name, value in both.items():
        assert (value.double() - alone[name].double()).abs().max() <= 1e-3 * alone[name].double().abs().max(), name
