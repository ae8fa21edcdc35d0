"""Operators that onnx's reference computes wrongly, or not at all, in some version of them.

Found by running each operator in every opset against onnxruntime. The reference blends batch statistics into a
BatchNormalization before opset 14, takes a Softmax before opset 13 for the later one, normalises in LRN as many
channels as there are samples, and knows only the newest Resize. A truth that is wrong there would condemn the runtime.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.reference.op_run import OpRun
from onnx.reference.ops.op_resize import Resize as NewResize

Array = NDArray[Any]

_resize: Any = NewResize._run


class BatchNormalization(OpRun):
    """(x - mean) / sqrt(variance + epsilon) * scale + bias with the statistics that are given.

    Before opset 9, `spatial` = 0 says that there are as many of them as elements in a sample.
    """

    op_domain = ""

    def _run(
        self, x: Array, scale: Array, bias: Array, mean: Array, variance: Array, epsilon: float | None = None,
        momentum: float | None = None, spatial: int | None = None, training_mode: int | None = None,
    ) -> tuple[Array]:  # fmt: skip
        shape = x.shape[1:] if spatial == 0 else (-1, *[1] * (x.ndim - 2))
        gain, shift, centre, spread = (value.reshape(shape) for value in (scale, bias, mean, variance))
        return (gain * (x - centre) / np.sqrt(spread + (1e-5 if epsilon is None else epsilon)) + shift,)


class LRN(OpRun):
    """x / (bias + alpha / size * sum of squares over `size` neighbouring channels) ^ beta."""

    op_domain = ""

    def _run(self, x: Array, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0, size: int = 1) -> tuple[Array]:
        before, after = math.floor((size - 1) / 2), math.ceil((size - 1) / 2)
        squares, channels = np.square(x), range(x.shape[1])
        sums = np.stack([squares[:, max(0, c - before) : c + after + 1].sum(axis=1) for c in channels], axis=1)
        # Attributes arrive in float32, and so would their quotient.
        return (x / (float(bias) + float(alpha) / size * sums) ** float(beta),)


class MeanVarianceNormalization(OpRun):
    """(x - mean) / (standard deviation + 1e-9) over `axes`, by default all but the channels."""

    op_domain = ""

    def _run(self, x: Array, axes: Sequence[int] | None = None) -> tuple[Array]:
        over = tuple(axes or (0, 2, 3))
        centred = x - x.mean(axis=over, keepdims=True)
        return (centred / (np.sqrt(np.square(centred).mean(axis=over, keepdims=True)) + 1e-9),)


def _softmax(rows: Array) -> Array:
    powers = np.exp(rows - rows.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def _log_softmax(rows: Array) -> Array:
    shifted = rows - rows.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def _hardmax(rows: Array) -> Array:
    return np.asarray(np.arange(rows.shape[1]) == rows.argmax(axis=1)[:, None], rows.dtype)


def _over_all_behind(name: str, of_rows: Callable[[Array], Array]) -> type[OpRun]:
    """An operator that before opset 13 took everything from `axis` (1 by default) on for one row."""

    class Rows(OpRun):
        op_domain = ""

        def _run(self, x: Array, axis: int | None = None) -> tuple[Array]:
            # The evaluator fills in the newest default of an attribute that a node leaves out.
            said = [attribute.i for attribute in self.onnx_node.attribute if attribute.name == "axis"]
            rows = math.prod(x.shape[: (said[0] if said else 1) % x.ndim])
            return (of_rows(x.reshape(rows, -1)).reshape(x.shape),)

    Rows.__name__ = name
    return Rows


class Resize(OpRun):
    """onnx's own, its coefficient of cubic interpolation in float64: from float32 the weights do not add up to one."""

    op_domain = ""

    def _run(
        self, x: Array, roi: Array | None = None, scales: Array | None = None, sizes: Array | None = None,
        cubic_coeff_a: float | None = None, **given: Any,
    ) -> tuple[Array]:  # fmt: skip
        cubic = -0.75 if cubic_coeff_a is None else float(cubic_coeff_a)
        (result,) = _resize(self, x, roi, scales, sizes, cubic_coeff_a=cubic, **given)
        return (result,)


def _old_resize(name: str) -> type[OpRun]:
    """Upsample, and Resize of opset 10: output i comes from i / scale, nearest rounds down."""

    class Scaled(OpRun):
        op_domain = ""

        def _run(self, x: Array, scales: Any, mode: str | None = None, **later: Any) -> tuple[Array]:
            places = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
            (result,) = _resize(self, x, None, np.asarray(scales), mode=mode, exclude_outside=0, **places)
            return (result,)

    Scaled.__name__ = name
    return Scaled


def repaired_operators(model: onnx.ModelProto) -> list[type[OpRun]]:
    """The replacements for the opset of a model.

    A BatchNormalization that takes statistics from its batch stays with onnx's own implementation.
    """
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 1)
    found: list[type[OpRun]] = [LRN, MeanVarianceNormalization, _old_resize("Upsample")]
    if not any(_trains(node) for node in model.graph.node):
        found.append(BatchNormalization)
    if opset < 13:
        rows = {"Softmax": _softmax, "LogSoftmax": _log_softmax, "Hardmax": _hardmax}
        found += [_over_all_behind(name, of_rows) for name, of_rows in rows.items()]
    return [*found, _old_resize("Resize") if opset < 11 else Resize]


def _trains(node: onnx.NodeProto) -> bool:
    if node.op_type != "BatchNormalization":
        return False
    asked = any(attribute.name == "training_mode" and attribute.i for attribute in node.attribute)
    return asked or len([name for name in node.output if name]) > 1
