"""report.html: one self-contained page, usable offline, from parity reports and fold reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from lowprec.artifacts import json_text
from lowprec.export.parity import ParityReport
from lowprec.report import ChangeReport

_VERDICTS = {
    "pass": "The artefacts are the network that was trained, up to the rounding they were given.",
    "warn": "The artefacts hold, with differences above the usual: look at the rows marked warn.",
    "fail": "The artefacts are not the network that was trained: look at the rows marked fail.",
    "inconclusive": "Nothing failed, but what was asked needs more samples than there are.",
}


@dataclass(frozen=True)
class Part:
    """One model on the page.

    Args:
        title: what it is called.
        parity: how it stands.
        folded: what was folded and what was not.
        provenance: where it comes from.
    """

    title: str
    parity: ParityReport
    folded: ChangeReport
    provenance: dict[str, Any]


def render_page(parts: Sequence[Part]) -> str:
    """The page; every value is escaped, so names in a model cannot become markup."""
    from jinja2 import Environment

    source = resources.files("lowprec.export").joinpath("report.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    models = [{"part": part, "words": _VERDICTS[part.parity.verdict], "stages": _stages(part)} for part in parts]
    return environment.from_string(source).render(models=models, json_text=json_text)


def _stages(part: Part) -> list[dict[str, Any]]:
    return [
        {
            "stage": stage,
            "verdict": stage.verdict if stage.status == "ran" else stage.status,
            "error": stage.worst("rms") or stage.worst("relative_error"),
            "rho": rho,
            "agreement": stage.worst("agreement"),
            # The bar is full at twice the failing limit.
            "bar": max(1.0, min(100.0, 50.0 * rho.value / rho.limit)) if rho and rho.value and rho.limit else None,
        }
        for stage in part.parity.stages
        if stage.backend not in part.parity.absent
        for rho in [stage.worst("rho") or stage.worst("nodes")]
    ]
