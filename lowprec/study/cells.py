"""The runs of a study and what came of them.

A run is known by the hash of its whole training config and of its samples, so a study that is changed keeps the runs
that it still has. Results are lines of JSON that are only appended: a killed study loses the runs in progress.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any

from lowprec.errors import ArtifactError
from lowprec.study.config import Line, StudyConfig

CHOOSING_SEED = 10_000


@dataclass(frozen=True)
class Cell:
    """One run; with `choosing` it is judged on the validation part, to choose the learning rate."""

    line: str
    batch: int
    precision: str
    seed: int
    rate: float
    choosing: bool


@dataclass(frozen=True)
class Outcome:
    """What one run came to.

    Args:
        key: of the cell.
        accuracy: on the test part, or on the validation part; None for a run that could not be finished.
        refused: why the method does not train like this at all, in one line; else empty.
        diverged: whether the loss or the loss scale left the numbers.
        steps: attempted.
        skipped: steps that overflowed.
        seconds: of the run.
    """

    key: str
    accuracy: float | None
    refused: str
    diverged: bool
    steps: int
    skipped: int
    seconds: float


class Plan:
    """Which runs a study consists of.

    Args:
        study: the config.
        fingerprint: of the samples.
    """

    def __init__(self, study: StudyConfig, fingerprint: str) -> None:
        self.study = study
        self._fingerprint = fingerprint
        self._keys: dict[Cell, str] = {}  # asked for after every run, and a config is long to hash

    def places(self) -> Iterator[tuple[Line, int]]:
        """Line and batch size, those with the most steps first."""
        for batch in sorted(self.study.grid.batch_sizes):
            yield from ((line, batch) for line in self.study.lines)

    def choosing(self, line: Line, batch: int) -> list[Cell]:
        """The runs that the learning rate is chosen by."""
        precision = self.study.grid.precisions[0]
        return [Cell(line.name, batch, precision, CHOOSING_SEED, rate, True) for rate in self._rates(line, batch)]

    def final(self, line: Line, batch: int, rate: float) -> list[Cell]:
        """The runs that count, once the rate is chosen."""
        grid = self.study.grid
        return [
            Cell(line.name, batch, precision, seed, rate, False)
            for precision in grid.precisions
            for seed in range(grid.seeds)
        ]

    def chosen(self, line: Line, batch: int, outcomes: dict[str, Outcome]) -> float | None:
        """The rate with the best validation accuracy, the lower of equal ones; None while a run is missing."""
        found = [(outcomes.get(self.key(cell)), cell.rate) for cell in self.choosing(line, batch)]
        if any(outcome is None for outcome, _ in found):
            return None
        # A run that diverged is below all others.
        return max(
            found, key=lambda one: (-1.0 if one[0] is None or one[0].accuracy is None else one[0].accuracy, -one[1])
        )[1]

    def settings(self, cell: Cell) -> dict[str, Any]:
        """The training config of a run."""
        line = self.study.line(cell.line)
        return self.study.settings(line, cell.batch, cell.precision, cell.seed, cell.rate, cell.choosing)

    def key(self, cell: Cell) -> str:
        """What a run is known by."""
        if cell not in self._keys:
            text = json.dumps([self.settings(cell), self._fingerprint], sort_keys=True)
            self._keys[cell] = hashlib.sha256(text.encode()).hexdigest()[:32]
        return self._keys[cell]

    def _rates(self, line: Line, batch: int) -> list[float]:
        grid = self.study.grid
        base = line.lr or float(self.study.base.get("optim", {}).get("lr", 0.05))
        return [base * factor * math.sqrt(batch / grid.rate_batch) for factor in grid.rates]


class Outcomes:
    """The outcomes in a folder: `runs.<rank>.jsonl`, one writer each.

    Args:
        folder: of the study.
        rank: of this writer.

    Raises:
        ArtifactError: another process writes this file, or a line that is not the last is damaged.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder = folder
        self._own = folder / f"runs.{rank}.jsonl"
        self.known: dict[str, Outcome] = {}
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Outcomes:
        self._file = self._own.open("ab")
        try:
            _lock(self._file, self._folder)
            self.refresh()
            self._file.truncate(_whole_lines(self._own.read_bytes()))
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def refresh(self) -> None:
        """Reads what all writers have written by now."""
        for path in sorted(self._folder.glob("runs.*.jsonl")):
            data = path.read_bytes()
            for number, line in enumerate(data[: _whole_lines(data)].splitlines(), 1):
                outcome = _parsed(line, f"{path}, line {number}")
                self.known[outcome.key] = outcome

    def add(self, outcome: Outcome) -> None:
        """Brings one outcome to the disk."""
        assert self._file is not None
        self._file.write(json.dumps(asdict(outcome), sort_keys=True).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.known[outcome.key] = outcome


def _whole_lines(data: bytes) -> int:
    """Bytes up to the last end of line: a killed writer leaves half a line."""
    return data.rfind(b"\n") + 1


def _parsed(line: bytes, where: str) -> Outcome:
    try:
        values = json.loads(line)
        return Outcome(**{field.name: values[field.name] for field in fields(Outcome)})
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{where} is damaged ({error}); remove the line, and its run is made again") from None


def _lock(file: IO[bytes], folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ArtifactError(
            f"another process works on the study {folder}; wait for it, or give another folder"
        ) from None
