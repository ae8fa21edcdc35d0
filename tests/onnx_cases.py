"""ONNX graphs for the fold tests: every operator of the tables between a norm and what can take that in.

`x -> BatchNormalization -> the operator -> a convolution`: scales and shifts disappear only if they pass the operator.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, parser

# What passes: nothing; positive scales; scales; with shifts.
NOTHING, POSITIVE, SCALES = (), ("positive",), ("positive", "negative")
POSITIVE_SHIFTS, ALL = ("positive", "shift"), ("positive", "negative", "shift")

POINTWISE = "y = Conv(h, w)"
KERNEL = (3, 4, 3, 3)


@dataclass(frozen=True)
class Case:
    """One graph.

    Args:
        body: nodes that make `h` from the norm's result `b`.
        passes: which norms disappear.
        weights: constants by name, beside the norm's own and the tail's `w`.
        shape: of the input; its first axis is free.
        tail: nodes that make `y` from `h`.
        tail_shape: of the tail's weight.
        opset: of ONNX's operators.
        operators: those that the case is about; by default the first of the body.
    """

    body: str
    passes: tuple[str, ...]
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    shape: tuple[int, ...] = (4, 6, 6)
    tail: str = POINTWISE
    tail_shape: tuple[int, ...] = (3, 4, 1, 1)
    opset: int = 21
    operators: tuple[str, ...] = ()

    @property
    def about(self) -> tuple[str, ...]:
        """The operators that it tests."""
        return self.operators or (self.body.split("=", 1)[1].split("(")[0].split("<")[0].strip(),)


def numbers(*values):
    return np.array(values, np.float32)


def indices(*values):
    return np.array(values, np.int64)


def some(*shape, seed=3):
    return np.random.default_rng(seed).uniform(0.5, 1.5, shape).astype(np.float32)


ROWS = {"tail": "y = MatMul(h, w)", "tail_shape": (4, 3)}
ZERO = numbers(0).reshape(())
FEATURES = {"shape": (4,), **ROWS}

CASES: dict[str, Case] = {
    "identity": Case("h = Identity(b)", ALL),
    "relu": Case("h = Relu(b)", POSITIVE),
    "leaky": Case("h = LeakyRelu<alpha=0.1>(b)", POSITIVE),
    "prelu": Case("h = PRelu(b, s)", POSITIVE, {"s": some(4, 1, 1)}),
    "prelu computed": Case("m = ReduceMean<keepdims=0>(x) h = PRelu(b, m)", NOTHING, operators=("PRelu",)),
    "abs": Case("h = Abs(b)", POSITIVE),
    "clip": Case("h = Clip(b, z)", POSITIVE, {"z": ZERO}),
    "clip to 6": Case("h = Clip(b, z, s)", NOTHING, {"z": ZERO, "s": numbers(6).reshape(())}),
    "clip from -1": Case("h = Clip(b, z)", NOTHING, {"z": numbers(-1).reshape(())}),
    "clip attribute": Case("h = Clip<min=0.0>(b)", POSITIVE, opset=7),
    "clip attributes": Case("h = Clip<min=0.0, max=6.0>(b)", NOTHING, opset=7),
    "max": Case("h = Max(b, z)", POSITIVE, {"z": ZERO}),
    "max with 1": Case("h = Max(b, z)", NOTHING, {"z": numbers(1)}),
    "sigmoid": Case("h = Sigmoid(b)", NOTHING),
    "max pool": Case("h = MaxPool<kernel_shape=[3,3], pads=[1,1,1,1], strides=[2,2]>(b)", POSITIVE_SHIFTS),
    "max pool up": Case("h = MaxPool<kernel_shape=[2,2], ceil_mode=1, strides=[4,4]>(b)", POSITIVE_SHIFTS),
    "average": Case("h = AveragePool<kernel_shape=[2,2]>(b)", ALL),
    "average up": Case("h = AveragePool<kernel_shape=[4,4], strides=[4,4], ceil_mode=1, count_include_pad=1>(b)", ALL),
    "average padded": Case("h = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1]>(b)", ALL),
    "average counted": Case("h = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1], count_include_pad=1>(b)", SCALES),
    "average same": Case('h = AveragePool<kernel_shape=[3,3], auto_pad="SAME_UPPER", count_include_pad=1>(b)', SCALES),
    "global average": Case("h = GlobalAveragePool(b)", ALL),
    "global max": Case("h = GlobalMaxPool(b)", POSITIVE_SHIFTS),
    "mean": Case("h = ReduceMean<keepdims=0>(b, a)", ALL, {"a": indices(-1, 2)}, **ROWS),
    "mean attribute": Case("h = ReduceMean<axes=[2,3]>(b)", ALL, opset=13),
    "mean of channels": Case("h = ReduceMean(b, a)", NOTHING, {"a": indices(1)}, tail_shape=(3, 1, 1, 1)),
    "mean of all": Case("m = ReduceMean(b) h = Add(x, m)", NOTHING, operators=("ReduceMean",)),
    "mean of none": Case(
        "h = ReduceMean<noop_with_empty_axes=1>(b, a)", NOTHING, {"a": np.zeros(0, np.int64)}, opset=18
    ),
    "sum of elements": Case("h = ReduceSum(b, a)", SCALES, {"a": indices(2)}),
    "maximum": Case("h = ReduceMax(b, a)", POSITIVE_SHIFTS, {"a": indices(3)}),
    "minimum": Case("h = ReduceMin(b, a)", POSITIVE_SHIFTS, {"a": indices(3)}),
    "nearest": Case('h = Resize<mode="nearest">(b, , s)', ALL, {"s": numbers(1, 1, 2, 1.5)}),
    "linear": Case('h = Resize<mode="linear">(b, , s)', ALL, {"s": numbers(1, 1, 2, 2)}),
    "linear by a product": Case(
        'k = Mul(s, t) h = Resize<mode="linear">(b, , k)',
        ALL,
        {"s": numbers(1, 1, 4, 3), "t": numbers(1, 1, 0.5, 0.5)},
        operators=("Resize",),
    ),
    "cubic": Case(
        'h = Resize<mode="cubic", coordinate_transformation_mode="align_corners", axes=[2,3]>(b, , , n)',
        ALL,
        {"n": indices(9, 8)},
    ),
    "resize axes": Case('h = Resize<mode="linear", axes=[2,3]>(b, , s)', ALL, {"s": numbers(2, 2)}),
    "resize channels": Case('h = Resize<mode="linear">(b, , s)', NOTHING, {"s": numbers(1, 1.1, 1, 1)}),
    "crop and resize": Case(
        'h = Resize<mode="linear", coordinate_transformation_mode="tf_crop_and_resize">(b, r, s)',
        NOTHING,
        {"s": numbers(1, 1, 2, 2), "r": numbers(0, 0, 0, 0, 1, 1, 1.5, 1)},
    ),
    "upsample": Case('h = Upsample<mode="nearest">(b, s)', ALL, {"s": numbers(1, 1, 2, 2)}, opset=9),
    "pad": Case("h = Pad(b, p)", SCALES, {"p": indices(0, 0, 1, 2, 0, 0, 0, 1)}),
    "pad axes": Case("h = Pad(b, p, , a)", SCALES, {"p": indices(1, 2), "a": indices(-1)}),
    "pad attribute": Case("h = Pad<pads=[0,0,1,1,0,0,1,1]>(b)", SCALES, opset=9),
    "pad with 1": Case(
        "h = Pad(b, p, o)", NOTHING, {"p": indices(0, 0, 1, 1, 0, 0, 1, 1), "o": numbers(1).reshape(())}
    ),
    "reflect": Case('h = Pad<mode="reflect">(b, p)', ALL, {"p": indices(0, 0, 1, 2, 0, 0, 0, 1)}),
    "add": Case("r = Conv(x, w4) h = Add(b, r)", ALL, {"w4": some(4, 4, 1, 1)}, operators=("Add",)),
    "subtract": Case("r = Conv(x, w4) h = Sub(r, b)", ALL, {"w4": some(4, 4, 1, 1)}, operators=("Sub",)),
    "sum": Case("r = Conv(x, w4) h = Sum(r, b, b)", ALL, {"w4": some(4, 4, 1, 1)}),
    "sum of one": Case("h = Sum(b)", ALL),
    "sum with the input": Case("r = Relu(x) h = Sum(b, r)", NOTHING, operators=("Sum",)),
    "add constant": Case("h = Add(c, b)", ALL, {"c": some(4, 1, 1)}),
    "subtract constant": Case("h = Sub(b, c)", ALL, {"c": some(1, 4, 1, 1)}),
    "subtract from constant": Case("h = Sub(c, b)", ALL, {"c": some(1)}),
    "add picture": Case("h = Add(b, c)", ALL, {"c": some(1, 4, 6, 6)}),
    "times picture": Case("h = Mul(b, c)", SCALES, {"c": some(4, 6, 6)}),
    "enlarging": Case("h = Add(b, c)", NOTHING, {"c": some(1, 4, 1, 1)}, shape=(1, 6, 6)),
    "times constant": Case("h = Mul(b, c)", ALL, {"c": some(4, 1, 1)}),
    "divided": Case("h = Div(b, c)", ALL, {"c": some(4, 1, 1)}),
    "one over": Case("s = Sigmoid(b) h = Div(c, s)", NOTHING, {"c": some(1)}, operators=("Div",)),
    "gate": Case("g = Sigmoid(x) h = Mul(g, b)", SCALES, operators=("Mul",)),
    "divided by a gate": Case("g = Sigmoid(x) h = Div(b, g)", SCALES, operators=("Div",)),
    "negative": Case("h = Neg(b)", ALL),
    "wide and back": Case("d = Cast<to=11>(b) h = Cast<to=1>(d)", ALL),
    "through half": Case("d = Cast<to=10>(b) h = Cast<to=1>(d)", NOTHING),
    "cast like": Case("d = CastLike(b, c) h = Cast<to=1>(d)", ALL, {"c": some(1).astype(np.float64)}),
    "sum of wholes": Case("d = Cast<to=7>(b) e = Add(d, d) h = Cast<to=1>(e)", NOTHING, operators=("Add",)),
    "conv padded": Case(
        "h = Relu(x)", SCALES, tail="y = Conv<pads=[1,1,1,1]>(b, w)", tail_shape=KERNEL, operators=("Conv",)
    ),
    "conv one-sided": Case(
        "h = Relu(x)", SCALES, tail="y = Conv<pads=[0,1,1,0]>(b, w)", tail_shape=(3, 4, 2, 2), operators=("Conv",)
    ),
    "conv same": Case(
        "h = Relu(x)", SCALES, tail='y = Conv<auto_pad="SAME_LOWER">(b, w)', tail_shape=KERNEL, operators=("Conv",)
    ),
    "conv valid": Case(
        "h = Relu(x)", ALL, tail='y = Conv<auto_pad="VALID">(b, w)', tail_shape=KERNEL, operators=("Conv",)
    ),
    "conv weight computed": Case(
        "m = ReduceMean<keepdims=0>(x) k = Mul(w, m)", NOTHING, tail="y = Conv(b, k)", operators=("Conv",)
    ),
    "up-convolution": Case(
        "h = Relu(x)", SCALES, tail="y = ConvTranspose<strides=[2,2]>(b, w)", tail_shape=(4, 3, 2, 2),
        operators=("ConvTranspose",),
    ),
    "up-convolution of points": Case(
        "h = Relu(x)", ALL, tail="y = ConvTranspose(b, w)", tail_shape=(4, 3, 1, 1), operators=("ConvTranspose",)
    ),
    "up-convolution with more": Case(
        "h = Relu(x)", SCALES, tail="y = ConvTranspose<output_padding=[1,1]>(b, w)",
        tail_shape=(4, 3, 1, 1), operators=("ConvTranspose",),
    ),
    "gemm": Case("h = Gemm<alpha=0.5, beta=2.0>(b, g, c)", ALL, {"g": some(4, 4), "c": some(1, 4)}, **FEATURES),
    "gemm transposed": Case("h = Gemm<transB=1>(b, g)", ALL, {"g": some(4, 4)}, **FEATURES),
    "gemm turned": Case("h = Gemm<transA=1>(b, b)", NOTHING, **FEATURES),
    "matmul": Case("h = MatMul(b, g)", ALL, {"g": some(4, 4)}, **FEATURES),
    "matmul of two": Case("t = Sigmoid(x) h = MatMul(b, t)", SCALES, operators=("MatMul",)),
    "matmul of means": Case("t = Softmax(x) h = MatMul(t, b)", ALL, operators=("MatMul",)),
    "matmul of other sums": Case("t = Softmax<axis=2>(x) h = MatMul(t, b)", SCALES, operators=("MatMul",)),
    "matmul from the left": Case("h = MatMul(g, b)", NOTHING, {"g": some(6, 6)}),
    "reshape": Case("h = Reshape(b, r)", ALL, {"r": indices(0, 4, 36, 1)}),
    "flatten": Case("h = Flatten(b)", ALL, tail="y = MatMul(h, w)", tail_shape=(144, 3)),
    "squeeze": Case("h = Squeeze(b, a)", ALL, {"a": indices(2)}, shape=(4, 1, 6), tail_shape=(3, 4, 1)),
    "squeeze all": Case("h = Squeeze(b)", NOTHING, shape=(4, 1, 6), tail_shape=(3, 4, 1)),
    "unsqueeze": Case("h = Unsqueeze(b, a)", ALL, {"a": indices(-1)}, tail_shape=(3, 4, 1, 1, 1)),
    "transpose": Case("h = Transpose<perm=[0,2,3,1]>(b)", ALL, **ROWS),
    "concat": Case(
        "r = Relu(x) s = Concat<axis=1>(b, r) h = Conv(s, v)", ALL, {"v": some(4, 8, 1, 1)}, operators=("Concat",)
    ),
    "concat with a constant": Case("h = Concat<axis=0>(b, c)", NOTHING, {"c": some(2, 4, 6, 6)}),
    "split": Case("r, s = Split<axis=1, num_outputs=2>(b) h = Concat<axis=1>(s, r)", ALL, operators=("Split",)),
    "split half": Case("h, s = Split<axis=1, num_outputs=2>(b)", ALL, tail_shape=(3, 2, 1, 1), operators=("Split",)),
    "split and relu": Case(
        "r, s = Split<axis=1, num_outputs=2>(b) t = Relu(r) h = Concat<axis=1>(s, t)", POSITIVE, operators=("Split",)
    ),
    "slice": Case(
        "h = Slice(b, s, e, a)", ALL, {"s": indices(1), "e": indices(3), "a": indices(1)}, tail_shape=(3, 2, 1, 1)
    ),
    "gather": Case("h = Gather<axis=1>(b, i)", ALL, {"i": indices(2, 0)}, tail_shape=(3, 2, 1, 1)),
    "depth to space": Case("h = DepthToSpace<blocksize=2>(b)", NOTHING, tail_shape=(3, 1, 1, 1)),
    "space to depth": Case("h = SpaceToDepth<blocksize=2>(b)", ALL, tail_shape=(3, 16, 1, 1)),
    "expand": Case("h = Expand(b, n)", ALL, {"n": indices(1, 4, 1, 6)}, shape=(4, 6, 1)),
    "tile": Case("h = Tile(b, n)", ALL, {"n": indices(1, 2, 1, 2)}, tail_shape=(3, 8, 1, 1)),
    "dropout": Case("h = Dropout(b)", ALL),
    "dropout that is off": Case("h = Dropout(b, r, t)", ALL, {"r": ZERO, "t": np.array(False)}),
    "captured": Case(
        "m = ReduceMean<keepdims=0>(x) f = Less(m, z) "
        "h = If(f)<then_branch = t () => (u) { u = Neg(b) }, else_branch = e () => (v) { v = Abs(b) }>",
        NOTHING,
        {"z": ZERO},
        operators=("If",),
    ),
    "other domain": Case("h = ai.onnx.ml.Binarizer<threshold=0.5>(b)", NOTHING),
}  # fmt: skip


def norm(name, channels, kind="all", seed=1):
    """Constants of a norm: `positive` and `negative` scales without a shift, `shift` a positive scale with one."""
    draw = np.random.default_rng(seed)
    gamma, variance = draw.uniform(0.5, 1.5, channels), draw.uniform(0.5, 2.0, channels)
    beta, mean = draw.normal(size=channels), draw.normal(size=channels)
    if kind in ("positive", "negative"):
        beta, mean = 0 * beta, 0 * mean
    if kind in ("negative", "all"):
        gamma *= np.where(np.arange(channels) % 2, 1.0, -1.0)
    values = {"gamma": gamma, "beta": beta, "mean": mean, "variance": variance}
    return {f"{name}_{key}": value.astype(np.float32) for key, value in values.items()}


def model_of(text, weights, inputs, opset=21, outputs=("y",), kind=TensorProto.FLOAT, ir_version=9, rank=None):
    """A model from nodes in ONNX's own syntax.

    Args:
        text: the nodes.
        weights: initializers by name.
        inputs: shapes by name; text for a free axis.
        opset: of ONNX's operators.
        outputs: their names.
        kind: element type of the inputs and outputs.
        ir_version: of the file.
        rank: of the outputs, where onnx cannot infer it.
    """
    graph = parser.parse_graph(f"g () => () {{ {text} }}")
    graph.input.extend(helper.make_tensor_value_info(name, kind, shape) for name, shape in inputs.items())
    shape = None if rank is None else [None] * rank
    graph.output.extend(helper.make_tensor_value_info(name, kind, shape) for name in outputs)
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("ai.onnx.ml", 3)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=ir_version)
    if rank is not None:
        return model
    known = onnx.shape_inference.infer_shapes(model).graph.output
    for value, inferred in zip(graph.output, known, strict=True):  # the checker wants a shape
        rank = len(inferred.type.tensor_type.shape.dim)
        value.CopyFrom(helper.make_tensor_value_info(value.name, inferred.type.tensor_type.elem_type, [None] * rank))
    del model.graph.output[:]
    model.graph.output.extend(graph.output)
    return model


def normed(name, source, result):
    """One BatchNormalization in ONNX's syntax."""
    constants = ", ".join(f"{name}_{key}" for key in ("gamma", "beta", "mean", "variance"))
    return f"[{name}] {result} = BatchNormalization({source}, {constants})"


def make(case: Case, kind: str) -> onnx.ModelProto:
    """The case's model with a norm of one kind."""
    weights = {**norm("norm", case.shape[0], kind), **case.weights, "w": some(*case.tail_shape, seed=5) - 1}
    text = f"{normed('norm', 'x', 'b')} {case.body} {case.tail}"
    return model_of(text, weights, {"x": ["N", *case.shape]}, case.opset)
