"""Weights that stay in a file: the same bundle as with weights in memory, whole or not at all.

The limits are lowered, so that a small network takes the way of one of several gigabytes; `tests/benchmarks/
large_model.py` does it with a large one.
"""

import json
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from fold_cases import randomise
from onnx import numpy_helper
from onnx.external_data_helper import uses_external_data
from torch import nn

from lowprec.errors import ArtifactError
from lowprec.export import export, external_data, onnx_files, torch_network, verify, weight_file
from lowprec.export.backends import BuildOptions
from lowprec.export.external_data import array_of, write_model
from lowprec.export.onnx_files import load_onnx
from lowprec.export.weight_file import ALIGNMENT, WeightFile


@pytest.fixture
def lowered(monkeypatch):
    """Whatever is in a file from here on is what would be large."""
    for module in (weight_file, external_data, onnx_files, torch_network):
        monkeypatch.setattr(module, "LARGE", 1000)
    for module in (weight_file, external_data, onnx_files):
        monkeypatch.setattr(module, "SMALLEST", 100)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)
    return randomise(nn.Sequential(*layers).eval())


ONE_GPU = BuildOptions(batch=(1, 4, 8), compute_capabilities=((8, 6),))
X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def test_a_weight_in_a_file_is_the_same_weight(tmp_path, lowered):
    file = WeightFile(tmp_path)
    chance = np.random.default_rng(0)
    first, small, second = chance.random((20, 9)), np.ones(3), chance.random((7, 5, 3), np.float32)
    kept = [file.add(array) for array in (first, small, second)]
    file.release()
    assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(kept, (first, small, second), strict=True))
    assert kept[1] is small
    assert file.find(kept[0]) == (0, first.nbytes)
    assert file.find(kept[2]) == (ALIGNMENT, second.nbytes)
    assert file.find(first) is None
    assert file.find(kept[0][:3]) is None  # begins at the same place and is another array
    kept[0][0, 0] = -1  # in memory alone
    assert np.fromfile(file.path, np.float64, first.size).reshape(first.shape)[0, 0] == first[0, 0]

    file.move_to(tmp_path / "weights")
    assert [path.name for path in tmp_path.iterdir()] == ["weights"]
    assert np.array_equal(kept[2], second)
    file.discard()
    assert not list(tmp_path.iterdir())
    assert np.array_equal(kept[2], second)


def test_a_large_network_is_exported_with_its_weights_beside_it(network, tmp_path, monkeypatch, request):
    asked = ("mixed", "int8", "fp16")
    export(network, (X,), tmp_path / "small", asked, ("onnx", "tensorrt-rtx"), build=ONE_GPU)
    request.getfixturevalue("lowered")
    bundle = export(network, (X,), tmp_path / "large", asked, ("onnx", "tensorrt-rtx"), build=ONE_GPU)

    assert {f"model.{kind}onnx.data" for kind in ("", "fp16.", "mixed.", "int8.")} <= set(bundle.files)
    light = onnx.load(tmp_path / "large" / "model.onnx", load_external_data=False)
    assert any(uses_external_data(tensor) for tensor in light.graph.initializer)
    assert not any("/" in entry.value for tensor in light.graph.initializer for entry in tensor.external_data)
    for name in ("model.onnx", "model.fp16.onnx", "model.mixed.onnx", "model.int8.onnx"):
        small, large = (onnx.load(tmp_path / size / name) for size in ("small", "large"))
        values = [{t.name: numpy_helper.to_array(t) for t in m.graph.initializer} for m in (small, large)]
        assert values[0].keys() == values[1].keys()
        assert all(np.array_equal(value, values[1][key]) for key, value in values[0].items())
    assert bundle.parity.passed
    assert verify(tmp_path / "large").passed
    assert "would hold the large weights twice" in bundle.parity.absent["openvino"]
    assert any(stage.status == "ran" for stage in verify(tmp_path / "large", ["openvino"]).stages[1:])
    engines = [tmp_path / size / "model.rtx.engine" for size in ("small", "large")]
    assert engines[0].read_bytes() == engines[1].read_bytes()
    whole, beside = (json.loads((tmp_path / size / "fold.json").read_text()) for size in ("small", "large"))
    assert whole["facts"]["float64_error"] == beside["facts"]["float64_error"]
    assert not [path.name for path in tmp_path.glob("**/.*")]


def test_the_same_network_gives_the_same_bytes(network, tmp_path, lowered):
    for folder in ("one", "two"):
        export(network, (X,), tmp_path / folder, precision="fp32")
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_large_onnx_file_is_referred_to_and_exported(network, tmp_path, lowered):
    export(network, (X,), tmp_path / "first", precision="fp32")
    model = load_onnx(tmp_path / "first" / "model.onnx")
    external = [tensor for tensor in model.graph.initializer if uses_external_data(tensor)]
    assert external
    assert array_of(external[0]).shape == tuple(external[0].dims)

    bundle = export(tmp_path / "first" / "model.onnx", None, tmp_path / "second", precision=("fp32", "fp16"))
    assert bundle.parity.passed
    assert "model.onnx.data" in bundle.files
    session = onnxruntime.InferenceSession(tmp_path / "second" / "model.onnx")
    expected = onnxruntime.InferenceSession(tmp_path / "first" / "model.onnx").run(None, {"input": X.numpy()})
    found = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    # The same float32 operations on the same weights.
    assert np.array_equal(found[0], expected[0])


def test_norms_of_a_large_onnx_file_fold_into_a_file(network, tmp_path, lowered):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own
        free = ({0: torch.export.Dim("batch")},)
        bare = torch.onnx.export(network, (X,), dynamo=True, dynamic_shapes=free, optimize=False, verbose=False)
    weights = {"save_as_external_data": True, "location": "bare.data", "size_threshold": 100}
    onnx.save(bare.model_proto, tmp_path / "bare.onnx", **weights)
    assert any(node.op_type == "BatchNormalization" for node in onnx.load(tmp_path / "bare.onnx").graph.node)

    bundle = export(tmp_path / "bare.onnx", None, tmp_path / "bundle", precision=("fp32", "fp16"))

    assert bundle.parity.passed
    assert bundle.fold_report.facts["norms_left"] == 0
    assert {"model.onnx.data", "model.fp16.onnx.data"} <= set(bundle.files)
    assert not [path.name for path in tmp_path.glob("**/.*")]
    session = onnxruntime.InferenceSession(tmp_path / "bundle" / "model.onnx")
    found = session.run(None, {session.get_inputs()[0].name: X.numpy()})[0]
    with torch.no_grad():
        expected = network(X).numpy()
    assert np.abs(found - expected).max() <= 288 * 10 * 2.0**-24 * np.abs(expected).max()  # sums of 288 products


def test_writing_moves_the_weights_and_the_model_still_has_them(network, tmp_path, lowered):
    export(network, (X,), tmp_path / "bundle", precision="fp32")
    model = onnx.load(tmp_path / "bundle" / "model.onnx")
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    write_model(tmp_path / "copy.onnx", model)
    assert all(np.array_equal(array_of(tensor), values[tensor.name]) for tensor in model.graph.initializer)
    read = onnx.load(tmp_path / "copy.onnx")
    assert all(np.array_equal(numpy_helper.to_array(tensor), values[tensor.name]) for tensor in read.graph.initializer)
    onnx.checker.check_model(str(tmp_path / "copy.onnx"), full_check=True)


def test_a_full_disk_leaves_nothing(network, tmp_path, monkeypatch, lowered):
    def full(self, array):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(WeightFile, "add", full)
    with pytest.raises(OSError, match="No space left"):
        export(network, (X,), tmp_path / "bundle", precision="fp32")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"location": "../model.onnx.data"}, "points outside the model's folder"),
        ({"location": "/etc/passwd"}, "points outside the model's folder"),
        ({"location": "other.data"}, "which is not there"),
        ({"offset": "99999999"}, "is truncated"),
        ({"length": "8"}, "its entry says 8"),
    ],
)
def test_references_are_checked_before_anything_is_read(network, tmp_path, lowered, change, words):
    export(network, (X,), tmp_path / "bundle", precision="fp32")
    path = tmp_path / "bundle" / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if uses_external_data(tensor))
    for entry in tensor.external_data:
        entry.value = change.get(entry.key, entry.value)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError, match=words):
        load_onnx(path)
