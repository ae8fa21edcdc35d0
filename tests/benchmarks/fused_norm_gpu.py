"""How fast L1 norm + ReLU trains on a GPU, at ResNet-50's shapes.

    python -m tests.benchmarks.fused_norm_gpu [--rounds N] [--output FILE.json]

Batch 128, fp16, channels_last, every distinct pair of channels and side that a norm of ResNet-50 sees at 224 pixels.
Forward plus backward in training mode, against nn.BatchNorm2d then nn.ReLU as they are ("eager") and the same pair
under torch.compile ("compiled"). Times are between CUDA events around several runs in a row; every figure is the
median, with quartiles, of ratios of neighbouring measurements, in turns which comes first; below 1 means that ours is
the faster. A small shape's time includes what the host needs to launch the kernels, on all sides.

Values are checked against float64 as in `tests.benchmarks.fused_norm`. `floor` is the time that a copy takes for the
bytes that cannot be avoided, as a share of the time that was needed. `peak` is what one forward and backward add to the
allocated memory at most. Exit status 1: a bar is missed or a value is wrong; 3: no CUDA device.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowprec.artifacts import write_json
from lowprec.packages import is_installed
from tests.benchmarks.fused_norm import Row, batch_norm, compared, floor_bytes, spread

BATCH = 128
# (channels, side) of every norm, stem first; conv1 of a stage's first block still sees the larger side.
SHAPES = (
    (64, 112),
    (64, 56), (256, 56),
    (128, 56), (128, 28), (512, 28),
    (256, 28), (256, 14), (1024, 14),
    (512, 14), (512, 7), (2048, 7),
)  # fmt: skip
BARS = {"eager": 0.65, "compiled": 1.0}
RUNS = 10  # between two events, so that the time of one is well above their resolution of half a microsecond
WARM_UP = 5


@dataclass(frozen=True)
class GpuRow(Row):
    """A row of the CPU's table whose tensors lie on the device."""

    def random(self, seed: int) -> Tensor:
        return super().random(seed).cuda()


def row_of(channels: int, side: int, batch: int = BATCH) -> GpuRow:
    return GpuRow("l1", "float16", "channels_last", (batch, channels, side, side))


def run(module: nn.Module, x: Tensor, g: Tensor) -> None:
    """One forward and backward."""
    x.grad = None
    for parameter in module.parameters():
        parameter.grad = None
    module(x).backward(g)


def milliseconds(module: nn.Module, x: Tensor, g: Tensor) -> float:
    """Of one run, over RUNS in a row."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(RUNS):
        run(module, x, g)
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / RUNS


def paired(ours: nn.Module, other: nn.Module, x: Tensor, g: Tensor, rounds: int) -> dict[str, float]:
    """Ratio of our time to the other's over `rounds` pairs, after a warm-up, and the median times."""
    for module in (ours, other):
        for _ in range(WARM_UP):
            run(module, x, g)
    times = []
    for turn in range(rounds):
        found = {module: milliseconds(module, x, g) for module in ((ours, other) if turn % 2 else (other, ours))}
        times.append((found[ours], found[other]))
    ms = [statistics.median(column) for column in zip(*times, strict=True)]
    return {**spread([one / two for one, two in times]), "ours_ms": ms[0], "other_ms": ms[1]}


def copy_bandwidth(x: Tensor) -> float:
    """Bytes read and written per second by copies of `x`; the best of ten."""
    target, found = torch.empty_like(x), []
    for _ in range(10):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(RUNS):
            target.copy_(x)
        last.record()
        last.synchronize()
        found.append(first.elapsed_time(last) / RUNS / 1e3)
    return 2 * x.nbytes / min(found)


def peak_bytes(module: nn.Module, x: Tensor, g: Tensor) -> int:
    """What one forward and backward add to the allocated memory at most."""
    x.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(module, x, g)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(row: GpuRow, rounds: int, bandwidth: float) -> dict[str, Any]:
    """One row: speed, memory and values."""
    torch._dynamo.reset()
    ours, eager = row.ours().cuda(), batch_norm(row).cuda()
    compiled = torch.compile(batch_norm(row).cuda(), dynamic=False)
    x, g = row.random(1).requires_grad_(), row.random(0)
    found: dict[str, Any] = {"shape": list(row.shape)}
    for name, other in (("eager", eager), ("compiled", compiled)):
        figure = paired(ours, other, x, g, rounds)
        found[name] = {**figure, "bar": BARS[name], "held": figure["median"] <= BARS[name]}
    found["floor_share"] = floor_bytes(row) / bandwidth / (found["eager"]["ours_ms"] / 1e3)
    modules = {"ours": ours, "eager": eager, "compiled": compiled}
    found["peak"] = {name: peak_bytes(module, x, g) for name, module in modules.items()}
    del x, g
    errors = {"from_input": compared(row, False), "from_output": compared(row, True)}
    right = all(error <= 1 for part in errors.values() for error in part.values())
    found["values"] = {**errors, "held": right}
    return found


def hardware() -> dict[str, Any]:
    import triton

    card = torch.cuda.get_device_properties(0)
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": card.name,
        "memory_gib": round(card.total_memory / 2**30, 1),
        "multiprocessors": card.multi_processor_count,
        "capability": list(torch.cuda.get_device_capability(0)),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


def shown(found: dict[str, Any]) -> str:
    """One line of the table."""

    def ratio(name: str) -> str:
        part = found[name]
        mark = " " if part["held"] else "!"
        return f"{part['median']:6.2f} ({part['q1']:.2f} to {part['q3']:.2f}){mark}"

    parts = [found["values"][name] for name in ("from_input", "from_output")]
    worst = max(error for part in parts for error in part.values())
    peaks = " ".join(f"{found['peak'][name] / 2**20:6.0f}" for name in ("ours", "eager", "compiled"))
    return (
        f"{'x'.join(map(str, found['shape'])):16} {ratio('eager')} {ratio('compiled')} "
        f"{found['eager']['ours_ms']:7.3f} {found['floor_share']:6.0%} {peaks}  {worst:5.2f}"
    )


def held(found: dict[str, Any]) -> bool:
    return all(found[name]["held"] for name in (*BARS, "values"))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="pairs per figure")
    parser.add_argument("--output", type=Path, help="JSON to write")
    options = parser.parse_args(arguments)
    if not (torch.cuda.is_available() and is_installed("triton")):
        print("fused_norm_gpu needs a CUDA device and triton")
        return 3
    about = hardware()
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    bandwidth = copy_bandwidth(row_of(*SHAPES[0]).random(0))
    print(f"L1 + ReLU, batch {BATCH}, fp16, channels_last; copy {bandwidth / 1e12:.2f} TB/s; bars {BARS}")
    print(f"{'shape':16} {'to eager':21} {'to compiled':21}{'ours ms':>8} {'floor':>6} peak MiB: all three, error")
    found = []
    for channels, side in SHAPES:
        found.append(measure(row_of(channels, side), options.rounds, bandwidth))
        print(shown(found[-1]), flush=True)
    if options.output is not None:
        write_json(options.output, {"hardware": about, "batch": BATCH, "copy_bytes_per_s": bandwidth, "rows": found})
    return 0 if all(map(held, found)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
