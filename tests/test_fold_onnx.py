"""Folding ONNX graphs that anybody wrote: every operator of the tables, what is written, and what is refused."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_cases import ALL, CASES, make, model_of, norm, normed, some

from lowprec.export.float64 import Float64Graph
from lowprec.export.folding import RULES, fold_onnx
from lowprec.export.folding.from_onnx.moves import MOVES
from lowprec.export.folding.from_onnx.operators import OPERATIONS
from lowprec.export.folding.from_onnx.read import read_onnx
from lowprec.export.folding.from_onnx.write import exact_graph

# Graphs of at most 200 products per output element and 5 layers: n * u * condition, with a wide margin for the
# condition of random weights, and still seven orders below any mistake in a fold.
FLOAT64 = 200 * 5 * 2.0**-53 * 10
FLOAT32 = FLOAT64 * 2.0**29
UNIT_OF = {TensorProto.DOUBLE: 2.0**-53, TensorProto.FLOAT: 2.0**-24, TensorProto.FLOAT16: 2.0**-11,
           TensorProto.BFLOAT16: 2.0**-8}  # fmt: skip


def feeds_for(model, batch=5, seed=7):
    """Other inputs than the fold itself looked at."""
    draw = np.random.default_rng(seed)
    feeds = {}
    for spec in Float64Graph(model).inputs:
        shape = [batch if not isinstance(length, int) else length for length in spec.shape]
        floats, wholes = draw.normal(size=shape).astype(np.float32), draw.integers(0, 3, shape).astype(np.int64)
        feeds[spec.name] = floats if spec.is_float else wholes
    return feeds


def worst(model, folded, feeds=None):
    """Largest difference of the outputs in float64 relative to their rms."""
    feeds = feeds_for(model) if feeds is None else feeds
    candidate = folded if isinstance(folded, Float64Graph) else Float64Graph(folded)
    expected, found = Float64Graph(model).run(feeds), candidate.run(feeds)
    assert list(expected) == list(found)
    return max(np.abs(found[n] - e).max() / np.sqrt(np.mean(e**2)) for n, e in expected.items())


def exact(model):
    """The model folded with nothing rounded, as it evaluates, and the names of the norms that are left."""
    view = read_onnx(model)
    for rule in RULES.values():
        rule.run(view.graph)
    left = [node.label for node in view.graph.nodes if node.norm is not None]
    return exact_graph(view), left


def kinds(model):
    return [node.op_type for node in model.graph.node]


def stored(model):
    return {tensor.name: tensor for tensor in model.graph.initializer}


def test_every_operator_of_the_tables_has_a_case():
    about = {operator for case in CASES.values() for operator in case.about}
    about |= {node.op_type for model, _ in PRODUCERS.values() for node in model().graph.node} | set(LIVE)
    assert set(OPERATIONS) | MOVES | {"Identity", "Dropout"} <= about


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("name", CASES)
def test_what_an_operator_lets_pass(name, kind):
    """A norm whose scales are positive, are negative, or that shifts, disappears through the operator or stays."""
    case = CASES[name]
    model = make(case, kind)
    before = model.SerializeToString()
    folded, report = fold_onnx(model)
    assert model.SerializeToString() == before
    onnx.checker.check_model(folded, full_check=True)
    assert report.facts["norms_found"] == 1
    assert report.facts["norms_left"] == (kind not in case.passes), report
    assert any(row.name == "norm" for row in report.refused) == (kind not in case.passes), report
    assert "BatchNormalization" not in kinds(folded)
    assert report.facts["float64_error"] <= FLOAT64
    assert worst(model, exact(model)[0]) <= FLOAT64
    assert worst(model, folded) <= FLOAT32


def producer(text, weights, shape=("N", 4, 6, 6), channels=6, opset=21, kind=TensorProto.FLOAT):
    """Nodes that make `h`, a norm behind them, and a ReLU."""
    weights = {**weights, **norm("norm", channels)}
    return lambda: model_of(f"{text} {normed('norm', 'h', 'b')} y = Relu(b)", weights, {"x": shape}, opset, kind=kind)


def embedding():
    body = f"e = Gather(t, x) h = Transpose<perm=[0,2,1]>(e) {normed('norm', 'h', 'b')} y = Relu(b)"
    model = model_of(body, {"t": some(9, 6), **norm("norm", 6)}, {"x": ("N", 5)})
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64
    return model


TURNED = "h = Transpose<perm=[0,2,1]>(m)"
# What stands before the norm, and the nodes that are left.
PRODUCERS = {
    "conv": (producer("h = Conv(x, w, c)", {"w": some(6, 4, 3, 3), "c": some(6)}), ["Conv", "Relu"]),
    "grouped": (producer("h = Conv<group=2>(x, w)", {"w": some(6, 2, 3, 3)}), ["Conv", "Relu"]),
    "up, grouped": (producer("h = ConvTranspose<group=2>(x, w)", {"w": some(4, 3, 2, 2)}), ["ConvTranspose", "Relu"]),
    "gemm": (
        producer("h = Gemm<alpha=0.5, beta=2.0>(x, w, c)", {"w": some(4, 6), "c": some(1, 6)}, ("N", 4)),
        ["Gemm", "Relu"],
    ),
    "gemm, one bias": (
        producer("h = Gemm<transB=1>(x, w, c)", {"w": some(6, 4), "c": some(1)}, ("N", 4), opset=9),
        ["Gemm", "Relu"],
    ),
    "matmul": (producer("h = MatMul(x, w)", {"w": some(4, 6)}, ("N", 4)), ["Gemm", "Relu"]),
    "matmul, bias": (
        producer("m = MatMul(x, w) h = Add(c, m)", {"w": some(4, 6), "c": some(6)}, ("N", 4)),
        ["MatMul", "Add", "Relu"],
    ),
    "matmul of rows": (
        producer(f"m = MatMul(x, w) {TURNED}", {"w": some(4, 6)}, ("N", 5, 4)),
        ["MatMul", "Add", "Transpose", "Relu"],
    ),
    "matmul of rows, bias": (
        producer(f"p = MatMul(x, w) m = Add(p, c) {TURNED}", {"w": some(4, 6), "c": some(1, 6)}, ("N", 5, 4)),
        ["MatMul", "Add", "Transpose", "Relu"],
    ),
    "embedding": (embedding, ["Gather", "Transpose", "Relu"]),
}


@pytest.mark.parametrize("name", PRODUCERS)
def test_a_norm_goes_into_what_makes_its_channels(name):
    model, left = PRODUCERS[name][0](), PRODUCERS[name][1]
    folded, report = fold_onnx(model)
    onnx.checker.check_model(folded, full_check=True)
    assert report.facts["norms_left"] == 0
    assert kinds(folded) == left
    assert worst(model, exact(model)[0]) <= FLOAT64
    assert worst(model, folded) <= FLOAT32


STATISTICS = "takes its statistics from each sample, so no constants stand for it"
LIVE = {
    "GroupNormalization": ("[live] b = GroupNormalization<num_groups=2>(h, s, c)", STATISTICS, 21),
    "InstanceNormalization": ("[live] b = InstanceNormalization(h, s, c)", STATISTICS, 21),
    "LRN": ("[live] b = LRN<size=3>(h)", STATISTICS, 21),
    "LayerNormalization": ("[live] b = LayerNormalization<axis=1>(h, f)", STATISTICS, 21),
    "MeanVarianceNormalization": ("[live] b = MeanVarianceNormalization(h)", STATISTICS, 21),
    "RMSNormalization": ("[live] b = RMSNormalization<axis=1>(h, f)", STATISTICS, 23),
    "BatchNormalization": (
        "[live] b, m, v = BatchNormalization<training_mode=1>(h, s, c, s, c)",
        "is in training mode, so its statistics still change; export the network in evaluation mode",
        21,
    ),
    "computed statistics": (
        "q = ReduceMean<axes=[0,2,3], keepdims=0>(h) [live] b = BatchNormalization(h, s, c, q, s)",
        "has statistics or parameters that the network computes, so no constants stand for it",
        13,
    ),
}


@pytest.mark.parametrize("name", LIVE)
def test_a_norm_that_lives_on_its_input_stays_and_says_so(name):
    body, reason, opset = LIVE[name]
    weights = {"w": some(4, 4, 1, 1), "s": some(4), "c": some(4, seed=4), "f": some(4, 6, 6)}
    model = model_of(f"h = Conv(x, w) {body} y = Conv(b, w)", weights, {"x": ["N", 4, 6, 6]}, opset)
    folded, report = fold_onnx(model)
    assert [(row.name, row.reason) for row in report.refused] == [("live", reason)]
    assert (report.facts["norms_found"], report.facts["norms_left"]) == (1, 1)
    assert kinds(folded) == kinds(model)
    assert worst(model, folded) == 0


IMAGE = {"x": ["N", 4, 6, 6]}
CONV_NORM = f"h = Conv(x, w) {normed('norm', 'h', 'b')}"
CONSTANTS = {"w": some(4, 4, 3, 3), **norm("norm", 4)}


@pytest.mark.parametrize(
    ("second", "length"),
    [("Conv<strides=[2]>(x, v)", 3), ("Conv(x, u)", 2)],
    ids=["other strides", "other lengths"],
)
def test_branches_of_unequal_lengths_stay_apart(second, length):
    """Lengths that the file leaves open may differ: a result of length 1 is then added to every place of the other."""
    weights = {"w": some(4, 4, 2), "v": some(4, 4, 2), "u": some(4, 4, 1)}
    model = model_of(f"a = Conv(x, w) b = {second} y = Add(a, b)", weights, {"x": ["N", 4, "L"]})
    folded, report = fold_onnx(model)
    assert any("its branches have windows of different places" in row.reason for row in report.refused)
    assert worst(model, folded, {"x": some(2, 4, length)}) <= FLOAT32


class TestWritten:
    def test_constants_are_computed_in_float64_and_rounded_once(self):
        model = model_of(f"{CONV_NORM} y = Relu(b)", CONSTANTS, IMAGE)
        folded, _ = fold_onnx(model)
        wide = {name: value.astype(np.float64) for name, value in CONSTANTS.items()}
        epsilon = float(np.float32(1e-5))  # as ONNX stores it
        scale = wide["norm_gamma"] / np.sqrt(wide["norm_variance"] + epsilon)
        weight, bias = wide["w"] * scale[:, None, None, None], wide["norm_beta"] - wide["norm_mean"] * scale
        assert list(stored(folded)) == ["w", "w.bias"]
        np.testing.assert_array_equal(numpy_helper.to_array(stored(folded)["w"]), weight.astype(np.float32))
        np.testing.assert_array_equal(numpy_helper.to_array(stored(folded)["w.bias"]), bias.astype(np.float32))

    def test_a_shared_weight_is_written_for_each_call(self):
        text = f"{CONV_NORM} r = Relu(b) t = Conv(x, w) s = Sigmoid(t) y = Add(r, s)"
        model = model_of(text, CONSTANTS, IMAGE)
        folded, _ = fold_onnx(model)
        assert list(stored(folded)) == ["w", "w_1", "w.bias"]
        assert folded.graph.node[0].input[1:] == ["w_1", "w.bias"]
        assert worst(model, folded) <= FLOAT32

    def test_what_is_dead_goes_with_all_that_is_said_of_it(self):
        model = model_of(f"{CONV_NORM} u = Relu(x) y = Relu(b)", {**CONSTANTS, "unused": some(3)}, IMAGE)
        model = onnx.shape_inference.infer_shapes(model)
        note = model.graph.quantization_annotation.add(tensor_name="u")
        note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="unused")
        assert {info.name for info in model.graph.value_info} == {"h", "b", "u"}
        folded, _ = fold_onnx(model)
        assert kinds(folded) == ["Conv", "Relu"]
        assert set(stored(folded)) == {"w", "w.bias"}
        assert not folded.graph.value_info
        assert not folded.graph.quantization_annotation

    def test_outputs_keep_their_names(self):
        text = f"{CONV_NORM} y = Mul(b, one) z = Mul(x, one) v = Mul(x, one)"
        model = model_of(text, {**CONSTANTS, "one": np.ones(1, np.float32)}, IMAGE, outputs=("y", "z", "v"))
        folded, _ = fold_onnx(model)
        assert [value.name for value in folded.graph.output] == ["y", "z", "v"]
        assert kinds(folded) == ["Conv", "Identity", "Identity"]
        assert worst(model, folded) <= FLOAT32

    def test_an_output_that_is_read_on_is_renamed_for_its_readers(self):
        model = model_of(f"{CONV_NORM} z = Relu(b)", CONSTANTS, IMAGE, outputs=("b", "z"))
        folded, report = fold_onnx(model)
        assert report.facts["norms_left"] == 0
        assert [(node.op_type, *node.output) for node in folded.graph.node] == [("Conv", "b"), ("Relu", "z")]
        assert worst(model, folded) <= FLOAT32

    def test_what_a_branch_captures_is_renamed_inside_it(self):
        text = (
            f"{CONV_NORM} m = ReduceMean<keepdims=0>(x) f = Less(m, z) "
            "y = If(f)<then_branch = t () => (u) { u = Neg(b) }, else_branch = e () => (v) { v = Abs(b) }>"
        )
        model = model_of(text, {**CONSTANTS, "z": np.zeros((), np.float32)}, IMAGE)
        folded, report = fold_onnx(model)
        assert report.facts["norms_left"] == 0
        branches = [attribute.g.node[0].input[0] for attribute in folded.graph.node[-1].attribute]
        assert branches == ["h", "h"]
        assert worst(model, folded) <= FLOAT32

    def test_equal_models_give_equal_bytes(self):
        model = make(CASES["concat"], "all")
        first, second = (fold_onnx(model)[0].SerializeToString(deterministic=True) for _ in range(2))
        assert first == second

    @pytest.mark.parametrize("kind", UNIT_OF)
    def test_the_types_of_the_file_stay(self, kind):
        weights = {"w": some(4, 4, 1, 1), **norm("norm", 4), "v": some(3, 4, 1, 1)}
        model = model_of(f"{CONV_NORM} r = Sigmoid(b) y = Conv(r, v)", weights, IMAGE, 22, kind=kind)
        for tensor in model.graph.initializer:
            values = numpy_helper.to_array(tensor)
            tensor.CopyFrom(helper.make_tensor(tensor.name, kind, values.shape, values.reshape(-1)))
        folded, report = fold_onnx(model)
        onnx.checker.check_model(folded, full_check=True)
        assert report.facts["norms_left"] == 0
        assert {tensor.data_type for tensor in folded.graph.initializer} == {kind}
        # Two constants are rounded once; of 4 products of about 1 each the sum is off by at most 8 roundings.
        assert worst(model, folded) <= 8 * UNIT_OF[kind]

    @pytest.mark.parametrize("axes", [0, 1, 2, 3])
    def test_a_norm_that_stays_is_one_operation_where_there_is_one(self, axes):
        model = model_of(f"{normed('norm', 'x', 'b')} y = Relu(b)", norm("norm", 4), {"x": ["N", 4, *[5] * axes]})
        folded, report = fold_onnx(model)
        assert report.facts["norms_left"] == 1
        assert kinds(folded) == (["Conv", "Relu"] if axes > 1 else ["Mul", "Add", "Relu"])
        assert set(stored(folded)) == {"norm.weight", "norm.bias"}
        assert worst(model, folded) <= FLOAT32

    def test_float64_has_no_convolution_to_be_written_as(self):
        constants = {name: value.astype(np.float64) for name, value in norm("norm", 4).items()}
        text = f"{normed('norm', 'x', 'b')} y = Relu(b)"
        folded, _ = fold_onnx(model_of(text, constants, IMAGE, kind=TensorProto.DOUBLE))
        assert kinds(folded) == ["Mul", "Add", "Relu"]

    def test_names_of_modules_are_those_of_the_exporter(self):
        model = model_of(f"{CONV_NORM} y = Relu(b)", CONSTANTS, IMAGE)
        model.graph.node[0].metadata_props.add(key="module_path", value="stem.conv")
        scopes = "['', 'stem', 'stem.bn', 'batch_norm']"
        model.graph.node[1].metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
        folded, report = fold_onnx(model)
        assert [(row.name, row.reason) for row in report.changed] == [("stem.bn", "folded into 'stem.conv'")]
        assert folded.graph.node[0].metadata_props[0].value == "stem.conv"
