"""Reads traced programs into the neutral graph: all knowledge of how aten spells an operation is here.

An operation counts as a per-channel affine by what it computes: an addition, subtraction, multiplication or division by
a constant, or a batch or instance norm on running statistics. So a norm layer of the library needs no entry, nor does
anybody else's. How gauges pass the other operations is the table `OPERATIONS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, fx

from lowprec.affine import ChannelAffine
from lowprec.export.folding.algebra import Array, LinearKind, Window, squeezed
from lowprec.export.folding.graph import (
    Affine,
    Attention,
    Graph,
    Linear,
    LiveNorm,
    MatrixProduct,
    Node,
    Op,
    Opaque,
    Product,
    Sum,
    Through,
    ZeroPad,
)
from lowprec.export.folding.traced.moves import MOVES, read_move
from lowprec.export.folding.traced.program import CALL, Program, arguments_by_name, is_float, operator_name, path_of

RUNNING_NORMS = ("batch_norm", "instance_norm")
_SAMPLE_NORMS = (
    "layer_norm",
    "group_norm",
    "rms_norm",
    "native_layer_norm",
    "native_group_norm",
    "local_response_norm",
)
# They read the shape of a tensor and none of its values.
_SHAPE_READERS = ("sym_size", "sym_numel", "sym_stride", "size", "numel")
# They read the shape of their second argument only.
_LIKE = ("view_as", "reshape_as", "expand_as")

Reader = Callable[[Program, fx.Node, dict[str, Any]], Op]


@dataclass(frozen=True)
class FxGraph:
    """A neutral graph and the fx node behind each of its nodes."""

    graph: Graph
    origin: dict[Node, fx.Node]


def read_graph(program: Program) -> FxGraph:
    """The neutral view of a functional float64 program.

    Constants do not appear as nodes: what reads them holds them. Nor do reads of a shape.
    """
    made: dict[fx.Node, Node] = {}
    for node in program.graph.nodes:
        if node.op == "get_attr" or operator_name(node) in _SHAPE_READERS:
            continue
        sources = [value for value in _values_read(node) if value in made]
        if not sources and _is_number(node):  # computed from shapes alone
            continue
        made[node] = Node(
            name=node.name,
            kind={"placeholder": "input"}.get(node.op, operator_name(node)),
            path=path_of(node),
            op=_operation(program, node, sources) if node.op == "call_function" else Opaque(),
            shape=_shape(node),
            is_float=_holds_floats(node),
            norm=_norm_call(program, node),
            is_output=node.op == "output",
        )
        for value in sources:
            made[node].inputs.append(made[value])
            made[value].users.append(made[node])
    return FxGraph(Graph(list(made.values())), {view: node for node, view in made.items()})


def _is_number(node: fx.Node) -> bool:
    return node.op == "call_function" and not isinstance(node.meta.get("val"), (Tensor, list, tuple))


def _values_read(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values an operation reads, once per reading, in order."""
    found: list[fx.Node] = []
    arguments = (node.args[:1], {}) if operator_name(node) in _LIKE else (node.args, node.kwargs)
    fx.node.map_arg(arguments, lambda value: found.append(value) or value)  # type: ignore[func-returns-value]
    return found


def _norm_call(program: Program, node: fx.Node) -> str | None:
    """Which call of which norm an operation belongs to."""
    if path_of(node) in program.norms:
        return str(node.meta[CALL])
    if operator_name(node) in (*RUNNING_NORMS, *_SAMPLE_NORMS):
        return node.name
    return None


def _operation(program: Program, node: fx.Node, sources: list[fx.Node]) -> Op:
    name = operator_name(node)
    if name in MOVES:
        return read_move(program, node, sources)
    reader = OPERATIONS.get(name)
    if reader is None or not _holds_floats(node) or not hasattr(node.target, "_schema"):
        return Opaque()
    op = reader(program, node, arguments_by_name(node))
    reads = {Sum: 2, Product: 2, MatrixProduct: 2}.get(type(op), 1)
    return Opaque() if len(sources) != reads and not isinstance(op, LiveNorm | Attention) else op


def _read_linear(kind: LinearKind) -> Reader:
    def read(program: Program, node: fx.Node, given: dict[str, Any]) -> Op:
        weight, bias = program.stored(given["weight"]), program.constant(given.get("bias"))
        if weight is None or (bias is None and given.get("bias") is not None):
            return Opaque()
        window = None if kind == "linear" else _window(given, tuple(weight.shape[2:]))
        axis = _rank(node) - (1 if kind == "linear" else weight.ndim - 1)
        bias_O = None if bias is None else _numpy(bias)
        return Linear(kind, weight, bias_O, int(given.get("groups", 1)), axis, window)

    return read


def _window(given: dict[str, Any], kernel: tuple[int, ...]) -> Window:
    def spread(value: Any) -> tuple[int, ...]:
        values = (value,) if isinstance(value, int) else tuple(value)
        return values * len(kernel) if len(values) == 1 else values

    dilation = spread(given["dilation"])
    padding = given["padding"]
    if padding == "same":
        totals = [step * (length - 1) for step, length in zip(dilation, kernel, strict=True)]
        # torch pads less on the left where the total is odd.
        pairs = tuple((total // 2, total - total // 2) for total in totals)
    else:
        pairs = tuple((width, width) for width in spread(0 if padding == "valid" else padding))
    return Window(spread(given["stride"]), pairs, dilation)


def _read_matmul(program: Program, node: fx.Node, given: dict[str, Any]) -> Op:
    """`x @ W` for a constant matrix is a linear layer."""
    first, second, *_ = given.values()
    if all(is_float(value) and program.constant(value) is None and _rank(value) > 1 for value in (first, second)):
        return MatrixProduct(means=_is_softmax(first))
    weight = program.stored(second)
    if weight is None or weight.ndim != 2 or program.constant(first) is not None:
        return Opaque()
    return Linear("linear", np.asarray(weight).T, None, 1, _rank(node) - 1)


def _is_softmax(node: fx.Node) -> bool:
    """Whether an operation's result adds up to one along the last axis."""
    return operator_name(node) in ("softmax", "_softmax") and node.args[1] in (-1, _rank(node) - 1)


def _read_attention(program: Program, node: fx.Node, given: dict[str, Any]) -> Op:
    ranks = {_rank(given[name]) for name in ("query", "key", "value")}
    return Opaque() if given["dropout_p"] or given.get("enable_gqa") or len(ranks) > 1 else Attention()


def _read_embedding(program: Program, node: fx.Node, given: dict[str, Any]) -> Op:
    table = program.stored(given["weight"])
    return Opaque() if table is None else Linear("embedding", table, None, 1, _rank(node) - 1)


def _read_running_norm(program: Program, node: fx.Node, given: dict[str, Any]) -> Op:
    if given.get("training", given.get("use_input_stats")):
        return LiveNorm(_live_reason(program, node))
    mean, variance = program.constant(given["running_mean"]), program.constant(given["running_var"])
    gamma, beta = program.constant(given["weight"]), program.constant(given["bias"])
    computed = any(given[key] is not None and program.constant(given[key]) is None for key in ("weight", "bias"))
    if mean is None or variance is None or computed:
        return LiveNorm("has statistics or parameters that the network computes, so no constants stand for it")
    with np.errstate(invalid="ignore", divide="ignore"):
        affine = ChannelAffine.from_statistics(
            _numpy(mean),
            np.sqrt(_numpy(variance) + given["eps"]),
            1.0 if gamma is None else _numpy(gamma),
            0.0 if beta is None else _numpy(beta),
        )
    return Affine.along(1, _rank(node), affine)


def _read_sample_norm(program: Program, node: fx.Node, given: dict[str, Any]) -> Op:
    return LiveNorm("takes its statistics from each sample, so no constants stand for it")


def _live_reason(program: Program, node: fx.Node) -> str:
    layer = program.norms.get(path_of(node))
    if layer is not None and layer.training:
        return "is in training mode, so its statistics still change; call model.eval() before fold(model)"
    if operator_name(node) == "instance_norm":
        return "takes its statistics from each sample, so no constants stand for it"
    return "keeps no running statistics and uses those of each batch, so no constants stand for it"


def _read_sum(factors: Callable[[float], tuple[float, float]]) -> Reader:
    """`factors` are the coefficients of (self, other) as torch defines them with its argument alpha."""

    def read(program: Program, node: fx.Node, given: dict[str, Any]) -> Op:
        alpha = given.get("alpha", 1)
        if isinstance(alpha, fx.Node):
            return Opaque()
        coefficients = factors(float(alpha))
        operands = [given["self"], given["other"]]
        if all(is_float(value) and program.constant(value) is None for value in operands):
            return Sum(coefficients)
        position, constant = _constant_operand(program, node, operands)
        if constant is None:
            return Opaque()
        rank = np.ones((1,) * _rank(node))
        return Affine(coefficients[1 - position] * rank, coefficients[position] * constant)

    return read


def _read_product(program: Program, node: fx.Node, given: dict[str, Any]) -> Op:
    divides = operator_name(node) == "div"
    if given.get("rounding_mode") is not None:
        return Opaque()
    operands = [given["self"], given["other"]]
    if all(is_float(value) and program.constant(value) is None for value in operands):
        return Product(divides)
    position, constant = _constant_operand(program, node, operands)
    if constant is None or (divides and position == 0):
        return Opaque()
    with np.errstate(divide="ignore"):
        scale = 1 / constant if divides else constant
    return Affine(scale, np.zeros((1,) * _rank(node)))


def _read_negation(program: Program, node: fx.Node, given: dict[str, Any]) -> Op:
    one = np.ones((1,) * _rank(node))
    return Affine(-one, 0 * one)


def _constant_operand(program: Program, node: fx.Node, operands: list[Any]) -> tuple[int, Array | None]:
    """Position and value of the one constant operand, of the result's rank; None where it enlarges what it meets."""
    for position, (value, other) in enumerate(zip(operands, reversed(operands), strict=True)):
        constant = _constant(program, value)
        if constant is None or not is_float(other) or program.constant(other) is not None:
            continue
        same = str(tuple(other.meta["val"].shape)) == str(tuple(node.meta["val"].shape))
        if same and constant.ndim <= _rank(node):
            return position, squeezed(constant.reshape((1,) * (_rank(node) - constant.ndim) + constant.shape))
    return 0, None


def _constant(program: Program, value: Any) -> Array | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return np.asarray(value, np.float64)
    tensor = program.constant(value)
    return None if tensor is None or tensor.is_complex() else _numpy(tensor)


def _read_homogeneous(program: Program, node: fx.Node, given: dict[str, Any]) -> Op:
    """f(s x) = s f(x) for s > 0."""
    if "weight" in given and program.constant(given["weight"]) is None:  # the slopes of a PReLU
        return Opaque()
    return Through(positive=True, shift=False)


def _read_clamp(program: Program, node: fx.Node, given: dict[str, Any]) -> Op:
    """A clamp from zero up is a ReLU."""
    return Through(positive=True, shift=False) if given["min"] == 0 and given.get("max") is None else Opaque()


def _read_max_pool(program: Program, node: fx.Node, given: dict[str, Any]) -> Op:
    return Through(positive=True, shift=True, mixes=_window_axes(node))


def _read_average_pool(program: Program, node: fx.Node, given: dict[str, Any]) -> Op:
    """The mean of a window; a shift does not pass where the window counts zeros or has a divisor of its own."""
    padding = given["padding"]
    counts = given["count_include_pad"] and any(padding if isinstance(padding, (list, tuple)) else [padding])
    even = not counts and given.get("divisor_override") is None
    return Through(positive=False, shift=even, mixes=_window_axes(node))


def _read_adaptive_pool(program: Program, node: fx.Node, given: dict[str, Any]) -> Op:
    return Through(positive=False, shift=True, mixes=_window_axes(node))


def _read_interpolation(program: Program, node: fx.Node, given: dict[str, Any]) -> Op:
    """Weights of nearest, linear and cubic interpolation add up to one."""
    return Through(positive=False, shift=True, mixes=tuple(range(2, _rank(node))))


def _read_reduction(positive: bool, shift: bool) -> Reader:
    def read(program: Program, node: fx.Node, given: dict[str, Any]) -> Op:
        dims = given.get("dim")
        source = given["self"]
        if dims is None or dims == [] or not is_float(source):
            return Opaque()
        rank = _rank(source)
        axes = tuple(sorted({dim % rank for dim in (dims if isinstance(dims, (list, tuple)) else [dims])}))
        return Through(positive, shift, axes, drops=not given.get("keepdim"))

    return read


def _read_pad(program: Program, node: fx.Node, given: dict[str, Any]) -> Op:
    rank, flat = _rank(node), list(given["pad"])
    if any(not isinstance(width, int) or width < 0 for width in flat):
        return Opaque()
    pairs = [(flat[index], flat[index + 1]) for index in range(0, len(flat), 2)]  # the last axis comes first
    widths = tuple([(0, 0)] * (rank - len(pairs)) + pairs[::-1])
    if given.get("mode", "constant") == "constant":
        return ZeroPad(widths) if not given["value"] else Opaque()
    return Through(positive=False, shift=True, mixes=tuple(axis for axis, pair in enumerate(widths) if any(pair)))


def _window_axes(node: fx.Node) -> tuple[int, ...]:
    """The axes of a pooling window: the last two of `max_pool2d`."""
    return tuple(range(_rank(node) - int(operator_name(node)[-2]), _rank(node)))


# Everything that is known about operations that compute something; those that move elements are in moves.py.
OPERATIONS: dict[str, Reader] = {
    **{f"conv{axes}d": _read_linear("conv") for axes in (1, 2, 3)},
    **{f"conv_transpose{axes}d": _read_linear("conv_transpose") for axes in (1, 2, 3)},
    "linear": _read_linear("linear"),
    "matmul": _read_matmul,
    "mm": _read_matmul,
    "bmm": _read_matmul,
    "scaled_dot_product_attention": _read_attention,
    "embedding": _read_embedding,
    **dict.fromkeys(RUNNING_NORMS, _read_running_norm),
    **dict.fromkeys(_SAMPLE_NORMS, _read_sample_norm),
    "add": _read_sum(lambda alpha: (1.0, alpha)),
    "sub": _read_sum(lambda alpha: (1.0, -alpha)),
    "rsub": _read_sum(lambda alpha: (-alpha, 1.0)),
    "mul": _read_product,
    "div": _read_product,
    "neg": _read_negation,
    **dict.fromkeys(("relu", "leaky_relu", "prelu", "abs"), _read_homogeneous),
    **dict.fromkeys(("clamp", "clamp_min"), _read_clamp),
    **{f"max_pool{axes}d": _read_max_pool for axes in (1, 2, 3)},
    **{f"avg_pool{axes}d": _read_average_pool for axes in (1, 2, 3)},
    **{f"adaptive_avg_pool{axes}d": _read_adaptive_pool for axes in (1, 2, 3)},
    **dict.fromkeys(("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d"), _read_interpolation),
    **dict.fromkeys(("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d"), _read_interpolation),
    "upsample_bicubic2d": _read_interpolation,
    "mean": _read_reduction(positive=False, shift=True),
    "sum": _read_reduction(positive=False, shift=False),
    "amax": _read_reduction(positive=True, shift=True),
    "amin": _read_reduction(positive=True, shift=True),
    "max": _read_reduction(positive=True, shift=True),
    "min": _read_reduction(positive=True, shift=True),
    "pad": _read_pad,
}


def _holds_floats(node: fx.Node) -> bool:
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(part, Tensor) and part.is_floating_point() for part in values)


def _numpy(tensor: Tensor) -> Array:
    return np.asarray(tensor.detach().double().numpy(), np.float64)


def _shape(node: fx.Node) -> tuple[int | None, ...]:
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return ()
    return tuple(length if isinstance(length, int) else None for length in value.shape)


def _rank(node: fx.Node) -> int:
    return len(node.meta["val"].shape)
