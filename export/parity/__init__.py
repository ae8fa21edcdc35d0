"""Is the candidate the same network? Measured rounding noise as the yardstick, metrics, verdicts and their report."""

from __future__ import annotations

from lowprec.export.parity.floor import Floor, noise_floor
from lowprec.export.parity.judge import judge
from lowprec.export.parity.metrics import METRICS, Metric
from lowprec.export.parity.report import ParityReport, Stage
from lowprec.export.parity.verdicts import Check, Limits, Verdict, worst

__all__ = [
    "METRICS",
    "Check",
    "Floor",
    "Limits",
    "Metric",
    "ParityReport",
    "Stage",
    "Verdict",
    "judge",
    "noise_floor",
    "worst",
]
