import importlib.util

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from reference_parity import cnn, digits, graph_of, half_typed, trained_weights

from lowprec.errors import (
    ArtifactError,
    ConfigError,
    DataError,
    MissingDependencyError,
    NoKernelError,
    UnsupportedError,
)
from lowprec.export.backends import BACKENDS, arithmetic, backend_named, ort
from lowprec.export.backends.eager import forward_names, named_outputs
from lowprec.export.emit.keep import DEFAULT_KEEP
from lowprec.export.emit.narrowing import Narrowing
from lowprec.export.emit.quantise import quantise
from lowprec.export.float64 import Float64Graph
from lowprec.export.golden import Golden
from lowprec.export.parity import Limits, judge, noise_floor, worst
from lowprec.export.stages import Artefact, run_stages
from lowprec.formats import BF16, FP32

torch = pytest.importorskip("torch")
needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")


@pytest.fixture(scope="module")
def weights():
    return trained_weights(width=8)


@pytest.fixture(scope="module")
def files(weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    onnx.save(cnn(weights), folder / "fp32.onnx")
    onnx.save(half_typed(cnn(weights)), folder / "fp16.onnx")
    return folder


class Twin(torch.nn.Module):
    """The network of `cnn` in torch."""

    def __init__(self, weights):
        super().__init__()
        width = len(weights["b1"])
        self.conv1, self.conv2 = torch.nn.Conv2d(1, width, 3, padding=1), torch.nn.Conv2d(width, width, 3, padding=1)
        self.linear = torch.nn.Linear(4 * width, 10)
        for layer, index in ((self.conv1, 1), (self.conv2, 2), (self.linear, 3)):
            layer.weight.data.copy_(torch.from_numpy(weights[f"w{index}"]))
            layer.bias.data.copy_(torch.from_numpy(weights[f"b{index}"]))

    def forward(self, x):
        r = self.conv1(x).relu()
        s = (self.conv2(r) + r).relu()
        return self.linear(torch.nn.functional.avg_pool2d(s, 4).flatten(1))


# --- the contract: every backend ------------------------------------------------------------------------------------
# What each backend is opened on; None where nothing can be run without a device.
ARTEFACTS = {
    "torch": lambda files, weights: Twin(weights).eval(),
    "reference": lambda files, weights: files / "fp32.onnx",
    "onnxruntime": lambda files, weights: str(files / "fp32.onnx"),
    "onnxruntime-cuda": lambda files, weights: files / "fp32.onnx",
    "onnxruntime-tensorrt": lambda files, weights: files / "fp32.onnx",
    "openvino": lambda files, weights: files / "fp32.onnx",
    "tensorrt-rtx": None,
    "tensorrt": None,
}


def test_every_backend_has_its_case():
    assert set(ARTEFACTS) == set(BACKENDS)


@pytest.mark.parametrize("name", BACKENDS)
def test_backends_describe_themselves(name):
    backend = BACKENDS[name]
    assert backend.name == name
    assert backend.summary
    assert all(suffix.startswith(".") for suffix in backend.suffixes)
    for answer in (backend.unavailable(), backend.cannot_run()):
        assert answer is None or (answer and "\n" not in answer)


@pytest.mark.parametrize("name", BACKENDS)
def test_backends_refuse_other_kinds_of_artefact(name, tmp_path):
    for artefact in (tmp_path / "notes.txt", 3.5):
        assert not BACKENDS[name].accepts(artefact)
        with pytest.raises(ArtifactError, match=f"backend '{name}' cannot open"):
            BACKENDS[name].open(artefact)


@pytest.fixture(params=[name for name, make in ARTEFACTS.items() if make])
def session(request, files, weights):
    backend = BACKENDS[request.param]
    reason = backend.unavailable() or backend.cannot_run()
    if reason:
        pytest.skip(reason)
    return backend.open(ARTEFACTS[request.param](files, weights))


def test_backends_agree_with_the_truth_to_their_rounding(session, weights):
    feeds = {"x": digits()[0][:64]}
    graph = Float64Graph(cnn(weights))
    outputs = session.run(feeds)
    assert all(isinstance(value, np.ndarray) for value in outputs.values())
    checks = judge(graph.run(feeds), outputs, noise_floor(graph, feeds, FP32))
    assert worst([check.verdict for check in checks]) == "pass"


def test_backends_say_what_they_take_and_how_they_compute(session):
    assert [spec.name for spec in session.inputs] == ["x"]
    assert session.inputs[0].dtype == "float32"
    assert session.arithmetic


def test_backends_refuse_feeds_that_do_not_fit(session):
    with pytest.raises(DataError, match="missing: x"):
        session.run({})
    with pytest.raises(DataError, match="unknown: z"):
        session.run({"x": np.zeros((1, 1, 8, 8)), "z": np.zeros(1)})


def test_backends_take_floats_of_any_width(session):
    images = digits()[0][:3]
    narrow, wide = (next(iter(session.run({"x": x}).values())) for x in (images, images.astype(np.float64)))
    np.testing.assert_array_equal(narrow, wide)


@pytest.mark.parametrize("name", ["reference", "onnxruntime", "openvino"])
def test_missing_and_damaged_files_are_one_line(name, tmp_path):
    with pytest.raises(ArtifactError, match="there is no such file"):
        BACKENDS[name].open(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    with pytest.raises(ArtifactError, match=r"not an ONNX model|no ONNX graph"):
        BACKENDS[name].open(tmp_path / "bad.onnx")


def test_an_unknown_backend_lists_the_valid_ones_and_the_nearest():
    with pytest.raises(ConfigError, match=r"did you mean 'onnxruntime'. choose one of torch, reference, onnxruntime"):
        backend_named("onnxruntim")
    assert backend_named("reference") is BACKENDS["reference"]


# --- onnxruntime ----------------------------------------------------------------------------------------------------
def test_half_files_are_found_out_to_compute_in_single_precision(files):
    session = BACKENDS["onnxruntime"].open(files / "fp16.onnx")
    assert session.arithmetic == (
        "float16 storage, float32 arithmetic between casts, on the CPU (products: 3 in float)"
    )


def test_types_of_products_are_read_and_not_assumed():
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "r"], ["m"]),
        helper.make_node("Cast", ["m"], ["w"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["w", "w"], ["y"]),
    ]
    model = graph_of(nodes, {"x": [2, 2]}, {"y": [2, 2]})
    computed = arithmetic.product_types(model)
    assert computed == {"float16": 1, "float": 1}
    assert arithmetic.half_types(model) == {"float16"}
    text = arithmetic.describe({"float16"}, computed)
    assert text == "float16 storage on the CPU (products: 1 in float, 1 in float16)"
    assert "no convolution" in arithmetic.describe({"bfloat16"}, arithmetic.product_types(graph_of([], {}, {})))
    assert arithmetic.half_types(graph_of([], {}, {})) == set()


def test_a_silent_fallback_is_a_failure():
    ort.check_providers("CPUExecutionProvider", ["CPUExecutionProvider"])
    with pytest.raises(MissingDependencyError, match="asked onnxruntime for CUDAExecutionProvider, found CPU"):
        ort.check_providers("CUDAExecutionProvider", ["CPUExecutionProvider"])


def test_what_onnxruntime_cannot_load_or_run_is_one_line():
    bad = graph_of([helper.make_node("Magic", ["x"], ["y"], domain="nowhere")], {"x": [2]}, {"y": [2]})
    bad.opset_import.append(helper.make_opsetid("nowhere", 1))
    with pytest.raises(UnsupportedError, match="onnxruntime cannot load this model") as caught:
        BACKENDS["onnxruntime"].open(bad)
    assert "\n" not in str(caught.value)
    shape = helper.make_node("Reshape", ["x", "s"], ["y"])
    model = graph_of([shape], {"x": ["n", 2]}, {"y": [3, 2]}, {"s": np.array([3, 2])})
    with pytest.raises(UnsupportedError, match="cannot run this model on this batch"):
        BACKENDS["onnxruntime"].open(model).run({"x": np.zeros((2, 2))})


# --- torch ----------------------------------------------------------------------------------------------------------
def test_a_module_in_training_mode_is_refused(weights):
    with pytest.raises(UnsupportedError, match=r"training mode.*model\.eval\(\)"):
        BACKENDS["torch"].open(Twin(weights))


def test_outputs_bear_the_names_of_an_export():
    a, b = torch.ones(2), torch.zeros(2)
    assert list(named_outputs(a)) == ["output"]
    assert list(named_outputs((a,))) == ["output"]
    assert list(named_outputs([a, b])) == ["output_0", "output_1"]
    assert list(named_outputs({"left": a, "right": b})) == ["left", "right"]
    assert named_outputs(a.bfloat16())["output"].dtype == np.float32
    with pytest.raises(UnsupportedError, match="output_1 is a str; only tensors"):
        named_outputs((a, "b"))


def test_inputs_bear_the_names_of_forward():
    class Two(torch.nn.Module):
        def forward(self, image, other, scale=1.0, *rest, flag=None, **more):
            return image * scale, other

    assert forward_names(Two()) == ["image", "other"]
    named = Two()
    named.input_names = ("a", "b")
    assert forward_names(named) == ["a", "b"]
    outputs = BACKENDS["torch"].open(Two().eval()).run({"other": np.array([2]), "image": np.array([1.0])})
    assert outputs["output_0"] == 1.0
    assert outputs["output_1"].dtype == np.int64


def test_a_module_that_knows_its_output_names_is_believed():
    class Named(torch.nn.Module):
        output_names = ("left", "right")

        def forward(self, x):
            return x, -x

    assert list(BACKENDS["torch"].open(Named().eval()).run({"x": np.ones(2)})) == ["left", "right"]


def test_modules_run_in_their_own_type(weights):
    module = Twin(weights).double().eval()
    images = digits()[0][:8]
    session = BACKENDS["torch"].open(module)
    assert "float64" in session.arithmetic
    before = {name: value.clone() for name, value in module.state_dict().items()}
    got = session.run({"x": images})["output"]
    assert got.dtype == np.float64
    truth = Float64Graph(cnn(weights)).run({"x": images})["scores"]
    # Scores of order 1 from sums of at most 72 terms, 4 layers deep: some hundreds of float64 roundings.
    np.testing.assert_allclose(got, truth, rtol=0, atol=1000 * 2.0**-53)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


# --- bfloat16 and int8 ----------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def typed(weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("typed")
    model = cnn(weights)
    onnx.save(model, folder / "fp32.onnx")
    for edges in (False, True):
        bf16, _ = Narrowing(narrow_io=edges).in_precision("bf16", model, folder, {}, None)
        onnx.save(bf16, folder / f"bf16-{edges}.onnx")
    onnx.save(quantise(folder / "fp32.onnx", {"x": digits()[0][:64]}, DEFAULT_KEEP)[0], folder / "int8.onnx")
    return folder


def test_a_backend_without_a_kernel_says_nothing_against_the_artefact(typed):
    with pytest.raises(NoKernelError, match="onnxruntime has no kernel for an operator of this model") as caught:
        BACKENDS["onnxruntime"].open(typed / "bf16-False.onnx")
    assert "\n" not in str(caught.value)
    graph = Float64Graph(onnx.load(typed / "fp32.onnx"))
    feeds = {"x": digits()[0][:8]}
    golden = Golden(feeds, graph.run(feeds), None, {"bf16": noise_floor(graph, feeds, BF16)})
    artefact = Artefact("model.bf16.onnx", typed / "bf16-False.onnx", "bf16")
    (stage,) = run_stages([artefact], golden, {"onnxruntime": BACKENDS["onnxruntime"]}, Limits())
    assert (stage.status, stage.verdict) == ("not available here", "info")


@pytest.mark.parametrize("edges", [False, True])
def test_openvino_computes_bfloat16(typed, edges):
    pytest.importorskip("openvino")
    session = BACKENDS["openvino"].open(typed / f"bf16-{edges}.onnx")
    assert "bfloat16 storage on the CPU (products: 3 in " in session.arithmetic
    graph = Float64Graph(onnx.load(typed / "fp32.onnx"))
    feeds = {"x": digits()[0][:32]}
    checks = judge(graph.run(feeds), session.run(feeds), noise_floor(graph, feeds, BF16))
    assert worst([check.verdict for check in checks]) in ("pass", "warn")


@pytest.mark.parametrize(("name", "products"), [("onnxruntime", "1 in float, 2 in int8"), ("openvino", "3 in int8")])
def test_int8_products_are_seen_for_what_they_are(typed, name, products):
    """onnxruntime fuses the convolutions and leaves the last product in float32, which nothing but its graph tells."""
    pytest.importorskip(name)
    assert BACKENDS[name].open(typed / "int8.onnx").arithmetic == f"int8 storage on the CPU (products: {products})"


# --- where nodes ran ------------------------------------------------------------------------------------------------
def test_placement_is_read_back(files):
    session = BACKENDS["onnxruntime"].open(files / "fp32.onnx")
    assert list(session.placement) == ["CPUExecutionProvider"]
    assert session.placement["CPUExecutionProvider"] > 3


def test_a_node_that_fell_to_the_cpu_is_named():
    cuda = "CUDAExecutionProvider"
    shapes = [(cuda, "conv", "Conv"), (ort.CPU, "g", "Gather"), (ort.CPU, "s", "Shape")]
    assert ort.checked_placement(cuda, shapes) == {cuda: 1, ort.CPU: 2}
    with pytest.raises(UnsupportedError, match=r"asked onnxruntime for CUDA.*placed mm \(MatMul\) on another provider"):
        ort.checked_placement(cuda, [*shapes, (ort.CPU, "mm", "MatMul")])


def test_what_an_onnxruntime_was_built_for_is_read():
    built = ["AzureExecutionProvider", "CPUExecutionProvider"]
    assert ort.missing_provider("CPUExecutionProvider", built, "cpu") is None
    reason = ort.missing_provider("CUDAExecutionProvider", built, "gpu")
    assert reason == (
        "this onnxruntime was built for Azure, CPU and lacks CUDAExecutionProvider; pip uninstall onnxruntime, then "
        "pip install lowprec[gpu]"
    )
