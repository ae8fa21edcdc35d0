"""`lowprec engine`: builds a bundle's engine on the machine that has its GPU, verifies it, renews the bundle."""

from __future__ import annotations

import argparse

from lowprec.cli import parity_table
from lowprec.cli.build_options import add_build_arguments, build_options_from
from lowprec.cli.terminal import note, progress, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `lowprec engine`."""
    parser.add_argument("bundle", help="bundle folder; renewed when everything is done")
    parser.add_argument("--target", default="tensorrt-rtx", metavar="T", help="tensorrt-rtx (default) or tensorrt")
    parser.add_argument(
        "--precision",
        metavar="P",
        help="of the ONNX file to build from (default: the replaced engine's, else narrowest)",
    )
    parser.add_argument(
        "--data",
        metavar="DATA",
        help="also judge on these samples: digits, an .npz, a folder of images or of CIFAR, tar shards",
    )
    parity_table.add_claims(parser)
    add_build_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Builds, verifies, prints the waterfall of the whole bundle."""
    from lowprec.export.rebuild import add_engine

    with progress("engine") as report_progress:
        bundle = add_engine(
            args.bundle,
            target=args.target,
            precision=args.precision,
            options=build_options_from(args),
            data=args.data,
            limits=parity_table.limits_from(args),
            progress=report_progress,
        )
    status = parity_table.show(bundle.parity, as_json=args.json)
    (say if not args.json else note)(f"bundle: {bundle.folder} (manifest SHA-256 {bundle.manifest_sha256})")
    return status
