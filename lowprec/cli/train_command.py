"""`lowprec train`: from a config to a run folder."""

from __future__ import annotations

import argparse

from lowprec.cli.terminal import progress, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `lowprec train`."""
    parser.add_argument("config", help="TOML file")
    parser.add_argument("-o", "--output", metavar="RUN", help="run folder to write")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="SECTION.KEY=VALUE", help="override single values"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint of the run folder")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and stop")


def run(args: argparse.Namespace) -> int:
    """Trains and says how it went."""
    from lowprec.errors import ConfigError
    from lowprec.train import Trainer, load_config

    config = load_config(args.config, args.set)
    if args.dry_run:
        say(config.to_toml().rstrip())
        return 0
    if args.output is None:
        raise ConfigError("train needs a run folder to write; give -o RUN")
    with progress("train") as report_progress:
        result = Trainer(config, progress=report_progress).fit(args.output, resume=args.resume)
    say(f"held-out accuracy {result.accuracy:.2%} after {result.landed} steps, {result.skipped} skipped")
    say(f"run: {args.output}")
    return 0
