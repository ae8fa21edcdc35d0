"""The source text of a script and edits to it, by the nodes of its syntax tree; it is never run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Left:
    """What is to be done by hand.

    Args:
        line: counted from 1.
        what: what stands there, and what to do.
    """

    line: int
    what: str


class Script:
    """A source text, its syntax tree, and what was decided about it."""

    def __init__(self, text: str, tree: ast.Module) -> None:
        self.tree = tree
        self.left: list[Left] = []
        self._source = text.encode("utf-8")  # columns of a syntax tree count bytes
        self._starts = [0]
        for line in self._source.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))
        self._edits: list[tuple[int, int, str]] = []

    def leave(self, node: ast.stmt | ast.expr, what: str) -> None:
        """Something for a person."""
        self.left.append(Left(node.lineno, what))

    def replace(self, node: ast.stmt | ast.expr, new: str, until: ast.stmt | ast.expr | None = None) -> None:
        """Puts `new` where `node` stands, or everything from it to the end of `until`."""
        self._edits.append((self._start(node), self._end(until or node), new))

    def insert_after(self, node: ast.stmt, line: str) -> None:
        """A line of its own, at the depth of `node`."""
        end = self._end(node)
        self._edits.append((end, end, f"\n{' ' * node.col_offset}{line}"))

    def remove(self, node: ast.stmt) -> None:
        """Takes a statement out, and its line where nothing else stands there."""
        start, end = self._start(node), self._end(node)
        line, after = self._starts[node.lineno - 1], self._starts[node.end_lineno or node.lineno]
        alone = not self._source[line:start].strip() and not self._source[end:after].strip()
        self._edits.append((line, after, "") if alone else (start, end, "pass"))

    def text(self, node: ast.expr) -> str:
        """The source of an expression."""
        return self._source[self._start(node) : self._end(node)].decode("utf-8")

    def edited(self) -> str:
        """The text with all edits."""
        result = self._source
        for start, end, new in sorted(self._edits, key=lambda edit: edit[:2], reverse=True):
            result = result[:start] + new.encode("utf-8") + result[end:]
        return result.decode("utf-8")

    def bodies(self) -> Iterator[list[ast.stmt]]:
        """Every sequence of statements, outermost first."""
        for node in ast.walk(self.tree):
            for name in ("body", "orelse", "finalbody"):
                body = getattr(node, name, None)
                if isinstance(body, list) and body and isinstance(body[0], ast.stmt):
                    yield body

    def _start(self, node: ast.stmt | ast.expr) -> int:
        return self._starts[node.lineno - 1] + node.col_offset

    def _end(self, node: ast.stmt | ast.expr) -> int:
        return self._starts[(node.end_lineno or node.lineno) - 1] + (node.end_col_offset or 0)


def imported(alias: ast.alias) -> str:
    """One name of an import as it is written."""
    return alias.name if alias.asname is None else f"{alias.name} as {alias.asname}"
