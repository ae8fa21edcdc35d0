"""Redraws the points of *Norm matters* (Hoffer et al., 2018) on scikit-learn's digits.

    python -m tests.benchmarks.norm_matters
    python -m tests.benchmarks.norm_matters --data path/to/cifar10 --epochs 30     # a folder of images by class

Four questions, five seeds each, every cell a real training run through the library's trainer:

1. Do L1, L-infinity and top-10 batch norm reach the accuracy of L2? (half weights, float32 masters)
2. Where do true half statistics break? (what the norms see is scaled; every intermediate of the statistics is rounded)
3. Does a learning-rate correction without weight decay do what weight decay does?
4. Does bounded weight norm hold up where plain weight norm does not, against batch norm?

Training sees 30 % of the 1797 images and the rest is held out, because with more the task is too easy to tell methods
apart. The same writers appear in both parts, images are 8x8, networks small: what holds here need not hold on ImageNet,
and differences inside the intervals (95 %, Student's t over seeds) are nothing. Cells that are in the results file are
not run again, so an interrupted run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowprec.artifacts import write_json
from lowprec.data import load_data
from lowprec.study.summary import Interval

RESULTS = Path(__file__).parent / "results"
SEEDS = range(5)


@dataclass(frozen=True)
class Task:
    """What is learned: data source, epochs, share held out, and the shape of the network that fits."""

    source: str
    epochs: int
    test_fraction: float
    in_channels: int
    classes: int

    @classmethod
    def of(cls, source: str, epochs: int) -> Task:
        """Channels and classes read from the data; digits hold out 70 %, other data a fifth."""
        samples = load_data(source)
        if samples.labels is None:
            raise SystemExit(f"{source} has no labels")
        channels = next(iter(samples.inputs.values())).shape[1]
        fraction = 0.7 if source == "digits" else 0.2
        return cls(source, epochs, fraction, int(channels), int(samples.labels.max()) + 1)

    @property
    def network(self) -> dict[str, int]:
        """Arguments of small_resnet."""
        return {"in_channels": self.in_channels, "classes": self.classes}

    @property
    def name(self) -> str:
        """For the files of results."""
        return "norm_matters" if self.source == "digits" else f"norm_matters_{Path(self.source).stem}"


@dataclass(frozen=True)
class Cell:
    """One training run: question, line of the figure, position on its axis, seed."""

    question: str
    line: str
    x: float
    seed: int
    task: Task

    @property
    def key(self) -> str:
        return f"{self.question}/{self.line}/{self.x:g}/{self.seed}"


def scaled_resnet(scale: float = 1.0, **network: int) -> Any:
    """small_resnet in which every batch norm sees its input `scale` times larger.

    The function, and with exact statistics the training too, stay the same: a norm takes the factor out again.
    """
    from torch import nn

    from lowprec.models import small_resnet

    class Gain(nn.Module):
        def forward(self, x: Any) -> Any:
            return x * scale

    model = small_resnet(**network)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, nn.Sequential(Gain(), module))
    return model


def without_batch_norm(weights: str, **network: int) -> Any:
    """small_resnet with mean-only batch norm, its weights bounded or under plain weight norm (a learned length).

    He's initialisation first: without a norm that divides, torch's default lets the signal fade from layer to layer,
    and the bound is taken from the weights as they stand.
    """
    from torch import nn
    from torch.nn.utils import parametrizations

    from lowprec.methods import convert
    from lowprec.models import small_resnet

    model = small_resnet(**network)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu" if isinstance(module, nn.Conv2d) else "linear")
    model, _ = convert(model, "mean_only")
    if weights == "bounded":
        return convert(model, "bounded_weight_norm")[0]
    for module in list(model.modules()):
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            parametrizations.weight_norm(module)
    return model


HERE = "tests.benchmarks.norm_matters"

ACCURACY = {
    "L2 (torch)": ("none", {}),
    "L1": ("l1", {}),
    "L-infinity": ("linf", {}),
    "top-10": ("topk", {}),
}
HALF = {
    "L2, tree sums": ("l2_half", {"accumulation": "tree"}),
    "L2, naive sums": ("l2_half", {"accumulation": "naive"}),
    "L1, tree sums": ("l1", {"stats_dtype": "float16", "accumulation": "tree"}),
    "L1, naive sums": ("l1", {"stats_dtype": "float16", "accumulation": "naive"}),
}
SCALES = (1.0, 50.0, 200.0, 400.0, 3000.0)
WEIGHTS = {
    "batch norm": {"factory": "lowprec.models:small_resnet"},
    "bounded weight norm": {"factory": f"{HERE}:without_batch_norm", "args": {"weights": "bounded"}},
    "weight norm": {"factory": f"{HERE}:without_batch_norm", "args": {"weights": "normed"}},
}
QUANTITY = {"decay": "training loss, last epoch"}  # of a question that is not about held-out accuracy
WEIGHT_DECAY = 5e-3  # strong enough to move the loss of so small a network
TITLES = {
    "accuracy": "L1, L-infinity and top-10 against L2",
    "half": "True half statistics: where L2 fails",
    "decay": "Weight decay, none, and its learning-rate mimic",
    "weights": "Bounded against plain weight norm, and batch norm",
}
DECAY = ("weight decay", "no weight decay", "no weight decay, corrected rate")


def cells(task: Task) -> Iterator[Cell]:
    for seed in SEEDS:
        for line in ACCURACY:
            yield Cell("accuracy", line, 0, seed, task)
        for line in HALF:
            for scale in SCALES:
                yield Cell("half", line, scale, seed, task)
        for line in DECAY:
            yield Cell("decay", line, 0, seed, task)
        for line in WEIGHTS:
            yield Cell("weights", line, 0, seed, task)


def config(cell: Cell, **overrides: Any) -> dict[str, Any]:
    """The config that all cells share, with this cell's method."""
    base: dict[str, Any] = {
        "model": {"factory": "lowprec.models:small_resnet", "args": cell.task.network},
        "precision": {"mode": "fp16-master"},
        "data": {"source": cell.task.source, "test_fraction": cell.task.test_fraction},
        "optim": {"lr": 0.1, "schedule": "cosine", "warmup": 20},
        "run": {"epochs": cell.task.epochs, "seed": cell.seed},
    }
    for section, values in overrides.items():
        base[section] = {**base.get(section, {}), **values}
    return base


def train(settings: dict[str, Any]) -> Any:
    """The finished run, or None when the loss scale hit its floor, which is how undefined statistics end."""
    from lowprec.errors import ScaleFloorError
    from lowprec.train import Trainer

    try:
        return Trainer(settings).fit()
    except ScaleFloorError:
        return None


def accuracy(settings: dict[str, Any]) -> float:
    """Held-out accuracy; chance for a run that could not go on."""
    result = train(settings)
    return 1 / settings["model"]["args"]["classes"] if result is None else float(result.accuracy)


def run(cell: Cell) -> float:
    """The figure of one cell: held-out accuracy, for the decay question the training loss of the last epoch."""
    import torch

    torch.set_num_threads(1)
    if cell.question == "decay":
        return train_decay(cell)
    if cell.question == "weights":
        made = WEIGHTS[cell.line]
        return accuracy(config(cell, model={**made, "args": {**made.get("args", {}), **cell.task.network}}))
    if cell.question == "half":
        name, args = HALF[cell.line]
        model = {"factory": f"{HERE}:scaled_resnet", "args": {"scale": cell.x, **cell.task.network}}
        return accuracy(
            config(
                cell, model=model, method={"name": name, "args": args}, run={"epochs": max(1, cell.task.epochs // 5)}
            )
        )
    name, args = ACCURACY[cell.line]
    return accuracy(config(cell, method={"name": name, "args": args}))


def train_decay(cell: Cell) -> float:
    """Training loss of the last epoch; the corrected run first records the norms of a run with decay.

    Not accuracy, which all three reach: the loss shows how far each got with its effective steps.
    """
    if cell.line == DECAY[0]:
        return float(train(config(cell, optim={"weight_decay": WEIGHT_DECAY})).losses[-1])
    if cell.line == DECAY[1]:
        return float(train(config(cell, optim={"weight_decay": 0.0})).losses[-1])
    with tempfile.TemporaryDirectory() as folder:
        record = str(Path(folder) / "norms.json")
        recorded = {"name": "wd_mimic", "args": {"record_to": record}}
        train(config(cell, optim={"weight_decay": WEIGHT_DECAY}, method=recorded))
        replayed = {"name": "wd_mimic", "args": {"norms": record, "skip_decay": WEIGHT_DECAY}}
        return float(train(config(cell, optim={"weight_decay": 0.0}, method=replayed)).losses[-1])


def measure(task: Task, workers: int) -> dict[str, float]:
    """Runs every cell that the results file lacks, and writes the file after each."""
    path = RESULTS / f"{task.name}.json"
    results: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    todo = [cell for cell in cells(task) if cell.key not in results]
    started = time.monotonic()
    with ProcessPoolExecutor(workers) as pool:
        jobs = {pool.submit(run, cell): cell for cell in todo}
        for done, job in enumerate(as_completed(jobs), 1):
            results[jobs[job].key] = job.result()
            RESULTS.mkdir(exist_ok=True)
            write_json(path, results)
            left = (time.monotonic() - started) * (len(todo) - done) / done
            print(f"{done}/{len(todo)} {jobs[job].key} {results[jobs[job].key]:.4f} ({left:.0f} s left)", flush=True)
    return results


def summary(task: Task, results: dict[str, float]) -> dict[tuple[str, str, float], tuple[float, float]]:
    """Mean and half width of its 95 % interval by (question, line, x)."""
    grouped: dict[tuple[str, str, float], list[float]] = {}
    for cell in cells(task):
        grouped.setdefault((cell.question, cell.line, cell.x), []).append(results[cell.key])
    found = {key: Interval.of(values) for key, values in grouped.items()}
    return {key: (one.mean, one.half) for key, one in found.items()}


def shown_as(question: str, mean: float, half: float) -> str:
    """A figure and its interval as text."""
    return f"{mean:.4f} ± {half:.4f}" if question in QUANTITY else f"{100 * mean:.1f} ± {100 * half:.1f} %"


def print_tables(found: dict[tuple[str, str, float], tuple[float, float]]) -> None:
    """The figures as Markdown."""
    for question, title in TITLES.items():
        rows = {key: value for key, value in found.items() if key[0] == question}
        xs = sorted({x for _, _, x in rows})
        head = [f"scale {x:g}" for x in xs] if len(xs) > 1 else [QUANTITY.get(question, "held-out accuracy")]
        print(f"\n**{title}**\n\n| | {' | '.join(head)} |\n|---|{'---|' * len(head)}")
        for line in dict.fromkeys(line for _, line, _ in rows):
            shown = [shown_as(question, *rows[question, line, x]) for x in xs]
            print(f"| {line} | {' | '.join(shown)} |")


def draw(task: Task, found: dict[tuple[str, str, float], tuple[float, float]]) -> None:
    """One picture, a panel per question."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "norm_matters"
    figure, panels = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for panel, (question, title) in zip(panels.flat, TITLES.items(), strict=True):
        rows = {key: value for key, value in found.items() if key[0] == question}
        lines = list(dict.fromkeys(line for _, line, _ in rows))
        if question == "half":
            for line in lines:
                points = [(x, *value) for (_, name, x), value in rows.items() if name == line]
                xs, means, halves = (np.array(column) for column in zip(*points, strict=True))
                panel.errorbar(xs, 100 * means, yerr=100 * halves, label=line, marker="o", capsize=3)
            panel.set(xscale="log", xlabel="scale of what the norms see")
            panel.legend(fontsize=8)
        else:
            unit = 1 if question in QUANTITY else 100
            values = unit * np.array([rows[question, line, 0.0] for line in lines])
            places = np.arange(len(lines))
            panel.errorbar(values[:, 0], places, xerr=values[:, 1], fmt="o", capsize=4)
            panel.set(yticks=places, yticklabels=lines, ylim=(len(lines) - 0.5, -0.5))
        panel.set_title(title, fontsize=10)
        label = QUANTITY.get(question, "held-out accuracy, %")
        panel.set_ylabel(label) if question == "half" else panel.set_xlabel(label)
        panel.grid(alpha=0.3)
    figure.suptitle(f"Norm matters on {task.source}, {len(SEEDS)} seeds, 95 % intervals")
    figure.savefig(RESULTS / f"{task.name}.svg", metadata={"Date": None})


def main() -> None:
    """Runs, prints the tables and draws the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes, one thread each")
    parser.add_argument("--data", default="digits", help="digits, a folder of images by class, or an .npz with labels")
    parser.add_argument("--epochs", type=int, default=30)
    args = parser.parse_args()
    task = Task.of(args.data, args.epochs)
    found = summary(task, measure(task, args.workers))
    print_tables(found)
    draw(task, found)


if __name__ == "__main__":
    main()
