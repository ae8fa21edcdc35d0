"""Emitted ONNX: names, axes, stable bytes; and its rounding to half: types, casts, refusals."""

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import tensorrt_rtx
import torch
import torch.nn.functional as F
from fold_cases import FOLD_CASES, Lambda, make, randomise
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from lowprec.errors import FoldError, UnsupportedError
from lowprec.export.emit import convert_precision, emit_onnx
from lowprec.export.float64 import Float64Graph
from lowprec.export.folding import fold, trace
from lowprec.export.onnx_files import module_path
from lowprec.formats import BF16, FP16, FP32

NARROW = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


def kept(*operators):
    """Keeps nodes by the type of their operator."""
    return lambda node: "kept wide as asked" if node.op_type in operators else None


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)

    def forward(self, x):
        return F.relu(x + self.norm(self.conv(x)))


class Network(nn.Module):
    """Resizing, a residual block, a norm that stays, a softmax, an integer output."""

    def __init__(self):
        super().__init__()
        self.stem, self.block, self.pre = nn.Conv2d(1, 4, 3), Block(4), nn.BatchNorm2d(1)
        self.fc = nn.Linear(4, 3)

    def forward(self, image):
        h = F.interpolate(self.pre(image), scale_factor=2.0)
        h = self.block(self.stem(h)).mean((2, 3))
        logits = self.fc(h)
        return F.softmax(logits.view(logits.shape[0], -1), 1), logits.argmax(1)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return randomise(Network().eval())


@pytest.fixture(scope="module")
def folded(network):
    return fold(network, (torch.randn(1, 1, 6, 6),))[0]


@pytest.fixture(scope="module")
def model(folded):
    return emit_onnx(folded)


def run(model, **feeds):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def shape_of(value):
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def element_types(model):
    """Element type of every value, with types inferred from the graph alone."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    del bare.graph.value_info[:]
    graph = onnx.shape_inference.infer_shapes(bare, strict_mode=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input, *graph.output)}
    return types | {tensor.name: tensor.data_type for tensor in graph.initializer}


def parse_strongly_typed(model):
    """What TensorRT-RTX's parser says about the model, [] when it takes it. Needs no GPU."""
    builder = tensorrt_rtx.Builder(tensorrt_rtx.Logger(tensorrt_rtx.Logger.ERROR))
    flags = 1 << int(tensorrt_rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = tensorrt_rtx.OnnxParser(network, tensorrt_rtx.Logger(tensorrt_rtx.Logger.ERROR))
    parser.parse(model.SerializeToString())
    return [parser.get_error(index).desc() for index in range(parser.num_errors)]


class TestEmit:
    def test_names_axes_and_versions(self, model):
        onnx.checker.check_model(model, full_check=True)
        assert [value.name for value in model.graph.input] == ["image"]
        assert [value.name for value in model.graph.output] == ["output_0", "output_1"]
        assert shape_of(model.graph.input[0]) == ["batch", 1, 6, 6]
        assert shape_of(model.graph.output[0]) == ["batch", 3]
        assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 20)]
        assert model.producer_name == "lowprec"
        assert model.ir_version <= 10

    @pytest.mark.parametrize("batch", [1, 2, 5])
    def test_computes_what_the_network_computes(self, network, model, batch):
        x = torch.randn(batch, 1, 6, 6)
        expected = [value.detach().numpy() for value in network(x)]
        found = run(model, image=x.numpy())
        # Sums of at most 36 products in five layers of probabilities below one.
        np.testing.assert_allclose(found[0], expected[0], atol=5 * 36 * FP32.unit_roundoff)
        assert (found[1] == expected[1]).all()

    @pytest.mark.parametrize("opset", [18, 21, 23])
    def test_every_opset_is_what_was_asked_for(self, folded, model, opset):
        """Operators that a newer opset spells otherwise (Resize, Softmax of float32) give the same values."""
        other = emit_onnx(folded, opset=opset)
        onnx.checker.check_model(other, full_check=True)
        assert [(entry.domain, entry.version) for entry in other.opset_import] == [("", opset)]
        assert other.ir_version == max(10, helper.find_min_ir_version_for(list(other.opset_import)))
        assert [module_path(node) for node in other.graph.node if node.op_type == "Conv"] == ["stem", "block.conv"]
        x = np.random.default_rng(0).normal(size=(2, 1, 6, 6)).astype(np.float32)
        for a, b in zip(run(model, image=x), run(other, image=x), strict=True):
            assert np.array_equal(a, b)

    @pytest.mark.parametrize("opset", [9, 17, 99])
    def test_an_opset_that_torch_does_not_write_is_refused(self, folded, opset):
        with pytest.raises(UnsupportedError, match=rf"asked for opset {opset}, and"):
            emit_onnx(folded, opset=opset)

    def test_same_bytes_twice_and_nothing_of_this_machine(self, folded, model):
        data = model.SerializeToString()
        assert emit_onnx(folded).SerializeToString() == data
        for word in (b"site-packages", b".py", b"pkg.torch", b"stack_trace", __file__.encode()):
            assert word not in data

    def test_a_loaded_network_gives_the_same_bytes(self, folded, model, tmp_path):
        torch.save(folded, tmp_path / "folded.pt")
        loaded = torch.load(tmp_path / "folded.pt", weights_only=False)
        assert emit_onnx(loaded).SerializeToString() == model.SerializeToString()

    def test_nodes_carry_module_paths(self, model):
        paths = {node.op_type: module_path(node) for node in model.graph.node}
        assert [module_path(node) for node in model.graph.node if node.op_type == "Conv"] == ["stem", "block.conv"]
        assert paths["Relu"] == "block"
        assert paths["Gemm"] == "fc"
        assert "BatchNormalization" not in paths
        assert paths["Softmax"] == ""

    def test_a_norm_that_stays_is_a_depthwise_convolution(self):
        layers = nn.Sequential(nn.SiLU(), nn.BatchNorm2d(3), nn.SiLU()).eval()
        with torch.no_grad():
            layers[1].running_mean.normal_()
        model = emit_onnx(fold(layers, (torch.randn(2, 3, 4, 4),))[0])
        (conv,) = [node for node in model.graph.node if node.op_type not in ("Sigmoid", "Mul", "Swish")]
        constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        assert (conv.op_type, module_path(conv)) == ("Conv", "1")
        assert {attribute.name: attribute.i for attribute in conv.attribute}["group"] == 3
        assert [constants[name].shape for name in conv.input[1:]] == [(3, 1, 1, 1), (3,)]

    def test_takes_names_from_a_trace_and_custom_axes(self):
        network = Lambda(lambda m, x: m.c(x), c=nn.Conv2d(1, 2, 3)).eval()
        traced = trace(
            network, (torch.randn(1, 1, 6, 6),), ({0: torch.export.Dim("n"), 3: torch.export.Dim("width", min=4)},)
        )
        folded, _ = fold(network, (torch.randn(1, 1, 6, 6),), ({0: torch.export.Dim("n")},))
        assert shape_of(emit_onnx(traced.module).graph.input[0]) == ["n", 1, 6, "width"]
        assert shape_of(emit_onnx(folded, traced).graph.input[0]) == ["n", 1, 6, "width"]

    def test_axes_are_named_and_bound_by_strings(self):
        network = Lambda(
            lambda m, x: torch.cat([x, m.up(m.down(x))], 1),
            down=nn.Conv2d(1, 2, 2, stride=2),
            up=nn.ConvTranspose2d(2, 1, 2, stride=2),
        )
        folded, _ = fold(network.eval(), (torch.randn(1, 1, 6, 6),), {"x": {0: "n", 2: "2*half", 3: "width"}})
        model = emit_onnx(folded)
        assert shape_of(model.graph.input[0]) == ["n", 1, "2*half", "width"]
        assert shape_of(model.graph.output[0])[:3] == ["n", 2, "2*half"]
        x = torch.randn(3, 1, 8, 4)
        found = Float64Graph(model).run({"x": x.numpy()})["output"]
        assert np.abs(found - network(x).detach().numpy()).max() <= 1e-5  # 2 layers of 4 products of about 1

    @pytest.mark.parametrize("name", ["", "a*b", "2*", "a b", "a+b"])
    def test_what_is_no_name_of_an_axis_is_refused(self, name):
        with pytest.raises(
            UnsupportedError, match=r"names no free axis; give a name such as height, or 2\*height \+ 1"
        ):
            fold(nn.ReLU().eval(), (torch.randn(2, 3),), ({1: name},))

    def test_a_named_axis_that_the_code_fixes_is_refused(self):
        network = Lambda(lambda m, x: x.reshape(-1, 4)).eval()
        with pytest.raises(FoldError, match="its code fixes the axis"):
            fold(Lambda(lambda m, x: x + torch.ones(4)).eval(), (torch.randn(2, 4),), ({1: "width"},))
        folded, _ = fold(network, (torch.randn(2, 4),), ({0: "n"},))
        assert folded.dynamic_shapes == ({0: "n"},)

    def test_an_operation_without_translation_is_refused_in_one_line(self):
        network = Lambda(lambda m, x: torch.special.airy_ai(x)).eval()
        with pytest.raises(UnsupportedError, match=r"cannot be written as ONNX: .*airy_ai") as error:
            emit_onnx(fold(network, (torch.randn(1, 2),))[0])
        inside = nn.Sequential(nn.Linear(2, 2), network).eval()
        with pytest.raises(UnsupportedError, match=r"cannot be written as ONNX \(in '1'\): .*airy_ai"):
            emit_onnx(fold(inside, (torch.randn(1, 2),))[0])
        assert "\n" not in str(error.value)

    def test_silent(self, folded, capfd):
        emit_onnx(folded)
        assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("fmt", [FP16, BF16], ids=lambda fmt: fmt.name)
class TestConvertPrecision:
    def test_every_computation_is_narrow_and_the_edges_are_float32(self, model, fmt):
        before = model.SerializeToString()
        narrow, report = convert_precision(model, fmt)
        assert model.SerializeToString() == before
        types = element_types(narrow)
        for node in narrow.graph.node:
            floats = {types[name] for name in node.output} & {TensorProto.FLOAT, NARROW[fmt.name]}
            assert floats <= ({TensorProto.FLOAT} if node.name == "cast_output_0" else {NARROW[fmt.name]}), node.name
        assert types["image"] == types["output_0"] == TensorProto.FLOAT
        casts = [node for node in narrow.graph.node if node.op_type == "Cast"]
        assert [node.name for node in casts] == [f"cast_image_{fmt.name}", "cast_output_0"]
        assert report.facts["casts"] == 2
        assert report.facts["wide"] == {}
        # Resize takes its scales as float32 whatever the type of its input.
        resize = next(node for node in narrow.graph.node if node.op_type == "Resize")
        assert types[resize.input[2]] == TensorProto.FLOAT

    def test_module_paths_stay(self, model, fmt):
        narrow, _ = convert_precision(model, fmt)
        assert [module_path(node) for node in narrow.graph.node if node.op_type == "Conv"] == ["stem", "block.conv"]

    def test_constants_are_rounded_once(self, model, fmt):
        narrow, _ = convert_precision(model, fmt)
        wide = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        dtype = np.float16 if fmt is FP16 else ml_dtypes.bfloat16
        rounded = [tensor for tensor in narrow.graph.initializer if tensor.data_type == NARROW[fmt.name]]
        assert {tensor.name for tensor in rounded} >= {"stem.weight", "block.conv.bias", "fc.weight"}
        for tensor in rounded:
            raw = np.frombuffer(tensor.raw_data, np.uint16)
            expected = wide[tensor.name].astype(dtype)
            assert (raw == expected.view(np.uint16).ravel()).all()

    def test_kept_nodes_are_wide_and_data_movement_between_them_too(self, model, fmt):
        mixed, report = convert_precision(model, fmt, keep=kept("Gemm", "Softmax"))
        types = element_types(mixed)
        for node in mixed.graph.node:
            if node.op_type in ("Gemm", "Reshape", "Softmax"):
                assert types[node.input[0]] == types[node.output[0]] == TensorProto.FLOAT
        assert report.facts["casts"] == 2  # the input, and the input of Gemm; nothing is cast back
        reasons = {row.name: row.reason for row in report.refused}
        assert reasons["fc"] == "kept wide as asked"
        assert sorted(reasons.values()).count("computes nothing from 'linear', which is wide") == 2
        assert types["fc.weight"] == TensorProto.FLOAT

    def test_tensorrt_parses_it_strongly_typed(self, model, fmt):
        for keep in (None, kept("Gemm")):
            assert parse_strongly_typed(convert_precision(model, fmt, keep)[0]) == []

    def test_same_bytes_twice(self, model, fmt):
        first, second = (convert_precision(model, fmt)[0].SerializeToString() for _ in range(2))
        assert first == second

    def test_one_cast_per_tensor_and_type(self, fmt):
        model = small(
            [("Relu", ["x"], ["a"]), ("Exp", ["a"], ["b"]), ("Sin", ["a"], ["c"]), ("Add", ["b", "c"], ["y"])]
        )
        mixed, report = convert_precision(model, fmt, keep=kept("Exp", "Add"))
        # x down, a up once for Exp (Sin reads it narrow), c up for Add, whose result is the output as it is.
        casts = [(node.input[0], node.output[0]) for node in mixed.graph.node if node.op_type == "Cast"]
        assert len(casts) == len({source for source, _ in casts}) == report.facts["casts"] == 3

    def test_operators_without_the_type_stay_wide(self, fmt):
        model = small([("Relu", ["x"], ["a"]), ("Celu", ["a"], ["b"]), ("Relu", ["b"], ["y"])])
        mixed, report = convert_precision(model, fmt)
        types = element_types(mixed)
        assert types["b"] == TensorProto.FLOAT
        assert [row.reason for row in report.refused] == [
            f"operator Celu of opset 12 is not defined for tensor({'float16' if fmt is FP16 else 'bfloat16'})"
        ]


def small(nodes, initializers=(), outputs=("y",), opset=22):
    """A model from (operator, inputs, outputs[, attributes]) on a float input x of shape (batch, 4)."""
    made = [
        helper.make_node(kind, inputs, results, name=f"{kind}_{index}", **(rest[0] if rest else {}))
        for index, (kind, inputs, results, *rest) in enumerate(nodes)
    ]
    graph = helper.make_graph(
        made,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4]) for name in outputs],
        [numpy_helper.from_array(np.asarray(value, np.float32), name) for name, value in initializers],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def test_half_model_runs_and_is_near(network, model):
    narrow, _ = convert_precision(model, FP16)
    x = torch.randn(6, 1, 6, 6)
    expected = network(x)[0].detach().numpy()
    found = run(narrow, image=x.numpy())[0]
    assert found.dtype == np.float32
    # About ten roundings to half on values of order 10 before a softmax, whose derivative is at most one quarter.
    np.testing.assert_allclose(found, expected, atol=10 * 10 * FP16.unit_roundoff / 4)


@pytest.mark.parametrize("fmt", [FP16, BF16], ids=lambda fmt: fmt.name)
def test_every_fold_case_converts_and_is_strongly_typed(fmt):
    case = FOLD_CASES["affine-after-affine"]["two-norms-first"]
    narrow, _ = convert_precision(emit_onnx(fold(make(case), (torch.randn(case.shape),))[0]), fmt)
    assert parse_strongly_typed(narrow) == []


def test_overflow_is_refused_and_names_the_constant():
    model = small([("Mul", ["x", "k"], ["y"])], [("k", [1.0, 2.0, -1e5, 7e4])])
    with pytest.raises(UnsupportedError, match=r"constant 'k' does not fit in fp16: 2 of 4 values overflow.*1e\+05"):
        convert_precision(model, FP16)
    mixed, _ = convert_precision(model, FP16, keep=kept("Mul"))
    assert [node.op_type for node in mixed.graph.node] == ["Mul"]
    assert convert_precision(model, BF16)[1].facts["subnormal"] == 0


def test_subnormal_and_vanished_constants_are_counted():
    model = small([("Mul", ["x", "k"], ["y"])], [("k", [1.0, 1e-5, 1e-9, 0.0])])
    _, report = convert_precision(model, FP16)
    assert (report.facts["subnormal"], report.facts["vanished"]) == (1, 1)
    assert [(row.name, row.reason) for row in report.changed] == [
        ("k", "rounded to fp16: 1 values turned subnormal, 1 vanished")
    ]


def test_infinite_constants_stay_infinite():
    model = small([("Mul", ["x", "k"], ["y"])], [("k", [np.inf, -np.inf, 1.0, 0.0])])
    narrow, _ = convert_precision(model, FP16)
    assert numpy_helper.to_array(narrow.graph.initializer[0]).tolist() == [np.inf, -np.inf, 1.0, 0.0]


def test_a_constant_wanted_in_both_types_is_there_in_both():
    model = small([("Mul", ["x", "k"], ["a"]), ("Add", ["a", "k"], ["y"])], [("k", [0.1, 0.2, 0.3, 0.4])])
    mixed, _ = convert_precision(model, FP16, keep=kept("Add"))
    kinds = {tensor.name: tensor.data_type for tensor in mixed.graph.initializer}
    assert kinds == {"k": TensorProto.FLOAT16, "k_fp32": TensorProto.FLOAT}
    onnx.checker.check_model(mixed, full_check=True)


def test_idle_casts_vanish_and_casts_from_integers_become_narrow():
    model = small(
        [
            ("Cast", ["x"], ["a"], {"to": TensorProto.FLOAT}),
            ("Cast", ["a"], ["i"], {"to": TensorProto.INT64}),
            ("Cast", ["i"], ["f"], {"to": TensorProto.FLOAT}),
            ("Add", ["a", "f"], ["b"]),
            ("Cast", ["b"], ["y"], {"to": TensorProto.FLOAT}),
        ]
    )
    narrow, _ = convert_precision(model, FP16)
    assert [node.op_type for node in narrow.graph.node] == ["Cast", "Cast", "Cast", "Add", "Cast"]
    assert element_types(narrow)["f"] == TensorProto.FLOAT16
    x = np.array([[1.5, -2.0, 3.0, 0.25]], np.float32)
    assert run(narrow, x=x)[0].tolist() == [[2.5, -4.0, 6.0, 0.25]]


def test_filled_constants_become_narrow():
    filled = {"value": numpy_helper.from_array(np.array([0.5], np.float32))}
    model = small(
        [
            ("Shape", ["x"], ["s"]),
            ("ConstantOfShape", ["s"], ["zero"]),
            ("ConstantOfShape", ["s"], ["half"], filled),
            ("Sum", ["x", "zero", "half"], ["y"]),
        ]
    )
    narrow, _ = convert_precision(model, FP16)
    types = element_types(narrow)
    assert types["zero"] == types["half"] == TensorProto.FLOAT16
    assert run(narrow, x=np.ones((1, 4), np.float32))[0].tolist() == [[1.5] * 4]


def test_outputs_that_are_also_read_keep_their_name_and_type():
    model = small([("Relu", ["x"], ["y"]), ("Neg", ["y"], ["z"])], outputs=("y", "z"))
    narrow, _ = convert_precision(model, FP16)
    types = element_types(narrow)
    assert types["y"] == types["z"] == TensorProto.FLOAT
    assert next(node for node in narrow.graph.node if node.op_type == "Neg").input[0] == "y_fp16"


def test_nested_graphs_and_other_formats_are_refused():
    branch = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["z"])], "b", [], [helper.make_tensor_value_info("z", 1, None)]
    )
    model = small([("If", ["c"], ["y"], {"then_branch": branch, "else_branch": branch})])
    with pytest.raises(UnsupportedError, match=r"node 'If_0' \(If\) holds a graph of its own"):
        convert_precision(model, FP16)
    with pytest.raises(UnsupportedError, match="rounded to fp16 or bf16; found fp32"):
        convert_precision(small([("Relu", ["x"], ["y"])]), FP32)


def test_operators_of_other_libraries_stay_wide():
    model = small([("Relu", ["x"], ["a"]), ("Mystery", ["a"], ["b"], {"domain": "some.where"}), ("Relu", ["b"], ["y"])])
    model.opset_import.append(helper.make_opsetid("some.where", 1))
    mixed, report = convert_precision(model, FP16)
    assert [row.reason for row in report.refused] == [
        "operator some.where.Mystery has no schema that says which types it takes",
        "the type of its input 'b' is not known",
    ]
    assert [node.op_type for node in mixed.graph.node] == ["Cast", "Relu", "Cast", "Mystery", "Relu"]


def test_an_affine_over_a_sequence_is_written_as_arithmetic():
    network = nn.Sequential(nn.Conv1d(3, 4, 3), nn.SiLU(), nn.BatchNorm1d(4), nn.SiLU(), nn.Conv1d(4, 2, 3))
    folded, _ = fold(randomise(network.eval()), (torch.randn(2, 3, 12),))
    model = emit_onnx(folded)
    assert [node.op_type for node in model.graph.node if node.op_type in ("Conv", "Mul", "Add")].count("Conv") == 2
    assert {"2"} == {module_path(node) for node in model.graph.node if node.op_type == "Add"}
    x = torch.randn(3, 3, 12)
    found = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"input": x.numpy()})[0]
    # Sums of at most 12 products on either side, then two activations: a dozen roundings of the largest value.
    assert np.abs(found - folded(x).numpy()).max() <= 48 * 2.0**-24 * np.abs(found).max()
    assert any(
        node.target is torch.ops.aten.conv1d.default and len(node.args) > 6 for node in folded.network.graph.nodes
    )


@pytest.mark.parametrize("other", ["stride", "padding", "shared"])
def test_a_depthwise_convolution_that_is_no_affine_stays(other):
    options = {"stride": {"stride": 2}, "padding": {"padding": 1}}.get(other, {})
    layer = nn.Conv1d(4, 4, 1, groups=4, **options)
    network = Lambda(lambda m, x: m.c(F.silu(m.c(F.silu(x)))) if other == "shared" else m.c(F.silu(x)), c=layer)
    folded, _ = fold(network.eval(), (torch.randn(2, 4, 12),))
    model = emit_onnx(folded)
    assert sum(node.op_type == "Conv" for node in model.graph.node) == (2 if other == "shared" else 1)
