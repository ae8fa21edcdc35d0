"""The norms of a run's output channels over its steps, and the file that holds them.

JSON lines instead of an array file: a recorder appends one row and is done, so a record per step costs what the row
costs, a killed run leaves every finished row, and nothing is unpickled on the way back. Python writes floats in the
shortest digits that read back to the same number, so the file is exact.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowprec.errors import ArtifactError, DataError

_HEADER = {"schema": 1, "holds": "2-norm of every output channel of the named weights after so many landed steps"}


@dataclass(frozen=True, eq=False)
class NormRow:
    """The norms at one moment.

    Args:
        step: landed steps before it; 0 is the start of the run.
        norms: (C,) float64 by parameter name (`blocks.0.conv1.weight`).
    """

    step: int
    norms: Mapping[str, NDArray[np.float64]]

    def to_json(self) -> str:
        """One line of the file; a norm that is not finite becomes null."""
        norms = {
            name: [value if math.isfinite(value) else None for value in values.tolist()]
            for name, values in self.norms.items()
        }
        return json.dumps({"step": self.step, "norms": norms}, allow_nan=False) + "\n"


@dataclass(frozen=True, eq=False)
class NormRecord:
    """Rows with rising steps and the same weights in each.

    Raises:
        DataError: there is no row, or the rows do not go together.
    """

    rows: tuple[NormRow, ...]

    def __post_init__(self) -> None:
        if not self.rows:
            raise DataError("the record of norms holds no row; record at least the start of a run")
        shapes = _shapes(self.rows[0])
        for before, row in zip(self.rows, self.rows[1:], strict=False):
            if row.step <= before.step:
                raise DataError(f"the record of norms has step {row.step} after step {before.step}; steps must rise")
            if _shapes(row) != shapes:
                raise DataError(f"the record of norms holds other weights at step {row.step} than at its start")

    def at(self, step: int) -> NormRow:
        """The newest row that is not after `step`: norms are held between rows; before the first row it is that one."""
        return self.rows[max(bisect_right(self.rows, step, key=lambda row: row.step) - 1, 0)]

    @classmethod
    def load(cls, path: str | Path) -> NormRecord:
        """Reads a file that `append_row` wrote. Raises `ArtifactError`, or `DataError` for rows that do not fit."""
        return cls(tuple(read_rows(Path(path))))

    def save(self, path: str | Path) -> None:
        """Writes all rows to a new file, or over an old one."""
        start_file(Path(path))
        for row in self.rows:
            append_row(Path(path), row)


def start_file(path: Path) -> None:
    """Begins a file of rows, in place of what was there. Raises `ArtifactError` if it cannot be written."""
    _write(path, "w", json.dumps(_HEADER) + "\n")


def append_row(path: Path, row: NormRow) -> None:
    """Adds one row to a file that was begun. Raises `ArtifactError` if it cannot be written."""
    _write(path, "a", row.to_json())


def read_rows(path: Path) -> Iterator[NormRow]:
    """The rows of a file. A last line without an end was being written when the run died, and is left out.

    Raises:
        ArtifactError: the file is missing, damaged, or not a record of norms.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ArtifactError(f"the record of norms is missing: no file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"the record of norms {path} cannot be read: {error}") from None
    header, *lines = text.split("\n")[:-1] or [""]
    if _parsed(header) != _HEADER:
        raise ArtifactError(f"{path} is not a record of norms; make one with lowprec.methods.record_norms")
    for number, line in enumerate(lines, start=2):
        yield _row(path, number, _parsed(line))


def _row(path: Path, number: int, value: Any) -> NormRow:
    try:
        step, norms = value["step"], value["norms"]
        arrays = {str(name): np.array(values, np.float64) for name, values in norms.items()}  # null becomes NaN
    except (TypeError, KeyError, ValueError, AttributeError):
        raise ArtifactError(f"the record of norms {path} is damaged in line {number}; record it again") from None
    shaped = all(array.ndim == 1 and not (array < 0).any() for array in arrays.values())
    if not isinstance(step, int) or isinstance(step, bool) or step < 0 or not shaped:
        raise ArtifactError(f"the record of norms {path} is damaged in line {number}; record it again")
    return NormRow(step, arrays)


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _shapes(row: NormRow) -> dict[str, tuple[int, ...]]:
    return {name: values.shape for name, values in row.norms.items()}


def _write(path: Path, mode: str, text: str) -> None:
    try:
        with path.open(mode, encoding="utf-8", newline="\n") as file:
            file.write(text)
    except OSError as error:
        raise ArtifactError(f"cannot write the record of norms {path}: {error.strerror or error}") from None
