"""`lowprec migrate`: the edits that move a script over from apex.amp or torch.cuda.amp."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from lowprec.cli.terminal import note, print_diff, print_json, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `lowprec migrate`."""
    parser.add_argument("script", help="a Python file that uses apex.amp, torch.cuda.amp or torch.amp")
    parser.add_argument("--write", action="store_true", help="edit the file (default: show the edits as a diff)")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """Shows or makes the edits; 1 when something is left to do by hand."""
    from lowprec.artifacts import write_text
    from lowprec.compat.migrate import migrate
    from lowprec.errors import DataError

    path = Path(args.script)
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8 text") from None
    found = migrate(text, str(path))
    if args.write and found.after != found.before:
        write_text(path, found.after)
    if args.json:
        left = [asdict(item) for item in found.left]
        print_json({"script": str(path), "diff": found.diff(path.name), "left": left, "written": args.write})
        return 1 if found.left else 0
    if found.after == found.before and not found.left:
        say(f"{path} uses neither apex.amp nor torch's; there is nothing to do")
    elif not args.write:
        print_diff(found.diff(path.name))
    else:
        say(f"{path} is written")
    for item in found.left:
        note(f"{path}:{item.line}: {item.what}")
    return 1 if found.left else 0
