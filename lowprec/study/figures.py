"""The figures of a study, as SVG text that is the same for the same numbers."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np

from lowprec.study.summary import Summary

_COLUMNS = 4


def accuracy_figure(summary: Summary) -> str:
    """A panel per line: accuracy over batch size with intervals, a colour per precision, the first line in grey."""
    grid, lines = summary.study.grid, summary.study.lines
    batches = sorted(grid.batch_sizes)
    columns = min(_COLUMNS, len(lines))
    rows = math.ceil(len(lines) / columns)
    pyplot = _pyplot()
    figure, panels = pyplot.subplots(
        rows,
        columns,
        figsize=(2.9 * columns, 2.3 * rows),
        sharex=True,
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for panel, line in zip(panels.flat, lines, strict=False):
        _draw(panel, summary, lines[0].name, grid.precisions[0], batches, {"color": "0.75", "lw": 4})
        for number, mode in enumerate(grid.precisions):
            _draw(
                panel, summary, line.name, mode, batches, {"color": f"C{number}", "label": mode, "marker": "o", "ms": 3}
            )
        panel.set_title(line.name, fontsize=9)
        panel.set_xscale("log", base=2)
        panel.set_xticks(batches, [str(batch) for batch in batches], fontsize=7)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    for panel in list(panels.flat)[len(lines) :]:
        panel.set_axis_off()
    panels.flat[0].legend(fontsize=7)
    figure.supxlabel("batch size", fontsize=9)
    figure.supylabel(f"test accuracy, %; grey: {lines[0].name}", fontsize=9)
    return _svg(figure)


def answers_figure(summary: Summary) -> str:
    """The differences that the questions ask for, with their intervals; empty where there are none."""
    answers = [answer for answer in summary.answers if answer.difference is not None]
    if not answers:
        return ""
    pyplot = _pyplot()
    figure, panel = pyplot.subplots(figsize=(9, 0.6 + 0.24 * len(answers)), layout="constrained")
    colours = {"shown": "C2", "not shown": "0.5", "contrary": "C3"}
    for number, answer in enumerate(answers):
        assert answer.difference is not None
        middle, half = 100 * answer.difference.mean, 100 * answer.difference.half
        panel.errorbar(middle, number, xerr=half, fmt="o", ms=4, capsize=3, color=colours[answer.verdict])
    panel.axvline(0, color="0.3", lw=0.8)
    labels = [f"{answer.says} ({answer.precision})" for answer in answers]
    panel.set(
        yticks=np.arange(len(answers)), ylim=(len(answers) - 0.5, -0.5), xlabel="difference of accuracies, points"
    )
    panel.set_yticklabels(labels, fontsize=7)
    panel.grid(alpha=0.3, axis="x")
    return _svg(figure)


def _draw(panel: Any, summary: Summary, line: str, mode: str, batches: list[int], style: dict[str, Any]) -> None:
    points = [(batch, summary.point(line, batch, mode).accuracy) for batch in batches]
    known = [(batch, accuracy) for batch, accuracy in points if accuracy is not None]
    if known:
        means = [100 * accuracy.mean for _, accuracy in known]
        halves = [100 * accuracy.half for _, accuracy in known]
        panel.errorbar([batch for batch, _ in known], means, yerr=halves, capsize=2, elinewidth=1, **style)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as pyplot

    pyplot.rcParams["svg.hashsalt"] = "lowprec"
    pyplot.rcParams["svg.fonttype"] = "none"
    return pyplot


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    _pyplot().close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
