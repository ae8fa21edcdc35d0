"""What a run tells while it goes: JSON lines in its folder, TensorBoard where it is asked for, notes to the caller.

The files are rewritten whole, so that a killed run leaves lines and no halves of lines, and a resumed one writes the
bytes that it would have written anyway: what lies after the checkpoint is dropped when it goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lowprec.artifacts import write_text
from lowprec.errors import ArtifactError, MissingDependencyError
from lowprec.precision.health import Health

METRICS = "metrics.jsonl"
HEALTH = "health.jsonl"
TENSORBOARD = "tensorboard"

Note = Callable[[str], None]


class RunLog:
    """Writes what happens in a run.

    Args:
        folder: of the run, or None to write nothing.
        step: attempted steps so far; later lines of an interrupted run are dropped.
        tensorboard: also write event files.
        note: called with one line for a person when something goes wrong.

    Raises:
        MissingDependencyError: TensorBoard is asked for and not installed.
        ArtifactError: an earlier health.jsonl is damaged.
    """

    def __init__(self, folder: Path | None, step: int, tensorboard: bool, note: Note | None) -> None:
        self._folder = folder
        self._note = note
        self._health = [] if folder is None else [row for row in _lines(folder / HEALTH) if row["step"] < step]
        self._told: set[str] = set()
        self._board = _board(folder / TENSORBOARD, step) if tensorboard and folder is not None else None

    def epoch(self, history: list[dict[str, Any]]) -> None:
        """The rows of all epochs so far; figures that are not finite are null."""
        if self._folder is not None:
            _write(self._folder / METRICS, history)
            _write(self._folder / HEALTH, self._health)
        self._scalars({name: value for name, value in history[-1].items() if name != "epoch"}, history[-1]["steps"])

    def skipped(self, step: int, scale: float, where: str) -> None:
        """A step did not land."""
        self._health.append({"step": step, "scale": scale, "overflow": where})
        self._scalars({"overflow/scale": scale}, step)
        self._tell(f"step {step} skipped at scale {scale:g}: overflow in {where}")

    def health(self, health: Health) -> None:
        """A step was measured."""
        self._health.append(health.to_json())
        for problem in health.problems:
            if problem not in self._told:
                self._tell(f"step {health.step}: {problem}")
                self._told.add(problem)
        for row in health.rows:
            prefix = f"health/{row.kind}/{row.name}"
            self._scalars({f"{prefix}/{key}": value for key, value in row.figures().items()}, health.step)

    def save(self) -> None:
        """Brings the lines so far to the disk; called with every checkpoint."""
        if self._folder is not None:
            _write(self._folder / HEALTH, self._health)

    def close(self) -> None:
        """Ends the event files."""
        if self._board is not None:
            self._board.close()

    def _tell(self, text: str) -> None:
        if self._note is not None:
            self._note(text)

    def _scalars(self, values: dict[str, Any], step: int) -> None:
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(name, value, step)


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    write_text(path, "".join(f"{json.dumps(row, sort_keys=True, allow_nan=False)}\n" for row in rows))


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read ({error}); remove it to go on without it") from None


def _board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingDependencyError(
            "run.tensorboard needs the tensorboard package: pip install 'lowprec[log]'"
        ) from None
    return SummaryWriter(str(folder), purge_step=step or None)
