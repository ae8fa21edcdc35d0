"""`lowprec export model.onnx`: files of torch's two exporters and of others, on the same way as modules."""

import io
import json

import numpy as np
import onnx
import pytest
import torch
from architectures import ARCHITECTURES
from fold_cases import randomise
from leftovers import operations_left
from networks import NETWORKS
from onnx import TensorProto, numpy_helper
from onnx_cases import model_of, norm, normed, some
from test_fold_onnx import FLOAT64, exact, kinds, worst
from test_verify import WITHOUT_TORCH

from lowprec.artifacts import sha256_of
from lowprec.export import export, verify
from lowprec.export.folding import fold, fold_onnx
from lowprec.export.folding.traced.quiet import quiet_exporter

# The page needs jinja2, which is a dependency; everything else may be absent.
WITHOUT_TORCH = WITHOUT_TORCH.replace('"jinja2", ', "")


def exported(network, x, dynamo):
    """What torch.onnx writes by itself."""
    with quiet_exporter():
        if dynamo:
            batch = ({0: torch.export.Dim("batch")},)
            return torch.onnx.export(network, (x,), dynamo=True, dynamic_shapes=batch, verbose=False).model_proto
        buffer = io.BytesIO()
        names = {"input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}}
        torch.onnx.export(network, (x,), buffer, dynamo=False, **names)
        return onnx.load_from_string(buffer.getvalue())


def left_in(model):
    """Norms, per-channel arithmetic with constants and depthwise 1x1 convolutions of an ONNX graph."""
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    found = []
    for node in model.graph.node:
        values = [constants[name] for name in node.input if name in constants]
        per_channel = any(sum(length > 1 for length in value.shape) <= 1 for value in values)
        groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
        depthwise = node.op_type == "Conv" and groups == len(values[0]) > 1 and values[0][0].size == 1
        arithmetic = node.op_type in ("Add", "Sub", "Mul", "Div") and per_channel
        if node.op_type == "BatchNormalization" or depthwise or arithmetic:
            found.append(node.name or node.output[0])
    return found


def from_networks(name):
    network = NETWORKS[name]
    return network.make().eval(), network.batch()


def from_architectures(name):
    return ARCHITECTURES[name].make(1).eval(), torch.randn(2, *ARCHITECTURES[name].shape[1:])


@pytest.mark.parametrize("dynamo", [True, False], ids=["dynamo", "torchscript"])
@pytest.mark.parametrize(
    ("make", "name"),
    [(from_networks, name) for name in ("residual, one relu", "dense", "u-net", "shared norm", "signal")]
    + [(from_architectures, name) for name in ("mxnet_resnet", "densenet_bc", "nam_resnet", "shufflenet_v1", "repvgg")],
)
def test_a_file_of_torchs_folds_as_far_as_the_module(make, name, dynamo):
    torch.manual_seed(0)
    network, x = make(name)
    randomise(network)
    folded, report = fold(network, (x,))
    model = exported(network, x, dynamo)
    file, file_report = fold_onnx(model)
    onnx.checker.check_model(file, full_check=True)
    # What is left of the module's norms is written as a convolution by one and as multiplication and addition by the
    # other where it has no spatial axis, so the report's own count is held against it too.
    assert len(left_in(file)) == len(operations_left(folded)), file_report.refused
    assert file_report.facts["norms_left"] == report.facts["norms_left"]
    assert worst(model, exact(model)[0]) <= FLOAT64


def image_model(channels=3, **given):
    """A small classifier whose norms all fold, `image` to `scores`."""
    text = (
        f"{normed('n0', 'image', 'a')} h = Conv(a, w) {normed('n1', 'h', 'b')} r = Relu(b) "
        "p = GlobalAveragePool(r) f = Flatten(p) scores = Gemm(f, v)"
    )
    weights = {"w": some(6, channels, 3, 3) - 1, "v": some(6, 4) - 1, **norm("n0", channels), **norm("n1", 6, "shift")}
    return model_of(text, weights, {"image": [given.pop("batch", "N"), channels, 8, 8]}, outputs=("scores",), **given)


@pytest.fixture
def folder(tmp_path):
    onnx.save(image_model(), tmp_path / "net.onnx")
    draw = np.random.default_rng(0)
    images = draw.normal(size=(40, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "data.npz", image=images, labels=draw.integers(0, 4, 40))
    return tmp_path


def test_a_file_becomes_a_bundle(folder, command):
    done = command("export", "net.onnx", "-o", "b", "--precision", "fp32", "fp16", cwd=folder)
    assert done.status == 0, done.stdout + done.stderr
    assert "verdict: pass" in done.stdout
    assert "fp32 on torch" not in done.stdout
    manifest = json.loads((folder / "b" / "manifest.json").read_text())
    origin = manifest["provenance"]
    assert origin["source"] == "net.onnx"
    assert origin["source_sha256"] == sha256_of(folder / "net.onnx")
    assert origin["data"] == "random inputs, drawn from the shapes and types that the model states"
    assert origin["data_fingerprint"] is None
    assert kinds(onnx.load(folder / "b" / "model.onnx")) == ["Conv", "Relu", "GlobalAveragePool", "Flatten", "Gemm"]
    parity = json.loads((folder / "b" / "parity.json").read_text())
    assert [(stage["name"], stage["backend"]) for stage in parity["stages"][:3]] == [
        ("fold", "reference"), ("fp32 on reference", "reference"), ("fp32 on onnxruntime", "onnxruntime")
    ]  # fmt: skip
    calibration = json.loads((folder / "b" / "calibration.json").read_text())
    assert list(calibration["inputs"]) == ["image"]
    assert set(calibration["outputs"]) == {"a", "h", "b", "r", "p", "f", "scores"}
    assert {"w", "v", "n0_gamma"} <= set(calibration["weights"])
    assert verify(folder / "b").passed
    facts = json.loads(command("inspect", "b", "--json", cwd=folder).stdout)
    assert [row["place"] for row in facts["folded"]] == ["n1", "n0"]
    assert not facts["not_folded"]
    assert facts["fp16_headroom"]


def test_a_file_is_exported_in_every_precision(folder, command):
    words = ("--precision", "fp16", "bf16", "mixed", "int8", "--keep", "op:Gemm", "--narrow-io", "--opset", "21")
    done = command("export", "net.onnx", "-o", "b", *words, "--calibration", "data.npz", cwd=folder)
    assert done.status == 0, done.stdout + done.stderr
    for name in ("model.fp16.onnx", "model.bf16.onnx", "model.mixed.onnx", "model.int8.onnx"):
        onnx.checker.check_model(onnx.load(folder / "b" / name), full_check=True)
    record = json.loads((folder / "b" / "calibration.json").read_text())
    wide = record["wide"]
    assert [entry["match"] for entry in record["keep"]["keep"]] == ["op:Gemm"]
    assert {precision: len(nodes) for precision, nodes in wide.items()} == dict.fromkeys(wide, 1)
    assert set(wide) == {"fp16", "bf16", "mixed", "int8"}
    assert command("verify", "b", cwd=folder).status == 0


def test_ranges_are_those_of_the_data(folder, command):
    done = command("export", "net.onnx", "-o", "b", "--calibration", "data.npz", cwd=folder)
    assert done.status == 0, done.stdout + done.stderr
    images = np.load(folder / "data.npz")["image"].astype(np.float64)
    calibration = json.loads((folder / "b" / "calibration.json").read_text())
    found = calibration["inputs"]["image"]
    assert (found["count"], found["min"], found["max"]) == (images.size, images.min(), images.max())
    # 7680 squares are added up in another order: n * u.
    assert found["rms"] == pytest.approx(np.sqrt(np.mean(images**2)), rel=images.size * 2.0**-53)
    assert calibration["data"]["samples"] == 40
    provenance = json.loads((folder / "b" / "manifest.json").read_text())["provenance"]
    assert provenance["data"] == "data.npz"
    assert len(provenance["data_fingerprint"]) == 64
    done = command("verify", "b", "--data", "data.npz", "--json", cwd=folder)
    assert done.status == 0, done.stdout + done.stderr


def test_a_file_is_exported_where_torch_is_absent(folder, process):
    for data in ((), ("--calibration", "data.npz")):
        done = process("export", "net.onnx", "-o", "b", *data, cwd=folder, before=WITHOUT_TORCH)
        assert done.status == 0, done.stderr
        assert "verdict: pass" in done.stdout
    bare = WITHOUT_TORCH.replace('"torch"', '"torch", "onnxruntime"')
    done = process("export", "net.onnx", "-o", "b", cwd=folder, before=bare)
    assert done.status == 0, done.stderr
    assert json.loads((folder / "b" / "fold.json").read_text())["facts"]["float32_error_ratio"] is None


@pytest.mark.parametrize("batch", [1, 3])
def test_a_batch_that_the_file_fixes_is_kept(folder, command, batch):
    onnx.save(image_model(batch=batch), folder / "fixed.onnx")
    for data, samples in ((), 64 // batch * batch), (("--calibration", "data.npz"), 40 // batch * batch):
        done = command("export", "fixed.onnx", "-o", "b", *data, cwd=folder)
        assert done.status == 0, done.stdout + done.stderr
        assert len(np.load(folder / "b" / "golden.npz")["output.scores"]) == samples
        assert command("verify", "b", "--data", "data.npz", cwd=folder).status == 0


def test_models_in_memory_and_their_example(tmp_path):
    example = (np.random.default_rng(1).normal(size=(20, 3, 8, 8)).astype(np.float32),)
    bundle = export(image_model(), example, tmp_path / "b", precision="fp32")
    assert bundle.parity.passed
    assert bundle.manifest["provenance"]["data"] == "the example inputs"
    np.testing.assert_array_equal(np.load(tmp_path / "b" / "golden.npz")["input.image"], example[0])


def half_model():
    model = image_model(kind=TensorProto.FLOAT16)
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    return model


def without_rows():
    return model_of("y = ReduceMean<keepdims=0>(x)", {}, {"x": ["N", 3]})


def branching():
    text = (
        "m = ReduceMean<keepdims=0>(x) f = Less(m, z) "
        "y = If(f)<then_branch = t () => (u) { u = Neg(x) }, else_branch = e () => (v) { v = Abs(x) }>"
    )
    return model_of(text, {"z": np.zeros((), np.float32)}, {"x": ["N", 3]})


REFUSED = {
    "half": (half_model, "the model is of float16, and export starts from float32"),
    "double": (lambda: model_of("y = Relu(x)", {}, {"x": ["N", 3]}, kind=TensorProto.DOUBLE), "is of float64"),
    "no rows": (without_rows, "the output 'y' has shape () for 64 samples"),
    "control flow": (branching, "export the network without control flow"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(folder, command, name):
    model, words = REFUSED[name]
    onnx.save(model(), folder / "odd.onnx")
    before = sorted(path.name for path in folder.iterdir())
    done = command("export", "odd.onnx", "-o", "b", cwd=folder)
    assert done.status == 2, done.stdout + done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("lowprec: ")]
    assert words in line
    assert sorted(path.name for path in folder.iterdir()) == before


def test_files_and_data_that_cannot_be_used(folder, command):
    (folder / "cut.onnx").write_bytes((folder / "net.onnx").read_bytes()[:500])
    np.savez(folder / "few.npz", image=np.zeros((1, 3, 8, 8), np.float32))
    np.savez(folder / "other.npz", picture=np.zeros((4, 3, 8, 8), np.float32), mask=np.zeros((4, 1), np.float32))
    onnx.save(image_model(batch=3), folder / "fixed.onnx")
    for arguments, words in (
        (("absent.onnx",), "no ONNX model at absent.onnx"),
        (("cut.onnx",), "cut.onnx is not an ONNX model, or is truncated"),
        (("data.npz",), "give a run folder, MODULE:FACTORY or MODEL.onnx"),
        (("fixed.onnx", "--calibration", "few.npz"), "the model takes 3 samples at a time, the data holds 1"),
        (("net.onnx", "--calibration", "other.npz"), "no array for the model's input 'image'"),
    ):
        done = command("export", *arguments, "-o", "b", cwd=folder)
        assert done.status == 2, (arguments, done.stdout, done.stderr)
        assert words in done.stderr
        assert not (folder / "b").exists()


def test_a_wrong_fold_is_found(monkeypatch):
    from lowprec.errors import FoldError
    from lowprec.export.folding.from_onnx import write

    plain = write._Writer._weight_and_bias
    monkeypatch.setattr(
        write._Writer,
        "_weight_and_bias",
        lambda self, old, weight, *rest: plain(self, old, np.asarray(weight) * 1.01, *rest),
    )
    with pytest.raises(FoldError, match=r"internal: the folded network differs from the original by 0\.0"):
        fold_onnx(image_model())
