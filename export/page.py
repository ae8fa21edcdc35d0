"""report.html: one self-contained page, usable offline, from parity reports and fold reports."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from typing import Any

from lowprec.export.parity import ParityReport, Stage
from lowprec.report import ChangeReport

_VERDICTS = {
    "pass": "The artefacts are the network that was trained, up to the rounding they were given.",
    "warn": "The artefacts hold, with differences above the usual: look at the rows marked warn.",
    "fail": "The artefacts are not the network that was trained: look at the rows marked fail.",
    "inconclusive": "Nothing failed, but what was asked needs more samples than there are.",
}


def render_page(parts: Sequence[tuple[str, ParityReport, ChangeReport]], provenance: dict[str, Any]) -> str:
    """The page; every value is escaped, so names in a model cannot become markup.

    Args:
        parts: (title, parity, fold) per model.
        provenance: shown at the end.
    """
    from jinja2 import Environment

    source = resources.files("lowprec.export").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    models = [_model(title, parity, folded) for title, parity, folded in parts]
    return environment.from_string(source).render(models=models, provenance=provenance)


def _model(title: str, parity: ParityReport, folded: ChangeReport) -> dict[str, Any]:
    return {
        "title": title,
        "verdict": parity.verdict,
        "words": _VERDICTS[parity.verdict],
        "stages": [_stage(stage) for stage in parity.stages],
        "folded": folded.changed,
        "refused": folded.refused,
    }


def _stage(stage: Stage) -> dict[str, Any]:
    rhos = [check.value for check in stage.checks if check.name.startswith("rho:") and check.value is not None]
    rho = max(rhos, default=None)
    return {
        "name": stage.name,
        "artefact": stage.artefact,
        "arithmetic": stage.arithmetic,
        "verdict": stage.verdict if stage.status == "ran" else stage.status,
        "ran": stage.status == "ran",
        "reason": stage.reason,
        "rho": rho,
        # The bar is full at twice the failing limit of 6.
        "bar": None if rho is None else max(1.0, min(100.0, 100.0 * rho / 12.0)),
        "checks": stage.checks,
    }
