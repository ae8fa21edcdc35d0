"""`lowprec demo`: the whole way on the embedded digits, once with L1 batch norm and once with MimicNorm."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from lowprec.cli import parity_table
from lowprec.cli.terminal import note, print_table, progress, say

METHODS = ("l1", "mimic_norm")

CONFIG = """
[model]
factory = "lowprec.models:small_resnet"

[precision]
mode = "fp16-master"

[data]
source = "digits"
batch_size = 64

[optim]
name = "sgd"
lr = 0.1
schedule = "cosine"
warmup = 40

[run]
epochs = 20
seed = 0
"""

MIN_ACCURACY = 0.98


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `lowprec demo`."""
    parser.add_argument("-o", "--output", default="lowprec-demo", metavar="DIR", help="folder (default: lowprec-demo)")
    parser.add_argument(
        "--epochs",
        type=int,
        metavar="N",
        help="train shorter or longer than the 20 epochs that the accuracy bar is for",
    )


def run(args: argparse.Namespace) -> int:
    """Runs both pipelines; 0 when both reach the accuracy and hold parity."""
    from lowprec.artifacts import new_folder, write_text
    from lowprec.data import load_data
    from lowprec.export.bundle import is_bundle
    from lowprec.export.page import Part, render_page
    from lowprec.export.pipeline import export
    from lowprec.export.sources import open_source
    from lowprec.train import Trainer, parse_config

    output, started = Path(args.output), time.monotonic()
    overrides = [f"run.epochs={args.epochs}"] if args.epochs else []
    results, parts = {}, []
    with new_folder(output, "the demo", lambda folder: is_bundle(folder / METHODS[0] / "bundle")) as work:
        for method in METHODS:
            config = parse_config(CONFIG, [f"method.name={method}", *overrides])
            run_folder, bundle_folder = work / method / "run", work / method / "bundle"
            run_folder.parent.mkdir()
            with progress(f"train {method}") as report_progress:
                results[method] = Trainer(config, progress=report_progress).fit(run_folder)
            source = open_source(str(run_folder))
            samples = load_data("digits", split="test")
            with progress(f"export {method}") as report_progress:
                bundle = export(
                    source.module,
                    source.inputs_for(samples),
                    bundle_folder,
                    precision="fp16",
                    targets=("onnx", "tensorrt-rtx"),
                    calibration=samples,
                    facts={"source": f"lowprec demo, {method}", **source.facts},
                    progress=report_progress,
                )
            parts.append(Part(method, bundle.parity, bundle.fold_report, bundle.manifest["provenance"]))
        write_text(work / "report.html", render_page(parts))
    for part in parts:
        parity_table.print_waterfall(part.parity, f"{part.title}: from the trained network to what is shipped")
    rows = [
        (
            p.title,
            f"{results[p.title].accuracy:.2%}",
            str(results[p.title].skipped),
            p.parity.verdict,
            str(output / p.title / "bundle"),
        )
        for p in parts
    ]
    print_table(("method", "held-out accuracy", "skipped steps", "parity", "bundle"), rows)
    say(f"report: {output / 'report.html'} ({time.monotonic() - started:.0f} s)")
    accurate = all(result.accuracy >= MIN_ACCURACY for result in results.values())
    if not accurate:
        note(f"lowprec: held-out accuracy is below {MIN_ACCURACY:.0%}")
    return 0 if accurate and all(part.parity.passed for part in parts) else 1
