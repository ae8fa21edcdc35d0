"""The files of a finished study: `table.md`, `study.json`, two figures, and `index.html`, one self-contained page."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from lowprec.artifacts import write_json, write_text
from lowprec.study.figures import accuracy_figure, answers_figure
from lowprec.study.summary import Summary

TABLE, DATA, PAGE = "table.md", "study.json", "index.html"


def write_report(summary: Summary, folder: str | Path) -> Path:
    """Writes them into `folder`; returns the path of the page."""
    path = Path(folder)
    figures = {"accuracy.svg": accuracy_figure(summary), "questions.svg": answers_figure(summary)}
    write_text(path / TABLE, "\n".join(markdown(summary)) + "\n")
    write_json(path / DATA, summary.to_json())
    for name, svg in figures.items():
        if svg:
            write_text(path / name, svg)
    write_text(path / PAGE, _page(summary, list(figures.values())))
    return path / PAGE


def markdown(summary: Summary) -> Iterator[str]:
    """A table per precision, and the answers."""
    batches = summary.study.grid.batch_sizes
    for precision in summary.study.grid.precisions:
        yield f"| {precision}: test accuracy, % | {' | '.join(map(str, batches))} |"
        yield "|---" * (len(batches) + 1) + "|"
        for name, cells in summary.rows(precision):
            yield f"| {name} | {' | '.join(cells)} |"
        yield ""
    if summary.answers:
        yield "| question | precision | difference, points | answer |"
        yield "|---|---|---|---|"
        for answer in summary.answers:
            difference = "" if answer.difference is None else answer.difference.percent()
            yield f"| {answer.says} | {answer.precision} | {difference} | {answer.verdict} |"


def _page(summary: Summary, figures: list[str]) -> str:
    """The page; every value but the figures, which matplotlib escapes, is escaped."""
    from jinja2 import Environment
    from markupsafe import Markup

    source = resources.files("lowprec.study").joinpath("page.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    drawn = [Markup(svg) for svg in figures]
    refused = sorted({(point.line, point.batch, point.refused) for point in summary.points if point.refused})
    return environment.from_string(source).render(summary=summary, figures=drawn, refused=refused)
