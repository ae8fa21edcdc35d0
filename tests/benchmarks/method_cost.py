"""What every method costs: a training step of ResNet-18 and the bytes it keeps, against the same network with BN.

    python -m tests.benchmarks.method_cost [--only METHOD ...] [--rounds 7] [--output FILE]

Images of 112 pixels, batch 16, float32, SGD with momentum and whatever the method does around a step. Bytes and times
are as in `mimic_cost`: both networks run in turns, the order changing each time, and the median of the ratios is
reported with its quartiles. `weight_norm_lp`, `bounded_weight_norm` and `agc` come on top of batch norm.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowprec.methods import METHODS
from tests.benchmarks.mimic_cost import kept_bytes, prepared, ratios
from tests.benchmarks.resnet18 import ResNet18

BATCH, PIXELS = 16, 112
OPTIONS: dict[str, dict[str, Any]] = {"norm_schedule": {"every": 1}}
# The rows of `digits.toml` that stand for a method; None is batch norm.
LINES: dict[str | None, str] = {
    None: "batch norm",
    **{name: name for name in ("l1", "linf", "topk", "l2_half", "mimic_norm", "one_batch_norm", "bnp", "kalman")},
    **{name: name for name in ("frn", "scaled_ws", "ic")},
    "bounded_weight_norm": "mean_only + bounded_weight_norm",
    "mean_only": "mean_only + bounded_weight_norm",
    "weight_norm_lp": "weight_norm_lp (p = inf), batch norm",
    "agc": "agc (clip = 0.1), batch norm",
    "bn_free_binary": "bn_free_binary, adamw",
    "batch_augmentation": "batch_augmentation (4 crops), batch norm",
}
MODE, BATCHES = "fp16-master", (128, 16, 2, 1)
RESULTS = Path(__file__).parent / "results"
LEFT_OUT = {
    "wd_mimic": "acts as norm_schedule does, on a record",
    "batch_augmentation": "multiplies the samples, which is its cost",
}


def measured() -> list[str]:
    """The methods that have a row."""
    return [name for name in METHODS if name not in LEFT_OUT]


def measure(name: str, rounds: int, original: nn.Module, x: Tensor) -> dict[str, Any]:
    """One method on a network and a batch of images."""
    y = torch.arange(len(x))
    changed, plain = prepared(original, name, **OPTIONS.get(name, {})), prepared(original, None)
    kept = kept_bytes(changed[0], x, y) / kept_bytes(plain[0], x, y)
    q1, median, q3 = ratios(changed, plain, x, y, rounds)
    return {"method": name, "kept": kept, "q1": q1, "time": median, "q3": q3}


def readme_table(costs: list[dict[str, Any]], study: dict[str, Any]) -> list[str]:
    """One row per method: what it is, whether it folds, what it costs, and its accuracies in the stored study."""
    cost = {row["method"]: (f"{row['time']:.2f}", f"{row['kept']:.2f}") for row in costs}
    accuracy = {
        (point["line"], point["batch"]): point["accuracy"] for point in study["points"] if point["precision"] == MODE
    }
    head = ["method", "what it does", "folds", "step", "kept", *(f"batch {batch}" for batch in BATCHES)]
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name in [None, *METHODS]:
        what, folds = ("the baseline", "exactly") if name is None else (METHODS[name].summary, METHODS[name].folds)
        shown = [_percent(accuracy[LINES[name], batch]) if name in LINES else "" for batch in BATCHES]
        title = "batch norm" if name is None else f"`{name}`"
        kind = f" ({METHODS[name].kind})" if name is not None and METHODS[name].kind != "module" else ""
        step, kept = ("1", "1") if name is None else cost.get(name, ("", ""))
        rows.append(f"| {' | '.join([title + kind, what, folds, step, kept, *shown])} |")
    return rows


def _percent(interval: dict[str, float] | None) -> str:
    return "cannot" if interval is None else f"{100 * interval['mean']:.1f} ± {100 * interval['half']:.1f}"


def main(arguments: list[str] | None = None) -> int:
    """One line per method."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=measured(), default=measured())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(arguments)
    rows = []
    for name in args.only:
        torch.manual_seed(0)
        rows.append(row := measure(name, args.rounds, ResNet18(), torch.randn(BATCH, 3, PIXELS, PIXELS)))
        print(
            f"{name}: {row['time']:.2f} ({row['q1']:.2f} to {row['q3']:.2f}) times the step, "
            f"{row['kept']:.2f} times the bytes",
            flush=True,
        )
    if args.output:
        args.output.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
