"""`lowprec train`: from a config to a run folder."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lowprec.cli.terminal import note, print_json, progress, say

INTERRUPTED = {signal.SIGTERM: 143, signal.SIGINT: 130}
"""The exit status after each signal that saves and stops a run: 128 and its number, as shells have it."""


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the config and what overrides it."""
    parser.add_argument("config", help="TOML file")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="SECTION.KEY=VALUE", help="override single values"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `lowprec train`."""
    add_config_arguments(parser)
    parser.add_argument("-o", "--output", metavar="RUN", help="run folder to write")
    parser.add_argument(
        "--resume", action="store_true", help="go on from the last checkpoint of the run folder, if there is one"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and stop")
    parser.add_argument("--json", action="store_true", help="print one JSON document about the run")


def run(args: argparse.Namespace) -> int:
    """Trains and says how it went."""
    from lowprec.errors import ConfigError
    from lowprec.train import Trainer, load_config
    from lowprec.train.processes import is_alone, is_first

    config = load_config(args.config, args.set)
    if args.dry_run:
        say(config.to_toml().rstrip())
        return 0
    if args.output is None:
        raise ConfigError("train needs a run folder to write; give -o RUN")
    with stopping(is_alone()) as stopped, progress("train") if is_first() else silence() as report_progress:
        trainer = Trainer(config, progress=report_progress, note=note)
        result = trainer.fit(args.output, resume=args.resume, stop=lambda: bool(stopped))
    if not is_first():
        return 0
    if args.json:
        print_json(result.to_json())
    if not result.finished:
        note(f"stopped by {stopped[0].name} after step {result.steps}; a checkpoint is saved, go on with --resume")
        return INTERRUPTED[stopped[0]]
    if args.json:
        return 0
    if result.resumed_at == result.steps and args.resume:
        say(f"{args.output} is finished already, after {result.steps} steps; nothing was changed")
    say(f"held-out accuracy {result.accuracy:.2%} after {result.landed} steps, {result.skipped} skipped")
    say(f"run: {args.output}")
    return 0


@contextmanager
def stopping(active: bool) -> Iterator[list[signal.Signals]]:
    """Collects the signals that ask a run to save and stop; the second one acts as it would have without this.

    Args:
        active: whether to; among several processes the first to leave would let the others wait for it.
    """
    caught: list[signal.Signals] = []
    before: dict[signal.Signals, Callable[..., Any] | int | None] = {}

    def ask(number: int, frame: object) -> None:
        caught.append(signal.Signals(number))
        note(f"{signal.Signals(number).name}: finishing what is in progress; once more to leave at once")
        for name, handler in before.items():
            signal.signal(name, handler)

    try:
        if active:
            before |= {name: signal.signal(name, ask) for name in INTERRUPTED}
        yield caught
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


@contextmanager
def silence() -> Iterator[None]:
    """In place of `progress`, for the processes that do not talk."""
    yield
