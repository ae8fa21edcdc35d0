"""What the neutral graph knows of ONNX operators that compute something: the table `OPERATIONS`.

An operator that is not in it, or is used in a way that it does not describe, is opaque. Attributes that became inputs
in later opsets are read in both places, so that files of any age fold.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from lowprec.affine import ChannelAffine
from lowprec.export.float64.operators import resolve_pads
from lowprec.export.folding.algebra import Array, Stored, Window, scaled
from lowprec.export.folding.from_onnx.moves import handed_over
from lowprec.export.folding.from_onnx.program import OnnxProgram
from lowprec.export.folding.graph import (
    Affine,
    Linear,
    LiveNorm,
    MatrixProduct,
    Op,
    Opaque,
    Product,
    Sum,
    Through,
    ZeroPad,
)

RUNNING_NORMS = ("BatchNormalization",)
_SAMPLE_NORMS = (
    "GroupNormalization",
    "InstanceNormalization",
    "LRN",
    "LayerNormalization",
    "MeanVarianceNormalization",
    "RMSNormalization",
)


@dataclass(frozen=True)
class Call:
    """A node with its attributes at hand.

    Args:
        program: the model.
        node: the node.
        given: its attributes.
    """

    program: OnnxProgram
    node: onnx.NodeProto
    given: dict[str, Any]

    def name(self, position: int) -> str:
        """Name of an input; empty where it is left out."""
        return self.node.input[position] if position < len(self.node.input) else ""

    def constant(self, position: int) -> Array | None:
        """A floating constant input."""
        return self.program.float_constant(self.name(position))

    def stored(self, position: int) -> NDArray[Any] | None:
        """A floating constant input as it is held."""
        return self.program.stored(self.name(position))

    def computes(self, position: int) -> bool:
        """Whether an input is there and no constant."""
        return bool(self.name(position)) and not self.program.is_constant(self.name(position))

    def numbers(self, attribute: str, position: int) -> list[int] | None:
        """Whole numbers that are an attribute in old opsets and a constant input in new ones; None if absent."""
        if attribute in self.given:
            return list(self.given[attribute])
        value = self.program.constant(self.name(position)) if self.name(position) else None
        return None if value is None else [int(number) for number in value.reshape(-1)]

    @property
    def rank(self) -> int:
        """Number of axes of the first input."""
        return self.program.rank(self.node.input[0])

    @property
    def spatial(self) -> tuple[int, ...]:
        """All axes of the first input behind the channels."""
        return tuple(range(2, self.rank))


Reader = Callable[[Call], Op]


def _read_conv(call: Call) -> Op:
    weight, bias = call.stored(1), call.constant(2)
    if weight is None or call.computes(2):
        return Opaque()
    return Linear("conv", weight, bias, call.given.get("group", 1), 1, _conv_window(call, weight.shape[2:]))


def _conv_window(call: Call, kernel: tuple[int, ...]) -> Window:
    """Padding as numbers; SAME at a stride and a free length has none."""
    stride, dilation = _steps(call, len(kernel))
    auto = call.given.get("auto_pad", "NOTSET")
    lengths = call.program.shape(call.node.input[0])[2:]
    varies = auto.startswith("SAME") and any(n is None and s > 1 for n, s in zip(lengths, stride, strict=True))
    known = [step if length is None else length for length, step in zip(lengths, stride, strict=True)]
    before, after = resolve_pads(auto, call.given.get("pads"), known, kernel, stride, dilation)
    return Window(stride, tuple(zip(before, after, strict=True)), dilation, varies)


def _steps(call: Call, axes: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    ones = [1] * axes
    return tuple(call.given.get("strides") or ones), tuple(call.given.get("dilations") or ones)


def _read_conv_transpose(call: Call) -> Op:
    weight, bias = call.stored(1), call.constant(2)
    if weight is None or call.computes(2):
        return Opaque()
    axes = weight.ndim - 2
    stride, dilation = _steps(call, axes)
    pads, extra = call.given.get("pads") or [0] * 2 * axes, call.given.get("output_padding") or [0] * axes
    cropped = tuple((pads[axis], pads[axes + axis] - extra[axis]) for axis in range(axes))
    varies = call.given.get("auto_pad", "NOTSET") != "NOTSET" or "output_shape" in call.given
    window = Window(stride, cropped, dilation, varies)
    return Linear("conv_transpose", weight, bias, call.given.get("group", 1), 1, window)


def _read_gemm(call: Call) -> Op:
    """alpha A B + beta C; a bias that differs from row to row is no bias."""
    held, bias = call.stored(1), call.constant(2)
    if held is None or call.given.get("transA", 0) or call.computes(2):
        return Opaque()
    weight_OC: Stored = held if call.given.get("transB", 0) else held.T
    if call.given.get("alpha", 1.0) != 1.0:
        weight_OC = scaled(weight_OC, np.full((1, 1), call.given["alpha"]))
    if bias is not None:
        if bias.size not in (1, bias.shape[-1] if bias.ndim else 1):
            return Opaque()
        bias = np.broadcast_to(bias.reshape(-1), weight_OC.shape[0]) * call.given.get("beta", 1.0)
    return Linear("linear", weight_OC, bias, 1, 1)


def _read_matmul(call: Call) -> Op:
    """`x @ W` for a constant matrix is a linear layer."""
    if call.computes(0) and call.computes(1):
        ranks = [call.program.rank(name) for name in call.node.input]
        return MatrixProduct(means=_is_softmax(call, call.name(0))) if min(ranks) > 1 else Opaque()
    weight = call.stored(1)
    if weight is None or weight.ndim != 2 or call.rank < 2:
        return Opaque()
    return Linear("linear", weight.T, None, 1, call.rank - 1)


def _is_softmax(call: Call, value: str) -> bool:
    """Whether a value adds up to one along its last axis; before opset 13 a softmax goes over several."""
    maker = next((node for node in call.program.model.graph.node if value in node.output), None)
    if maker is None or maker.op_type != "Softmax" or call.program.opset < 13:
        return False
    axes = [attribute.i for attribute in maker.attribute if attribute.name == "axis"] or [-1]
    return axes[0] in (-1, call.program.rank(value) - 1)


def read_biased_product(program: OnnxProgram, product: onnx.NodeProto, adds: onnx.NodeProto) -> Linear | None:
    """A matrix product and the addition behind it as one linear layer; None where they are not."""
    linear = _read_matmul(Call(program, product, {})) if product.op_type == "MatMul" else None
    if not isinstance(linear, Linear) or adds.op_type != "Add":
        return None
    position = 1 - list(adds.input).index(product.output[0])
    bias = program.float_constant(adds.input[position])
    if bias is None or bias.ndim > linear.axis + 1 or bias.size not in (1, bias.shape[-1] if bias.ndim else 1):
        return None
    if bias.size not in (1, linear.channels):
        return None
    return Linear("linear", linear.stored, np.broadcast_to(bias.reshape(-1), linear.channels).copy(), 1, linear.axis)


def _read_gather(call: Call) -> Op:
    """Rows of a constant table are an embedding; entries of a computed tensor are a movement."""
    table = call.stored(0)
    if table is None or table.ndim != 2 or call.given.get("axis", 0) != 0:
        return Opaque()
    return Linear("embedding", table, None, 1, call.program.rank(call.node.output[0]) - 1)


def _read_running_norm(call: Call) -> Op:
    trains = call.given.get("training_mode", 0) or len([name for name in call.node.output if name]) > 1
    if trains:
        return LiveNorm("is in training mode, so its statistics still change; export the network in evaluation mode")
    gamma, beta, mean, variance = (call.constant(position) for position in range(1, 5))
    if gamma is None or beta is None or mean is None or variance is None:
        return LiveNorm("has statistics or parameters that the network computes, so no constants stand for it")
    if call.rank < 2 or not call.given.get("spatial", 1):
        return Opaque()
    epsilon = call.given.get("epsilon", float(np.float32(1e-5)))
    with np.errstate(invalid="ignore", divide="ignore"):
        affine = ChannelAffine.from_statistics(mean, np.sqrt(variance + epsilon), gamma, beta)
    return Affine.along(1, call.rank, affine)


def _read_sample_norm(call: Call) -> Op:
    return LiveNorm("takes its statistics from each sample, so no constants stand for it")


def _read_sum(coefficients: tuple[float, float]) -> Reader:
    def read(call: Call) -> Op:
        if call.computes(0) and call.computes(1):
            return Sum(coefficients)
        position, constant = _constant_operand(call)
        if constant is None:
            return Opaque()
        rank = np.ones((1,) * call.program.rank(call.node.output[0]))
        return Affine(coefficients[1 - position] * rank, coefficients[position] * constant)

    return read


def _read_many_summed(call: Call) -> Op:
    if all(map(call.computes, range(len(call.node.input)))):
        return Sum((1.0,) * len(call.node.input)) if len(call.node.input) > 1 else handed_over()
    return _read_sum((1.0, 1.0))(call) if len(call.node.input) == 2 else Opaque()


def _read_product(call: Call) -> Op:
    divides = call.node.op_type == "Div"
    rank = call.program.rank(call.node.output[0])
    if call.computes(0) and call.computes(1):
        same = all(call.program.rank(name) == rank for name in call.node.input)
        return Product(divides) if same else Opaque()
    position, constant = _constant_operand(call)
    if constant is None or (divides and position == 0):
        return Opaque()
    with np.errstate(divide="ignore"):
        scale = 1 / constant if divides else constant
    return Affine(scale, np.zeros((1,) * rank))


def _constant_operand(call: Call) -> tuple[int, Array | None]:
    """Position and value of the constant operand, of the result's rank; None where it enlarges what it meets."""
    position = 0 if call.computes(1) else 1
    constant, other = call.constant(position), call.program.shape(call.name(1 - position))
    if constant is None or not call.computes(1 - position) or constant.ndim > len(other):
        return position, None
    whole = constant.reshape((1,) * (len(other) - constant.ndim) + constant.shape)
    enlarges = any(length != 1 and length != known for length, known in zip(whole.shape, other, strict=True))
    return position, None if enlarges else whole


def _read_negation(call: Call) -> Op:
    one = np.ones((1,) * call.rank)
    return Affine(-one, 0 * one)


def _read_homogeneous(call: Call) -> Op:
    """f(s x) = s f(x) for s > 0."""
    return Opaque() if call.computes(1) else Through(positive=True, shift=False)  # a PRelu has its slopes there


def _read_clip(call: Call) -> Op:
    """A clip from zero up is a ReLU; so is a maximum with zero."""
    if call.node.op_type == "Max":
        constant = _constant_operand(call)[1] if len(call.node.input) == 2 else None
        is_relu = constant is not None and not constant.any()
    else:
        low = call.constant(1) if call.name(1) else call.given.get("min")
        limited = bool(call.name(2)) or call.given.get("max", np.inf) < np.finfo(np.float32).max
        is_relu = low is not None and not np.any(low) and not limited
    return Through(positive=True, shift=False) if is_relu else Opaque()


def _read_max_pool(call: Call) -> Op:
    return Through(positive=True, shift=True, mixes=call.spatial)


def _read_average_pool(call: Call) -> Op:
    """The mean of a window; a shift does not pass where the window counts zeros."""
    padded = any(call.given.get("pads") or ()) or call.given.get("auto_pad", "NOTSET").startswith("SAME")
    counts = call.given.get("count_include_pad", 0) and padded  # a last window that overhangs counts what is there
    return Through(positive=False, shift=not counts, mixes=call.spatial)


def _read_global_pool(call: Call) -> Op:
    return Through(positive=call.node.op_type == "GlobalMaxPool", shift=True, mixes=call.spatial)


def _read_reduction(positive: bool, shift: bool) -> Reader:
    def read(call: Call) -> Op:
        axes = call.numbers("axes", 1)
        if not axes and (call.computes(1) or call.given.get("noop_with_empty_axes", 0)):
            return Opaque()
        mixed = tuple(sorted({axis % call.rank for axis in axes or range(call.rank)}))
        return Through(positive, shift, mixed, drops=not call.given.get("keepdims", 1))

    return read


def _read_interpolation(call: Call) -> Op:
    """Weights of nearest, linear and cubic interpolation add up to one, wherever they take their places from.

    Not where places outside of the tensor count as a constant, nor where a length that stays is still resampled.
    """
    usual = call.given.get("mode", "nearest") in ("nearest", "linear", "cubic")
    places = call.given.get("coordinate_transformation_mode", "half_pixel")
    stretches = call.given.get("keep_aspect_ratio_policy", "stretch") == "stretch"
    if not usual or not stretches or places in ("tf_crop_and_resize", "tf_half_pixel_for_nn"):
        return Opaque()
    kept = (1,) if _keeps_channels(call) else ()
    return Through(False, True, tuple(axis for axis in range(call.rank) if axis not in kept))


def _keeps_channels(call: Call) -> bool:
    """Whether axis 1 is not resampled: its length stays, and by a factor of exactly one."""
    before, after = call.program.shape(call.node.input[0]), call.program.shape(call.node.output[0])
    if len(before) < 2 or before[1] is None or before[1] != after[1]:
        return False
    axes = [axis % call.rank for axis in call.given.get("axes", range(call.rank))]
    position = 2 if call.node.op_type == "Resize" and call.program.opset >= 11 else 1
    by_length = "scales" not in call.given and not call.name(position)
    if by_length or 1 not in axes:
        return True
    given = call.given.get("scales")
    scales = call.program.constant(call.name(position)) if given is None else np.asarray(given)
    return scales is not None and (not scales.size or scales[axes.index(1)] == 1)


def _read_pad(call: Call) -> Op:
    flat, rank = call.numbers("pads", 1), call.rank
    axes = call.numbers("axes", 3)
    if flat is None or min(flat, default=0) < 0 or (axes is None and call.name(3)):
        return Opaque()
    widths = [(0, 0)] * rank
    padded = range(rank) if axes is None else [axis % rank for axis in axes]
    for index, axis in enumerate(padded):
        widths[axis] = (flat[index], flat[len(flat) // 2 + index])
    if call.given.get("mode", "constant") == "constant":
        value = call.program.constant(call.name(2)) if call.name(2) else np.asarray(call.given.get("value", 0.0))
        return ZeroPad(tuple(widths)) if value is not None and not value.any() else Opaque()
    return Through(False, True, tuple(axis for axis, pair in enumerate(widths) if any(pair)))


def _read_cast(call: Call) -> Op:
    """Between float32 and float64 nothing is rounded that float64 would see; a cast to half rounds."""
    kinds = {call.program.types.get(name) for name in (call.node.input[0], call.node.output[0])}
    return handed_over() if kinds <= {TensorProto.FLOAT, TensorProto.DOUBLE} else Opaque()


OPERATIONS: dict[str, Reader] = {
    "Conv": _read_conv,
    "ConvTranspose": _read_conv_transpose,
    "Gemm": _read_gemm,
    "MatMul": _read_matmul,
    "Gather": _read_gather,
    **dict.fromkeys(RUNNING_NORMS, _read_running_norm),
    **dict.fromkeys(_SAMPLE_NORMS, _read_sample_norm),
    "Add": _read_sum((1.0, 1.0)),
    "Sub": _read_sum((1.0, -1.0)),
    "Sum": _read_many_summed,
    "Mul": _read_product,
    "Div": _read_product,
    "Neg": _read_negation,
    **dict.fromkeys(("Relu", "LeakyRelu", "PRelu", "Abs"), _read_homogeneous),
    **dict.fromkeys(("Clip", "Max"), _read_clip),
    "MaxPool": _read_max_pool,
    "AveragePool": _read_average_pool,
    **dict.fromkeys(("GlobalAveragePool", "GlobalMaxPool"), _read_global_pool),
    "ReduceMean": _read_reduction(positive=False, shift=True),
    "ReduceSum": _read_reduction(positive=False, shift=False),
    "ReduceMax": _read_reduction(positive=True, shift=True),
    "ReduceMin": _read_reduction(positive=True, shift=True),
    **dict.fromkeys(("Resize", "Upsample"), _read_interpolation),
    "Pad": _read_pad,
    **dict.fromkeys(("Cast", "CastLike"), _read_cast),
}
"""Everything that is known about operators that compute something; those that move elements are in onnx_moves.py."""
