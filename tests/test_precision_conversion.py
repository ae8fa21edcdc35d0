"""Ten architectures in half and mixed precision: valid, parsed by TensorRT-RTX, and with no cast too many."""

import random
import warnings

import numpy as np
import onnx
import pytest
import torch
from architectures import ARCHITECTURES, example, randomise
from onnx import TensorProto, numpy_helper
from onnxconverter_common import float16
from test_emit import parse_strongly_typed, run, small
from torch import nn

from lowprec.errors import ConfigError, UnsupportedError
from lowprec.export import export
from lowprec.export.emit import emit_onnx
from lowprec.export.emit.keep import DEFAULT_KEEP, keep_list
from lowprec.export.emit.narrowing import Narrowing
from lowprec.export.emit.node_types import MOVEMENTS
from lowprec.export.folding import fold

TEN = ["resnet_bottleneck", "densenet", "mobilenet_v3", "shufflenet_v2", "inception_v3", "coatnet", "bn_transformer",
       "unet", "ecapa", "wavenet"]  # fmt: skip


@pytest.fixture(scope="module", params=TEN)
def model(request):
    architecture = ARCHITECTURES[request.param]
    network = randomise(architecture.make(1).eval(), "mixed", seed=3)
    return emit_onnx(fold(network, (example(architecture, batch=2),))[0])


def casts(model):
    return [node for node in model.graph.node if node.op_type == "Cast" and target(node) in (1, 10, 16)]


def target(node):
    return next(attribute.i for attribute in node.attribute if attribute.name == "to")


def cancelling(model):
    """Pairs of casts of which the second undoes the first, with nothing but movements between."""
    readers = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found = []
    for cast in casts(model):
        pending = [cast.output[0]]
        while pending:
            for reader in readers.get(pending.pop(), []):
                if reader.op_type == "Cast" and target(reader) != target(cast):
                    found.append((cast.name, reader.name))
                elif reader.op_type in MOVEMENTS:
                    pending += reader.output
    return found


def copied(model):
    return onnx.ModelProto.FromString(model.SerializeToString())


def narrowed(model, precision, **options):
    return Narrowing(**options).in_precision(precision, model, None, {}, None)[0]


@pytest.mark.parametrize("precision", ["fp16", "bf16", "mixed"])
def test_narrow_models_are_valid_and_hold_no_casts_that_cancel(model, precision):
    narrow = narrowed(model, precision)
    onnx.checker.check_model(narrow, full_check=True)
    assert parse_strongly_typed(narrow) == []
    assert cancelling(narrow) == []
    types = {tensor.data_type for tensor in narrow.graph.initializer}
    assert (TensorProto.BFLOAT16 if precision == "bf16" else TensorProto.FLOAT16) in types
    assert precision == "mixed" or TensorProto.FLOAT not in types or holds_squares(model)


def holds_squares(model: onnx.ModelProto) -> bool:
    """Whether something is computed from a sum of squares: a pooled standard deviation is."""
    return any(node.op_type in ("Sqrt", "ReduceL2") for node in model.graph.node)


@pytest.mark.parametrize("seed", range(4))
def test_no_keep_list_rounds_in_passing(model, seed):
    """A value may be widened for a join and narrowed behind it, which loses nothing; the other way round it may not."""
    draw = random.Random(seed)
    if seed % 2:
        words = {f"op:{node.op_type}" for node in model.graph.node}
    else:
        words = {f"node:{node.name}" for node in model.graph.node}
    kept = keep_list(draw.sample(sorted(words), len(words) // 3))
    precision = draw.choice(["fp16", "bf16"])
    narrow = narrowed(model, precision, keep=kept, narrow_io=seed > 1)
    onnx.checker.check_model(narrow, full_check=True)
    assert parse_strongly_typed(narrow) == []
    to_half = {node.name for node in casts(narrow) if target(node) != TensorProto.FLOAT}
    assert [pair for pair in cancelling(narrow) if pair[0] in to_half] == []
    assert len({(node.input[0], target(node)) for node in casts(narrow)}) == len(casts(narrow))


def test_half_models_hold_as_many_casts_as_onnxconverter_makes_or_fewer(model):
    """That converter reads float32 constants as the half ones that they are clipped to, and casts at its own edges."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of the values that it clips
        theirs = float16.convert_float_to_float16(copied(model), keep_io_types=True)
    # One cast up to a sum of squares, which that converter rounds to half, and one down behind it.
    assert len(casts(narrowed(model, "fp16"))) <= len(casts(theirs)) + 2 * holds_squares(model)


CAST, JOIN = {"to": TensorProto.FLOAT}, {"axis": 1}
NARROW, WIDE = ("Sigmoid", ["x"], ["h"]), ("Softmax", ["x"], ["s"])
PASSING = {
    "an input to a wide node": ([("Flatten", ["x"], ["m"]), ("Softmax", ["m"], ["y"])], 0),
    "an input and a wide value": ([WIDE, ("Concat", ["x", "s"], ["m"], JOIN), ("Softmax", ["m"], ["y"])], 0),
    "a wide value to a narrow node": ([WIDE, ("Flatten", ["s"], ["m"]), ("Sigmoid", ["m"], ["y"])], 2),
    "two types to a narrow node": ([NARROW, WIDE, ("Concat", ["s", "h"], ["m"], JOIN), ("Sigmoid", ["m"], ["y"])], 3),
    "two types to a wide node": ([NARROW, WIDE, ("Concat", ["s", "h"], ["m"], JOIN), ("Softmax", ["m"], ["y"])], 2),
    "two types to both": (
        [
            NARROW,
            WIDE,
            ("Concat", ["s", "h"], ["m"], JOIN),
            ("Softmax", ["m"], ["a"]),
            ("Sigmoid", ["m"], ["b"]),
            ("Concat", ["a", "b"], ["y"], JOIN),
        ],
        4,
    ),
    "an input to both": (
        [
            ("Flatten", ["x"], ["m"]),
            ("Softmax", ["m"], ["a"]),
            ("Sigmoid", ["m"], ["b"]),
            ("Concat", ["a", "b"], ["y"], JOIN),
        ],
        2,
    ),
    "values to a wide node and their places": (
        [
            ("TopK", ["x", "k"], ["v", "i"]),
            ("Softmax", ["v"], ["s"]),
            ("Cast", ["i"], ["f"], CAST),
            ("Add", ["s", "f"], ["y"]),
        ],
        2,
    ),
    "a decision about two types": ([NARROW, WIDE, ("Less", ["s", "h"], ["m"]), ("Cast", ["m"], ["y"], CAST)], 2),
}


@pytest.mark.parametrize("name", PASSING)
def test_what_is_only_moved_is_not_rounded_in_passing(name):
    nodes, count = PASSING[name]
    model = small(nodes)
    model.graph.initializer.append(numpy_helper.from_array(np.array([2]), "k"))
    model.graph.output[0].type.tensor_type.ClearField("shape")
    mixed = narrowed(model, "mixed")
    onnx.checker.check_model(mixed, full_check=True)
    to_half = {node.name for node in casts(mixed) if target(node) == TensorProto.FLOAT16}
    assert [pair for pair in cancelling(mixed) if pair[0] in to_half] == []
    assert len(casts(mixed)) - sum(node[0] == "Cast" for node in nodes) == count


@pytest.mark.parametrize("names", [["x", "y"], ["y"], True])
def test_inputs_and_outputs_are_narrow_where_asked(names):
    model = small([("Mul", ["x", "k"], ["h"]), ("Relu", ["h"], ["y"])], [("k", [1.0, 2.0, 3.0, 4.0])])
    half = narrowed(model, "fp16", narrow_io=names)
    onnx.checker.check_model(half, full_check=True)
    types = {v.name: v.type.tensor_type.elem_type for v in (*half.graph.input, *half.graph.output)}
    narrow = {"x", "y"} if names is True else set(names)
    assert types == {name: TensorProto.FLOAT16 if name in narrow else TensorProto.FLOAT for name in ("x", "y")}
    assert len(casts(half)) == 2 - len(narrow)
    x = np.array([[1.0, -2.0, 0.5, 3.0]], np.float16 if "x" in narrow else np.float32)
    assert run(half, x=x)[0].tolist() == [[1.0, 0.0, 1.5, 12.0]]


def test_one_name_is_as_good_as_a_list_of_it():
    model = small([("Relu", ["x"], ["result"])], outputs=("result",))
    half = narrowed(model, "fp16", narrow_io="result")
    assert half.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT16


@pytest.mark.parametrize(
    ("words", "near"), [({"precision": "mixd"}, "mixed"), ({"targets": ["tensorrt_rtx"]}, "tensorrt-rtx")]
)
def test_unknown_words_name_the_nearest(tmp_path, words, near):
    with pytest.raises(ConfigError, match=rf"did you mean '{near}'\? choose from "):
        export(small([("Relu", ["x"], ["y"])]), None, tmp_path / "b", **words)
    assert not list(tmp_path.iterdir())


def test_a_wide_node_reads_a_narrow_input_and_makes_a_narrow_output():
    model = small([("Softmax", ["x"], ["y"])], [])
    mixed = narrowed(model, "mixed", narrow_io=True)
    onnx.checker.check_model(mixed, full_check=True)
    assert [node.op_type for node in mixed.graph.node] == ["Cast", "Softmax", "Cast"]
    with pytest.raises(ConfigError, match="asked for 'z' to be narrow; the floating inputs and outputs are x, y"):
        narrowed(model, "fp16", narrow_io=["z"])


def test_mixed_keeps_what_overflows_and_says_so():
    model = small([("Mul", ["x", "k"], ["h"]), ("Sigmoid", ["h"], ["y"])], [("k", [1.0, 2.0, -1e5, 7e4])])
    mixed, report = Narrowing().in_precision("mixed", model, None, {}, None)
    assert [(row.name, row.reason) for row in report.refused] == [("Mul_0", "its constant 'k' overflows fp16")]
    assert {tensor.name: tensor.data_type for tensor in mixed.graph.initializer} == {"k": TensorProto.FLOAT}
    x = np.array([[1.0, 0.5, 1e-5, 1e-5]], np.float32)
    assert abs(run(mixed, x=x)[0] - run(model, x=x)[0]).max() <= 2 * 2.0**-11  # one rounding of h and y each


def test_what_reads_an_overflowing_constant_through_a_movement_is_kept_too():
    moved = ("Reshape", ["k", "shape"], ["m"])
    for nodes in ([moved, ("Mul", ["x", "m"], ["h"])], [moved, ("Concat", ["m", "m"], ["c"], {"axis": 0}),
                  ("Squeeze", ["m"], ["q"]), ("Mul", ["x", "q"], ["h"])]):  # fmt: skip
        model = small([*nodes, ("Tanh", ["h"], ["y"])], [("k", [1.0, 2.0, -1e5, 7e4])])
        model.graph.initializer.append(numpy_helper.from_array(np.array([1, 4]), "shape"))
        mixed, report = Narrowing().in_precision("mixed", model, None, {}, None)
        onnx.checker.check_model(mixed, full_check=True)
        assert {row.reason for row in report.refused} == {"its constant 'k' overflows fp16"}
        x = np.array([[1.0, 0.5, 1e-5, 0.0]], np.float32)  # half would make the last 0 * inf, no number
        assert abs(run(mixed, x=x)[0] - run(model, x=x)[0]).max() <= 2 * 2.0**-11  # one rounding of h and y each
        with pytest.raises(UnsupportedError, match=r"\(Mul\) cannot be narrow: its constant 'k' overflows fp16; keep"):
            narrowed(model, "fp16", keep=keep_list(["op:Reshape"]))
        narrowed(model, "fp16", keep=keep_list(["op:Mul"]))


def test_an_overflowing_constant_moved_for_a_wide_and_a_narrow_reader_is_not_cast_to_infinity():
    nodes = [("Reshape", ["k", "shape"], ["m"]), ("Mul", ["x", "m"], ["h"]), ("Add", ["h", "m"], ["y"])]
    model = small(nodes, [("k", [1.0, 2.0, -1e5, 7e4])])
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 4]), "shape"))
    with pytest.raises(UnsupportedError, match=r"\(Add\) cannot be narrow: its constant 'k' overflows fp16; keep"):
        narrowed(model, "fp16", keep=keep_list(["op:Mul"]))
    wide = narrowed(model, "fp16", keep=keep_list(["op:Mul", "op:Add"]))
    x = np.array([[1.0, 0.5, 1e-5, 1e-5]], np.float32)
    assert abs(run(wide, x=x)[0] - run(model, x=x)[0]).max() <= 1e5 * 2.0**-10  # the input's one rounding


@pytest.mark.parametrize("value", [{"value_float": 0.1}, {"value_floats": [0.1, 0.2, 0.3, 0.4]}])
def test_constants_that_are_written_as_plain_numbers_are_rounded_too(value):
    model = small([("Constant", [], ["k"], value), ("Mul", ["x", "k"], ["y"])])
    narrow = narrowed(model, "fp16")
    onnx.checker.check_model(narrow, full_check=True)
    (constant,) = narrow.graph.initializer
    assert constant.data_type == TensorProto.FLOAT16
    assert np.array_equal(numpy_helper.to_array(constant), np.asarray(next(iter(value.values())), np.float16))


def test_a_keep_list_serves_every_narrow_precision():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))

        def forward(self, x):
            return self.head(self.body(x).sigmoid()).softmax(1)

    model = emit_onnx(fold(Two().eval(), (torch.randn(2, 4),))[0])
    for precision in ("fp16", "bf16", "mixed"):
        narrow, report = Narrowing(keep_list(["module:head"])).in_precision(precision, model, None, {}, None)
        assert [row.name for row in report.refused] == ["head.0", "head.1", "head.2"]
        wide = {tensor.name for tensor in narrow.graph.initializer if tensor.data_type == TensorProto.FLOAT}
        assert wide == {"head.0.weight", "head.0.bias", "head.2.weight", "head.2.bias"}
    _, report = Narrowing().in_precision("mixed", model, None, {}, None)
    assert [row.reason for row in report.refused] == [DEFAULT_KEEP.entries[0].reason]


def test_every_operator_of_the_default_list_exists():
    names = {schema.name for schema in onnx.defs.get_all_schemas()}
    assert {entry.match.removeprefix("op:") for entry in DEFAULT_KEEP.entries} <= names
