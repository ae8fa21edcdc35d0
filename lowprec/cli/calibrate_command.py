"""`lowprec calibrate`: ranges and half-precision headroom of a run on data."""

from __future__ import annotations

import argparse

from lowprec.cli.inspect_command import bits_text
from lowprec.cli.terminal import print_table, progress, say

_BATCH = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `lowprec calibrate`."""
    parser.add_argument("model", help="a run folder, or MODULE:FACTORY")
    parser.add_argument(
        "--data", metavar="DATA", help="digits, a folder of images, or an .npz (default: the run's own)"
    )
    parser.add_argument("-o", "--output", metavar="FILE", help="where to write calibration.json")


def run(args: argparse.Namespace) -> int:
    """Calibrates, writes the file if asked, prints the tightest tensors."""
    from lowprec.calibration import calibrate
    from lowprec.data import load_data
    from lowprec.errors import ConfigError
    from lowprec.export.sources import open_source

    source = open_source(args.model)
    data = args.data or source.data
    if data is None:
        raise ConfigError(f"{args.model} names no data of its own; give --data")
    samples = load_data(data)
    with progress("calibrate") as report_progress:
        result = calibrate(source.module, source.batches(samples, _BATCH), progress=report_progress)
    if args.output:
        result.save(args.output)
    largest = sorted(result.outputs.items(), key=lambda item: -item[1]["absmax"])[:10]
    rows = [(name, f"{found['absmax']:.4g}", bits_text(found["fp16_headroom_bits"])) for name, found in largest]
    print_table(("output of", "absmax", "headroom in bits"), rows, "the ten largest outputs")
    where = f": {args.output}" if args.output else ""
    say(f"{len(result.outputs)} layers on {result.data['samples']} samples of {data}{where}")
    return 0
