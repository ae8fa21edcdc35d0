"""Time and memory of folding and emitting a network of more than 2 GiB, which no single protobuf message holds.

    python -m tests.benchmarks.large_model [--gib 2.5] [--whole] [--precision fp32]

A stack of linear layers, each with a batch norm that folds into it, so that every weight changes. Memory is the largest
resident size of the process that built the network, imports included, as a share of the weights. `--whole` exports a
bundle instead, with its rounding-noise floor and the runs that judge it.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from tests.benchmarks.folding import peak_mib

WIDTH = 8192
BAR = 2.2


def network(gib: float) -> nn.Module:
    """So many GiB of float32 weights."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(max(1, round(gib * 2**30 / (4 * WIDTH**2)))):
        norm = nn.BatchNorm1d(WIDTH)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.running_mean, 0, 0.1)
        layers += [nn.Linear(WIDTH, WIDTH, bias=False), norm, nn.ReLU()]
    return nn.Sequential(*layers).eval()


def fold_and_emit(model: nn.Module, folder: Path) -> None:
    """What `export` does before anything is judged."""
    from lowprec.export.external_data import write_model
    from lowprec.export.torch_network import TorchNetwork

    on_its_way = TorchNetwork(model, (torch.randn(4, WIDTH),), None)
    on_its_way.fold(None, folder)
    write_model(folder / "model.onnx", on_its_way.emit(folder / "model.onnx"))


def main() -> int:
    """One line; 1 when the bar is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gib", type=float, default=2.5, help="of weights")
    parser.add_argument("--whole", action="store_true", help="a whole bundle")
    parser.add_argument("--precision", default="fp32", help="of the bundle, beside fp32")
    args = parser.parse_args()
    model = network(args.gib)
    weights = sum(tensor.nbytes for tensor in model.state_dict().values()) / 2**20
    built, started = peak_mib(), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=".large_model-", dir=".") as folder:
        if args.whole:
            from lowprec.export import export

            parity = export(model, (torch.randn(4, WIDTH),), Path(folder) / "bundle", precision=args.precision).parity
            print(f"parity: {parity.verdict}")
        else:
            fold_and_emit(model, Path(folder))
    seconds, share = time.perf_counter() - started, peak_mib() / weights
    held = share <= BAR
    print(
        f"{weights / 1024:.2f} GiB of weights: {seconds:.0f} s, peak {share:.2f} of them "
        f"({built / weights:.2f} before), bar {BAR} {'held' if held else 'MISSED'}"
    )
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
