"""The command line: one subcommand is one call of the Python interface.

Exit status: 0 done and parity holds, 1 parity fails or a check says no, 2 unusable input (nothing was written),
3 something asked for by name is not available here. Every module of this package has `add_arguments` and `run` and
imports what it needs inside `run`, so that `--help` is instant and `verify` needs no torch.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from typing import NoReturn

import lowprec
from lowprec.errors import LowprecError

COMMANDS: dict[str, str] = {
    "demo": "train, calibrate, export and verify on the embedded digits; says where report.html is",
    "train": "train from a TOML config into a run folder",
    "export": "turn a run, a MODULE:FACTORY or an ONNX file into a bundle of verified artefacts",
    "engine": "build a bundle's engine where its GPU is, verify it, and renew the bundle",
    "verify": "check a bundle against its float64 reference on every backend that runs here",
    "compare": "judge whether two models are the same up to rounding",
    "check-resume": "prove on a config that a killed and resumed run ends in the same bits",
    "calibrate": "measure ranges and half-precision headroom on data",
    "inspect": "say what a file, a bundle or a run is",
    "study": "train a grid of methods, batch sizes, precisions and seeds alike; table, figures, page",
    "migrate": "show the edits that move a script over from apex.amp or torch.cuda.amp",
    "doctor": "versions, devices, and which backends work here",
}
"""Subcommand name -> one line of help; the module `lowprec.cli.<name>_command` holds the rest."""

INTERNAL_ERROR = 70  # EX_SOFTWARE of sysexits.h: not one of the four statuses that scripts act on


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    try:
        return int(_module(args.command).run(args))
    except LowprecError as error:
        return _complain(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _complain("interrupted; nothing half-written was left behind", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains when it flushes
        return 0
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        return _complain(f"cannot read or write{where}: {error.strerror or error}; nothing half-written was left", 2)
    except MemoryError:
        return _complain("out of memory; use fewer samples or a smaller batch", 2)
    except Exception:
        traceback.print_exc()
        return _complain("internal error, a defect of lowprec; please report the lines above", INTERNAL_ERROR)


def build_parser() -> argparse.ArgumentParser:
    """The parser with every subcommand."""
    parser = _Parser(prog="lowprec", description="Train in half precision, export folded, prove parity.")
    parser.add_argument("--version", action="version", version=f"lowprec {lowprec.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    for name, summary in COMMANDS.items():
        sub = subparsers.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        _module(name).add_arguments(sub)
    return parser


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are one line and leave with status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _module(command: str):  # type: ignore[no-untyped-def]  # a module with add_arguments and run
    return importlib.import_module(f"lowprec.cli.{command.replace('-', '_')}_command")


def _complain(message: str, status: int) -> int:
    print(f"lowprec: {' '.join(message.split())}", file=sys.stderr)
    return status
