import itertools

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from reference_parity import conv_loops, dot_error, graph_of, single

from lowprec.errors import ArtifactError, DataError, UnsupportedError
from lowprec.export.float64 import Float64Graph, operators
from lowprec.export.onnx_files import load_onnx

torch = pytest.importorskip("torch")
F = torch.nn.functional


def run(model, feeds):
    return next(iter(Float64Graph(model).run(feeds).values()))


def plain(model, feeds):
    return ReferenceEvaluator(model).run(None, feeds)[0]


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def close(a, b, terms):
    # Both are float64 sums of at most `terms` products of normal values; |a b| stays below 5^2 for these samples.
    np.testing.assert_allclose(a, b, rtol=0, atol=dot_error(terms, 25.0))


@pytest.mark.parametrize(
    ("stride", "dilation", "pad", "groups"), list(itertools.product((1, 2), (1, 2), (0, 2), (1, 2, 4)))
)
def test_convolution_is_the_loops(stride, dilation, pad, groups):
    x, w = normal(2, 4, 7, 6), normal(8, 4 // groups, 3, 2)
    model = single(
        "Conv", {"x": x, "w": w}, ["y"], strides=[stride] * 2, dilations=[dilation] * 2, pads=[pad] * 4, group=groups
    )
    close(run(model, {"x": x, "w": w}), conv_loops(x, w, stride, dilation, pad, groups), 4 * 6)


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_of_every_rank_are_torchs(axes, groups):
    x, w, b = normal(3, 4, *[6, 5, 7][:axes]), normal(6, 4 // groups, *[3, 2, 3][:axes]), normal(6)
    strides, pads = [2, 1, 2][:axes], [1, 0, 2][:axes]
    model = single("Conv", {"x": x, "w": w, "b": b}, ["y"], strides=strides, pads=pads * 2, group=groups)
    conv = [F.conv1d, F.conv2d, F.conv3d][axes - 1]
    expected = conv(*map(torch.from_numpy, (x, w, b)), stride=strides, padding=pads, groups=groups)
    close(run(model, {"x": x, "w": w, "b": b}), expected.numpy(), 4 * 18 + 1)


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_convolution_pads_by_itself_as_onnxruntime_does(auto_pad):
    onnxruntime = pytest.importorskip("onnxruntime")
    # Small whole numbers: every float32 sum is exact, so both must agree to the last bit.
    x = np.random.default_rng(1).integers(-3, 4, (1, 2, 7, 6)).astype(np.float32)
    w = np.random.default_rng(2).integers(-3, 4, (3, 2, 3, 2)).astype(np.float32)
    node = helper.make_node("Conv", ["x", "w"], ["y"], auto_pad=auto_pad)
    model = graph_of([node], {"x": [1, 2, 7, 6]}, {"y": [None] * 4}, {"w": w})
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(run(model, {"x": x}), session.run(None, {"x": x})[0])


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER"])
def test_convolution_pads_a_spread_kernel_to_the_size_onnx_states(auto_pad):
    x, w = normal(1, 2, 7, 6), normal(3, 2, 3, 2)
    feeds = {"x": x, "w": w}
    got = run(single("Conv", feeds, ["y"], auto_pad=auto_pad, dilations=[2, 3], strides=[2, 1]), feeds)
    spread = np.zeros((3, 2, 5, 4))
    spread[:, :, ::2, ::3] = w
    close(
        got,
        run(single("Conv", {"x": x, "w": spread}, ["y"], auto_pad=auto_pad, strides=[2, 1]), {"x": x, "w": spread}),
        40,
    )
    assert got.shape == (1, 3, 4, 6)


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize(("groups", "stride", "dilation", "extra"), [(1, 1, 1, 0), (2, 2, 1, 1), (4, 3, 2, 1)])
def test_transposed_convolutions_are_torchs(axes, groups, stride, dilation, extra):
    x, w, b = normal(2, 4, *[4, 5, 3][:axes]), normal(4, 3, *[3, 2, 3][:axes]), normal(3 * groups)
    model = single(
        "ConvTranspose",
        {"x": x, "w": w, "b": b},
        ["y"],
        strides=[stride] * axes,
        pads=[1] * 2 * axes,
        dilations=[dilation] * axes,
        output_padding=[extra] * axes,
        group=groups,
    )
    conv = [F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d][axes - 1]
    expected = conv(
        *map(torch.from_numpy, (x, w, b)),
        stride=stride,
        padding=1,
        output_padding=extra,
        groups=groups,
        dilation=dilation,
    )
    close(run(model, {"x": x, "w": w, "b": b}), expected.numpy(), 4 * 18 + 1)


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool"])
@pytest.mark.parametrize(
    "attributes",
    [
        {"kernel_shape": [3, 2]},
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
        {"kernel_shape": [2, 2], "strides": [2, 2], "auto_pad": "SAME_UPPER"},
        {"kernel_shape": [2, 2], "dilations": [2, 3]},
        {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1},
    ],
)
def test_pools_are_those_of_onnx(op, attributes):
    x = normal(2, 3, 9, 8)
    model = single(op, {"x": x}, ["y"], **attributes)
    close(run(model, {"x": x}), plain(model, {"x": x}), 9)


def test_an_average_counts_its_padding_only_where_asked():
    x = normal(1, 2, 5, 5)
    for include in (0, 1):
        model = single("AveragePool", {"x": x}, ["y"], kernel_shape=[3, 3], pads=[1] * 4, count_include_pad=include)
        expected = F.avg_pool2d(torch.from_numpy(x), 3, 1, 1, count_include_pad=bool(include))
        close(run(model, {"x": x}), expected.numpy(), 9)


@pytest.mark.parametrize("length", [5, 6, 7, 8])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 2, 0), (3, 3, 0), (3, 1, 1), (2, 3, 1), (3, 2, 1)])
def test_pools_that_round_up_are_those_of_torch(length, kernel, stride, padding):
    """onnx's reference gives other lengths for a padded maximum at stride 1, and other means at the far border."""
    x = normal(2, 3, length, length)
    given = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [padding] * 4, "ceil_mode": 1}
    expected = F.max_pool2d(torch.from_numpy(x), kernel, stride, padding, ceil_mode=True)
    np.testing.assert_array_equal(run(single("MaxPool", {"x": x}, ["y"], **given), {"x": x}), expected.numpy())
    for counts in (0, 1):
        model = single("AveragePool", {"x": x}, ["y"], **given, count_include_pad=counts)
        expected = F.avg_pool2d(torch.from_numpy(x), kernel, stride, padding, True, bool(counts))
        close(run(model, {"x": x}), expected.numpy(), kernel**2)


def test_a_maximum_below_zero_is_not_the_padding():
    x = -1 - np.abs(normal(1, 1, 4, 4))
    model = single("MaxPool", {"x": x}, ["y"], kernel_shape=[3, 3], pads=[1] * 4)
    np.testing.assert_array_equal(run(model, {"x": x}), F.max_pool2d(torch.from_numpy(x), 3, 1, 1).numpy())


def test_indices_of_a_maximum_come_from_onnx_itself():
    x = normal(1, 1, 4, 4)
    node = helper.make_node("MaxPool", ["x"], ["y", "i"], kernel_shape=[2, 2], strides=[2, 2])
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.DOUBLE, [1, 1, 4, 4])],
        [
            helper.make_tensor_value_info("y", TensorProto.DOUBLE, None),
            helper.make_tensor_value_info("i", TensorProto.INT64, None),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    found = Float64Graph(model).run({"x": x})
    np.testing.assert_array_equal(x.ravel()[found["i"].ravel()], found["y"].ravel())


def test_dequantising_keeps_what_float32_would_lose():
    x, scale = np.array([127, -128], np.int8), np.array(1 / 3)
    model = single("DequantizeLinear", {"x": x, "s": scale, "z": np.array(3, np.int8)}, ["y"])
    got = run(model, {"x": x, "s": scale, "z": np.array(3, np.int8)})
    np.testing.assert_array_equal(got, np.array([124, -131]) * (1 / 3))
    large = {"x": np.array([2**24 + 1], np.int32), "s": np.array(1.0)}
    assert run(single("DequantizeLinear", large, ["y"]), large) == 2**24 + 1


FAST_OPERATORS_TESTED = {
    "Conv",
    "ConvTranspose",
    "MaxPool",
    "AveragePool",
    "DequantizeLinear",
    "Erf",
    "Gelu",
    "HardSwish",
    "GroupNormalization",
}
REPAIRED_OPERATORS_TESTED = {"BatchNormalization", "LRN", "MeanVarianceNormalization", "Resize", "Upsample"}
REPAIRED_OPERATORS_TESTED_OF_OLD = {"Softmax", "LogSoftmax", "Hardmax"}  # these and those in test_repaired.py


def test_every_replaced_operator_has_its_test():
    model = single("Relu", {"x": normal(1)}, ["y"])
    tested = FAST_OPERATORS_TESTED | REPAIRED_OPERATORS_TESTED
    assert {operator.__name__ for operator in operators.float64_operators(model)} == tested
    model.opset_import[0].version = 9
    tested |= REPAIRED_OPERATORS_TESTED_OF_OLD
    assert {operator.__name__ for operator in operators.float64_operators(model)} == tested


X = normal(2, 4, 6, 6)
EPS = float(np.float32(1e-5))  # ONNX stores the attribute as float32
OTHERS = [
    ("Softmax", [X], {"axis": 1}, lambda x: F.softmax(x, 1)),
    ("LogSoftmax", [X], {"axis": -1}, lambda x: F.log_softmax(x, -1)),
    ("Erf", [X], {}, torch.erf),
    ("Gelu", [X], {}, F.gelu),
    ("Gelu", [X], {"approximate": "tanh"}, lambda x: F.gelu(x, approximate="tanh")),
    ("Mish", [X], {}, F.mish),
    ("Swish", [X], {"alpha": 1.0}, F.silu),
    ("Softplus", [X], {}, F.softplus),
    ("LpNormalization", [X], {"axis": 1}, lambda x: F.normalize(x, dim=1)),
    (
        "BatchNormalization",
        [X, normal(4), normal(4, seed=1), normal(4, seed=2), normal(4, seed=3) ** 2],
        {},
        lambda x, w, b, m, v: F.batch_norm(x, m, v, w, b, eps=EPS),
    ),
    ("Sigmoid", [X], {}, torch.sigmoid),
    ("Tanh", [X], {}, torch.tanh),
    ("HardSwish", [X], {}, F.hardswish),
    ("Einsum", [normal(2, 3), normal(3, 4)], {"equation": "ij,jk->ik"}, lambda a, b: a @ b),
    ("MatMul", [normal(2, 3, 4), normal(2, 4, 5)], {}, torch.matmul),
    ("LayerNormalization", [X, normal(6), normal(6, seed=1)], {}, lambda x, w, b: F.layer_norm(x, (6,), w, b, EPS)),
    ("RMSNormalization", [X, normal(6)], {}, lambda x, w: F.rms_norm(x, (6,), w, EPS)),
    (
        "InstanceNormalization",
        [X, normal(4), normal(4, seed=1)],
        {},
        lambda x, w, b: F.instance_norm(x, weight=w, bias=b, eps=EPS),
    ),
    (
        "GroupNormalization",
        [X, normal(4), normal(4, seed=1)],
        {"num_groups": 2},
        lambda x, w, b: F.group_norm(x, 2, w, b, EPS),
    ),
    ("GlobalAveragePool", [X], {}, lambda x: x.mean((2, 3), keepdim=True)),
    ("ReduceMean", [X], {"keepdims": 0}, lambda x: x.mean()),
]


@pytest.mark.parametrize(("op", "inputs", "attributes", "expected"), OTHERS, ids=[case[0] for case in OTHERS])
def test_operators_left_to_onnx_are_float64(op, inputs, attributes, expected):
    feeds = {f"i{index}": value for index, value in enumerate(inputs)}
    got = run(single(op, feeds, ["y"], opset=24, **attributes), feeds)
    # Float64 throughout: some tens of roundings (144 terms in the longest sum) of values up to 25. A float32 step
    # inside would leave 2^-24.
    np.testing.assert_allclose(got, expected(*map(torch.from_numpy, inputs)).numpy(), rtol=0, atol=dot_error(144, 25.0))


def test_declared_halves_are_evaluated_wide():
    w, x = np.array([[1 / 3]], np.float16), np.array([[0.1]])
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
        helper.make_node("MatMul", ["h", "w"], ["m"]),
        helper.make_node("Constant", [], ["c"], value_float=0.25),
        helper.make_node("Cast", ["c"], ["ch"], to=TensorProto.FLOAT16),
        helper.make_node("Add", ["m", "ch"], ["a"]),
        helper.make_node("Cast", ["a"], ["y"], to=TensorProto.FLOAT),
    ]
    model = graph_of(nodes, {"x": ["n", 1]}, {"y": ["n", 1]})
    model.graph.initializer.append(numpy_helper.from_array(w, "w"))
    before = model.SerializeToString()
    assert run(model, {"x": x}) == 0.1 * float(w[0, 0]) + 0.25
    assert model.SerializeToString() == before


def test_bfloat16_weights_are_read():
    model = graph_of([helper.make_node("Cast", ["w"], ["y"], to=TensorProto.FLOAT)], {}, {"y": [2]})
    model.graph.initializer.append(helper.make_tensor("w", TensorProto.BFLOAT16, [2], [1.0, -0.5]))
    np.testing.assert_array_equal(run(model, {}), [1.0, -0.5])


def test_constants_of_a_shape_are_wide():
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"]),
        helper.make_node("Add", ["zeros", "x"], ["y"]),
    ]
    model = graph_of(nodes, {"x": [2]}, {"y": [2]}, {"shape": np.array([2])})
    np.testing.assert_array_equal(run(model, {"x": np.array([1 / 3, 0.1])}), [1 / 3, 0.1])


def visited(model, feeds):
    seen = []

    def visit(name, kind, value, terms):
        seen.append((name, kind, terms))
        return value

    Float64Graph(model).run(feeds, visit)
    return seen


def test_a_visitor_sees_each_stored_value_and_may_replace_it():
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Mul", ["r", "two"], ["y"]),
    ]
    weights = {"w": normal(2, 3, 2, 2), "two": np.array(2.0)}
    model = graph_of(nodes, {"x": ["n", 3, 4, 4]}, {"y": ["n", 2, 3, 3]}, weights)
    x = normal(1, 3, 4, 4)
    assert visited(model, {"x": x}) == [
        ("x", "input", 0),
        ("w", "weight", 0),
        ("c", "node", 12),
        ("r", "node", 0),
        ("two", "weight", 0),
        ("y", "node", 1),
    ]
    got = Float64Graph(model).run({"x": x}, lambda name, kind, value, terms: value + (name == "r"))
    np.testing.assert_array_equal(got["y"], 2 * (np.maximum(conv_of(x, weights["w"]), 0) + 1))


def conv_of(x, w):
    return run(single("Conv", {"x": x, "w": np.float32(w).astype(np.float64)}, ["y"]), {"x": x, "w": np.float32(w)})


TERMS = [
    ("ConvTranspose", [(1, 4, 5, 5), (4, 3, 2, 2)], {"group": 2}, 2 * 4),
    ("Gemm", [(2, 7), (5, 7)], {"transB": 1}, 7),
    ("Gemm", [(7, 2), (7, 5)], {"transA": 1}, 7),
    ("MatMul", [(2, 7), (7, 5)], {}, 7),
    ("AveragePool", [(1, 1, 4, 4)], {"kernel_shape": [2, 3]}, 6),
    ("GlobalAveragePool", [(1, 1, 4, 4)], {}, 16),
    ("Softmax", [(2, 9)], {"axis": 1}, 9),
    ("ReduceMean", [(2, 9)], {"keepdims": 1}, 18),
    ("ReduceMax", [(2, 9)], {"keepdims": 1}, 0),
    ("LayerNormalization", [(2, 3, 4), (4,)], {}, 4),
    ("GroupNormalization", [(1, 4, 3), (4,), (4,)], {"num_groups": 2}, 6),
    ("Einsum", [(2, 3), (3, 4)], {"equation": "ij,jk->ik"}, 3),
    ("Sum", [(2,), (2,), (2,)], {}, 3),
    ("Add", [(2,), (2,)], {}, 1),
    ("Transpose", [(2, 3)], {}, 0),
]


@pytest.mark.parametrize(("op", "shapes", "attributes", "terms"), TERMS, ids=[f"{c[0]}-{c[3]}" for c in TERMS])
def test_reductions_say_how_long_they_are(op, shapes, attributes, terms):
    feeds = {f"i{index}": normal(*shape) for index, shape in enumerate(shapes)}
    assert visited(single(op, feeds, ["y"], opset=21, **attributes), feeds)[-1] == ("y", "node", terms)


def test_values_that_decide_sizes_are_not_visited():
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Cast", ["s"], ["sf"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["sf", "growth"], ["wanted"]),
        helper.make_node("Cast", ["wanted"], ["wi"], to=TensorProto.INT64),
        helper.make_node("Resize", ["x", "", "", "wi"], ["r"], mode="nearest"),
        helper.make_node("Resize", ["r", "", "scales"], ["q"], mode="nearest"),
        helper.make_node("Mul", ["q", "gain"], ["y"]),
    ]
    weights = {
        "growth": np.array([1.0, 1.0, 2.0, 2.0]),
        "scales": np.array([1.0, 1.0, 2.0, 2.0]),
        "gain": np.array([0.3]),
    }
    model = graph_of(nodes, {"x": [1, 1, 2, 2]}, {"y": [None] * 4}, weights)
    seen = {name for name, _, _ in visited(model, {"x": normal(1, 1, 2, 2)})}
    assert seen == {"x", "gain", "r", "q", "y"}


def test_functions_are_seen_through():
    function = helper.make_function(
        "local", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 20)]
    )
    model = graph_of(
        [helper.make_node("Twice", ["x"], ["y"], domain="local")], {"x": [2]}, {"y": [2]}, functions=[function]
    )
    model.opset_import.append(helper.make_opsetid("local", 1))
    assert visited(model, {"x": normal(2)})[-1] == ("y", "node", 1)


def test_branches_run_with_the_values_around_them():
    value = helper.make_tensor_value_info
    branches = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node(op, ["x", "h"], ["o"])], name, [], [value("o", TensorProto.FLOAT, [2])]
        )
        for name, op in (("then", "Add"), ("else", "Sub"))
    }
    nodes = [helper.make_node("Mul", ["x", "x"], ["h"]), helper.make_node("If", ["yes"], ["y"], **branches)]
    model = graph_of(nodes, {"x": [2]}, {"y": [2]}, {"yes": np.array(True)})
    x = normal(2)
    np.testing.assert_array_equal(run(model, {"x": x}), x + x * x)


@pytest.mark.parametrize("op", ["RandomNormalLike", "Bernoulli"])
def test_random_graphs_are_refused(op):
    with pytest.raises(UnsupportedError, match="draws random numbers"):
        Float64Graph(single(op, {"x": normal(2)}, ["y"]))


def test_operators_without_float64_are_refused():
    with pytest.raises(UnsupportedError, match=r"GridSample.*cannot be evaluated in float64"):
        Float64Graph(single("GridSample", {"x": normal(1, 1, 2, 2), "g": normal(1, 2, 2, 2)}, ["y"]))


def test_an_unknown_operator_is_one_line():
    node = helper.make_node("Magic", ["x"], ["y"], domain="nowhere")
    model = graph_of([node], {"x": [2]}, {"y": [2]})
    model.opset_import.append(helper.make_opsetid("nowhere", 1))
    with pytest.raises(UnsupportedError, match="Magic"):
        Float64Graph(model)


def test_a_failing_node_is_named():
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="head")
    model = graph_of([node], {"x": ["n", "k"]}, {"y": ["n", 2]}, {"w": normal(3, 2)})
    with pytest.raises(UnsupportedError, match=r"node 'head' \(MatMul\) cannot be evaluated"):
        run(model, {"x": normal(1, 4)})


FEEDS = [
    ({}, "missing: x, unknown: none"),
    ({"x": normal(2, 3), "z": normal(1)}, "missing: none, unknown: z"),
    ({"x": normal(2, 4)}, r"has shape \(2, 4\); the model takes \(n, 3\)"),
    ({"x": normal(3)}, r"has shape \(3,\)"),
    ({"x": np.array([["a", "b", "c"]])}, "holds <U1; the model takes float32"),
]


@pytest.mark.parametrize(("feeds", "message"), FEEDS)
def test_feeds_that_do_not_fit_are_refused(feeds, message):
    model = graph_of([helper.make_node("Relu", ["x"], ["y"])], {"x": ["n", 3]}, {"y": ["n", 3]})
    with pytest.raises(DataError, match=message):
        run(model, feeds)


def test_specs_name_the_batch_axis():
    graph = Float64Graph(graph_of([helper.make_node("Relu", ["x"], ["y"])], {"x": ["n", 3]}, {"y": [None, 3]}))
    assert graph.inputs[0].shape == ("n", 3)
    assert (graph.inputs[0].dtype, graph.batch_axis, graph.outputs[0].batch_axis) == ("float32", 0, 0)
    assert Float64Graph(graph_of([helper.make_node("Relu", ["x"], ["y"])], {"x": [2]}, {"y": [2]})).batch_axis is None


def saved(tmp_path, location=None):
    model = graph_of([helper.make_node("Add", ["x", "w"], ["y"])], {"x": [4]}, {"y": [4]}, {"w": normal(4)})
    path = tmp_path / "m.onnx"
    external = {"save_as_external_data": True, "location": "w.data", "size_threshold": 0} if location else {}
    onnx.save(model, path, **external)
    if location and location != "w.data":
        stored = onnx.load(path, load_external_data=False)
        stored.graph.initializer[0].external_data[0].value = location
        path.write_bytes(stored.SerializeToString())
    return path


def test_weights_beside_the_file_are_loaded(tmp_path):
    model = load_onnx(saved(tmp_path, "w.data"))
    np.testing.assert_array_equal(numpy_helper.to_array(model.graph.initializer[0]), normal(4).astype(np.float32))


@pytest.mark.parametrize("location", ["../w.data", "/etc/hostname", "sub/../../w.data"])
def test_weights_outside_the_folder_are_refused(tmp_path, location):
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "w.data").write_bytes(bytes(16))
    with pytest.raises(ArtifactError, match="outside the model's folder"):
        load_onnx(saved(folder, location))


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    path = saved(folder, "w.data")
    (folder / "w.data").rename(tmp_path / "elsewhere")
    (folder / "w.data").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="outside the model's folder"):
        load_onnx(path)


def test_missing_and_truncated_weights_are_named(tmp_path):
    path = saved(tmp_path, "w.data")
    (tmp_path / "w.data").write_bytes(bytes(3))
    with pytest.raises(ArtifactError, match="truncated: the weight 'w' ends at byte 16, the file at 3"):
        load_onnx(path)
    (tmp_path / "w.data").unlink()
    with pytest.raises(ArtifactError, match="which is not there"):
        load_onnx(path)


def test_files_that_are_no_models_are_one_line(tmp_path):
    path = saved(tmp_path)
    whole = path.read_bytes()
    with pytest.raises(ArtifactError, match="there is no such file"):
        load_onnx(tmp_path / "none.onnx")
    with pytest.raises(ArtifactError, match="cannot be read"):
        load_onnx(tmp_path)
    for content in (b"", whole[: len(whole) // 2], b"\x00" * 64, b"not a model at all"):
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match=r"not an ONNX model|holds no ONNX graph") as caught:
            load_onnx(path)
        assert "\n" not in str(caught.value)


def test_cycles_and_unknown_operators_are_named(tmp_path):
    path = tmp_path / "m.onnx"
    nodes = [helper.make_node("Add", ["x", "b"], ["a"], name="first"), helper.make_node("Relu", ["a"], ["b"])]
    path.write_bytes(graph_of(nodes, {"x": [2]}, {"b": [2]}).SerializeToString())
    with pytest.raises(ArtifactError, match="node 'first' reads 'b', which nothing before it defines"):
        load_onnx(path)
    path.write_bytes(graph_of(nodes[:0], {"x": [2]}, {"b": [2]}).SerializeToString())
    with pytest.raises(ArtifactError, match="nothing computes the output 'b'"):
        load_onnx(path)
    path.write_bytes(graph_of([helper.make_node("Magic", ["x"], ["b"])], {"x": [2]}, {"b": [2]}).SerializeToString())
    with pytest.raises(ArtifactError, match="breaks the rules of ONNX: No Op registered for Magic"):
        load_onnx(path)
