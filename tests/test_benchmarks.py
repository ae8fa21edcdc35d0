"""The studies stay runnable: every line of every question, one epoch, one seed."""

import math
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.benchmarks import norm_matters  # noqa: E402 - the studies are run from the root, not installed

TASK = norm_matters.Task.of("digits", 1)
ONE_OF_EACH = {(cell.question, cell.line): cell for cell in norm_matters.cells(TASK) if cell.seed == 0}


@pytest.mark.parametrize("cell", ONE_OF_EACH.values(), ids=lambda cell: f"{cell.question}-{cell.line}")
def test_a_cell_of_norm_matters_runs(cell, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)  # the studies' workers are processes of their own
    assert math.isfinite(norm_matters.run(cell))


def test_intervals_are_students():
    mean, half = norm_matters.interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3.0
    # s = sqrt(2.5), t(0.975, 4) = 2.776, n = 5; a dozen float64 roundings stay far below 1e-12
    assert half == pytest.approx(2.776 * math.sqrt(2.5 / 5), rel=1e-12)
    assert len(norm_matters.SEEDS) == 5
