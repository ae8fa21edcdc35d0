"""What calibration.json holds, whoever measured it: a torch network by its modules or an ONNX graph by its tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowprec.artifacts import write_json
from lowprec.formats import FP16

SCHEMA = 1


@dataclass(frozen=True)
class Calibration:
    """Ranges of a network's tensors on some data; see `range_summary` for the numbers.

    Args:
        inputs: by name of the forward argument or graph input.
        outputs: by module path (the network's own output under "(model)"), in order of the first call; of a graph, by
            name of the tensor in order of evaluation.
        weights: by parameter path, as the layer uses it (a parametrised weight by what it evaluates to).
        data: batches, samples, and the SHA-256 of the inputs (types, shapes and bytes, in order).
    """

    inputs: dict[str, dict[str, Any]]
    outputs: dict[str, dict[str, Any]]
    weights: dict[str, dict[str, Any]]
    data: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The content of calibration.json."""
        return {
            "schema": SCHEMA,
            "data": self.data,
            "inputs": self.inputs,
            "outputs": self.outputs,
            "weights": self.weights,
        }

    def save(self, path: str | Path) -> None:
        """Writes calibration.json, whole or not at all."""
        write_json(Path(path), self.to_dict())


def range_summary(
    count: int, low: float, high: float, zeros: float, subnormal: float, squares: float
) -> dict[str, Any]:
    """Plain numbers for JSON.

    count; min, max, absmax, rms; zeros and fp16_subnormal as shares of count (nonzero values below 2^-14, the
    smallest normal half, keep few bits or none); fp16_headroom_bits = log2(fp16 max / absmax), negative
    where it overflows, null for a tensor of zeros.

    Args:
        count: number of values.
        low: the smallest.
        high: the largest.
        zeros: how many are zero.
        subnormal: how many are not zero and below the smallest normal half.
        squares: sum of squares.
    """
    absmax = max(abs(low), abs(high))
    headroom = FP16.headroom_bits(absmax)
    return {
        "count": count,
        "min": low,
        "max": high,
        "absmax": absmax,
        "rms": math.sqrt(squares / count),
        "zeros": zeros / count,
        "fp16_subnormal": subnormal / count,
        "fp16_headroom_bits": headroom if math.isfinite(headroom) else None,
    }
