"""A parity report as a person reads it: the waterfall of errors, then the verdict and what decided it."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from lowprec.cli.terminal import print_json, print_table, say

if TYPE_CHECKING:
    from lowprec.export.parity import Limits, ParityReport, Stage

_HEADERS = ("stage", "artefact", "backend", "arithmetic", "error", "rho", "top-1 agreement, 95 %", "verdict")
_BENCH_HEADERS = ("artefact", "backend", "batch", "p50 ms", "p90 ms", "p99 ms", "samples/s", "runs (ended by)")
_STATUS = {"fail": 1, "inconclusive": 3}


def add_claims(parser: argparse.ArgumentParser) -> None:
    """Adds the claims that a user may ask a comparison to prove."""
    parser.add_argument(
        "--margin",
        type=float,
        metavar="POINTS",
        help="claim: accuracy drops by less than so many points (needs labels)",
    )
    parser.add_argument(
        "--min-agreement", type=float, metavar="SHARE", help="claim: at least this share of decisions agree (0.999)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def limits_from(args: argparse.Namespace) -> Limits:
    """The limits of the verdict, with the claims that were asked for."""
    from lowprec.export.parity import Limits

    return Limits(margin=None if args.margin is None else args.margin / 100, min_agreement=args.min_agreement)


def show(report: ParityReport, *, as_json: bool, title: str = "") -> int:
    """Prints the report and returns the exit status: 0 parity holds (warnings included), 1 fails, 3 undecided."""
    if as_json:
        print_json(report.to_dict())
    else:
        print_waterfall(report, title)
        for stage in report.stages:
            if stage.reason and stage.backend not in report.absent:
                say(f"{stage.status}: {stage.name}: {stage.reason}")
            for check in stage.checks:
                if check.verdict not in ("pass", "info"):
                    say(f"{check.verdict}: {stage.name}: {check.text}")
        if "bench" in report.facts:
            _print_bench(report.facts["bench"])
        say(f"verdict: {report.verdict}")
    return 0 if report.passed else _STATUS[report.verdict]


def print_waterfall(report: ParityReport, title: str = "") -> None:
    """One row per stage, in the order in which a network goes through them; a line per backend that is not here."""
    absent = report.absent
    print_table(_HEADERS, [_row(stage) for stage in report.stages if stage.backend not in absent], title)
    for backend, reason in absent.items():
        say(f"not available here: {backend}: {reason}")


def _print_bench(bench: dict[str, Any]) -> None:
    rows = [
        (
            row["artefact"],
            row["backend"],
            str(row["batch"]),
            *(f"{row[key]:.3g}" for key in ("p50_ms", "p90_ms", "p99_ms")),
            f"{row['samples_per_s']:.4g}",
            f"{row['runs']} ({row['ended_by']})",
        )
        for row in bench["rows"]
        if "reason" not in row
    ]
    print_table(_BENCH_HEADERS, rows, f"latency on {bench['machine']}, host to host")


def _row(stage: Stage) -> tuple[str, ...]:
    verdict = stage.verdict if stage.status == "ran" else stage.status
    error = stage.worst("rms") or stage.worst("relative_error")
    rho = stage.worst("rho") or stage.worst("nodes")
    agreement = "-"
    if (share := stage.worst("agreement")) and share.interval:
        agreement = f"{share.value:.2%} [{share.interval[0]:.2%}, {share.interval[1]:.2%}]"
    figures = ("-" if check is None else f"{check.value:.3g}" for check in (error, rho))
    return (stage.name, stage.artefact, stage.backend, stage.arithmetic, *figures, agreement, verdict)
