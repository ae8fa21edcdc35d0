"""`lowprec study`: a grid of methods, batch sizes, precisions and seeds, with a table, figures and a page."""

from __future__ import annotations

import argparse
import os

from lowprec.cli.terminal import note, print_json, print_table, progress, say
from lowprec.cli.train_command import INTERRUPTED, add_config_arguments, silence, stopping


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `lowprec study`."""
    add_config_arguments(parser)
    parser.add_argument("-o", "--output", metavar="DIR", help="folder of the study; runs that are in it are kept")
    parser.add_argument("--workers", type=int, metavar="N", help="processes of one thread each; the number of cores")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and stop")
    parser.add_argument("--json", action="store_true", help="print one JSON document of what it shows")


def run(args: argparse.Namespace) -> int:
    """Makes what is missing, draws the conclusions, writes the page."""
    from lowprec.errors import ConfigError
    from lowprec.study import load_study, run_study, summarise, write_report

    study = load_study(args.config, args.set)
    if args.dry_run:
        say(study.to_toml().rstrip())
        return 0
    if args.output is None:
        raise ConfigError("study needs a folder to write; give -o DIR")
    if args.workers is not None and args.workers < 1:
        raise ConfigError(f"--workers is {args.workers}; give at least 1")
    first = int(os.environ.get("RANK", 0)) == 0
    with stopping(True) as stopped, progress("study, training steps") if first else silence() as report_progress:
        outcomes = run_study(study, args.output, args.workers, report_progress, lambda: bool(stopped))
    if outcomes is None:
        note(f"stopped by {stopped[0].name}; the runs that are finished are kept, the same command goes on")
        return INTERRUPTED[stopped[0]]
    if not first:
        return 0
    summary = summarise(study, outcomes)
    page = write_report(summary, args.output)
    if args.json:
        print_json(summary.to_json())
        return 0
    for precision in study.grid.precisions:
        batches = [str(batch) for batch in study.grid.batch_sizes]
        rows = [[name, *cells] for name, cells in summary.rows(precision)]
        print_table([f"{precision}: test accuracy, %", *batches], rows)
        say("")
    answers = [
        [a.says, a.precision, a.difference.percent() if a.difference else "", a.verdict] for a in summary.answers
    ]
    print_table(["question", "precision", "difference, points", "answer"], answers)
    say(f"page: {page}")
    return 0
