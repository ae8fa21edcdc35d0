"""The studies stay runnable: every line of every question, one epoch, one seed."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from lowprec.study import load_study, summarise
from lowprec.study.cells import Outcomes

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.benchmarks import folding, fused_norm, half_training, method_cost, mimic_cost, norm_matters  # noqa: E402 - run from the root
from tests.benchmarks.resnet18 import ResNet18  # noqa: E402

TASK = norm_matters.Task.of("digits", 1)
ONE_OF_EACH = {(cell.question, cell.line): cell for cell in norm_matters.cells(TASK) if cell.seed == 0}


@pytest.mark.parametrize("cell", ONE_OF_EACH.values(), ids=lambda cell: f"{cell.question}-{cell.line}")
def test_a_cell_of_norm_matters_runs(cell, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)  # the studies' workers are processes of their own
    assert math.isfinite(norm_matters.run(cell))


def test_the_benchmark_of_the_fused_norms_runs_and_its_values_are_right(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    assert fused_norm.main(["--quick", "--output", str(tmp_path / "found.json")]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found["rows"]) == 3 * 3 * 2  # families, types, layouts
    assert all(row["values"]["held"] and row["kept"]["held"] for row in found["rows"])
    assert found["growth"]
    assert found["resnet18"]["relus_fused"] == 17  # the stem and two of each of eight blocks


def test_the_benchmark_of_the_fused_norms_reports_what_is_missed():
    row = {"family": "l1", "dtype": "float32", "layout": "contiguous", "shape": [64, 64, 56, 56], "bar": 0.55}
    good = {**row, "median": 0.5, "held": True, "values": {"held": True}, "kept": {"ratio": 0.52, "held": True}}
    slow = {**good, "median": 0.6, "held": False}
    wrong = {**good, "values": {"held": False}}
    resnet = {"median": 1.1, "held": True}
    assert fused_norm.verdict({"rows": [good], "resnet18": resnet}, quick=False) == []
    assert len(fused_norm.verdict({"rows": [good, slow, wrong], "resnet18": {**resnet, "held": False}}, False)) == 3
    assert len(fused_norm.verdict({"rows": [good, slow, wrong], "resnet18": resnet}, quick=True)) == 1


def test_the_readme_shows_the_stored_run_of_the_fold():
    stored = json.loads((ROOT / "tests" / "benchmarks" / "results" / "folding.json").read_text())
    readme = " ".join((ROOT / "README.md").read_text().split())
    for words in folding.readme_lines(stored):
        assert words in readme
    assert folding.verdict(stored, quick=False) == stored["missed"] == []


def test_the_readme_shows_the_stored_run_of_the_fused_norms():
    stored = json.loads((ROOT / "tests" / "benchmarks" / "results" / "fused_norm.json").read_text())
    readme = (ROOT / "README.md").read_text()
    for line in fused_norm.readme_table(stored):
        assert line in readme
    step = stored["resnet18"]
    assert f"is {step['median']:.2f} ({step['q1']:.2f} to {step['q3']:.2f}) times as fast" in readme
    assert stored["missed"] == []


def test_the_benchmark_of_half_training_runs_and_the_readme_shows_its_stored_run(tmp_path):
    status = half_training.main(["--only", "trainer", "--rounds", "1", "--output", str(tmp_path / "found.json")])
    assert status in (0, 1)  # the bar is for a quiet machine
    (row,) = json.loads((tmp_path / "found.json").read_text())
    assert row["rounds"] == 2 * 22  # two epochs of 23 steps, without the first of each
    stored = json.loads((ROOT / "tests" / "benchmarks" / "results" / "half_training.json").read_text())
    assert all(row["held"] for row in stored if "held" in row)
    readme = " ".join((ROOT / "README.md").read_text().split())
    for words in half_training.readme_lines(stored):
        assert words in readme


def test_the_readme_shows_the_stored_study_and_costs_of_all_methods():
    results = ROOT / "tests" / "benchmarks" / "results"
    costs = json.loads((results / "method_cost.json").read_text())
    study = json.loads((results / "digits" / "study.json").read_text())
    readme = (ROOT / "README.md").read_text()
    for row in method_cost.readme_table(costs, study):
        assert row in readme
    assert [row["method"] for row in costs] == method_cost.measured()
    for answer in study["answers"]:
        assert (answer["difference"] is None) == (answer["verdict"] == "cannot")


def test_the_stored_study_is_that_of_its_config():
    study = load_study(ROOT / "tests" / "benchmarks" / "digits.toml")
    folder = ROOT / "tests" / "benchmarks" / "results" / "digits"
    assert load_study(folder / "study.toml") == study
    with Outcomes(folder, 0) as stored:
        summary = summarise(study, stored.known)
    found = summary.to_json()
    assert {key: found[key] for key in ("points", "answers", "precisions")} == {
        key: json.loads((folder / "study.json").read_text())[key] for key in ("points", "answers", "precisions")
    }


def test_the_benchmark_of_costs_runs():
    row = method_cost.measure("agc", 2, ResNet18(4), torch.randn(2, 3, 32, 32))
    assert row["kept"] == 1
    assert row["time"] > 0


def test_the_benchmark_of_mimic_norm_counts_bytes_and_the_readme_shows_its_stored_run():
    stored = json.loads((ROOT / "tests" / "benchmarks" / "results" / "mimic_cost.json").read_text())
    assert all(row["held"] for row in stored)
    assert mimic_cost.readme_line(stored) in " ".join((ROOT / "README.md").read_text().split())
    per_sample = {}
    for method in (None, "mimic_norm"):
        model, optimizer = mimic_cost.prepared(mimic_cost.ResNet18(4), method)
        batches = [(torch.randn(count, 3, 64, 64), torch.arange(count)) for count in (2, 4)]
        few, more = (mimic_cost.kept_bytes(model, *batch) for batch in batches)
        per_sample[method] = (more - few) / 2
        assert mimic_cost.seconds(model, optimizer, *batches[0]) > 0
    assert 0.5 < per_sample["mimic_norm"] / per_sample[None] <= mimic_cost.KEPT_SHARE
