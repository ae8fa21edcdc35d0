"""A few numbers for every node of a network, so that a failure can be traced to the first node that is off.

Keeping every activation would make a bundle as large as its data; a handful of random projections of each one, taken in
float64 on a few samples, shows any change of it as surely as its outputs would (Johnson and Lindenstrauss), and any
machine can take them again. The projections are signs drawn from the tensor's name.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowprec.errors import ArtifactError
from lowprec.export.float64 import Float64Graph, Kind, Visit
from lowprec.export.parity.floor import DRAWS, RoundingDraw, rms
from lowprec.export.parity.storage import Storage
from lowprec.export.tensors import fixed_batch
from lowprec.formats import FP32

SAMPLES = 4
PROJECTIONS = 8

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class Sketches:
    """Projections of every node's output, in order of evaluation.

    Args:
        names: of the tensors, as in the ONNX graph.
        values: (tensors, samples, PROJECTIONS), float64.
        floors: by precision, (tensors,): rms deviation of the projections under rounding noise.
    """

    names: tuple[str, ...]
    values: NDArray[np.float64]
    floors: dict[str, NDArray[np.float64]]

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """Plain arrays for golden.npz."""
        arrays = {"names": np.array(self.names), "values": self.values}
        return arrays | {f"floor.{precision}": floor for precision, floor in self.floors.items()}

    @classmethod
    def from_arrays(cls, arrays: Arrays) -> Sketches:
        """What `to_arrays` gave; raises `ArtifactError` for anything else."""
        names, values = np.asarray(arrays.get("names")), np.asarray(arrays.get("values"))
        floors = {key.removeprefix("floor."): np.asarray(a) for key, a in arrays.items() if key.startswith("floor.")}
        whole = names.dtype.kind == "U" and names.ndim == 1 and values.dtype == np.float64
        if not whole or any(a.shape[:1] != names.shape or a.dtype != np.float64 for a in (values, *floors.values())):
            raise ArtifactError("the node sketches are incomplete; the file they were stored in is damaged")
        return cls(tuple(str(name) for name in names), values, floors)


def take_sketches(graph: Float64Graph, inputs: Arrays, storages: Collection[Storage]) -> Sketches:
    """Sketches of a network on the first samples of its inputs, and how far rounding noise moves each of them."""
    feeds = _first(graph, inputs)
    exact = _project(graph, feeds)
    names = tuple(exact)
    floors = {}
    for storage in storages:
        squares = np.zeros(len(names))
        for draw in range(DRAWS):
            noise = RoundingDraw(storage, FP32, 0, draw, 0)
            moved = _project(graph, feeds, noise)
            squares += [rms(moved[name] - exact[name]) ** 2 for name in names]
        floors[storage.name] = np.sqrt(squares / DRAWS)
    shape = (len(names), len(next(iter(feeds.values()))), PROJECTIONS)
    return Sketches(names, np.array([exact[name] for name in names]).reshape(shape), floors)


def deviations(sketches: Sketches, graph: Float64Graph, inputs: Arrays, precision: str) -> dict[str, float]:
    """By tensor, in order of evaluation: rms deviation from the sketches in multiples of the floor of `precision`.

    Tensors that the graph does not have under the same name are left out; where the floor is 0 any deviation is
    infinite.
    """
    found = _project(graph, _first(graph, inputs))
    ratios = {}
    for name, value, floor in zip(sketches.names, sketches.values, sketches.floors[precision], strict=True):
        if name in found and found[name].shape == value.shape:
            error = rms(found[name] - value)
            finite = np.array_equal(np.isfinite(found[name]), np.isfinite(value))
            ratios[name] = np.inf if not finite else error / floor if floor > 0 else np.inf if error > 0 else 0.0
    return ratios


def _first(graph: Float64Graph, inputs: Arrays) -> dict[str, NDArray[Any]]:
    """The samples that sketches are taken of: the first few, or the first batch where the graph fixes its size."""
    count = fixed_batch(graph.inputs) or SAMPLES
    return {name: array[:count] for name, array in inputs.items()}


def _project(graph: Float64Graph, feeds: Arrays, noise: Visit | None = None) -> dict[str, NDArray[np.float64]]:
    samples = len(next(iter(feeds.values())))
    found: dict[str, NDArray[np.float64]] = {}

    def look(name: str, kind: Kind, value: NDArray[Any], terms: int) -> NDArray[Any]:
        value = noise(name, kind, value, terms) if noise else value
        if kind == "node" and value.dtype.kind == "f" and value.ndim and len(value) == samples:
            found[name] = _projections(name, value.reshape(samples, -1))
        return value

    graph.run(feeds, look)
    return found


def _projections(name: str, rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """rows @ signs / sqrt(n), (samples, PROJECTIONS): each as large as the rms of a row of n numbers."""
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    n = rows.shape[1]
    with np.errstate(invalid="ignore", over="ignore"):
        columns = [rows @ (generator.integers(0, 2, n) * 2.0 - 1.0) for _ in range(PROJECTIONS)]
    return np.asarray(np.stack(columns, axis=1) / np.sqrt(max(n, 1)), np.float64)
