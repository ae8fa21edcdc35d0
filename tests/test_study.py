"""Studies: the plan, the runs, what survives a killed process, and the conclusions."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from lowprec import Trainer
from lowprec.data import load_data
from lowprec.errors import ArtifactError, ConfigError, UnsupportedError
from lowprec.study import load_study, run_study, summarise, write_report
from lowprec.study.cells import Outcome, Outcomes, Plan
from lowprec.study.config import study_from
from lowprec.study.page import markdown
from lowprec.study.runner import train_once
from lowprec.study.summary import Interval, judged

ROOT = Path(__file__).parents[1]
CONFIG = """
[study]
title = "a <b>bold</b> study"
limits = "Two seeds & tiny networks."
batch_sizes = [1, 64]
precisions = ["fp32", "fp16-master"]
seeds = 2
rates = [0.5, 1.0]
epochs = { 1 = 1 }

[model]
factory = "lowprec.models:mlp"
args = { hidden = [4] }

[data]
test_fraction = 0.95

[optim]
lr = 0.1

[run]
epochs = 2

[[line]]
name = "batch <i>norm</i>"

[[line]]
name = "no norm"
method = "bnp"
lr = 0.01
set = { "optim.momentum" = 0.5 }

[[question]]
says = "more steps are better"
first = { line = "no norm", batch = 1 }
second = { line = "no norm", batch = 64 }

[[question]]
says = "batch norm trains on one sample"
first = { line = "batch <i>norm</i>", batch = 1, precision = "fp32" }
second = { line = "no norm", batch = 1, precision = "fp32" }
expect = "even"
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "study.toml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """A study and its folder, made once."""
    folder = tmp_path_factory.mktemp("study") / "out"
    study = load_study(config)
    seen = []
    outcomes = run_study(study, folder, workers=2, progress=lambda done, total: seen.append((done, total)))
    return study, folder, outcomes, seen


def test_every_run_is_made_once_and_counted(finished):
    _, folder, outcomes, seen = finished
    # Two lines, two batch sizes: two rates to choose from, then two precisions with two seeds.
    assert len(outcomes) == 2 * 2 * (2 + 2 * 2)
    assert len((folder / "runs.0.jsonl").read_text().splitlines()) == len(outcomes)
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]
    assert len({total for _, total in seen}) == 1
    # 5 % of 1797 are 89 images, a quarter of which (23) are not trained on while the rate is chosen: steps per line.
    one, large = 66 * 2 + 89 * 4, 2 * (2 * 2 + 2 * 4)
    assert seen[-1][1] == 2 * (one + large)


def test_what_is_there_is_not_made_again(finished, monkeypatch):
    study, folder, outcomes, _ = finished
    before = (folder / "runs.0.jsonl").read_bytes()
    monkeypatch.setattr("lowprec.study.runner.ProcessPoolExecutor.submit", lambda *_: pytest.fail("made again"))
    assert run_study(study, folder, workers=1) == outcomes
    assert (folder / "runs.0.jsonl").read_bytes() == before


def test_all_lines_share_samples_seeds_and_schedule_and_the_test_part_is_not_chosen_on(finished):
    study = finished[0]
    plan = Plan(study, "x")
    for line, batch in plan.places():
        choosing, final = plan.choosing(line, batch), plan.final(line, batch, 0.1)
        assert {plan.settings(cell)["data"]["validation_fraction"] for cell in choosing} == {0.25}
        assert {plan.settings(cell)["data"]["validation_fraction"] for cell in final} == {0.0}
        assert not {cell.seed for cell in choosing} & {cell.seed for cell in final}
        assert {plan.settings(cell)["run"]["epochs"] for cell in final} == {1 if batch == 1 else 2}
        rates = [cell.rate for cell in choosing]
        base = 0.01 if line.name == "no norm" else 0.1
        np.testing.assert_allclose(rates, [base * f * math.sqrt(batch / 128) for f in (0.5, 1)], rtol=1e-12)
        assert plan.settings(final[0])["optim"].get("momentum", 0.9) == (0.5 if line.name == "no norm" else 0.9)
    assert "momentum" not in study.base["optim"]


def outcome(key, accuracy, refused="", diverged=False):
    return Outcome(key, accuracy, refused, diverged, 1, 0, 1.0)


def test_the_rate_is_the_best_on_the_validation_part_and_the_lower_of_equal_ones(finished):
    plan = Plan(finished[0], "x")
    line, batch = next(plan.places())
    low, high = plan.choosing(line, batch)
    for accuracies, wanted in (((0.5, 0.6), high), ((0.6, 0.5), low), ((0.5, 0.5), low), ((None, 0.0), high)):
        known = {plan.key(cell): outcome(plan.key(cell), a) for cell, a in zip((low, high), accuracies, strict=True)}
        assert plan.chosen(line, batch, known) == wanted.rate
    assert plan.chosen(line, batch, {}) is None


def test_a_changed_study_keeps_the_runs_that_it_still_has(finished):
    study = finished[0]
    plan, other = Plan(study, "x"), Plan(replace(study, grid=replace(study.grid, seeds=3, title="other")), "x")
    line, batch = next(plan.places())
    kept = {plan.key(cell) for cell in plan.final(line, batch, 0.1)}
    assert kept < {other.key(cell) for cell in other.final(line, batch, 0.1)}
    assert not kept & {Plan(study, "other samples").key(cell) for cell in plan.final(line, batch, 0.1)}


def test_a_run_of_the_study_is_a_run_of_the_trainer(finished):
    study, _, outcomes, _ = finished
    plan = Plan(study, load_data("digits").fingerprint)
    line = study.line("no norm")
    cell = plan.final(line, 64, plan.chosen(line, 64, outcomes))[0]
    result = Trainer(plan.settings(cell)).fit()
    assert outcomes[plan.key(cell)].accuracy == result.accuracy
    assert outcomes[plan.key(cell)].steps == result.steps


def test_intervals_are_students():
    found = Interval.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.mean == 3.0
    # s = sqrt(2.5); the table's t(0.975, 4) = 2.776 has four digits
    assert found.half == pytest.approx(2.776 * math.sqrt(2.5 / 5), rel=2e-4)
    assert found.percent() == f"300.0 ± {100 * found.half:.1f}"


@pytest.mark.parametrize(
    ("expect", "first", "second", "verdict"),
    [
        ("above", [0.9, 0.91, 0.92], [0.5, 0.51, 0.53], "shown"),
        ("above", [0.5, 0.51, 0.53], [0.9, 0.91, 0.92], "contrary"),
        ("above", [0.9, 0.5, 0.7], [0.5, 0.9, 0.7], "not shown"),
        ("even", [0.9, 0.91, 0.9], [0.9, 0.9, 0.9], "shown"),
        ("even", [0.9, 0.91, 0.9], [0.5, 0.5, 0.5], "contrary"),
        ("even", [0.5, 0.5, 0.5], [0.9, 0.91, 0.9], "contrary"),
        ("even", [0.9, 0.8, 0.9], [0.9, 0.9, 0.9], "not shown"),
        ("no worse", [0.9, 0.91, 0.9], [0.5, 0.5, 0.5], "shown"),
        ("no worse", [0.9, 0.91, 0.9], [0.905, 0.91, 0.905], "shown"),
        ("no worse", [0.5, 0.5, 0.5], [0.9, 0.91, 0.9], "contrary"),
        ("no worse", [0.9, 0.8, 0.9], [0.9, 0.9, 0.9], "not shown"),
        # Far apart per seed and yet even: what counts is the difference of pairs.
        ("even", [0.1, 0.5, 0.9], [0.1, 0.5, 0.901], "shown"),
        ("even", [], [0.9, 0.9, 0.9], "cannot"),
    ],
)
def test_what_decides_is_the_interval_of_the_paired_difference(expect, first, second, verdict):
    assert judged("says", "fp32", first, second, expect, 0.02).verdict == verdict


def test_the_conclusions_and_the_page(finished, tmp_path):
    study, folder, outcomes, _ = finished
    summary = summarise(study, outcomes)
    point = summary.point("batch <i>norm</i>", 1, "fp32")
    assert "more than one value per channel, and this batch has one; raise data.batch_size" in point.refused
    assert point.accuracy is None
    point = summary.point("no norm", 64, "fp16-master")
    cells = Plan(study, load_data("digits").fingerprint).final(study.line("no norm"), 64, point.rate)
    found = [outcomes[Plan(study, load_data("digits").fingerprint).key(cell)].accuracy for cell in cells]
    assert point.accuracies == found[2:]
    assert point.accuracy.mean == np.mean(found[2:])
    assert [answer.precision for answer in summary.answers] == ["fp32", "fp16-master", "fp32"]
    assert summary.answers[-1].verdict == "cannot"
    assert [answer.precision for answer in summary.precisions] == ["fp16-master"] * 2
    page = write_report(summary, folder)
    html = page.read_text()
    assert "<i>" not in html
    assert "<b>" not in html
    assert "batch &lt;i&gt;norm" in html
    assert "<svg" in html
    assert html.count("http") == html.count("http://www.w3.org") + html.count("http://purl.org") + html.count(
        "https://matplotlib.org"
    ) + html.count("http://creativecommons.org")
    tags = HTMLParser()
    tags.feed(html)
    tags.close()
    stored = json.loads((folder / "study.json").read_text())
    assert len(stored["points"]) == 2 * 2 * 2
    assert "cannot" in (folder / "table.md").read_text()
    assert next(markdown(summary)) == "| fp32: test accuracy, % | 1 | 64 |"
    again = {path.name: path.read_bytes() for path in folder.iterdir()}
    write_report(summarise(study, outcomes), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == again


def test_a_diverged_run_counts_as_chance():
    settings = {
        "model": {"factory": "lowprec.models:mlp", "args": {"hidden": [4]}},
        "precision": {"mode": "fp16-master"},
        "data": {"batch_size": 64, "test_fraction": 0.9, "validation_fraction": 0.0},
        "optim": {"lr": 1e8, "momentum": 0.0, "schedule": "constant"},
        "run": {"epochs": 20},
    }
    found = train_once(settings)
    assert found["diverged"]
    assert found["refused"] == ""


def command(*args):
    return [sys.executable, "-m", "lowprec", "study", *map(str, args)]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def wait_for_lines(path, count, process):
    started = time.monotonic()
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - started < 120
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_study_goes_on_and_ends_as_if_nothing_had_been(number, finished, config, tmp_path):
    _, _, outcomes, _ = finished
    out = tmp_path / "out"
    process = subprocess.Popen(
        command(config, "-o", out, "--workers", 1), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler), start_new_session=True,
    )  # fmt: skip
    wait_for_lines(out / "runs.0.jsonl", 3, process)
    if number == signal.SIGKILL:
        os.killpg(process.pid, number)  # the workers too
        process.communicate()
        with (out / "runs.0.jsonl").open("ab") as file:
            file.write(b'{"key": "half a li')
    else:
        process.send_signal(number)
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 130
        assert "stopped by SIGINT; the runs that are finished are kept, the same command goes on" in stderr
    done = subprocess.run(
        command(config, "-o", out, "--workers", 1, "--json"), env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["points"]
    with Outcomes(out, 0) as found:
        assert {key: one.accuracy for key, one in found.known.items()} == {
            key: one.accuracy for key, one in outcomes.items()
        }


def test_the_ranks_of_torchrun_share_the_runs(finished, config, tmp_path):
    _, _, outcomes, _ = finished
    out = tmp_path / "out"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    done = subprocess.run(
        [*torchrun, *command(config, "-o", out)[2:]], env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    shares = [
        {json.loads(line)["key"] for line in (out / f"runs.{rank}.jsonl").read_text().splitlines()} for rank in range(2)
    ]
    assert all(shares)
    assert not shares[0] & shares[1]
    with Outcomes(out, 0) as found:
        assert {key: one.accuracy for key, one in found.known.items()} == {
            key: one.accuracy for key, one in outcomes.items()
        }
    assert done.stdout.count("page:") == 1


def test_two_studies_do_not_write_one_folder_and_damage_is_named(tmp_path, finished):
    study = finished[0]
    (tmp_path / "study.toml").write_text("")
    with Outcomes(tmp_path, 0), pytest.raises(ArtifactError, match="another process works on the study"):
        run_study(study, tmp_path)
    (tmp_path / "runs.1.jsonl").write_text('{"key": 1}\n')
    with pytest.raises(ArtifactError, match=r"runs\.1\.jsonl, line 1 is damaged .*remove the line"):
        run_study(study, tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    (other / "file").write_text("")
    with pytest.raises(ArtifactError, match=r"cannot write a study to .*holds something else"):
        run_study(study, other)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"study": {"batch_size": [1]}}, r"unknown key 'batch_size' in \[study\]; did you mean 'batch_sizes'"),
        ({"study": {"seeds": 1}}, "give two seeds or more"),
        ({"study": {"batch_sizes": [0]}}, "give whole numbers from 1"),
        ({"study": {"batch_sizes": [2, 2]}}, "give at least one, each once"),
        ({"study": {"precisions": ["fp17"]}}, "fp17"),
        ({"study": {"rates": [-1.0]}}, "give factors above 0"),
        ({"study": {"epochs": {"3": 1}}}, r"study.epochs.3 is 1"),
        ({"line": []}, r"a study needs \[\[line\]\] tables"),
        ({"line": [{"name": "a"}, {"name": "a"}]}, "names that differ"),
        ({"line": [{"method": "l1"}]}, "has no name"),
        ({"line": [{"name": "a", "method": "l7"}]}, "names method 'l7'; choose none or one of l1"),
        ({"line": [{"name": "a", "set": {"optim.rate": 1}}]}, r"unknown key 'rate' in \[optim\]"),
        ({"line": [{"name": "a", "set": {"optim.lr.x": 1}}]}, "line 'a' sets 'optim.lr.x': 'lr' is not a table"),
        ({"question": [{"says": "x", "first": {"line": "b", "batch": 1}}]}, "names line 'b', batch 1"),
        ({"question": [{"says": "x", "expect": "below"}]}, "one of above, no worse, even"),
        ({"question": {"says": "x"}}, r"question must be \[\[question\]\] tables"),
        ({"modle": {}}, r"unknown section \[modle\]"),
    ],
)
def test_a_wrong_config_is_one_line(change, match):
    raw = {"study": {}, "line": [{"name": "a"}], **change}
    with pytest.raises(ConfigError, match=match):
        study_from(raw)


def test_a_line_that_cannot_be_converted_is_named_before_anything_runs(tmp_path):
    raw = {
        "study": {"batch_sizes": [4]},
        "line": [{"name": "mine", "method": "mimic_norm", "set": {"model.args.norm": "l1"}}],
        "model": {"factory": "lowprec.models:mlp", "args": {"hidden": []}},
    }
    with pytest.raises(UnsupportedError, match="line 'mine': method 'mimic_norm' found no batch norm"):
        run_study(study_from(raw), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_config_written_into_the_folder_is_the_study(finished):
    study, folder, _, _ = finished
    assert load_study(folder / "study.toml") == study


def test_the_command_line(process, config, tmp_path):
    dry = process("study", config, "--dry-run", "--set", "study.seeds=3", cwd=tmp_path)
    assert dry.status == 0
    assert "seeds = 3" in dry.stdout
    assert process("study", config, cwd=tmp_path).stderr == "lowprec: study needs a folder to write; give -o DIR\n"
    refused = process("study", config, "-o", "out", "--workers", "0", cwd=tmp_path)
    assert (refused.status, refused.stderr) == (2, "lowprec: --workers is 0; give at least 1\n")
