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
    parser.add_argument("--data", metavar="DATA", help="also judge on these samples: digits, a folder, an .npz")
    parser.add_argument("--manifest-sha256", metavar="HEX", help="the hash that manifest.json must have")
    parity_table.add_claims(parser)


def run(args: argparse.Namespace) -> int:
    """Verifies and prints the waterfall."""
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
    return parity_table.show(report, as_json=args.json)
