"""What folding takes for a constant in an ONNX file, which lengths it believes, and what it refuses."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_cases import indices, model_of, norm, normed, some
from test_fold_onnx import CONSTANTS, CONV_NORM, FLOAT32, FLOAT64, IMAGE, exact, kinds, stored, worst

from lowprec.errors import ArtifactError, DataError, UnsupportedError
from lowprec.export.backends.ort import OnnxRuntime
from lowprec.export.folding import fold_onnx
from lowprec.export.folding.from_onnx.read import read_onnx
from lowprec.export.folding.graph import Linear
from lowprec.export.onnx_files import load_onnx


class TestConstants:
    def test_what_depends_on_constants_alone_is_computed_once(self):
        text = f"k = Mul(v, g) w = Transpose<perm=[1,0,2,3]>(k) {CONV_NORM} y = Relu(b)"
        weights = {"v": some(4, 5, 1, 1), "g": some(1, 5, 1, 1), **norm("norm", 5)}
        model = model_of(text, weights, IMAGE)
        folded, report = fold_onnx(model)
        assert kinds(folded) == ["Conv", "Relu"]
        assert (report.changed[0].name, report.changed[0].reason) == (
            "network", "constants computed once in float64 (Mul, Transpose)"
        )  # fmt: skip
        assert report.changed[1].reason == "folded into 'h'"
        assert worst(model, folded) <= FLOAT32

    def test_a_computed_constant_that_nothing_folds_into_is_stored(self):
        model = model_of("k = Mul(v, g) s = Softmax(x) y = MatMul(k, s)", {"v": some(6, 6), "g": some(6, 1)}, IMAGE)
        folded, _ = fold_onnx(model)
        assert kinds(folded) == ["Softmax", "MatMul"]
        product = some(6, 6).astype(np.float64) * some(6, 1).astype(np.float64)
        np.testing.assert_array_equal(numpy_helper.to_array(stored(folded)["k"]), product.astype(np.float32))

    def test_a_constant_that_grows_stays_computed(self):
        model = model_of("k = Expand(v, n) y = Add(x, k)", {"v": some(1, 1, 1), "n": indices(1, 1, 64, 64)},
                         {"x": ["N", 2, 64, 64]})  # fmt: skip
        folded, report = fold_onnx(model)
        assert kinds(folded) == ["Expand", "Add"]
        assert not report.changed

    def test_what_a_caller_may_override_is_no_constant(self):
        model = model_of(f"{CONV_NORM} y = Relu(b)", CONSTANTS, IMAGE)
        model.graph.input.append(helper.make_tensor_value_info("norm_gamma", TensorProto.FLOAT, [4]))
        folded, report = fold_onnx(model)
        assert kinds(folded) == ["Conv", "BatchNormalization", "Relu"]
        assert report.refused[0].reason.startswith("has statistics or parameters that the network computes")
        assert "norm_gamma" in stored(folded)
        assert [value.name for value in folded.graph.input] == ["x", "norm_gamma"]

    def test_before_ir_4_every_initializer_is_listed_and_still_one(self):
        model = model_of(f"{CONV_NORM} y = Relu(b)", CONSTANTS, IMAGE, opset=8, ir_version=3, rank=4)
        shapes = {name: value.shape for name, value in CONSTANTS.items()}
        model.graph.input.extend(helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items())
        onnx.checker.check_model(model, full_check=True)
        folded, report = fold_onnx(model)
        onnx.checker.check_model(folded, full_check=True)
        assert report.facts["norms_left"] == 0
        assert [value.name for value in folded.graph.input] == ["x"]
        assert worst(model, folded) <= FLOAT32

    def test_weights_that_are_stored_as_int8_stay_so(self):
        weights = {"q": np.full((4, 4, 1, 1), 3, np.int8), "s": np.array(0.1, np.float32), **norm("norm", 4)}
        model = model_of(f"w = DequantizeLinear(q, s) {CONV_NORM} y = Relu(b)", weights, IMAGE)
        folded, report = fold_onnx(model)
        assert kinds(folded) == ["DequantizeLinear", "Conv", "Conv", "Relu"]
        assert report.facts["norms_left"] == 1
        np.testing.assert_array_equal(numpy_helper.to_array(stored(folded)["q"]), weights["q"])

    def test_local_functions_are_looked_into(self):
        model = model_of("b = own.Block(x, w) y = Relu(b)", CONSTANTS, IMAGE, rank=4)
        body = onnx.parser.parse_graph(f"g () => () {{ {CONV_NORM.replace('norm_', 'n_')} }}").node
        names = ["x", "w", *(f"n_{key}" for key in ("gamma", "beta", "mean", "variance"))]
        opsets = [helper.make_opsetid("", 21)]
        model.functions.append(helper.make_function("own", "Block", names, ["b"], body, opsets))
        model.graph.node[0].input.extend(f"norm_{key}" for key in ("gamma", "beta", "mean", "variance"))
        model.opset_import.append(helper.make_opsetid("own", 1))
        folded, report = fold_onnx(model)
        assert kinds(folded) == ["Conv", "Relu"]
        assert not folded.functions
        assert report.facts["norms_left"] == 0


SHUFFLE = (
    "s = Shape(h) n = Gather<axis=0>(s, i0) c = Gather<axis=0>(s, i1) l = Gather<axis=0>(s, i2) "
    "g = Div(c, half) n1 = Unsqueeze(n, z) g1 = Unsqueeze(g, z) l1 = Unsqueeze(l, z) "
    "grouped = Concat<axis=0>(n1, two, g1, l1) flat = Concat<axis=0>(n1, minus, l1) "
    "a = Reshape(h, grouped) t = Transpose<perm=[0,2,1,3]>(a) u = Reshape(t, flat)"
)
LENGTHS = {
    **{f"i{axis}": indices(axis)[0] for axis in range(3)},
    "two": indices(2),
    "half": indices(2)[0],
    "minus": indices(-1),
    "z": indices(0),
    "w": some(6, 4, 1, seed=2),
}


class TestLengths:
    @pytest.mark.parametrize("length", [5, "L"])
    def test_fixed_lengths_are_found_behind_arithmetic_on_shapes(self, length):
        """A channel shuffle as the older exporter writes it: groups and channels come out of Shape, Gather and Div."""
        text = f"h = Conv(x, w) {SHUFFLE} {normed('norm', 'u', 'b')} y = Sigmoid(b)"
        weights = {**LENGTHS, **norm("norm", 6)}
        model = model_of(text, weights, {"x": ["N", 4, length]})
        folded, report = fold_onnx(model)
        assert report.facts["norms_left"] == 0
        assert "Div" not in kinds(folded)
        assert worst(model, exact(model)[0]) <= FLOAT64

    def test_labels_along_a_free_axis_are_not_believed(self):
        """Channels go to an axis that is as long as the batch: what holds for two samples holds for no other number."""
        text = f"h = Conv(x, w) t = Transpose<perm=[1,0,2]>(h) {normed('norm', 't', 'b')} y = Relu(b)"
        model = model_of(text, {"w": some(6, 4, 1), **norm("norm", 2)}, {"x": [2, 4, 5]})
        assert fold_onnx(model)[1].facts["norms_left"] == 1  # along the batch: its constants are not the channels'
        text = f"h = Conv(x, w) t = Reshape(h, r) {normed('norm', 't', 'b')} y = Relu(b)"
        model = model_of(text, {"w": some(6, 4, 1), "r": indices(-1, 3, 5), **norm("norm", 3)}, {"x": ["N", 4, 5]})
        (moves,) = (node.op for node in read_onnx(model).graph.nodes if node.kind == "Reshape")
        assert moves.move([np.arange(6).reshape(1, 6, 1)]) is None
        assert moves.move([np.zeros((1, 1, 1), np.int64)]).shape == (1, 1, 1)
        folded, report = fold_onnx(model)
        assert report.facts["norms_left"] == 1
        assert worst(model, folded) <= FLOAT32

    def test_a_length_that_the_model_needs_is_found_by_trying(self):
        text = f"{CONV_NORM} r = MaxPool<kernel_shape=[33,33]>(b) y = Relu(r)"
        model = model_of(text, CONSTANTS, {"x": ["N", 4, "H", "W"]})
        assert fold_onnx(model)[1].facts["norms_left"] == 0

    def test_a_reshape_to_what_the_caller_gives_is_opaque(self):
        text = f"{normed('norm', 'x', 'b')} h = Reshape(b, r) y = MatMul(h, w)"
        model = model_of(text, {**norm("norm", 4), "w": some(6, 3)}, IMAGE)
        model.graph.input.append(helper.make_tensor_value_info("r", TensorProto.INT64, [2]))
        feeds = {"x": np.random.default_rng(0).normal(size=(3, 4, 6, 6)).astype(np.float32), "r": indices(-1, 6)}
        folded, report = fold_onnx(model, feeds)
        assert report.facts["norms_left"] == 1
        assert worst(model, folded, feeds) <= FLOAT32
        with pytest.raises(UnsupportedError, match="on random inputs; give real ones, on the command line"):
            fold_onnx(model)

    @pytest.mark.parametrize(("lengths", "convolutions"), [(["H", "W"], 2), ([6, 6], 1), ([7, 7], 1), ([6, 7], 1)])
    def test_a_padding_that_depends_on_the_length_takes_gauges_and_does_not_merge(self, lengths, convolutions):
        """At stride 2 the small window is the first half of the large one where the length is even, else the second."""
        same = 'Conv<auto_pad="SAME_UPPER", strides=[2,2]>'
        text = f"p = {same}(x, w) q = {same}(x, v) s = Add(p, q) {normed('norm', 's', 'b')} y = Relu(b)"
        weights = {"w": some(4, 4, 3, 3), "v": some(4, 4, 2, 2), **norm("norm", 4)}
        model = model_of(text, weights, {"x": ["N", 4, *lengths]})
        folded, report = fold_onnx(model)
        assert report.facts["norms_left"] == 0
        assert kinds(folded).count("Conv") == convolutions
        for length in (6, 7) if "H" in lengths else ():
            image = np.random.default_rng(length).normal(size=(3, 4, length, length))
            assert worst(model, folded, {"x": image}) <= FLOAT32
        if "H" not in lengths:
            assert worst(model, folded) <= FLOAT32

    def test_one_sided_padding_merges_where_the_places_agree(self):
        text = "p = Conv<pads=[1,1,1,1]>(x, w) q = Conv<pads=[0,0,1,1]>(x, v) s = Add(p, q) y = Relu(s)"
        weights = {"w": some(4, 4, 3, 3), "v": some(4, 4, 2, 2)}
        model = model_of(text, weights, IMAGE)
        folded, _ = fold_onnx(model)
        assert kinds(folded) == ["Conv", "Relu"]
        assert worst(model, folded) <= FLOAT32
        both = model_of(text.replace("0,0,1,1", "1,0,1,0"), weights, IMAGE)  # one place too high
        with pytest.raises(UnsupportedError):
            fold_onnx(both)


def test_the_neutral_graph_knows_its_origins():
    weights = {"w": some(4, 6), "c": some(6)}
    view = read_onnx(model_of("m = MatMul(x, w) s = Add(m, c) y = Relu(s)", weights, {"x": ["N", 4]}))
    by_kind = {node.kind: node for node in view.graph.nodes}
    assert view.origin[by_kind["MatMul"]] == (0, 1)
    assert isinstance(by_kind["MatMul"].op, Linear)
    assert view.origin[by_kind["input"]] == view.origin[by_kind["output"]] == ()
    assert view.values[by_kind["MatMul"]] == "s"
    assert len({node.name for node in view.graph.nodes}) == len(view.graph.nodes)


class TestRefused:
    def test_graphs_that_are_not_in_order(self, tmp_path):
        model = model_of(f"{CONV_NORM} y = Relu(b)", CONSTANTS, IMAGE)
        nodes = list(model.graph.node)[::-1]
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        with pytest.raises(ArtifactError, match=r"'Relu' reads 'b', .* the graph is cyclic, not sorted, or incomplete"):
            fold_onnx(model)
        (tmp_path / "cut.onnx").write_bytes(model.SerializeToString()[:100])
        with pytest.raises(ArtifactError, match=r"cut\.onnx"):
            load_onnx(tmp_path / "cut.onnx")

    @pytest.mark.parametrize(
        ("text", "opset", "words"),
        [
            ("y = Relu(x)", 6, "is of opset 6, lowprec folds from opset 7 on; convert it with onnx.version_converter"),
            ("r = RandomNormalLike(x) y = Add(x, r)", 21, "draws random numbers"),
            ("y = Dropout(x, r, t)", 21, "draws random numbers"),
            ("y = com.example.Magic(x)", 21, "onnx's reference cannot evaluate this graph"),
            ("y = GridSample(x, g)", 21, "cannot be evaluated in float64"),
        ],
    )
    def test_models_without_a_truth(self, text, opset, words):
        model = model_of(text, {"g": some(2, 3, 3, 2), "r": some(), "t": np.array(True)}, IMAGE, opset, rank=4)
        model.opset_import.append(helper.make_opsetid("com.example", 1))
        with pytest.raises(UnsupportedError, match=words):
            fold_onnx(model)

    def test_an_input_without_a_shape(self):
        model = model_of("y = Relu(x)", {}, IMAGE)
        model.graph.input[0].type.tensor_type.ClearField("shape")
        with pytest.raises(UnsupportedError, match="says nothing about the shape of its input 'x'"):
            fold_onnx(model)
        assert fold_onnx(model, {"x": np.ones((3, 2), np.float32)})[1].facts["float64_error"] == 0
        with pytest.raises(DataError, match="missing: x"):
            fold_onnx(model, {"z": np.ones((3, 2), np.float32)})

    def test_weights_that_are_stored_sparsely(self):
        model = model_of("y = MatMul(x, w)", {}, {"x": ["N", 2]})
        values = helper.make_tensor("w", TensorProto.FLOAT, [1], [2.0])
        places = helper.make_tensor("w_places", TensorProto.INT64, [1], [3])
        model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, places, [2, 2]))
        with pytest.raises(UnsupportedError, match="the weight 'w' is stored sparsely"):
            fold_onnx(model)

    def test_a_folded_constant_that_overflows(self):
        constants = {**CONSTANTS, "norm_gamma": np.full(4, 60000.0, np.float32)}
        model = model_of(f"{CONV_NORM} y = Relu(b)", constants, IMAGE, kind=TensorProto.FLOAT16)
        for tensor in model.graph.initializer:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
        with pytest.raises(UnsupportedError, match=r"constant 'w' does not fit in fp16: \d+ of 144 values overflow"):
            fold_onnx(model)


def test_without_onnxruntime_the_rounding_is_not_measured(monkeypatch):
    monkeypatch.setattr(OnnxRuntime, "unavailable", lambda self: "not installed")
    folded, report = fold_onnx(model_of(f"{CONV_NORM} y = Relu(b)", CONSTANTS, IMAGE))
    assert report.facts["float32_error_ratio"] is None
    assert report.facts["norms_left"] == 0
    assert kinds(folded) == ["Conv", "Relu"]


def test_one_sample_does_not_stand_for_all():
    """Along an axis of length 1 nothing is seen to vary, so a single sample is taken twice."""
    text = f"h = Conv(x, w) t = Reshape(h, r) {normed('norm', 't', 'b')} y = Relu(b)"
    model = model_of(text, {"w": some(6, 4, 1), "r": indices(-1, 3, 5), **norm("norm", 3)}, {"x": ["N", 4, 5]})
    feeds = {"x": np.ones((1, 4, 5), np.float32)}
    assert read_onnx(model, feeds).program.lengths["x"] == (2, 4, 5)
    assert fold_onnx(model, feeds)[1].facts["norms_left"] == 1
