"""Time and memory of folding and emitting a network of more than 2 GiB, which no single protobuf message holds.

    python -m tests.benchmarks.large_model [--gib 2.5] [--whole | --onnx] [--precision fp32]

A stack of linear layers, each with a batch norm that folds into it, so that every weight changes. Memory is the largest
resident size of the process that built the network, imports included, as a share of the weights. `--whole` exports a
bundle instead, with its rounding-noise floor and the runs that judge it; `--onnx` exports one from an ONNX file that
another process has written.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
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


def write_onnx(gib: float, file: Path) -> None:
    """The network as somebody's ONNX file, nothing folded yet."""
    program = torch.onnx.export(network(gib), (torch.randn(2, WIDTH),), dynamo=True, verbose=False, optimize=False)
    assert program is not None
    program.save(file, external_data=True)


def source(args: argparse.Namespace, folder: Path) -> nn.Module | Path:
    """What is exported: the network, or the ONNX file of it."""
    if not args.onnx:
        return network(args.gib)
    writer = multiprocessing.get_context("spawn").Process(target=write_onnx, args=(args.gib, folder / "source.onnx"))
    writer.start()
    writer.join()
    if writer.exitcode:
        raise SystemExit(f"the ONNX file was not written (exit code {writer.exitcode})")
    return folder / "source.onnx"


def bytes_of(model: nn.Module | Path) -> int:
    """Of its weights."""
    if isinstance(model, Path):
        return sum(file.stat().st_size for file in model.parent.glob(model.name + "*"))
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def main() -> int:
    """One line; 1 when the bar is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gib", type=float, default=2.5, help="of weights")
    parser.add_argument("--whole", action="store_true", help="a whole bundle")
    parser.add_argument("--onnx", action="store_true", help="a whole bundle, from an ONNX file")
    parser.add_argument("--precision", default="fp32", help="of the bundle, beside fp32")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix=".large_model-", dir=".") as folder:
        model = source(args, Path(folder))
        weights, built, started = bytes_of(model) / 2**20, peak_mib(), time.perf_counter()
        if args.whole or args.onnx:
            from lowprec.export import export

            samples = np.random.default_rng(0).standard_normal((2 if args.onnx else 4, WIDTH), dtype=np.float32)
            inputs = (samples,) if args.onnx else (torch.from_numpy(samples),)
            print(f"parity: {export(model, inputs, Path(folder) / 'bundle', precision=args.precision).parity.verdict}")
        else:
            assert isinstance(model, nn.Module)
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
