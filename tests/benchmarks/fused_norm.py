"""How fast the fused norms train on a CPU, against nn.BatchNorm2d then nn.ReLU.

    python -m tests.benchmarks.fused_norm [--rounds N] [--output FILE.json] [--quick]

Every figure is the median, with quartiles, of ratios of two runs that followed each other, in turns which comes first,
in this process; a ratio below 1 means that ours is the faster (for ResNet-18: above 1, BatchNorm's time by ours). A run
is forward plus backward in training mode on random input, new in each pair. In the same process every row's values are
checked against float64 on twelve channels: gamma 1, -1, 0, 1e-3 with beta 0, 1, 5; y, dx, dgamma, dbeta.

The bars are about the default environment. glibc gives memory of more than 32 MiB back at once, so the large tensors
pay for their pages on every call; the column "heap" repeats the rows in a process told not to (MALLOC_ variables).
`floor` is the time that a copy takes for the bytes that cannot be avoided (read x, write y; read what was kept and dy,
write dx; the bits), as a share of the time that was needed. Memory is shown as the bytes that autograd keeps and as
what a process grew by. Exit status 1: a bar is missed or a value is wrong.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lowprec
from lowprec.artifacts import write_json
from lowprec.kernels import fused_norm, native, output_suffices
from lowprec.norm import L1BatchNorm2d, LInfBatchNorm2d, TopKBatchNorm2d
from tests.benchmarks.resnet18 import ResNet18
from tests.reference_kernels import Problem, bounds, doubtful, rows, solve

FAMILIES: dict[str, type[nn.Module]] = {"l1": L1BatchNorm2d, "linf": LInfBatchNorm2d, "top-10": TopKBatchNorm2d}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SHAPES = ((64, 64, 56, 56), (64, 256, 14, 14))
QUICK_SHAPES = ((4, 16, 12, 12),)
AFFINE = [(gamma, beta) for gamma in (1.0, -1.0, 0.0, 1e-3) for beta in (0.0, 1.0, 5.0)]
BYTES_BAR = 0.55
RESNET_BAR = 1.05
HEAP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(1 << 40), "MALLOC_TOP_PAD_": str(1 << 28)}
LAYERS = 4  # of the network whose process growth is measured


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    family: str
    dtype: str
    layout: str
    shape: tuple[int, ...]

    @property
    def bar(self) -> float:
        """The largest ratio to BatchNorm + ReLU that the row may have."""
        planes = self.layout == "contiguous"
        if self.family != "l1":
            return 0.7 if planes else 0.9
        if self.dtype == "float32":
            return 0.55 if planes else 0.7
        return 0.6 if planes else 0.75

    @property
    def name(self) -> str:
        return f"{self.family:7}{self.dtype:9} {self.layout:14}{'x'.join(map(str, self.shape)):13}"

    def random(self, seed: int) -> Tensor:
        made = torch.randn(self.shape, generator=torch.Generator().manual_seed(seed)).to(DTYPES[self.dtype])
        return made.to(memory_format=FORMATS[self.layout])

    def ours(self) -> nn.Module:
        return FAMILIES[self.family](self.shape[1], relu=True)


class Composed(nn.Module):
    """The eager formula: the same norm in separate operations, then nn.ReLU."""

    def __init__(self, row: Row) -> None:
        super().__init__()
        self.norm = FAMILIES[row.family](row.shape[1])
        self.norm.kernel_k = lambda: None

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(x))


def batch_norm(row: Row, inplace: bool = False) -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(row.shape[1]), nn.ReLU(inplace=inplace))


def seconds(module: nn.Module, x: Tensor, g: Tensor) -> float:
    """Of one forward and backward."""
    for parameter in module.parameters():
        parameter.grad = None
    x = x.detach().requires_grad_()
    started = time.perf_counter()
    module(x).backward(g)
    return time.perf_counter() - started


def spread(values: list[float]) -> dict[str, float]:
    q1, median, q3 = np.quantile(values, [0.25, 0.5, 0.75])
    return {"median": float(median), "q1": float(q1), "q3": float(q3)}


def paired(row: Row, ours: nn.Module, other: nn.Module, rounds: int) -> dict[str, float]:
    """Ratio of our time to the other's over `rounds` pairs, after one that warms up, and the median times in ms."""
    g, times = row.random(0), []
    for turn in range(rounds + 1):
        x = row.random(turn + 1)
        pair = (ours, other) if turn % 2 else (other, ours)
        found = {module: seconds(module, x, g) for module in pair}
        times.append((found[ours], found[other]))
    times = times[1:]
    ms = [1e3 * statistics.median(column) for column in zip(*times, strict=True)]
    return {**spread([one / two for one, two in times]), "ours_ms": ms[0], "other_ms": ms[1]}


def copy_bandwidth(row: Row) -> float:
    """Bytes read and written per second by a copy of one tensor of the row; the best of ten."""
    source, target = row.random(0), row.random(1)
    found = []
    for _ in range(10):
        started = time.perf_counter()
        target.copy_(source)
        found.append(time.perf_counter() - started)
    return 2 * source.nbytes / min(found)


def floor_bytes(row: Row) -> float:
    """x, y; z, dy, dx; L1's sign bits are written and read."""
    elements = float(np.prod(row.shape))
    return elements * (5 * DTYPES[row.dtype].itemsize + (2 / 8 if row.family == "l1" else 0))


def kept_bytes(module: nn.Module, x: Tensor) -> int:
    """What autograd keeps for the backward, each storage once."""
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x.detach().requires_grad_())
    del y
    return sum(kept.values())


def compared(row: Row, from_output: bool) -> dict[str, float]:
    """Largest error of y, dx, dgamma and dbeta on twelve channels, each as a share of its bound; over 1 is wrong.

    Where rounding may turn a ReLU, the kernel's own y decides; where it may turn a ReLU or a sign, dx is not compared.
    A channel whose k largest are in doubt is left out.
    """
    few = min(len(AFFINE), row.shape[1])
    x, g = row.random(100).requires_grad_(), row.random(101)
    pairs = [AFFINE[i % len(AFFINE)] for i in range(row.shape[1])]
    if from_output:
        pairs = [p if output_suffices(*map(torch.tensor, ([p[0]], [p[1]])), x.dtype) else (1.0, 0.0) for p in pairs]
    weight, bias = (torch.tensor(column, device=x.device).requires_grad_() for column in zip(*pairs, strict=True))
    k = {"l1": 0, "linf": 1, "top-10": 10}[row.family]
    y = fused_norm(x, weight, bias, k=k, relu=True, from_output=from_output).y
    y.backward(g)
    x_Cn, g_Cn, y_Cn, dx_Cn = (rows(t.detach()[:, :few].double().numpy()) for t in (x, g, y, x.grad))
    w_C, b_C, dw_C, db_C = (t.detach()[:few].double().cpu().numpy() for t in (weight, bias, weight.grad, bias.grad))
    ask = Problem(x_Cn, g_Cn, w_C, b_C, k=k, relu=True)
    want = solve(ask)
    place, channel = doubtful(ask, want, bounds(ask, want, row.dtype, from_output, likely=True))
    turned = (y_Cn > 0) != (want.y > 0)
    assert not (turned & ~place).any(), "the ReLU is elsewhere"
    assert place.mean() < 0.01, "too many places in doubt"
    assert channel.sum() <= few // 3, "too many channels whose largest deviations are in doubt"
    want = solve(ask, active=y_Cn > 0)
    off = bounds(ask, want, row.dtype, from_output, likely=True)
    # A turned sign moves the mean of the signs by 2 / n, and with it all of dx.
    signs = 2 * place.sum(1, keepdims=True) / x_Cn.shape[1] ** 2 if k == 0 else 0
    dx_off = off.dx + np.abs(ask.w * want.dweight[:, None]) / want.scale * ask.constant * signs
    tiny = np.finfo(float).tiny  # where 0 is asked for, 0 / 0 is no error
    errors = {
        "y": np.abs(y_Cn - want.y) / (off.y + tiny),
        "dx": np.where(place, 0, np.abs(dx_Cn - want.dx) / (dx_off + tiny)),
        "dgamma": np.abs(dw_C - want.dweight) / (off.dweight + tiny),
        "dbeta": np.abs(db_C - want.dbias) / (off.dbias + tiny),
    }
    return {name: float(error[~channel].max()) for name, error in errors.items()}


def measure(row: Row, rounds: int, compiled: nn.Module | None) -> dict[str, Any]:
    """One row: speed, bytes and values."""
    ours, theirs = row.ours(), batch_norm(row)
    x = row.random(1)
    found: dict[str, Any] = {"family": row.family, "dtype": row.dtype, "layout": row.layout, "shape": list(row.shape)}
    found |= {**paired(row, ours, theirs, rounds), "bar": row.bar}
    found["held"] = found["median"] <= row.bar
    fewer = max(2, rounds // 5)
    found["against_inplace"] = paired(row, ours, batch_norm(row, inplace=True), fewer)
    found["against_eager_formula"] = paired(row, ours, Composed(row), fewer)
    found["against_compiled"] = None if compiled is None else paired(row, ours, compiled, fewer)
    found["floor_share"] = floor_bytes(row) / copy_bandwidth(row) / (found["ours_ms"] / 1e3)
    kept = [kept_bytes(module, x) for module in (ours, theirs)]
    ratio = kept[0] / kept[1]
    found["kept"] = {"ours": kept[0], "other": kept[1], "ratio": ratio, "bar": BYTES_BAR, "held": ratio <= BYTES_BAR}
    errors = {"from_input": compared(row, False), "from_output": compared(row, True)}
    right = all(error <= 1 for part in errors.values() for error in part.values())
    found["values"] = {**errors, "held": right}
    return found


def table(rounds: int, shapes: tuple[tuple[int, ...], ...], compile_too: bool) -> Iterator[tuple[Row, dict[str, Any]]]:
    """Every row in turn."""
    for shape in shapes:
        for layout in FORMATS:
            for dtype in DTYPES:
                torch._dynamo.reset()
                compiled = torch.compile(batch_norm(Row("l1", dtype, layout, shape))) if compile_too else None
                for family in FAMILIES:
                    row = Row(family, dtype, layout, shape)
                    yield row, measure(row, rounds, compiled)


class Product(nn.Module):
    """Stands for a convolution: a layer that keeps its input."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor.to(x.dtype)


def growth(row: Row, kind: str) -> dict[str, int]:
    """Bytes that this process grew by, held after a forward of several layers, and at the peak; in a fresh process."""

    def resident(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

    network = nn.Sequential(
        *(nn.Sequential(Product(), row.ours() if kind == "ours" else batch_norm(row)) for _ in range(LAYERS))
    )
    x, g = row.random(0), row.random(1)
    small = x[:2, :, :4, :4].contiguous(memory_format=FORMATS[row.layout])
    network(small).sum().backward()  # loads what is loaded on first use
    before = resident("VmRSS:")
    y = network(x)
    held = resident("VmRSS:") - before
    y.backward(g)
    return {"held": held, "peak": resident("VmHWM:") - before}


def in_a_process(environment: dict[str, str], *arguments: str) -> Any:
    """What this module prints as JSON when it is run with `arguments`."""
    command = [sys.executable, "-m", "tests.benchmarks.fused_norm", *arguments]
    done = subprocess.run(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def resnet_step(rounds: int, batch: int, pixels: int) -> dict[str, Any]:
    """BatchNorm's time by ours over whole training steps: forward, loss, backward, SGD."""
    torch.manual_seed(0)
    theirs = ResNet18().train()
    ours, report = lowprec.convert(theirs, "l1")
    labels = torch.arange(batch) % 1000

    def stepper(model: nn.Module) -> Callable[[Tensor], float]:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

        def step(x: Tensor) -> float:
            started = time.perf_counter()
            loss = nn.functional.cross_entropy(model(x), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return time.perf_counter() - started

        return step

    steps, ratios, times = [stepper(model) for model in (ours, theirs)], [], []
    for turn in range(rounds + 1):
        x = torch.randn(batch, 3, pixels, pixels, generator=torch.Generator().manual_seed(turn))
        found = {index: steps[index](x) for index in ((0, 1) if turn % 2 else (1, 0))}
        ratios.append(found[1] / found[0])
        times.append((found[0], found[1]))
    ms = [1e3 * statistics.median(column) for column in zip(*times[1:], strict=True)]
    fused = sum(getattr(module, "act", None) is not None for module in ours.modules())
    figure = {**spread(ratios[1:]), "ours_ms": ms[0], "other_ms": ms[1], "bar": RESNET_BAR}
    return {**figure, "held": figure["median"] >= RESNET_BAR, "relus_fused": fused, "norms": len(report.changed)}


def hardware() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": name,
        "threads": torch.get_num_threads(),
        "instruction_sets": native.instruction_sets(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "libc": " ".join(platform.libc_ver()),
    }


def shown(row: Row, found: dict[str, Any], heap: float | None) -> str:
    """One line of the table."""

    def figure(part: dict[str, float] | None) -> str:
        return "     -" if part is None else f"{part['median']:6.2f}"

    values = max(error for name in ("from_input", "from_output") for error in found["values"][name].values())
    others = "".join(figure(found[f"against_{name}"]) for name in ("inplace", "eager_formula", "compiled"))
    return (
        f"{row.name}{found['median']:6.2f} ({found['q1']:.2f} to {found['q3']:.2f}) bar {row.bar:.2f} "
        f"{'held  ' if found['held'] else 'MISSED'}{others}{'     -' if heap is None else f'{heap:6.2f}'}"
        f"{100 * found['floor_share']:6.0f} %{found['kept']['ratio']:6.2f}{values:7.2f}"
        f"{'' if found['values']['held'] else ' WRONG'}{found['ours_ms']:8.2f}{found['other_ms']:8.2f}"
    )


HEAD = (
    f"{'':43}  ours / (BatchNorm + ReLU)         in pl.eager comp. heap  floor  kept  error ours ms theirs\n"
    "error: the largest, as a share of its bound"
)


def run(rounds: int, quick: bool) -> dict[str, Any]:
    """Everything, printed as it comes."""
    compile_too = not quick and shutil.which("g++") is not None
    results: dict[str, Any] = {"hardware": hardware(), "rounds": rounds, "rows": []}
    if not compile_too:
        print("not compared with torch.compile: " + ("--quick" if quick else "no C++ compiler here"))
    heap = {} if quick else in_a_process(HEAP, "--part", "rows", "--rounds", str(max(2, rounds // 3)))
    print(("sizes of --quick: the bars are not about them\n" if quick else "") + HEAD)
    for row, found in table(rounds, QUICK_SHAPES if quick else SHAPES, compile_too):
        found["heap"] = heap.get(row.name)
        results["rows"].append(found)
        print(shown(row, found, None if found["heap"] is None else found["heap"]["median"]), flush=True)
    results["growth"] = []
    shapes = {"float32": QUICK_SHAPES[0]} if quick else {"float32": SHAPES[0], "bfloat16": (128, *SHAPES[0][1:])}
    for dtype, shape in shapes.items():
        for layout in list(FORMATS)[: 1 if quick else None]:
            case = ["--part", "growth", "--case", json.dumps(["l1", dtype, layout, shape])]
            ours, theirs = (in_a_process({}, *case, "--kind", kind) for kind in ("ours", "batchnorm"))
            activation = int(np.prod(shape)) * DTYPES[dtype].itemsize
            found = {"dtype": dtype, "layout": layout, "shape": shape, "activation": activation, "layers": LAYERS}
            results["growth"].append({**found, "ours": ours, "other": theirs})
            text = ", ".join(f"{name} {ours[name] / theirs[name]:.2f}" for name in ours if theirs[name])
            mib = {name: f"{ours[name] / 2**20:.0f} of {theirs[name] / 2**20:.0f} MiB" for name in ours}
            print(f"process growth, {LAYERS} layers, {dtype} {layout} {activation / 2**20:.0f} MiB each: {text} {mib}")
    results["resnet18"] = resnet_step(1 if quick else max(31, rounds), *((2, 32) if quick else (8, 224)))
    print(f"ResNet-18 step, BatchNorm's time by ours: {results['resnet18']}")
    return results


def readme_table(results: dict[str, Any]) -> list[str]:
    """The lines of the README's table: the two sizes side by side."""
    lines = ["| | " + " | ".join(DTYPES) + " |", "|---|" + "---|" * len(DTYPES)]
    for family in FAMILIES:
        for layout in FORMATS:
            found = [row for row in results["rows"] if (row["family"], row["layout"]) == (family, layout)]
            cells = (" / ".join(f"{r['median']:.2f}" for r in found if r["dtype"] == dtype) for dtype in DTYPES)
            lines.append(f"| {family} + ReLU, {layout} | {' | '.join(cells)} |")
    return lines


def verdict(results: dict[str, Any], quick: bool) -> list[str]:
    """What was missed, in words; at the sizes of --quick only values count."""
    missed = []
    for row in results["rows"]:
        name = f"{row['family']} {row['dtype']} {row['layout']} {row['shape']}"
        if not row["values"]["held"]:
            missed.append(f"{name}: wrong values {row['values']}")
        if not row["held"] and not quick:
            missed.append(f"{name}: {row['median']:.3f} of BatchNorm + ReLU, the bar is {row['bar']}")
        if not row["kept"]["held"] and not quick:
            missed.append(f"{name}: keeps {row['kept']['ratio']:.3f} of its bytes, the bar is {BYTES_BAR}")
    if not results["resnet18"]["held"] and not quick:
        missed.append(f"ResNet-18: {results['resnet18']['median']:.3f} times as fast, the bar is {RESNET_BAR}")
    return missed


def main(arguments: list[str] | None = None) -> int:
    """Runs, prints the table, writes the JSON; 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="pairs of runs a figure is the median of")
    parser.add_argument("--output", type=Path, help="where to write the results as JSON")
    parser.add_argument("--quick", action="store_true", help="small sizes, two rounds: does it still run?")
    parser.add_argument("--part", choices=("rows", "growth"), help=argparse.SUPPRESS)
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.part == "growth":
        print(json.dumps(growth(Row(*args.case[:3], tuple(args.case[3])), args.kind)))
        return 0
    if args.part == "rows":
        every = [Row(f, d, m, s) for s in SHAPES for m in FORMATS for d in DTYPES for f in FAMILIES]
        print(json.dumps({row.name: paired(row, row.ours(), batch_norm(row), args.rounds) for row in every}))
        return 0
    results = run(2 if args.quick else args.rounds, args.quick)
    results["missed"] = verdict(results, args.quick)
    for line in results["missed"]:
        print(f"missed: {line}")
    if args.output:
        write_json(args.output, results)
    return 1 if results["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
