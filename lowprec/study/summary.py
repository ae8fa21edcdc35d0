"""What a study shows: means with intervals, precisions against each other, and the answers to its questions."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from lowprec.data import load_data
from lowprec.study.cells import Outcome, Plan
from lowprec.study.config import Line, Place, Question, StudyConfig
from lowprec.train.config import config_from

Verdict = Literal["shown", "not shown", "contrary", "cannot"]
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and half the width of its 95 % interval (Student's t)."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Of two values or more."""
        stats = importlib.import_module("scipy.stats")  # scikit-learn brings it; it has no types

        spread = float(np.std(values, ddof=1)) / math.sqrt(len(values))
        return cls(float(np.mean(values)), float(stats.t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1)) * spread)

    @property
    def low(self) -> float:
        """Lower end."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """Upper end."""
        return self.mean + self.half

    def percent(self) -> str:
        """As `94.1 ± 0.8`."""
        return f"{100 * self.mean:.1f} ± {100 * self.half:.1f}"


@dataclass(frozen=True)
class Point:
    """One line at one batch size in one precision.

    Args:
        line: its name.
        batch: size.
        precision: mode.
        rate: the learning rate that was chosen.
        accuracies: per seed, that of chance where a run could not be finished.
        accuracy: their interval; None where the method refused.
        diverged: how many of the runs did.
        refused: why the method does not train like this; else empty.
        seconds: of all runs together.
    """

    line: str
    batch: int
    precision: str
    rate: float
    accuracies: list[float]
    accuracy: Interval | None
    diverged: int
    refused: str
    seconds: float


@dataclass(frozen=True)
class Answer:
    """The answer to a question in one precision, or to whether two precisions are even on a line.

    Args:
        says: the claim.
        precision: in which.
        difference: of the accuracies, first minus second, paired by seed; None where one of them cannot.
        margin: what counts as even or as no worse; 0 for "above".
        verdict: "shown", "contrary" where the data shows the opposite, else "not shown"; "cannot" without runs.
    """

    says: str
    precision: str
    difference: Interval | None
    margin: float
    verdict: Verdict


@dataclass(frozen=True)
class Summary:
    """All of it.

    Args:
        study: the config.
        points: by line, batch size, precision.
        answers: to the questions, per precision.
        precisions: for each line and each precision but the first, whether it is even with the first over all batches.
        provenance: versions, samples, time.
    """

    study: StudyConfig
    points: list[Point]
    answers: list[Answer]
    precisions: list[Answer]
    provenance: dict[str, Any]

    def point(self, line: str, batch: int, precision: str) -> Point:
        """One of `points`."""
        return next(p for p in self.points if (p.line, p.batch, p.precision) == (line, batch, precision))

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "schema": 1,
            "points": [asdict(point) for point in self.points],
            "answers": [asdict(answer) for answer in self.answers],
            "precisions": [asdict(answer) for answer in self.precisions],
            "provenance": self.provenance,
        }

    def rows(self, precision: str) -> Iterator[tuple[str, list[str]]]:
        """Line and the cells of its row of the table, in percent, by batch size."""
        for line in self.study.lines:
            points = [self.point(line.name, batch, precision) for batch in self.study.grid.batch_sizes]
            yield line.name, [_shown(point) for point in points]


def summarise(study: StudyConfig, outcomes: dict[str, Outcome]) -> Summary:
    """Reads a finished study; `outcomes` as `run_study` returns them."""
    data = config_from({"data": study.base.get("data", {})}).data
    samples = load_data(data.source, what="data.source", test_fraction=data.test_fraction)
    assert samples.labels is not None
    chance = 1 / (int(samples.labels.max()) + 1)
    plan = Plan(study, samples.fingerprint)
    points = [
        _point(plan, outcomes, line, batch, precision, chance)
        for line in study.lines
        for batch in study.grid.batch_sizes
        for precision in study.grid.precisions
    ]
    found = Summary(study, points, [], [], _provenance(samples.source, len(samples), samples.fingerprint, points))
    answers = [
        _answer(found, question, precision)
        for question in study.questions
        for precision in ([""] if question.first.precision and question.second.precision else study.grid.precisions)
    ]
    return Summary(study, points, answers, list(_against_first(found)), found.provenance)


def _point(plan: Plan, outcomes: dict[str, Outcome], line: Line, batch: int, precision: str, chance: float) -> Point:
    rate = plan.chosen(line, batch, outcomes)
    assert rate is not None
    cells = [cell for cell in plan.final(line, batch, rate) if cell.precision == precision]
    found = [outcomes[plan.key(cell)] for cell in cells]
    refused = next((one.refused for one in found if one.refused), "")
    accuracies = [] if refused else [chance if one.accuracy is None else one.accuracy for one in found]
    return Point(
        line.name,
        batch,
        precision,
        rate,
        accuracies,
        Interval.of(accuracies) if accuracies else None,
        sum(one.diverged for one in found),
        refused,
        round(sum(one.seconds for one in found), 1),
    )


def _answer(found: Summary, question: Question, precision: str) -> Answer:
    def accuracies(place: Place) -> list[float]:
        return found.point(place.line, place.batch, place.precision or precision).accuracies

    first, second = accuracies(question.first), accuracies(question.second)
    margin = question.margin or found.study.grid.margin
    places = dict.fromkeys(place.precision or precision for place in (question.first, question.second))
    where = " and ".join(places)
    return judged(question.says, where, first, second, question.expect, margin)


def judged(
    says: str, precision: str, first: Sequence[float], second: Sequence[float], expect: str, margin: float
) -> Answer:
    """Compares accuracies, paired; `expect` as in `Question`.

    The interval of the difference decides: wholly where the claim has it, the claim is shown; wholly elsewhere, the
    contrary is.
    """
    low, high = {"above": (0.0, math.inf), "no worse": (-margin, math.inf), "even": (-margin, margin)}[expect]
    margin = 0.0 if expect == "above" else margin
    if not first or not second:
        return Answer(says, precision, None, margin, "cannot")
    difference = Interval.of([a - b for a, b in zip(first, second, strict=True)])
    verdict: Verdict = "not shown"
    if low < difference.low and difference.high < high:
        verdict = "shown"
    elif difference.high < low or high < difference.low:
        verdict = "contrary"
    return Answer(says, precision, difference, margin, verdict)


def _against_first(found: Summary) -> Iterator[Answer]:
    grid = found.study.grid
    for line in found.study.lines:
        per_mode = {
            mode: [a for batch in grid.batch_sizes for a in found.point(line.name, batch, mode).accuracies]
            for mode in grid.precisions
        }
        base = per_mode[grid.precisions[0]]
        for mode in grid.precisions[1:]:
            yield judged(line.name, mode, per_mode[mode], base, "even", grid.margin)


def _shown(point: Point) -> str:
    if point.accuracy is None:
        return "cannot"
    return point.accuracy.percent() + (f" ({point.diverged} diverged)" if point.diverged else "")


def _provenance(source: str, samples: int, fingerprint: str, points: Sequence[Point]) -> dict[str, Any]:
    import torch

    import lowprec

    return {
        "lowprec": lowprec.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "data": source,
        "samples": samples,
        "fingerprint": fingerprint,
        "core_seconds": round(sum(point.seconds for point in points)),
    }
