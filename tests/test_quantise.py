"""int8: scales, evidence, a noise floor of its own, and defects that it finds."""

import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from architectures import ARCHITECTURES, example
from architectures import randomise as scaled_weights
from fold_cases import randomise
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from lowprec.errors import ConfigError, DataError, MissingDependencyError, UnsupportedError
from lowprec.export import compare, export, verify
from lowprec.export.emit import emit_onnx, quantise
from lowprec.export.emit.keep import DEFAULT_KEEP, keep_list
from lowprec.export.float64 import Float64Graph
from lowprec.export.folding import fold
from lowprec.export.onnx_files import module_path
from lowprec.export.parity import judge, noise_floor, worst
from lowprec.export.parity.floor import RoundingDraw
from lowprec.export.parity.storage import Storage
from lowprec.export.storage import storage_of
from lowprec.formats import FP16, FP32


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=2)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        h = F.max_pool2d(F.relu(self.norm(self.stem(x))), 2)
        return self.head(F.relu(self.body(h)).mean((2, 3)))


def samples(count=64, seed=0):
    return np.random.default_rng(seed).normal(size=(count, 3, 8, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The float32 model, its file, and the int8 one."""
    torch.manual_seed(0)
    model = emit_onnx(fold(randomise(Small().eval()), (torch.randn(2, 3, 8, 8),))[0])
    path = tmp_path_factory.mktemp("int8") / "model.onnx"
    onnx.save(model, path)
    return model, path, quantise.quantise(path, {"x": samples()}, DEFAULT_KEEP)[0]


def tensors(model):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def verdict(model, int8, feeds):
    """The verdict over int8 outputs in float64, and rho."""
    graph = Float64Graph(model)
    floor = noise_floor(graph, feeds, storage_of(int8))
    checks = judge(graph.run(feeds), Float64Graph(int8).run(feeds), floor)
    rho = next(check.value for check in checks if check.name.startswith("rho:"))
    return worst([check.verdict for check in checks]), rho


def test_scales_are_symmetric_and_the_largest_magnitude_over_127(small):
    model, _, int8 = small
    wide, stored = tensors(model), tensors(int8)
    for name in ("stem.weight", "body.weight", "head.weight"):
        largest = np.abs(wide[name]).reshape(len(wide[name]), -1).max(1)
        # onnxruntime divides by 127 in float32: two roundings.
        np.testing.assert_allclose(stored[f"{name}_scale"], largest / 127, rtol=2 * 2.0**-24)
        rounded = np.rint(wide[name] / stored[f"{name}_scale"].reshape(-1, *[1] * (wide[name].ndim - 1)))
        assert np.abs(stored[f"{name}_quantized"] - rounded).max() <= 1  # ties
    np.testing.assert_allclose(stored["x_scale"], np.abs(samples()).max() / 127, rtol=2 * 2.0**-24)
    assert all((value == 0).all() for name, value in stored.items() if name.endswith("_zero_point"))
    assert {tensor.data_type for tensor in int8.graph.initializer if "bias" in tensor.name} == {TensorProto.FLOAT}


def test_the_same_bytes_twice_names_and_module_paths_stay(small):
    model, path, int8 = small
    again, report = quantise.quantise(path, {"x": samples()}, DEFAULT_KEEP)
    assert again.SerializeToString() == int8.SerializeToString()
    assert [path for path in map(module_path, int8.graph.node) if path] == [
        path for path in map(module_path, model.graph.node) if path
    ]
    assert int8.producer_name == "lowprec"
    assert not int8.metadata_props
    assert report.facts["samples"] == 64
    assert sorted(path.parent.iterdir()) == [path]


def test_what_is_kept_is_not_quantised(small):
    _, path, _ = small
    int8, report = quantise.quantise(path, {"x": samples()}, keep_list(["module:head"]))
    assert [row.name for row in report.refused] == ["head"]
    assert "head.weight" in tensors(int8)
    assert "head.weight_quantized" not in tensors(int8)


def test_without_onnxruntime_it_says_what_to_install(small, monkeypatch):
    monkeypatch.setattr(quantise, "is_installed", lambda name: False)
    with pytest.raises(MissingDependencyError, match=r"pip install lowprec\[cpu\]"):
        quantise.quantise(small[1], {"x": samples()}, DEFAULT_KEEP)


def test_what_cannot_be_quantised_is_one_line(small):
    with pytest.raises(UnsupportedError, match="onnxruntime cannot quantise this model") as caught:
        quantise.quantise(small[1], {"x": samples()[:, :2]}, DEFAULT_KEEP)
    assert "\n" not in str(caught.value)


# --- the floor ------------------------------------------------------------------------------------------------------
def test_a_draw_moves_a_quantised_value_by_half_a_step_at_most():
    storage = Storage("int8", FP32, steps={"v": np.array(0.5)})
    value = np.random.default_rng(0).normal(size=4000)
    value[:10] = 0.0
    moved = RoundingDraw(storage, FP32, 0, 0, 0)("v", "node", value, 1) - value
    assert np.abs(moved).max() <= 0.25
    assert (moved[:10] == 0).all()
    # Uniform: rms is s / sqrt(12), the rms of n squares within 4 / sqrt(n).
    assert np.sqrt(np.mean(moved[10:] ** 2)) == pytest.approx(0.5 / np.sqrt(12), rel=4 / np.sqrt(4000))
    assert RoundingDraw(storage, FP32, 0, 0, 0)("v", "input", np.array([1.5, 2.0]), 0).tolist() == [1.5, 2.0]
    others = RoundingDraw(storage, FP32, 0, 0, 0)("w", "node", value, 1) - value
    assert 0 < np.abs(others).max() <= 2 * 2.0**-24 * np.abs(value).max()


def test_mixed_storage_moves_wide_values_as_float32_does():
    storage = Storage("mixed", FP16, wide=frozenset({"w"}))
    value = np.random.default_rng(0).normal(size=400)
    for name, fmt in (("v", FP16), ("w", FP32)):
        mixed, plain = (RoundingDraw(s, FP32, 0, 0, 0)(name, "node", value, 1) for s in (storage, fmt))
        assert np.array_equal(mixed, plain)


def test_storage_is_read_from_the_model(small):
    _, _, int8 = small
    stored, scales = storage_of(int8), tensors(int8)
    assert (stored.name, stored.format) == ("int8", FP32)
    assert {"x", "conv2d", "stem.weight", "output"} <= set(stored.steps)
    assert stored.steps["body.weight"].shape == (8, 1, 1, 1)
    assert stored.steps["x"] == scales["x_scale"]
    assert "max_pool2d" not in stored.steps  # it selects from what is stored in these very steps


def test_a_scale_that_is_computed_is_refused():
    nodes = [
        helper.make_node("Abs", ["s"], ["t"]),
        helper.make_node("QuantizeLinear", ["x", "t"], ["q"], name="quantise"),
        helper.make_node("DequantizeLinear", ["q", "t"], ["y"]),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in ("x", "y")]
    graph = helper.make_graph(
        nodes, "g", values[:1], values[1:], [numpy_helper.from_array(np.array(0.5, np.float32), "s")]
    )
    with pytest.raises(UnsupportedError, match=r"node 'quantise' .* has a scale that is computed"):
        storage_of(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))


def test_a_right_int8_model_is_at_its_floor(small):
    model, _, int8 = small
    found, rho = verdict(model, int8, {"x": samples()})
    assert found == "pass"
    assert 0.3 <= rho <= 2.0  # a draw is as large as the errors it stands for


@pytest.mark.parametrize("name", ["resnet_basic", "mobilenet_v2", "densenet", "bn_transformer", "ecapa", "unet"])
def test_right_int8_architectures_pass(name, tmp_path):
    architecture = ARCHITECTURES[name]
    network = scaled_weights(architecture.make(1).eval(), "positive", seed=3)
    model = emit_onnx(fold(network, (example(architecture, batch=2),))[0])
    onnx.save(model, tmp_path / "model.onnx")
    (spec,) = Float64Graph(model).inputs
    feeds = {spec.name: example(architecture, batch=32, seed=5).numpy()}
    int8, _ = quantise.quantise(tmp_path / "model.onnx", feeds, DEFAULT_KEEP)
    found, rho = verdict(model, int8, feeds)
    assert found in ("pass", "warn")
    # 28 right models (14 architectures, two kinds of weights) are from 0.79 to 1.47; the floor's own 6 draws, whose
    # errors are not independent over an output, leave it a factor of two.
    assert 0.5 <= rho <= 2.0


def scaled(int8, name, change):
    """A copy with one constant changed."""
    damaged = onnx.ModelProto.FromString(int8.SerializeToString())
    tensor = next(tensor for tensor in damaged.graph.initializer if tensor.name == name)
    values = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(change(values)).astype(values.dtype), name))
    return damaged


DEFECTS = {
    "an activation's scale": ("relu_scale", lambda scale: scale * 0.5),
    "a weight's scale": ("body.weight_scale", lambda scale: scale * 1.5),
    "scales of other channels": ("stem.weight_scale", lambda scale: scale[::-1]),
    "a transposed kernel": ("stem.weight_quantized", lambda weight: weight.swapaxes(2, 3)),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_defects_of_int8_models_are_found(small, name):
    """Judged at the floor of the right model, as a bundle does."""
    model, _, int8 = small
    feeds = {"x": samples()}
    graph = Float64Graph(model)
    floor = noise_floor(graph, feeds, storage_of(int8))
    outputs = Float64Graph(scaled(int8, *DEFECTS[name])).run(feeds)
    assert worst([check.verdict for check in judge(graph.run(feeds), outputs, floor)]) == "fail"


def test_swapped_outputs_are_found():
    """Of two heads of one shape; nothing in names or types tells them apart."""

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.left, self.right = nn.Conv2d(3, 8, 3), nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x):
            h = F.relu(self.body(x)).mean((2, 3))
            return self.left(h), self.right(h)

    torch.manual_seed(0)
    model = emit_onnx(fold(Heads().eval(), (torch.randn(2, 3, 8, 8),))[0])
    with tempfile.TemporaryDirectory() as folder:
        onnx.save(model, f"{folder}/m.onnx")
        int8, _ = quantise.quantise(Path(folder, "m.onnx"), {"x": samples()}, DEFAULT_KEEP)
    graph = Float64Graph(model)
    floor = noise_floor(graph, {"x": samples()}, storage_of(int8))
    right = Float64Graph(int8).run({"x": samples()})
    swapped = dict(zip(right, reversed(right.values()), strict=True))
    reference = graph.run({"x": samples()})
    assert worst([check.verdict for check in judge(reference, right, floor)]) in ("pass", "warn")
    assert worst([check.verdict for check in judge(reference, swapped, floor)]) == "fail"


def test_samples_that_give_no_scale_are_refused(small):
    _, path, _ = small
    broken = samples()
    broken[3, 0, 0, 0] = np.inf
    for feeds, words in ((broken, "are not all finite"), (0 * samples(), "are 0 throughout")):
        with pytest.raises(DataError, match=f"those of input 'x' {words}"):
            quantise.quantise(path, {"x": feeds}, DEFAULT_KEEP)


def test_a_fixed_batch_is_calibrated_on_whole_ones(small, tmp_path):
    fixed = onnx.ModelProto.FromString(small[0].SerializeToString())
    for value in (*fixed.graph.input, *fixed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 4
    del fixed.graph.value_info[:]
    path = tmp_path / "fixed.onnx"
    onnx.save(fixed, path)
    feeds = samples(6)
    feeds[4:] *= 100  # left out
    scale = tensors(quantise.quantise(path, {"x": feeds}, DEFAULT_KEEP)[0])["x_scale"]
    np.testing.assert_allclose(scale, np.abs(feeds[:4]).max() / 127, rtol=2 * 2.0**-24)
    with pytest.raises(DataError, match="takes 4 samples at a time, and there are 3"):
        quantise.quantise(path, {"x": samples(3)}, DEFAULT_KEEP)


def test_int8_of_a_file_needs_samples(small, tmp_path):
    with pytest.raises(ConfigError, match=r"asked for int8, .* give some with --calibration DATA"):
        export(small[1], None, tmp_path / "b", precision=["fp16", "int8"])
    assert not list(tmp_path.iterdir())


def test_an_int8_bundle_is_made_verified_and_compared(tmp_path):
    torch.manual_seed(0)
    network = randomise(Small().eval())
    bundle = export(network, (torch.from_numpy(samples()),), tmp_path / "b", precision=["mixed", "int8"])
    assert bundle.parity.passed, bundle.parity.failure()
    assert set(bundle.record("calibration.json")["wide"]) == {"mixed", "int8"}
    np.savez(tmp_path / "data.npz", x=samples(seed=3))
    report = verify(tmp_path / "b", backends=["onnxruntime"], data=str(tmp_path / "data.npz"))
    arithmetic = {stage.name: stage.arithmetic for stage in report.stages}
    assert "int8 storage on the CPU (products:" in arithmetic["int8 on onnxruntime"]
    stages = {stage.name: stage for stage in report.stages}
    assert stages["int8 on onnxruntime"].verdict in ("pass", "warn")
    same = compare(tmp_path / "b" / "model.onnx", tmp_path / "b" / "model.int8.onnx", str(tmp_path / "data.npz"))
    assert same.facts["precision"] == "int8"
