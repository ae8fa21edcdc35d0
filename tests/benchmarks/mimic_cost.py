"""What MimicNorm saves: a training step of ResNet-18 and ResNet-50 at 224 pixels against the same network with BN.

    python -m tests.benchmarks.mimic_cost [--rounds 15] [--output FILE]

Bytes kept for the backward are counted by torch's own hook on saved tensors, each memory once, parameters left out. A
step is forward, backward, SGD with momentum and the centring of the weights; both run in turns, the order changing each
time, and the median of the ratios is reported with its quartiles.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowprec.methods import attach, convert
from tests.benchmarks.folding import resnet50
from tests.benchmarks.resnet18 import ResNet18

KEPT_SHARE, TIMES_AS_FAST = 0.62, 1.10
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {"ResNet-18": (ResNet18, 32), "ResNet-50": (resnet50, 8)}


Prepared = tuple[nn.Module, torch.optim.Optimizer]


def prepared(model: nn.Module, method: str | None, **options: Any) -> Prepared:
    """In training, with its optimizer."""
    model = convert(model, method, **options)[0].train() if method else model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    attach(model, optimizer)
    return model, optimizer


def kept_bytes(model: nn.Module, x: Tensor, y: Tensor) -> int:
    """Bytes that autograd keeps between forward and backward, besides parameters."""
    own = {param.untyped_storage().data_ptr() for param in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = F.cross_entropy(model(x), y)
    loss.backward()
    return sum(kept.values())


def seconds(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    """One step."""
    started = time.perf_counter()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - started


def ratios(one: Prepared, other: Prepared, x: Tensor, y: Tensor, rounds: int) -> list[float]:
    """Quartiles of the time of a step of `one` in times of `other`, side by side, the order changing each time."""
    found = []
    for turn in range(rounds + 1):
        first, second = (one, other) if turn % 2 else (other, one)
        a, b = seconds(*first, x, y), seconds(*second, x, y)
        found.append(a / b if turn % 2 else b / a)
    return statistics.quantiles(found[1:], n=4)  # the first turn warms up


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Both figures of one network."""
    torch.manual_seed(0)
    make, batch = NETWORKS[name]
    x, y = torch.randn(batch, 3, 224, 224), torch.arange(batch)
    original = make()
    mimic, plain = prepared(original, "mimic_norm"), prepared(original, None)
    share = kept_bytes(mimic[0], x, y) / kept_bytes(plain[0], x, y)
    q1, median, q3 = ratios(plain, mimic, x, y, rounds)
    held = share <= KEPT_SHARE and median >= TIMES_AS_FAST
    return {"network": name, "batch": batch, "kept": share, "q1": q1, "faster": median, "q3": q3, "held": held}


def readme_line(rows: list[dict[str, Any]]) -> str:
    """What the README says of a stored run."""
    kept = " and ".join(f"{row['kept']:.2f}" for row in rows)
    faster = " and ".join(f"{row['faster']:.2f}" for row in rows)
    return f"keeps {kept} times the bytes for the backward, and its step is {faster} times as fast"


def main(arguments: list[str] | None = None) -> int:
    """One line per network; 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(arguments)
    rows = [measure(name, args.rounds) for name in args.only]
    for row in rows:
        print(
            f"{row['network']}, batch {row['batch']}: {row['kept']:.3f} of the bytes (bar {KEPT_SHARE}), "
            f"{row['faster']:.3f} ({row['q1']:.3f} to {row['q3']:.3f}) times as fast (bar {TIMES_AS_FAST})"
        )
    if args.output:
        args.output.write_text(json.dumps(rows, indent=2) + "\n")
    return 0 if all(row["held"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
