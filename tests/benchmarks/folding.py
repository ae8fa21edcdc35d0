"""What folding costs at export and gains at run time, against a bare `torch.onnx.export` of the same network.

    python -m tests.benchmarks.folding [--only export|latency] [--network NAME] [--quick] [--output FILE.json]

Export: ResNet-50 at 224 pixels. Each measurement is a process of its own that has imported everything, built the
network and exported a network of one convolution before the clock starts; memory is the peak resident size of the
whole process. The kinds of work follow each other in turns, and a figure is the median, with quartiles, of the ratios
within one turn. One thread: the bare export uses no more, and on a machine with other work the threads of the fold's
checks wait for each other longer than they compute. `fold` is fold alone; `emit` is fold plus `emit_onnx`, whose result
holds the weights, and `proto` the bare export made to hold them too (`model_proto`).

Latency: onnxruntime with one thread, the folded file against the bare export's, both after onnxruntime's own
optimisations, in the time of that thread, which is what passes when nothing else wants the core. Two sessions of one
and the same file differ by a hundredth, depending on where their memory happens to lie, so a round makes both anew, in
random order, and takes the median ratio of pairs of runs in random order; a figure is the median of the rounds with its
95 % interval (order statistics), and rounds go on until that is tight or the time is up.

Without --network and --quick the results go to results/folding.json, the part that was measured; --network with
--output replaces one network's rows. Exit status 1: a bar is missed, or the two files do not compute the same.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.benchmarks.resnet18 import ResNet18

HERE = "tests.benchmarks.folding"
RESULTS = Path(__file__).parent / "results" / "folding.json"
KINDS = ("bare", "fold", "emit")
EXPORT_BARS = {"emit seconds": 1.3, "emit peak": 1.3}  # fold and emission together, as shares of the bare export's
LATENCY_BAR = 1.02  # the upper end of the interval, as a share of the bare file's
SPEEDUP_BARS = {"repvgg": 1.1, "mobileone": 1.1}  # by the network's name, the median
MAX_OUTPUT_ERROR = 1e-3  # of the largest output: float32 in another order of summation, and no wrong network
BLOCK = 2e-3  # seconds: fast networks run several times in a row
PAIRS = 9  # in a round
ROUNDS = 9  # at least
HALF_WIDTH = 0.005  # of the interval, at which rounds stop


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut, in torchvision's form."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        after = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(before, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, after, 1, bias=False), nn.BatchNorm2d(after)
        self.relu, self.downsample = nn.ReLU(inplace=True), None
        if stride != 1 or before != after:
            self.downsample = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


def resnet50() -> nn.Module:
    """ResNet-18's stem and forward with stages of bottlenecks; random weights and statistics."""
    torch.manual_seed(0)
    network, before = ResNet18(), 64
    for index, (width, blocks) in enumerate(zip((64, 128, 256, 512), (3, 4, 6, 3), strict=True), 1):
        stage = nn.Sequential(Bottleneck(before, width, 1 if index == 1 else 2))
        before = 4 * width
        stage.extend(Bottleneck(before, width, 1) for _ in range(blocks - 1))
        setattr(network, f"layer{index}", stage)
    network.fc = nn.Linear(before, 1000)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for scale, shift in ((module.weight, module.bias), (module.running_var, module.running_mean)):
                nn.init.uniform_(scale, 0.5, 1.5)
                nn.init.normal_(shift, 0, 0.1)
    return network.eval()


def bare_export(network: nn.Module, x: Tensor) -> torch.onnx.ONNXProgram:
    """What one would do without this library; with two samples, since torch.export takes a batch of one for fixed."""
    batch, x = ({0: torch.export.Dim("batch")},), torch.cat([x, x]) if len(x) == 1 else x
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(network, (x,), dynamo=True, dynamic_shapes=batch, verbose=False)
    assert program is not None
    return program


def worker(kind: str) -> Callable[[nn.Module, Tensor], Any]:
    """One of `KINDS`; a process that exports bare does not import this library."""
    if kind == "bare":
        return bare_export
    from lowprec.export.emit import emit_onnx
    from lowprec.export.folding import fold

    if kind == "fold":
        return lambda network, x: fold(network, (x,))
    return lambda network, x: emit_onnx(fold(network, (x,))[0])


def peak_mib() -> float:
    """Of this process. Not ru_maxrss, which on Linux begins with the size of the process that started this one."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def export_once(kind: str, pixels: int) -> dict[str, float]:
    """Seconds and peak of one kind of work, in a fresh process."""
    work = worker(kind)
    small, few = nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), torch.randn(2, 3, 8, 8)
    bare_export(small, few)
    work(small, few)
    network, x = resnet50(), torch.randn(1, 3, pixels, pixels)
    before, started, cpu = peak_mib(), time.perf_counter(), time.process_time()
    made = work(network, x)
    found = {"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu}
    found |= {"before": before, "peak": peak_mib()}
    if kind == "bare":
        assert made.model_proto.graph.node
        found |= {"proto seconds": time.perf_counter() - started, "proto peak": peak_mib()}
    return found


def in_a_process(kind: str, pixels: int, threads: int) -> dict[str, float]:
    """`export_once` in a fresh process with so many threads."""
    command = [sys.executable, "-m", HERE, "--child", kind, "--pixels", str(pixels)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def export(turns: int, pixels: int, threads: int) -> dict[str, Any]:
    """Every kind in each turn, the first one in turns, and the ratios to the bare export."""
    from tests.benchmarks.fused_norm import spread

    def shown(found: dict[str, float]) -> str:
        return f"{found['median']:.2f} ({found['q1']:.2f} to {found['q3']:.2f})"

    runs: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for turn in range(turns):
        for kind in (*KINDS[turn % 3 :], *KINDS[: turn % 3]):
            runs[kind].append(in_a_process(kind, pixels, threads))
    table = {kind: {name: spread([run[name] for run in made]) for name in made[0]} for kind, made in runs.items()}
    print(f"ResNet-50 at {pixels} pixels, {turns} turns, {threads} thread(s)")
    for kind, found in table.items():
        print(f"{kind:6}" + ", ".join(f"{name} {shown(value)}" for name, value in found.items()), "(s, MiB)")
    ratios: dict[str, dict[str, Any]] = {}
    for kind, base in itertools.product(KINDS[1:], ("seconds", "cpu", "peak", "proto seconds", "proto peak")):
        name, label = base.removeprefix("proto "), f"{kind} {base.replace('proto', 'by proto')}"
        pairs = zip(runs[kind], runs["bare"], strict=True)
        ratio: dict[str, Any] = spread([ours[name] / bare[base] for ours, bare in pairs])
        if bar := EXPORT_BARS.get(label):
            ratio |= {"bar": bar, "held": ratio["median"] <= bar}
        note = f" bar {bar} {'held' if ratio['held'] else 'MISSED'}" if bar else ""
        print(f"{label:22}{shown(ratio)} of the bare export{note}", flush=True)
        ratios[label] = ratio
    return {"turns": turns, "pixels": pixels, "export_threads": threads, "table": table, "ratios": ratios}


def session(model: bytes) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def seconds(called: Any, x: np.ndarray, calls: int) -> float:
    """Of one call, the mean of several in a row."""
    feed = {called.get_inputs()[0].name: x}
    started = time.thread_time()
    for _ in range(calls):
        called.run(None, feed)
    return (time.thread_time() - started) / calls


def median_interval(values: list[float]) -> tuple[float, float]:
    """95 % interval of the median, from order statistics; all of them where there are fewer than six."""
    ordered, n = sorted(values), len(values)
    rank = max(0, int(n / 2 - 0.98 * math.sqrt(n)))
    return ordered[rank], ordered[n - 1 - rank]


def one_round(models: dict[str, bytes], x: np.ndarray, pairs: int, chance: random.Random) -> dict[str, list[float]]:
    """Seconds of each file in every pair, of sessions made for this round."""
    names = chance.sample(sorted(models), 2)
    sessions = {name: session(models[name]) for name in names}
    for _ in range(3):
        warm = max(seconds(made, x, 1) for made in sessions.values())
    calls = max(1, round(BLOCK / warm))
    found: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(pairs):
        for name in chance.sample(names, 2):
            found[name].append(seconds(sessions[name], x, calls))
    return found


def compared(models: dict[str, bytes], x: np.ndarray, quick: bool, cap: float) -> dict[str, Any]:
    """The folded file's time as a share of the bare one's, and the medians in ms."""
    times: dict[str, list[float]] = {name: [] for name in models}
    chance, medians, started = random.Random(0), list[float](), time.monotonic()
    while True:
        found = one_round(models, x, 3 if quick else PAIRS, chance)
        medians.append(statistics.median(a / b for a, b in zip(found["folded"], found["bare"], strict=True)))
        for name, values in found.items():
            times[name].extend(values)
        low, high = median_interval(medians)
        tight = len(medians) >= ROUNDS and (high - low) / 2 <= HALF_WIDTH
        if tight or quick or time.monotonic() - started > cap:
            break
    ms = {f"{name}_ms": 1e3 * statistics.median(values) for name, values in times.items()}
    return {"median": statistics.median(medians), "low": low, "high": high, "rounds": len(medians), **ms}


def output_error(models: dict[str, bytes], x: np.ndarray) -> float:
    """Largest difference of the two files' outputs, by the largest output; infinite where one is not finite."""
    made = {name: session(model) for name, model in models.items()}
    folded, bare = (made[name].run(None, {made[name].get_inputs()[0].name: x}) for name in ("folded", "bare"))
    errors = [np.abs(a.astype(np.float64) - b).max() / np.abs(b).max() for a, b in zip(folded, bare, strict=True)]
    return float(max(errors)) if np.isfinite(errors).all() else math.inf


def networks(only: str | None, quick: bool) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Name, network and example of every architecture, each with both kinds of gammas."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from architectures import ARCHITECTURES, example, randomise

    if only not in (None, *ARCHITECTURES):
        raise SystemExit(f"no network is called {only}; there are {', '.join(ARCHITECTURES)}")
    for name, made in ARCHITECTURES.items():
        for signs in ("positive", "mixed") if only in (None, name) else ():
            network = randomise(made.make(1 if quick else made.bench_width), signs).eval()
            yield f"{name}, {signs}", network, example(made, bench=not quick)


def latency(only: str | None, quick: bool, cap: float) -> dict[str, Any]:
    """Every network's figure by its name and kind of gammas, printed as it comes."""
    rows: dict[str, Any] = {}
    for name, network, x in networks(only, quick):
        models = {
            "bare": bare_export(network, x).model_proto.SerializeToString(),
            "folded": worker("emit")(network, x).SerializeToString(),
        }
        row = {"output_error": output_error(models, x.numpy()), **compared(models, x.numpy(), quick, cap)}
        speedup = SPEEDUP_BARS.get(name.partition(",")[0], 0.0)
        row |= {"same": row["output_error"] <= MAX_OUTPUT_ERROR, "bar": LATENCY_BAR, "speedup_bar": speedup}
        row["held"] = row["high"] <= LATENCY_BAR and 1 / row["median"] >= speedup
        rows[name] = row
        print(
            f"{name:32}{row['median']:7.3f} ({row['low']:.3f} to {row['high']:.3f}){row['rounds']:4} rounds "
            f"{'held  ' if row['held'] else 'MISSED'}{row['folded_ms']:9.3f} of {row['bare_ms']:.3f} ms, "
            f"error {row['output_error']:.1e}{'' if row['same'] else ' WRONG'}",
            flush=True,
        )
    return rows


def readme_lines(results: dict[str, Any]) -> list[str]:
    """What the README says of a stored run."""
    ratios, rows = results["export"]["ratios"], results["latency"]["rows"]
    families = {name.partition(",")[0] for name in rows}
    faster = {name: max(row["median"] for key, row in rows.items() if key.startswith(f"{name},")) for name in families}
    return [
        f"{ratios['emit seconds']['median']:.2f} times the time and {ratios['emit peak']['median']:.2f} times the peak",
        f"{len(families)} families is slower than the unfolded one by more than {100 * (LATENCY_BAR - 1):.0f} %",
        *(f"{name} {faster[name]:.2f}" for name in sorted(SPEEDUP_BARS)),
    ]


def verdict(results: dict[str, Any], quick: bool) -> list[str]:
    """What was missed, in words; at the sizes of --quick only values count."""
    missed = []
    for name, ratio in results.get("export", {}).get("ratios", {}).items():
        if not ratio.get("held", True) and not quick:
            missed.append(f"{name}: {ratio['median']:.2f} of the bare export's, the bar is {ratio['bar']}")
    for name, row in results.get("latency", {}).get("rows", {}).items():
        if not row["same"]:
            missed.append(f"{name}: the two files differ by {row['output_error']:.1e}")
        if not row["held"] and not quick:
            missed.append(
                f"{name}: {row['median']:.3f} of the bare file's time, at most {row['high']:.3f}; the bar is at most "
                f"{row['bar']}" + (f" and {row['speedup_bar']} times as fast" if row["speedup_bar"] else "")
            )
    return missed


def main(arguments: list[str] | None = None) -> int:
    """Runs, prints the tables, writes the JSON; 1 when a bar is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=("export", "latency"))
    parser.add_argument("--network", help="the only architecture whose latency is measured")
    parser.add_argument("--turns", type=int, default=7, help="of the export, a process per kind in each")
    parser.add_argument("--threads", type=int, default=1, help="of the export's processes")
    parser.add_argument("--cap", type=float, default=40, help="seconds after which a latency is not refined further")
    parser.add_argument("--output", type=Path, help="where to write the results as JSON")
    parser.add_argument("--quick", action="store_true", help="small images, one turn, one round: does it still run?")
    parser.add_argument("--child", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--pixels", type=int, default=224, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.child:
        print(json.dumps(export_once(args.child, args.pixels)))
        return 0
    import onnx
    import onnxruntime

    from tests.benchmarks.fused_norm import hardware

    output = args.output or (None if args.quick or args.network else RESULTS)
    results: dict[str, Any] = json.loads(output.read_text()) if output and output.exists() else {}
    described = {**hardware(), "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}
    print(described)
    if args.quick:
        print("sizes of --quick: the bars are not about them")
    if args.only != "latency" and not args.network:
        turns, pixels = (1, 64) if args.quick else (args.turns, args.pixels)
        results["export"] = {**described, **export(turns, pixels, args.threads)}
    if args.only != "export":
        known = results.get("latency", {}).get("rows", {}) if args.network else {}
        results["latency"] = {**described, "rows": known | latency(args.network, args.quick, args.cap)}
    results["missed"] = verdict(results, args.quick)
    for line in results["missed"]:
        print(f"missed: {line}")
    if output:
        from lowprec.artifacts import write_json

        output.parent.mkdir(exist_ok=True)
        write_json(output, results)
    return 1 if results["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
