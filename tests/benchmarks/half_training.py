"""What half training costs on a CPU: steps of every mode, the measuring of health, the trainer around the loop.

    python -m tests.benchmarks.half_training [--only modes health trainer] [--rounds 15] [--output FILE]

All ratios are paired: both sides run in turns in one process, the order changing every turn, and the median of the
ratios is reported with its range (of the trainer's steps, their inner 80 %). Native half is torch's own CPU kernels on
`model.half()`, which are so slow that they run three times only.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lowprec.data import load_data, part_of
from lowprec.precision import MODES, Precision
from lowprec.train import Trainer, parse_config
from lowprec.train.network import batch_of, batches_of_epoch, build_network, build_optimizer
from tests.benchmarks.resnet18 import ResNet18

PIXELS, BATCH = 64, 16
FASTER_THAN_NATIVE, SLOWER_THAN_FP32, HEALTH_SHARE, TRAINER_SHARE = 15.0, 2.0, 1.03, 1.03


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(BATCH, 3, PIXELS, PIXELS), torch.randint(0, 10, (BATCH,))


def stepper(mode: str, health_every: int = 0) -> Callable[[], object]:
    """A training step of ResNet-18 in one of our modes."""
    torch.manual_seed(0)
    model = ResNet18(10)
    precision = Precision(mode, health_every=health_every)
    precision.prepare(model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9))
    x, y = batch()

    def step() -> object:
        with precision.forward():
            loss = F.cross_entropy(model(x), y)
        return precision.step(loss)

    return step


def native_half() -> Callable[[], object]:
    """The same step as torch runs it after `model.half()`, with a static loss scale."""
    torch.manual_seed(0)
    model = ResNet18(10).half()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01 / 256, momentum=0.9)
    x, y = batch()
    x = x.half()

    def step() -> object:
        (F.cross_entropy(model(x).float(), y) * 256).backward()
        optimizer.step()
        optimizer.zero_grad()
        return True

    return step


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def paired(ours: Callable[[], object], other: Callable[[], object], rounds: int) -> dict[str, Any]:
    """Time of `ours` as a multiple of the time of `other`."""
    ours(), other()
    ratios = []
    for turn in range(rounds):
        first, second = (ours, other) if turn % 2 else (other, ours)
        a, b = seconds(first), seconds(second)
        ratios.append(a / b if turn % 2 else b / a)
    return {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios), "rounds": rounds}


def modes(rounds: int) -> list[dict[str, Any]]:
    """Every mode against fp32, and the master mode against native half."""
    fp32 = stepper("fp32")
    rows = []
    for name in MODES:
        if name != "fp32":
            row = paired(stepper(name), fp32, rounds)
            rows.append(
                {"what": f"{name} / fp32", **row, "bar": SLOWER_THAN_FP32, "held": row["median"] <= SLOWER_THAN_FP32}
            )
    row = paired(native_half(), stepper("fp16-master"), 3)
    held = row["median"] >= FASTER_THAN_NATIVE
    return [*rows, {"what": "native half / fp16-master", **row, "bar": FASTER_THAN_NATIVE, "held": held}]


def health(rounds: int) -> list[dict[str, Any]]:
    """A measured step against one that is not, spread over the default interval."""
    every = Precision().health_every
    row = paired(stepper("fp16-master", 1), stepper("fp16-master", 0), rounds)
    shared = {key: 1 + (row[key] - 1) / every for key in ("median", "low", "high")}
    held = shared["median"] <= HEALTH_SHARE
    found = {
        "what": f"health every {every} steps / none",
        **shared,
        "rounds": rounds,
        "bar": HEALTH_SHARE,
        "held": held,
    }
    return [{"what": "measured step / plain step", **row}, found]


CONFIG = """
[model]
factory = "lowprec.models:small_resnet"
args = { width = 32 }
[data]
batch_size = 64
[optim]
lr = 0.05
weight_decay = 0.0
schedule = "constant"
[run]
epochs = 2
"""


def hand_steps() -> Iterator[float]:
    """The loop that the trainer runs, written out: seconds of one step after another."""
    config, cpu = parse_config(CONFIG), torch.device("cpu")
    data = part_of(load_data("digits"), "train")
    model = build_network(config)
    optimizer = build_optimizer(config.optim, model)
    precision = Precision(config.precision.mode)
    precision.prepare(model, optimizer)
    model.train()
    for epoch in range(config.run.epochs):
        for index in batches_of_epoch(len(data), config.data.batch_size, config.run.seed, epoch):
            started = time.perf_counter()
            inputs, labels = batch_of(data, index, cpu)
            with precision.forward():
                loss = F.cross_entropy(model(inputs[None]), labels)
            precision.step(loss)
            yield time.perf_counter() - started


def step_by_step() -> list[float]:
    """One run of the trainer: time of a step by the time of the same step by hand right after it."""
    by_hand, resumed = hand_steps(), time.perf_counter()
    ratios: list[float] = []

    def each(done: int, total: int) -> None:
        nonlocal resumed
        ours, hand = time.perf_counter() - resumed, next(by_hand)
        if done % (total // 2) != 1:  # the first step of an epoch has an evaluation before it
            ratios.append(ours / hand)
        resumed = time.perf_counter()

    Trainer(parse_config(CONFIG), progress=each).fit()
    return ratios


def trainer(rounds: int) -> list[dict[str, Any]]:
    """Every step of `Trainer.fit` against the same step by hand right after it, in the trainer's progress callback.

    A machine's speed wanders by tens of percent from second to second; two steps in a row share it.
    """
    ratios = [ratio for _ in range(rounds) for ratio in step_by_step()]
    low, median, high = (sorted(ratios)[int(len(ratios) * share)] for share in (0.1, 0.5, 0.9))
    row = {"median": median, "low": low, "high": high, "rounds": len(ratios), "bar": TRAINER_SHARE}
    return [{"what": "Trainer / the same step by hand", **row, "held": median <= TRAINER_SHARE}]


PARTS: dict[str, Callable[[int], list[dict[str, Any]]]] = {"modes": modes, "health": health, "trainer": trainer}


def readme_lines(rows: list[dict[str, Any]]) -> list[str]:
    """What the README says of a stored run."""
    found = {row["what"]: row["median"] for row in rows}
    modes = ", ".join(f"{name} {found[f'{name} / fp32']:.2f}" for name in MODES if name != "fp32")
    return [
        f"{modes} times the time of fp32",
        f"{found['native half / fp16-master']:.1f} times as fast as torch's native half",
        f"{100 * (found[next(what for what in found if what.startswith('health'))] - 1):.1f} % of the time",
        f"{100 * (found['Trainer / the same step by hand'] - 1):.1f} % slower than the same loop by hand",
    ]


def main(arguments: list[str] | None = None) -> int:
    """One line per ratio; 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(arguments)
    rows = [row for name in args.only for row in PARTS[name](args.rounds)]
    for row in rows:
        bar = "" if "bar" not in row else f"  bar {row['bar']:g} {'held' if row['held'] else 'MISSED'}"
        print(f"{row['what']:36} {row['median']:7.3f} ({row['low']:.3f} to {row['high']:.3f}){bar}")
    if args.output:
        args.output.write_text(json.dumps(rows, indent=2) + "\n")
    return 0 if all(row.get("held", True) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
