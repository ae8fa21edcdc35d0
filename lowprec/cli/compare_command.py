"""`lowprec compare`: says whether two models are the same, up to the rounding that the candidate is allowed."""

from __future__ import annotations

import argparse

from lowprec.cli import parity_table
from lowprec.cli.terminal import progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `lowprec compare`."""
    parser.add_argument("reference", help="an .onnx file, a run folder, or MODULE:FACTORY; taken as the truth")
    parser.add_argument("candidate", help="the same kinds, or an .engine; judged against the reference")
    parser.add_argument(
        "--data", metavar="DATA", required=True, help="digits, an .npz, a folder of images or of CIFAR, tar shards"
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "fp16", "bf16"),
        help="what the candidate may be rounded to (default: its types)",
    )
    parity_table.add_claims(parser)


def run(args: argparse.Namespace) -> int:
    """Compares and prints the waterfall."""
    from lowprec.export.comparison import compare

    with progress("compare") as report_progress:
        report = compare(
            args.reference,
            args.candidate,
            args.data,
            precision=args.precision,
            limits=parity_table.limits_from(args),
            progress=report_progress,
        )
    return parity_table.show(report, as_json=args.json)
