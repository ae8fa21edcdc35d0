"""golden.npz: what any machine needs to verify a bundle without the training code.

Array names: `input.NAME` and `output.NAME` (the float64 reference: the trained network before any folding), `labels`
where there are any, `floor.PRECISION.NAME`, the rms rounding noise of each output element when this network's stored
values are rounded to PRECISION, and `sketch.*`, a few projections of every node's output. The floor is measured once,
at export, on the network that was trained, so a damaged artefact cannot widen the limits that it is judged by.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowprec.artifacts import read_npz, write_npz
from lowprec.errors import ArtifactError
from lowprec.export.parity import Floor
from lowprec.export.sketches import Sketches

MAX_SAMPLES = 256
"""Truth and floor are taken on at most this many samples."""


@dataclass(frozen=True)
class Golden:
    """Inputs, float64 outputs and rounding-noise floors of the reference network.

    Args:
        inputs: by input name, samples along axis 0.
        outputs: float64, by output name.
        labels: integer class per sample, or None.
        floors: by precision name.
        sketches: projections of every node's output, or None.
    """

    inputs: dict[str, NDArray[Any]]
    outputs: dict[str, NDArray[np.float64]]
    labels: NDArray[np.int64] | None = None
    floors: dict[str, Floor] = field(default_factory=dict)
    sketches: Sketches | None = None

    @property
    def samples(self) -> int:
        """Number of samples."""
        return int(next(iter(self.inputs.values())).shape[0])

    def save(self, path: Path) -> None:
        """Writes the .npz atomically, the same bytes for the same content."""
        arrays: dict[str, NDArray[Any]] = {f"input.{name}": value for name, value in self.inputs.items()}
        arrays |= {f"output.{name}": value for name, value in self.outputs.items()}
        for precision, floor in self.floors.items():
            arrays |= {f"floor.{precision}.{name}": value for name, value in floor.to_arrays().items()}
        if self.sketches is not None:
            arrays |= {f"sketch.{name}": value for name, value in self.sketches.to_arrays().items()}
        if self.labels is not None:
            arrays["labels"] = self.labels
        write_npz(path, arrays)

    @classmethod
    def load(cls, path: Path) -> Golden:
        """Reads an .npz written by `save`; raises `ArtifactError` when parts are missing or do not fit together."""
        arrays = read_npz(path, "the golden samples")
        inputs, outputs = _under(arrays, "input."), _under(arrays, "output.")
        if not inputs or not outputs:
            raise ArtifactError(f"{path} holds no inputs or no outputs; it is not the golden file of a bundle")
        by_precision: dict[str, dict[str, NDArray[Any]]] = {}
        for name, value in _under(arrays, "floor.").items():
            precision, _, rest = name.partition(".")
            by_precision.setdefault(precision, {})[rest] = value
        lengths = {value.shape[:1] for value in (*inputs.values(), *outputs.values())}
        if len(lengths) != 1 or lengths <= {(), (0,)}:
            raise ArtifactError(f"{path}: inputs and outputs have no samples, or not equally many; it is damaged")
        floors = {precision: Floor.from_arrays(parts) for precision, parts in by_precision.items()}
        sketched = _under(arrays, "sketch.")
        sketches = Sketches.from_arrays(sketched) if sketched else None
        return cls(inputs, outputs, arrays.get("labels"), floors, sketches)


def _under(arrays: dict[str, NDArray[Any]], prefix: str) -> dict[str, NDArray[Any]]:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
