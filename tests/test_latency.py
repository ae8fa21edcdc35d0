"""Latency: what is timed, when it ends, and what `verify --bench` says."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from lowprec.errors import ConfigError, MissingDependencyError
from lowprec.export import latency
from lowprec.export.backends import Session
from lowprec.export.latency import bench_bundle, measure
from lowprec.export.tensors import TensorSpec

SPEC = (TensorSpec("x", ("n", 2), "float32"),)


class Sleeper(Session):
    """Takes so many milliseconds, the first runs longer, and notes when it ran."""

    def __init__(self, milliseconds, log, name):
        super().__init__(SPEC, SPEC, "asleep")
        self._milliseconds, self._log, self._name, self._runs = milliseconds, log, name, 0

    def _run(self, feeds):
        self._runs += 1
        self._log.append(self._name)
        time.sleep(self._milliseconds(self._runs) / 1e3)
        return feeds


def test_sessions_are_warmed_up_interleaved_and_timed(monkeypatch):
    log = []
    slow = Sleeper(lambda run: 60 if run == 1 else 6, log, "slow")
    fast = Sleeper(lambda run: 2, log, "fast")
    found = measure({"slow": slow, "fast": fast}, {"x": np.zeros((4, 2), np.float32)}, seconds=0.3)
    assert log[:6] == ["slow"] * 3 + ["fast"] * 3
    assert log[6:16] == ["slow", "fast"] * 5
    # A sleep takes its time and up to some milliseconds more on a busy machine, never less.
    assert 6 <= found["slow"]["p50_ms"] <= 30
    assert 2 <= found["fast"]["p50_ms"] < found["slow"]["p50_ms"]
    for row in found.values():
        assert row["batch"] == 4
        assert row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"]
        assert row["samples_per_s"] == pytest.approx(4 / row["mean_ms"] * 1e3)


def test_a_steady_session_ends_by_precision_and_an_unsteady_one_by_time(monkeypatch):
    clock = {"now": 0.0}
    monkeypatch.setattr(latency.time, "perf_counter", lambda: clock["now"])

    def session(seconds):
        class Timed(Session):
            def _run(self, feeds):
                clock["now"] += next(seconds)
                return feeds

        return Timed(SPEC, SPEC, "by the clock")

    steady = session(iter(lambda: 0.01, None))
    unsteady = session(iter(np.random.default_rng(0).uniform(0.001, 0.02, 10**5).tolist()))
    found = measure({"steady": steady, "unsteady": unsteady}, {"x": np.zeros((1, 2))}, seconds=0.5)
    assert (found["steady"]["runs"], found["steady"]["ended_by"]) == (latency.MIN_RUNS, "precision")
    assert found["unsteady"]["ended_by"] == "time"
    assert found["steady"]["half_width"] == pytest.approx(0, abs=1e-12)
    assert found["steady"]["p99_ms"] == pytest.approx(10)
    assert found["unsteady"]["half_width"] > latency.HALF_WIDTH


def test_the_interval_of_a_median_is_that_of_order_statistics():
    times = [float(value) for value in range(1, 101)]
    # Ranks 50 -+ 1.96 sqrt(100) / 2: from the 41st to the 61st of 100 numbers.
    assert latency._half_width(times) == pytest.approx((61 - 41) / 2 / 50.5)


@pytest.fixture
def bundle(demo, tmp_path):
    return Path(shutil.copytree(demo[0] / "l1" / "bundle", tmp_path / "bundle"))


def test_verify_bench_times_every_artefact_that_runs_here(bundle, command):
    words = ("verify", str(bundle), "--bench", "1", "4", "--bench-seconds", "0.05")
    done = command(*words, "--json", cwd=bundle.parent)
    assert done.status == 0, done.stderr
    bench = json.loads(done.stdout)["facts"]["bench"]
    timed = {(row["artefact"], row["backend"], row["batch"]) for row in bench["rows"] if "reason" not in row}
    assert {("model.onnx", "onnxruntime", 1), ("model.fp16.onnx", "onnxruntime", 4)} <= timed
    assert all(row["backend"] != "reference" for row in bench["rows"])
    reasons = {row["backend"]: row["reason"] for row in bench["rows"] if "reason" in row}
    assert "tensorrt-rtx" in reasons
    assert "onnxruntime" in bench["packages"]
    done = command(*words, "--backend", "onnxruntime", cwd=bundle.parent)
    assert "samples/s" in done.stdout
    assert "latency on Linux" in done.stdout


def test_what_cannot_be_timed_is_one_line(bundle):
    with pytest.raises(ConfigError, match="batches of 1 and more"):
        bench_bundle(bundle, batches=[0])
    with pytest.raises(MissingDependencyError, match="tensorrt-rtx was asked for and cannot run here"):
        bench_bundle(bundle, ["tensorrt-rtx"])


def test_a_batch_that_an_artefact_does_not_take_is_said(bundle, monkeypatch):
    opened = latency._opened

    def up_to_two(backend, path):
        session = opened(backend, path)
        session.batches = lambda feeds: (range(1, 3),)
        return session

    monkeypatch.setattr(latency, "_opened", up_to_two)
    rows = bench_bundle(bundle, ["onnxruntime"], [2, 4], seconds=0.02)["rows"]
    assert {row["batch"]: row.get("reason") for row in rows} == {2: None, 4: "it takes batches of 1 to 2"}
