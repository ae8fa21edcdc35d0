"""`lowprec check-resume`: proves on a config that a run that is killed and resumed ends in the same bits."""

from __future__ import annotations

import argparse

from lowprec.cli.terminal import note, print_json, progress, say
from lowprec.cli.train_command import add_config_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `lowprec check-resume`."""
    add_config_arguments(parser)
    parser.add_argument("--steps", type=int, default=12, help="length of the runs (default: 12)")
    parser.add_argument("--kills", type=int, default=2, help="how often the second one is killed (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which it is killed")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """Trains twice and compares; 1 when the two differ."""
    from lowprec.train import load_config
    from lowprec.train.resume_check import check_resume

    config = load_config(args.config, args.set)
    with progress("check-resume") as report_progress:
        found = check_resume(config, args.steps, args.kills, args.seed, report_progress)
    if args.json:
        print_json(found.to_json())
        return 0 if found.same else 1
    (say if found.same else note)(found.sentence)
    return 0 if found.same else 1
