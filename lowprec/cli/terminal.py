"""What a person sees: tables, progress and verdicts, through rich on a terminal and as plain lines elsewhere.

rich is imported when it is there and needed; `verify` and `doctor` run without it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lowprec.artifacts import json_text

Progress = Callable[[int, int], None]
"""progress(done, total), the callback that every long function of the library takes."""

_PLAIN_EVERY_SECONDS = 5.0
_STYLES = {"pass": "green", "warn": "yellow", "fail": "bold red", "inconclusive": "yellow"}


def say(text: str) -> None:
    """One line of result on stdout."""
    print(text, flush=True)


def note(text: str) -> None:
    """One line about what is going on, on stderr, so that stdout stays the result alone."""
    print(text, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """The one JSON document of `--json`."""
    sys.stdout.write(json_text(value))
    sys.stdout.flush()


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]], title: str = "") -> None:
    """A table: drawn on a terminal, aligned columns when piped; nothing without rows."""
    if not rows:
        return
    if _is_terminal(sys.stdout) and (rich := _rich_console(stderr=False)):
        from rich.markup import escape
        from rich.table import Table

        table = Table(*[escape(h) for h in headers], title=escape(title) or None, title_justify="left")
        for row in rows:
            table.add_row(*[_styled(escape(cell)) for cell in row])
        rich.print(table)
        return
    if title:
        say(title)
    widths = [max(len(str(row[i])) for row in [headers, *rows]) for i in range(len(headers))]
    for row in [headers, *rows]:
        say("  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_diff(text: str) -> None:
    """A unified diff, in colours on a terminal."""
    colours = {"+": "\033[32m", "-": "\033[31m", "@": "\033[36m"} if _is_terminal(sys.stdout) else {}
    for line in text.splitlines():
        colour = colours.get(line[:1])
        say(f"{colour}{line}\033[0m" if colour else line)


def _styled(cell: str) -> str:
    style = _STYLES.get(cell.lower())
    return f"[{style}]{cell}[/]" if style else cell


@contextlib.contextmanager
def progress(label: str) -> Iterator[Progress]:
    """A progress bar with time left on a terminal; elsewhere a plain line every few seconds and one at the end."""
    console = _rich_console(stderr=True) if _is_terminal(sys.stderr) else None
    if console is None:
        yield _plain_progress(label)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Bar(*columns, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _plain_progress(label: str) -> Progress:
    started = last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done >= total or now - last >= _PLAIN_EVERY_SECONDS:
            last = now
            left = f", {(now - started) * (total - done) / done:.0f} s left" if 0 < done < total else ""
            note(f"{label}: {done}/{total} ({now - started:.0f} s{left})")

    return report


def _is_terminal(stream: Any) -> bool:
    return bool(stream.isatty()) and os.environ.get("TERM") != "dumb"


def _rich_console(*, stderr: bool) -> Any:
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(stderr=stderr)
