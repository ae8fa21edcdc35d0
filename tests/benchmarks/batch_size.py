"""How methods hold up as batches get small: accuracy on scikit-learn's digits by batch size, five seeds each.

    python -m tests.benchmarks.batch_size [--workers 2]

A residual network of 5 thousand parameters in half weights with float32 masters, the same for all methods: 360 training
images, SGD with momentum and a cosine schedule. The learning rate of every method at every batch size is
the best of three (a factor 3 apart) on a quarter of the training images, with a seed of its own; the test images (the
other 1437) are looked at once per seed. 8x8 images, the same writers in both parts: what holds here need not hold
elsewhere.
Cells that are in the results file are not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from lowprec.artifacts import write_json
from tests.benchmarks.norm_matters import interval

RESULTS = Path(__file__).parent / "results" / "batch_size.json"
EPOCHS = {128: 40, 16: 10, 4: 4, 2: 4, 1: 4}  # with as many as for small batches, large ones would make a dozen steps
SIZES = tuple(EPOCHS)
SEEDS = range(5)
HELD_OUT = 0.7995  # 360 images train, so that no batch of two is cut to one
CHOOSING = 100  # the seed with which learning rates are chosen
FACTORS = (1 / 3, 1.0, 3.0)
# Line of the table: method, learning rate at batch 128 in the middle of the three; it goes with the root of the batch.
LINES = {
    "batch norm": ("none", 0.1),
    "mimic_norm": ("mimic_norm", 0.1),
    "one_batch_norm": ("one_batch_norm", 0.1),
    "bnp": ("bnp", 0.03),
    "kalman": ("kalman", 0.1),
}
NEEDS_TWO = ("mimic_norm", "one_batch_norm")  # they normalise over the samples


@dataclass(frozen=True)
class Cell:
    """One run; with `factor` on the validation images, to choose the learning rate."""

    line: str
    batch: int
    seed: int
    rate: float

    @property
    def key(self) -> str:
        return f"{self.line}/{self.batch}/{self.seed}/{self.rate:.4g}"


def rates(line: str, batch: int) -> list[float]:
    """The learning rates to choose from."""
    return [LINES[line][1] * factor * math.sqrt(batch / 128) for factor in FACTORS]


def places() -> Iterator[tuple[str, int]]:
    """Method and batch size, slow ones first."""
    for batch in sorted(SIZES):
        yield from ((line, batch) for line in LINES if batch > 1 or line not in NEEDS_TWO)


def run(cell: Cell) -> float:
    """Accuracy; that of chance where training diverged."""
    import torch

    from lowprec.errors import ScaleFloorError
    from lowprec.train import Trainer

    torch.set_num_threads(1)
    choosing = cell.seed == CHOOSING
    settings = {
        "model": {"factory": "lowprec.models:small_resnet", "args": {"width": 8, "blocks": 2}},
        "method": {"name": LINES[cell.line][0]},
        "data": {"batch_size": cell.batch, "test_fraction": HELD_OUT, "validation_fraction": 0.25 if choosing else 0.0},
        "optim": {"lr": cell.rate},
        "run": {"epochs": EPOCHS[cell.batch], "seed": cell.seed},
    }
    try:
        result = Trainer(settings).fit()
    except ScaleFloorError:
        return 0.1
    return result.accuracies[-1] if choosing else result.accuracy


def measure(workers: int) -> dict[str, float]:
    """Runs what is missing; saves after each run."""
    results: dict[str, float] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    run_all([Cell(*place, CHOOSING, rate) for place in places() for rate in rates(*place)], results, workers)
    run_all([Cell(*place, seed, chosen(results, *place)) for place in places() for seed in SEEDS], results, workers)
    return results


def run_all(cells: list[Cell], results: dict[str, float], workers: int) -> None:
    """Those of `cells` that have no result."""
    missing = [cell for cell in cells if cell.key not in results]
    with ProcessPoolExecutor(workers) as pool:
        waiting = {pool.submit(run, cell): cell for cell in missing}
        for count, future in enumerate(as_completed(waiting), 1):
            results[waiting[future].key] = future.result()
            write_json(RESULTS, results)
            print(f"\r{count}/{len(missing)}", end="", file=sys.stderr)


def chosen(results: dict[str, float], line: str, batch: int) -> float:
    """The rate with the best validation accuracy."""
    return max(rates(line, batch), key=lambda rate: results[Cell(line, batch, CHOOSING, rate).key])


def table(results: dict[str, float]) -> list[str]:
    """Markdown rows: mean and 95 % interval in percent, Student's t over the seeds."""
    rows = []
    for line in LINES:
        cells = []
        for batch in SIZES:
            if (line, batch) not in set(places()):
                cells.append("cannot")
                continue
            rate = chosen(results, line, batch)
            mean, half = interval([results[Cell(line, batch, seed, rate).key] for seed in SEEDS])
            cells.append(f"{100 * mean:.1f} ± {100 * half:.1f}")
        rows.append(f"| {line} | {' | '.join(cells)} |")
    return rows


def main() -> None:
    """Runs and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    results = measure(parser.parse_args().workers)
    print(
        "\n".join(
            [f"| accuracy, % | {' | '.join(map(str, SIZES))} |", "|---" * (len(SIZES) + 1) + "|", *table(results)]
        )
    )


if __name__ == "__main__":
    main()
