"""`lowprec verify`: is this bundle what was trained? Runs where torch is absent."""

from __future__ import annotations

import argparse

from lowprec.cli import parity_table
from lowprec.cli.terminal import progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `lowprec verify`."""
    parser.add_argument("bundle", help="bundle folder")
    parser.add_argument(
        "--backend", nargs="+", metavar="NAME", help="run these only, and fail (3) where one is not available"
    )
    parser.add_argument(
        "--data",
        metavar="DATA",
        help="also judge on these samples: digits, an .npz, a folder of images or of CIFAR, tar shards",
    )
    parser.add_argument("--manifest-sha256", metavar="HEX", help="the hash that manifest.json must have")
    parser.add_argument(
        "--bench",
        nargs="*",
        type=int,
        metavar="BATCH",
        help="also time every artefact on every backend that runs it here, at these batch sizes (default: 1)",
    )
    parser.add_argument("--bench-seconds", type=float, default=1.0, metavar="S", help="at most, per row (default: 1)")
    parity_table.add_claims(parser)


def run(args: argparse.Namespace) -> int:
    """Verifies, times where that is asked for, and prints the waterfall."""
    import dataclasses

    from lowprec.export.latency import bench_bundle
    from lowprec.export.verification import verify

    with progress("verify") as report_progress:
        report = verify(
            args.bundle,
            backends=args.backend,
            data=args.data,
            manifest_sha256=args.manifest_sha256,
            limits=parity_table.limits_from(args),
            progress=report_progress,
        )
    if args.bench is not None:
        with progress("bench") as report_progress:
            bench = bench_bundle(args.bundle, args.backend, args.bench or [1], args.bench_seconds, report_progress)
        report = dataclasses.replace(report, facts=report.facts | {"bench": bench})
    return parity_table.show(report, as_json=args.json)
