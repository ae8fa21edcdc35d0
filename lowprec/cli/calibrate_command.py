"""`lowprec calibrate`: ranges, half-precision headroom, and how far running statistics are from the exact ones."""

from __future__ import annotations

import argparse
from pathlib import Path

from lowprec.cli.inspect_command import bits_text
from lowprec.cli.terminal import print_table, progress, say

_BATCH = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `lowprec calibrate`."""
    parser.add_argument("model", help="a run folder, or MODULE:FACTORY")
    parser.add_argument(
        "--data",
        metavar="DATA",
        help="digits, an .npz, a folder of images or of CIFAR, tar shards (default: the run's own)",
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="where to write calibration.json")


def run(args: argparse.Namespace) -> int:
    """Calibrates, writes the file if asked, prints the largest tensors and the drift of running statistics."""
    from lowprec.artifacts import write_json
    from lowprec.calibration import calibrate, recompute_batch_stats
    from lowprec.data import load_data
    from lowprec.errors import ConfigError, UnsupportedError
    from lowprec.export.sources import open_source
    from lowprec.report import ChangeReport

    source = open_source(args.model)
    data = args.data or source.data
    if data is None:
        raise ConfigError(f"{args.model} names no data of its own; give --data")
    samples = load_data(data)
    batches = source.batches(samples, _BATCH)
    with progress("ranges") as report_progress:
        result = calibrate(source.module, batches, progress=report_progress)
    try:
        with progress("running statistics") as report_progress:
            _, statistics = recompute_batch_stats(source.module, batches, progress=report_progress)
    except UnsupportedError:
        statistics = ChangeReport()  # no norm keeps any
    if args.output:
        write_json(Path(args.output), result.to_dict() | {"running_statistics": statistics.to_dict()})
    largest = sorted(result.outputs.items(), key=lambda item: -item[1]["absmax"])[:10]
    rows = [(name, f"{found['absmax']:.4g}", bits_text(found["fp16_headroom_bits"])) for name, found in largest]
    print_table(("output of", "absmax", "headroom in bits"), rows, "the ten largest outputs")
    print_table(("norm", "running statistics"), [(row.name, row.reason) for row in statistics.changed])
    where = f": {args.output}" if args.output else ""
    say(f"{len(result.outputs)} layers on {result.data['samples']} samples of {data}{where}")
    return 0
