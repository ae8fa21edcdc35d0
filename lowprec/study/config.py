"""The config of a study: a training config that all runs share, the lines that are compared, and the questions.

TOML: the sections of `lowprec train` (those that all runs share), `[study]`, `[[line]]` and `[[question]]`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lowprec.errors import ConfigError
from lowprec.methods import METHODS
from lowprec.precision.modes import mode_named
from lowprec.train.config import config_from, section_from
from lowprec.train.toml import parse_toml, put_value, read_config, toml_text

EXPECTATIONS = ("above", "no worse", "even")


@dataclass(frozen=True)
class Grid:
    """`[study]`.

    Args:
        title: of the page.
        limits: what the data cannot show, for the page.
        batch_sizes: of every line.
        precisions: modes; the learning rates are chosen in the first one.
        seeds: runs per line, batch size and precision.
        rates: factors of a line's learning rate that are tried on the validation part.
        rate_batch: the batch size that `lr` is meant for; others take lr * sqrt(batch / rate_batch).
        validation_fraction: of the training part, while the learning rate is chosen.
        epochs: of single batch sizes, instead of `run.epochs`: for large batches, whose epochs have few steps.
        margin: accuracies that differ by less are even, unless a question says otherwise.
    """

    title: str = "Study"
    limits: str = ""
    batch_sizes: list[int] = field(default_factory=lambda: [1, 2, 4, 16, 128])
    precisions: list[str] = field(default_factory=lambda: ["fp32", "fp16-master"])
    seeds: int = 5
    rates: list[float] = field(default_factory=lambda: [1 / 3, 1.0, 3.0])
    rate_batch: int = 128
    validation_fraction: float = 0.25
    epochs: dict[str, int] = field(default_factory=dict)
    margin: float = 0.02

    def __post_init__(self) -> None:
        for name in ("batch_sizes", "precisions", "rates"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ConfigError(f"study.{name} is {values}; give at least one, each once")
        if any(isinstance(batch, bool) or not isinstance(batch, int) or batch < 1 for batch in self.batch_sizes):
            raise ConfigError(f"study.batch_sizes is {self.batch_sizes}; give whole numbers from 1")
        if any(
            isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < math.inf
            for rate in self.rates
        ):
            raise ConfigError(f"study.rates is {self.rates}; give factors above 0")
        for mode in self.precisions:
            mode_named(mode)
        if self.seeds < 2 or self.rate_batch < 1 or not 0 < self.validation_fraction < 1 or not self.margin >= 0:
            raise ConfigError(
                f"study: seeds={self.seeds}, rate_batch={self.rate_batch}, margin={self.margin}, "
                f"validation_fraction={self.validation_fraction}; give two seeds or more (an interval needs them), a "
                "batch size, a margin of at least 0 and a fraction between 0 and 1"
            )
        known = {str(batch) for batch in self.batch_sizes}
        for batch, epochs in self.epochs.items():
            if batch not in known or isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
                raise ConfigError(f"study.epochs.{batch} is {epochs!r}; give epochs, from 1, of one of {sorted(known)}")


@dataclass(frozen=True)
class Line:
    """`[[line]]`: a row of the table.

    Args:
        name: of the row.
        method: in METHODS, or none.
        args: of the method.
        lr: learning rate at `study.rate_batch`; 0 for `optim.lr`.
        set: other keys of the training config, `"section.key" = value`.
    """

    name: str = ""
    method: str = "none"
    args: dict[str, Any] = field(default_factory=dict)
    lr: float = 0.0
    set: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.name:
            raise ConfigError("a [[line]] has no name; give it one")
        if self.method != "none" and self.method not in METHODS:
            raise ConfigError(
                f"line {self.name!r} names method {self.method!r}; choose none or one of {', '.join(METHODS)}"
            )
        if not 0 <= self.lr < math.inf:
            raise ConfigError(f"line {self.name!r} has lr {self.lr}; give a positive number, or 0 for optim.lr")


@dataclass(frozen=True)
class Place:
    """One line at one batch size, in every precision or in one."""

    line: str = ""
    batch: int = 0
    precision: str = ""


@dataclass(frozen=True)
class Question:
    """`[[question]]`: what is asked of two places, seed by seed.

    Args:
        says: the claim, in words.
        first: `{line = ..., batch = ...}`, and a precision if not all.
        second: the other place.
        expect: "above": the first is more accurate; "no worse": at most `margin` less so; "even": they differ by less
            than `margin`.
        margin: of "no worse" and "even"; 0 takes that of the study.
    """

    says: str = ""
    first: Place = field(default_factory=Place)
    second: Place = field(default_factory=Place)
    expect: str = "above"
    margin: float = 0.0

    def __post_init__(self) -> None:
        if not self.says or self.expect not in EXPECTATIONS:
            raise ConfigError(
                f"a [[question]] says {self.says!r} and expects {self.expect!r}; give the claim in words and one of "
                f"{', '.join(EXPECTATIONS)}"
            )


@dataclass(frozen=True)
class StudyConfig:
    """A whole study.

    Args:
        grid: `[study]`.
        lines: what is compared; the first is the baseline of the figures.
        questions: what is asked.
        base: the sections of the training config that all runs share, as plain data.
    """

    grid: Grid
    lines: tuple[Line, ...]
    questions: tuple[Question, ...]
    base: dict[str, Any]

    def line(self, name: str) -> Line:
        """The line of that name."""
        return next(line for line in self.lines if line.name == name)

    def settings(
        self, line: Line, batch: int, precision: str, seed: int, rate: float, choosing: bool
    ) -> dict[str, Any]:
        """The training config of one run, as plain data."""
        grid = self.grid
        settings = deepcopy(self.base)

        def put(section: str, **values: Any) -> None:
            settings[section] = {**settings.get(section, {}), **values}

        put("method", name=line.method, args=dict(line.args))
        put("precision", mode=precision)
        put("data", batch_size=batch, validation_fraction=grid.validation_fraction if choosing else 0.0)
        put("optim", lr=rate)
        put("run", seed=seed, evaluate_every=0)
        if str(batch) in grid.epochs:
            put("run", epochs=grid.epochs[str(batch)])
        for key, value in line.set.items():
            put_value(settings, key, value, f"line {line.name!r} sets {key!r}")
        return settings

    def to_toml(self) -> str:
        """The config with the defaults of the study written out."""
        lines = [_without_defaults(line) for line in self.lines]
        questions = [_without_defaults(question) for question in self.questions]
        return toml_text({"study": asdict(self.grid), **self.base, "line": lines, "question": questions})


def load_study(path: str | Path, overrides: Iterable[str] = ()) -> StudyConfig:
    """Reads the config of a study and checks every run's config.

    Raises:
        ConfigError: the file is missing, not TOML, or holds an unknown or wrong value.
    """
    return study_from(parse_toml(read_config(path), overrides, str(path)))


def study_from(raw: Mapping[str, Any]) -> StudyConfig:
    """Builds the config of a study from nested plain data. Raises `ConfigError`."""
    rest = dict(raw)
    grid = section_from("study", Grid, _table("study", rest.pop("study", {})))
    lines = tuple(section_from("line", Line, one) for one in _tables("line", rest.pop("line", [])))
    questions = tuple(_question(one) for one in _tables("question", rest.pop("question", [])))
    if len({line.name for line in lines}) != len(lines) or not lines:
        raise ConfigError("a study needs [[line]] tables with names that differ")
    study = StudyConfig(grid, lines, questions, {name: dict(_table(name, values)) for name, values in rest.items()})
    for question in questions:
        for place in (question.first, question.second):
            _check_place(study, question, place)
    for line in lines:
        config_from(study.settings(line, grid.batch_sizes[0], grid.precisions[0], 0, 0.1, True))
    return study


def _question(raw: Mapping[str, Any]) -> Question:
    places = {
        name: section_from(f"question.{name}", Place, _table(f"question.{name}", raw[name]))
        for name in ("first", "second")
        if name in raw
    }
    question: Question = section_from("question", Question, {k: v for k, v in raw.items() if k not in places})
    return Question(
        question.says, places.get("first", Place()), places.get("second", Place()), question.expect, question.margin
    )


def _check_place(study: StudyConfig, question: Question, place: Place) -> None:
    grid = study.grid
    known = (
        place.line in {line.name for line in study.lines}
        and place.batch in grid.batch_sizes
        and (not place.precision or place.precision in grid.precisions)
    )
    if not known:
        raise ConfigError(
            f"the question {question.says!r} names line {place.line!r}, batch {place.batch}, precision "
            f"{place.precision!r}, which the study does not have"
        )


def _table(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"[{name}] must be a section of keys and values")
    return value


def _tables(name: str, value: Any) -> list[Mapping[str, Any]]:
    if not isinstance(value, list):
        raise ConfigError(f"{name} must be [[{name}]] tables")
    return [_table(name, one) for one in value]


def _without_defaults(value: Line | Question | Place) -> dict[str, Any]:
    found = {}
    for one in fields(value):
        held = getattr(value, one.name)
        default = one.default if one.default_factory is MISSING else one.default_factory()
        if held != default:
            found[one.name] = _without_defaults(held) if isinstance(held, Place) else held
    return found
