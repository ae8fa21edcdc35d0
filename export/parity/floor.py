"""The rounding-noise floor: how far this very network strays on these very inputs when its values are rounded.

Why measured and not assumed: a tolerance in absolute or relative terms knows nothing of the network. 1e-5 fails every
half network and 1e-2 passes a wrong padding; certified error bounds come out a billion times too wide on five blocks.
A few random roundings of the real graph cost as many evaluations and give the yardstick for each single output.
Source: Monte-Carlo arithmetic, Parker, Monte Carlo Arithmetic, 1997, random rounding of inputs and results.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowprec.errors import ArtifactError, ConfigError
from lowprec.export.float64 import Float64Graph, Kind
from lowprec.export.parity.storage import Storage, format_of_precision
from lowprec.export.tensors import fixed_batch
from lowprec.formats import FP32, FloatFormat, format_named

Array = NDArray[Any]
_BLOCK = 1 << 22  # elements perturbed at a time
DRAWS = 6
"""Draws by default: the rms of 6 is within a factor of two of the truth (chi-squared of 6), well inside the bands."""


@dataclass(frozen=True, eq=False)
class Floor:
    """Rms deviation of each output element under random rounding.

    Args:
        storage: name of the precision that values are stored in.
        accumulator: name of the format that sums are formed in.
        draws: how many random evaluations it rests on.
        seed: what the draws were seeded with.
        rms: by output name, float64, of the output's shape. For outputs that are no floats the deviation of an element
            is 1 where a draw changed it and 0 where not.
    """

    storage: str
    accumulator: str
    draws: int
    seed: int
    rms: dict[str, NDArray[np.float64]]

    @property
    def storage_format(self) -> FloatFormat:
        """The floating format that values are stored in, where they are not quantised."""
        return format_of_precision(self.storage)

    def total(self, output: str) -> float:
        """Rms over all elements of an output; 0 for an empty one."""
        return rms(self.rms[output])

    def channels(self, output: str) -> NDArray[np.float64]:
        """Rms per channel (axis 1), shape (C,); of the whole output, shape (1,), where it has fewer than two axes."""
        return channel_rms(self.rms[output])

    def take(self, samples: int) -> Floor:
        """The floor of the first samples along axis 0."""
        kept = {name: array[:samples] for name, array in self.rms.items()}
        return Floor(self.storage, self.accumulator, self.draws, self.seed, kept)

    def to_arrays(self) -> dict[str, Array]:
        """Plain arrays for an .npz: `rms.NAME` per output, `storage`, `accumulator`, `draws`, `seed`."""
        about = {"storage": self.storage, "accumulator": self.accumulator, "draws": self.draws, "seed": self.seed}
        arrays: dict[str, Array] = {key: np.asarray(value) for key, value in about.items()}
        return arrays | {f"rms.{name}": value for name, value in self.rms.items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> Floor:
        """What `to_arrays` gave. Raises `ArtifactError` when a part is missing or is no noise floor."""
        try:
            numbers = {name: np.asarray(arrays[name]).item() for name in ("draws", "seed")}
            names = {name: str(np.asarray(arrays[name]).item()) for name in ("storage", "accumulator")}
        except (KeyError, ValueError):
            raise ArtifactError("the noise floor is incomplete; the file it was stored in is damaged") from None
        values = {name.removeprefix("rms."): np.asarray(v) for name, v in arrays.items() if name.startswith("rms.")}
        if any(value.dtype != np.float64 or not np.all(value >= 0) for value in values.values()) or not values:
            raise ArtifactError(
                "the noise floor holds no, or negative, deviations; the file it was stored in is damaged"
            )
        format_of_precision(names["storage"])
        format_named(names["accumulator"])
        return cls(names["storage"], names["accumulator"], int(numbers["draws"]), int(numbers["seed"]), values)


def rms(x: Array) -> float:
    """sqrt(mean(x^2)) over the finite elements; 0 when there are none. Scaled by the largest, so it cannot overflow."""
    finite = x[np.isfinite(x)]
    largest = float(np.max(np.abs(finite))) if finite.size else 0.0
    if largest == 0.0:
        return 0.0
    return largest * math.sqrt(float(np.mean(np.square(finite / largest))))


def channel_rms(x: Array) -> NDArray[np.float64]:
    """`rms` per index of axis 1, shape (C,); of the whole, shape (1,), where there are fewer than two axes."""
    if x.ndim < 2:
        return np.array([rms(x)])
    return np.array([rms(x[:, c]) for c in range(x.shape[1])], np.float64)


def deviation(reference: Array, candidate: Array) -> NDArray[np.float64]:
    """candidate - reference for floats, 1 where they differ and 0 where not for anything else; NaN where not finite."""
    if reference.dtype.kind != "f":
        return np.not_equal(reference, candidate).astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        difference = candidate.astype(np.float64) - reference.astype(np.float64)
    return np.asarray(np.where(np.isfinite(reference) & np.isfinite(candidate), difference, np.nan), np.float64)


def perturbed(
    x: Array, terms: int, storage: FloatFormat, accumulator: FloatFormat, generator: np.random.Generator
) -> NDArray[np.float64]:
    """x after one random rounding to `storage` of a result that was added up in `accumulator`.

    x + d1 * max(u |x|, s / 2) + d2 * sqrt(terms) * u_acc * |x|, with d1 and d2 uniform in [-1, 1], u the unit roundoff
    of `storage`, s its subnormal step, u_acc the unit roundoff of the accumulator (for terms > 1 only). Zeros and
    non-finite values stay: they are stored exactly.

    Args:
        x: float64.
        terms: length of the sum that made each element.
        storage: the format x is stored in.
        accumulator: the format it was added up in.
        generator: source of the draws.
    """
    if terms <= 1 and x.size > _BLOCK:  # the same draws, without several copies of a large weight
        blocks = np.array_split(x.reshape(-1), -(-x.size // _BLOCK))
        result = np.empty(x.size)
        for start, block in zip(np.cumsum([0, *map(len, blocks)]), blocks, strict=False):
            result[start : start + len(block)] = perturbed(block, terms, storage, accumulator, generator)
        return result.reshape(x.shape)
    size = np.abs(x)
    with np.errstate(over="ignore", invalid="ignore"):
        amplitude = np.maximum(storage.unit_roundoff * size, storage.min_subnormal / 2)
        noise = amplitude * generator.uniform(-1.0, 1.0, x.shape)
        if terms > 1:
            summing = math.sqrt(terms) * accumulator.unit_roundoff * size
            noise += summing * generator.uniform(-1.0, 1.0, x.shape)
        return np.asarray(np.where((x != 0) & np.isfinite(x), x + noise, x), np.float64)


class RoundingDraw:
    """Perturbs the stored values of one evaluation; the draws depend on a value's name, not on its turn.

    Weights draw the same in every block of samples, the others anew in each. A quantised value x is moved by d s, d
    uniform in [-1/2, 1/2] and s its step: the error of rounding to the nearest multiple of s (Widrow, Kollar,
    Quantization Noise, 2008). Saturation is not part of it: a value beyond the range is wrong, not noisy.
    """

    def __init__(
        self, storage: FloatFormat | Storage, accumulator: FloatFormat, seed: int, draw: int, start: int
    ) -> None:
        self._storage, self._accumulator = Storage.of(storage), accumulator
        self._key = (seed, draw)
        self._start = start

    def __call__(self, name: str, kind: Kind, value: Array, terms: int) -> Array:
        """The value after one random rounding; values that are moved or selected, and exact ones, stay."""
        step = self._storage.steps.get(name)
        if value.dtype.kind != "f" or (kind == "node" and terms == 0 and step is None):
            return value
        if kind == "input" or value.size == 1:
            # An input is the same numbers on both sides, and a lone constant (a power's 2, a clip's 6) is a literal of
            # the formula: each is wrong only by what storing it changes, which is nothing where the format holds it.
            exact = self._storage.holds(name, value)
            if exact.all():
                return value
        else:
            exact = None
        block = () if kind == "weight" else (self._start,)
        generator = np.random.default_rng([*self._key, zlib.crc32(name.encode()), *block])
        if step is None:
            found = perturbed(value, terms, self._storage.format_of(name), self._accumulator, generator)
        else:
            noise = step * generator.uniform(-0.5, 0.5, value.shape)
            found = np.where((value != 0) & np.isfinite(value), value + noise, value)
        return np.where(exact, value, found) if exact is not None else found


def noise_floor(
    graph: Float64Graph,
    feeds: Mapping[str, Array],
    storage: FloatFormat | Storage,
    accumulator: FloatFormat = FP32,
    draws: int = DRAWS,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    batch: int = 64,
) -> Floor:
    """Measures the floor by Monte-Carlo: each value that the graph stores is perturbed as `perturbed` says.

    Stored values are the inputs, the weights and the result of each operator that computes (moving, selecting and
    retyping round nothing). deviation_r = f(perturbed in draw r) - f(unperturbed); the floor is its rms over the draws
    in which it is finite. Each sample is perturbed on its own; the weights of a draw are the same for all samples.

    Args:
        graph: the network in float64.
        feeds: one array per input; the caller caps the number of samples.
        storage: the format that values are stored in, or how each of them is.
        accumulator: the format that sums are formed in, never narrower than what is claimed of the backend.
        draws: number of random evaluations, at least 2.
        seed: recorded with the result; same seed, same floor.
        progress: called as progress(evaluations done, evaluations in all).
        batch: samples evaluated at a time where axis 0 of all inputs and outputs is free; bounds the memory.

    Raises:
        ConfigError: fewer than two draws.
        DataError: the feeds do not fit the graph.
    """
    if draws < 2:
        raise ConfigError(f"asked for a noise floor from {draws} draws; it takes at least 2")
    blocks = list(_blocks(graph, feeds, batch))
    total = len(blocks) * (draws + 1)
    parts: list[dict[str, NDArray[np.float64]]] = []
    for index, (start, block) in enumerate(blocks):
        exact = graph.run(block)
        squares = _Squares(exact)
        for draw in range(draws):
            if progress:
                progress(index * (draws + 1) + draw + 1, total)
            squares.add(graph.run(block, RoundingDraw(storage, accumulator, seed, draw, start)))
        parts.append(squares.rms())
    if progress:
        progress(total, total)
    found = parts[0] if len(parts) == 1 else {n: np.concatenate([part[n] for part in parts]) for n in parts[0]}
    return Floor(storage.name, accumulator.name, draws, seed, found)


class _Squares:
    """Running sums of squared deviations from the unperturbed outputs, over the draws in which they are finite."""

    def __init__(self, exact: dict[str, Array]) -> None:
        self._exact = exact
        self._sums = {name: np.zeros(value.shape) for name, value in exact.items()}
        self._counts = {name: np.zeros(value.shape) for name, value in exact.items()}

    def add(self, drawn: dict[str, Array]) -> None:
        for name, value in drawn.items():
            off = deviation(self._exact[name], value)
            finite = np.isfinite(off)
            self._sums[name] += np.square(np.where(finite, off, 0.0))
            self._counts[name] += finite

    def rms(self) -> dict[str, NDArray[np.float64]]:
        return {name: np.sqrt(self._sums[name] / np.maximum(self._counts[name], 1)) for name in self._sums}


def _blocks(graph: Float64Graph, feeds: Mapping[str, Array], batch: int) -> Iterator[tuple[int, Mapping[str, Array]]]:
    """(first sample, feeds) of each block of samples; one block where the samples cannot be told apart.

    A graph that fixes its batch is given that many at a time.
    """
    lengths = {np.shape(value)[:1] for value in feeds.values()}
    free = graph.batch_axis == 0 and all(spec.batch_axis == 0 for spec in graph.outputs)
    fixed = fixed_batch(graph.inputs)
    if not (free or fixed) or len(lengths) != 1 or lengths == {()}:
        yield 0, feeds
        return
    (total,) = lengths.pop()
    batch = fixed or batch
    for start in range(0, max(total, 1), batch):
        yield start, {name: value[start : start + batch] for name, value in feeds.items()}
