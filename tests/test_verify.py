"""`verify`: holds on what was exported, fails on what was changed, and needs no torch."""

import json
import shutil

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from lowprec.artifacts import sha256_of
from lowprec.errors import ArtifactError, ConfigError, DataError, MissingDependencyError, ParityError
from lowprec.export import truth, verify
from lowprec.export.bundle import open_bundle
from lowprec.export.float64 import Float64Graph
from lowprec.export.golden import Golden
from lowprec.export.onnx_files import module_path
from lowprec.export.parity.storage import Storage
from lowprec.export.sketches import Sketches, deviations
from lowprec.export.stages import match_names
from lowprec.formats import FP16

WITHOUT_TORCH = """
import sys
class Absent:
    names = {"torch", "onnxscript", "safetensors", "sklearn", "scipy", "rich", "jinja2", "matplotlib", "tensorrt_rtx"}
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""


@pytest.fixture
def bundle(demo, tmp_path):
    """A copy of the L1 bundle to be damaged."""
    return shutil.copytree(demo[0] / "l1" / "bundle", tmp_path / "bundle")


def hash_anew(bundle, *, bind=False):
    """What somebody does who changes a file and wants the bundle to look whole."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    if bind:
        fold = json.loads((bundle / "fold.json").read_text())
        fold["model_onnx_sha256"] = sha256_of(bundle / "model.onnx")
        (bundle / "fold.json").write_text(json.dumps(fold))
        side = json.loads((bundle / "model.rtx.engine.json").read_text())
        side["source_sha256"] = sha256_of(bundle / side["source"])
        (bundle / "model.rtx.engine.json").write_text(json.dumps(side))
    manifest["files"] = {name: sha256_of(bundle / name) for name in manifest["files"]}
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def scale_weight(path, index, factor):
    model = onnx.load(path)
    tensor = model.graph.initializer[index]
    array = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array((array * factor).astype(array.dtype), tensor.name))
    onnx.save(model, path)


def weights_of(path):
    model = onnx.load(path)
    return [i for i, t in enumerate(model.graph.initializer) if len(t.dims) >= 2 and t.data_type in (1, 10)]


def test_an_untouched_bundle_holds(bundle, command):
    done = command("verify", bundle, cwd=bundle)
    assert done.status == 0, done.stderr
    assert "verdict: pass" in done.stdout
    assert "built, not run here" in done.stdout


@pytest.mark.parametrize("file", ["model.onnx", "model.fp16.onnx"])
def test_one_weight_tensor_changed_by_one_percent_fails_though_hashed_anew(bundle, command, file):
    scale_weight(bundle / file, weights_of(bundle / file)[2], 1.01)
    hash_anew(bundle)
    done = command("verify", bundle, cwd=bundle)
    assert done.status == 1, done.stdout + done.stderr
    assert "fail" in done.stdout


@pytest.mark.parametrize("file", ["model.onnx", "model.fp16.onnx"])
def test_the_numbers_alone_find_one_percent_in_any_weight_tensor(bundle, file):
    """With every hash in the bundle forged too, only the outputs can tell."""
    whole = (bundle / file).read_bytes()
    indices = weights_of(bundle / file)
    assert len(indices) >= 6
    for index in indices:
        (bundle / file).write_bytes(whole)
        scale_weight(bundle / file, index, 1.01)
        hash_anew(bundle, bind=True)
        report = verify(bundle, backends=["onnxruntime"])
        assert report.verdict == "fail", index
        with pytest.raises(ParityError, match=r"rho|elementwise|channel"):
            report.raise_if_failed()


def test_evidence_for_another_file_fails(bundle):
    fold = json.loads((bundle / "fold.json").read_text())
    fold["model_onnx_sha256"] = "0" * 64
    (bundle / "fold.json").write_text(json.dumps(fold))
    hash_anew(bundle)
    report = verify(bundle)
    assert report.verdict == "fail"
    assert "fold.json was made for another model.onnx" in report.failure()


def test_one_flipped_byte_in_any_file_is_unusable(bundle, command):
    names = sorted(json.loads((bundle / "manifest.json").read_text())["files"])
    assert {"model.onnx", "model.fp16.onnx", "model.rtx.engine", "golden.npz", "report.html"} <= set(names)
    for name in names:
        whole = (bundle / name).read_bytes()
        damaged = bytearray(whole)
        damaged[len(damaged) // 2] ^= 1
        (bundle / name).write_bytes(damaged)
        with pytest.raises(ArtifactError, match=f"{name} was changed: SHA-256"):
            verify(bundle)
        if name == "model.onnx":
            done = command("verify", bundle, cwd=bundle)
            assert (done.status, done.stdout) == (2, "")
            assert len(done.stderr.splitlines()) == 1
        (bundle / name).write_bytes(whole)
    assert verify(bundle).passed


def test_it_runs_where_torch_and_every_optional_package_are_absent(bundle, process):
    done = process("verify", bundle, cwd=bundle, before=WITHOUT_TORCH)
    assert done.status == 0, done.stderr
    assert "verdict: pass" in done.stdout
    for arguments in (("doctor",), ("inspect", bundle)):
        done = process(*arguments, cwd=bundle, before=WITHOUT_TORCH)
        assert done.status == 0, done.stderr


def test_json_is_one_document_and_nothing_else(bundle, command):
    done = command("verify", bundle, "--json", cwd=bundle)
    report = json.loads(done.stdout)
    assert report["verdict"] == "pass"


def test_the_manifest_can_be_pinned(bundle, command):
    digest = sha256_of(bundle / "manifest.json")
    assert command("verify", bundle, "--manifest-sha256", digest, cwd=bundle).status == 0
    done = command("verify", bundle, "--manifest-sha256", "0" * 64, cwd=bundle)
    assert done.status == 2
    assert "this is another bundle" in done.stderr


def test_a_backend_asked_for_by_name(bundle, command):
    assert verify(bundle, backends=["reference"]).passed
    with pytest.raises(ConfigError, match="unknown backend 'onnxruntim'"):
        verify(bundle, backends=["onnxruntim"])
    with pytest.raises(MissingDependencyError, match="the backend tensorrt-rtx was asked for and cannot run here"):
        verify(bundle, backends=["tensorrt-rtx"])
    assert command("verify", bundle, "--backend", "tensorrt-rtx", cwd=bundle).status == 3
    with pytest.raises(ConfigError, match="the backend torch runs nothing that"):
        verify(bundle, backends=["torch"])


def test_more_data_gives_more_stages(bundle):
    plain, wider = verify(bundle), verify(bundle, data="digits")
    assert len(wider.stages) > len(plain.stages)
    assert wider.passed


def test_data_of_the_wrong_shape_or_with_nan_is_one_line(bundle, tmp_path, command):
    np.savez(tmp_path / "wrong.npz", x=np.zeros((4, 1, 9, 9), np.float32))
    np.savez(tmp_path / "nan.npz", x=np.full((4, 1, 8, 8), np.nan, np.float32))
    np.savez(tmp_path / "name.npz", pixels=np.zeros((4, 1, 8, 8), np.float32), other=np.zeros((4, 1), np.float32))
    for name in ("wrong.npz", "nan.npz", "name.npz", "absent.npz"):
        done = command("verify", bundle, "--data", tmp_path / name, cwd=tmp_path)
        assert done.status == 2, (name, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        assert len([line for line in done.stderr.splitlines() if line.startswith("lowprec: ")]) == 1


@pytest.mark.parametrize("damage", ["gone", "folder", "no files", "schema", "escape", "golden"])
def test_a_damaged_bundle_is_one_line(bundle, command, damage):
    manifest = bundle / "manifest.json"
    content = json.loads(manifest.read_text())
    if damage == "gone":
        (bundle / "model.onnx").unlink()
    elif damage == "folder":
        manifest.unlink()
    elif damage == "no files":
        manifest.write_text(json.dumps({**content, "files": {}}))
    elif damage == "schema":
        manifest.write_text(json.dumps({**content, "schema": 99}))
    elif damage == "escape":
        files = {**content["files"], "../../etc/passwd": "0" * 64}
        manifest.write_text(json.dumps({**content, "files": files}))
    else:
        np.savez(bundle / "golden.npz", x=np.zeros(3))
        hash_anew(bundle)
    done = command("verify", bundle, cwd=bundle)
    assert (done.status, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_an_open_bundle_lists_what_it_holds(bundle):
    opened = open_bundle(bundle)
    assert list(opened.onnx_artefacts) == ["fp32", "fp16"]
    assert opened.engines == ["model.rtx.engine"]
    with pytest.raises(ArtifactError, match=r"has no model\.int8\.onnx; it lists"):
        opened.path("model.int8.onnx")


@pytest.mark.parametrize("name", ["fold.json", "parity.json", "calibration.json", "model.rtx.engine.json"])
@pytest.mark.parametrize("content", ["[]", "{}", "3", '{"changed": 7, "stages": 7, "inputs": 7}'])
def test_forged_records_are_never_a_traceback(bundle, command, name, content):
    (bundle / name).write_text(content)
    hash_anew(bundle)
    for verb in ("verify", "inspect"):
        done = command(verb, bundle, cwd=bundle)
        assert done.status in (0, 1, 2)
        assert "Traceback" not in done.stderr


def test_large_networks_take_fewer_golden_samples(monkeypatch, bundle):
    """The floor's work is bounded by counting multiply-adds, here a budget that pays for no more than the minimum."""
    monkeypatch.setattr(truth, "MAX_WORK", 1)
    golden = truth.golden_from_onnx(bundle / "model.onnx", "digits", [Storage.of(FP16)])
    assert golden.samples == truth.MIN_SAMPLES == len(golden.labels)


def test_a_claim_that_so_few_samples_cannot_decide_is_status_3(bundle, command):
    # All 256 decisions agree, or one or two near ties flip: the 95 % interval is then [0.972, 0.998] at worst and
    # [0.985, 1] at best, which proves 0.95 and neither proves nor refutes 0.997.
    assert command("verify", bundle, "--min-agreement", "0.95", cwd=bundle).status == 0
    done = command("verify", bundle, "--min-agreement", "0.997", cwd=bundle)
    assert done.status == 3
    assert "inconclusive" in done.stdout
    assert command("verify", bundle, "--margin", "5", cwd=bundle).status == 0
    assert command("verify", bundle, "--margin", "0.01", cwd=bundle).status == 3
    assert command("verify", bundle, "--margin", "500", cwd=bundle).status == 2


def test_inputs_are_matched_by_name_or_when_there_is_only_one():
    assert match_names(["x"], ["image"]) == {"x": "image"}
    assert match_names(["a", "b"], ["b", "a"]) == {"a": "a", "b": "b"}
    with pytest.raises(DataError, match=r"there are arrays for a, b, the model takes a, c; give both the same names"):
        match_names(["a", "b"], ["a", "c"])


@pytest.mark.parametrize("file", ["model.onnx", "model.fp16.onnx"])
def test_the_first_node_that_is_off_is_named(bundle, file):
    """A planted defect of 2 % in any convolution or product: the report names that node by its module path."""
    whole, model = (bundle / file).read_bytes(), onnx.load(bundle / file)
    weights = {t.name: i for i, t in enumerate(model.graph.initializer)}
    planted = [(node, weights[node.input[1]]) for node in model.graph.node if node.op_type in ("Conv", "Gemm")]
    assert len(planted) >= 8
    for node, index in planted:
        (bundle / file).write_bytes(whole)
        scale_weight(bundle / file, index, 1.02)
        hash_anew(bundle, bind=True)
        report = verify(bundle, backends=["reference"])
        (stage,) = [s for s in report.stages if s.artefact == file and s.name.endswith("node by node")]
        assert stage.verdict == "fail"
        expected = f"the first node that is off is '{node.name}' ({node.op_type} of '{module_path(node)}')"
        assert stage.checks[0].text.startswith(expected)


def test_sketches_survive_storage_and_refuse_damage(bundle):
    golden = Golden.load(bundle / "golden.npz")
    assert len(golden.sketches.names) == golden.sketches.values.shape[0] >= 20
    arrays = golden.sketches.to_arrays()
    for broken in ({}, {**arrays, "names": arrays["names"][1:]}, {**arrays, "values": arrays["values"].astype(int)}):
        with pytest.raises(ArtifactError, match="the node sketches are incomplete"):
            Sketches.from_arrays(broken)


def test_a_sketch_is_as_large_as_the_rms_of_what_it_stands_for(bundle):
    graph = Float64Graph(onnx.load(bundle / "model.onnx"))
    golden = Golden.load(bundle / "golden.npz")
    (name,) = golden.outputs
    sketch = dict(zip(golden.sketches.names, golden.sketches.values, strict=True))[name]
    rms = np.sqrt(np.mean(golden.outputs[name][:4] ** 2))
    # 32 projections: the rms of so many has a relative standard deviation of at most sqrt(2 / 32) = 0.25; 4 of these.
    assert 0 < abs(np.sqrt(np.mean(sketch**2)) / rms) < 2
    assert deviations(golden.sketches, graph, golden.inputs, "fp32")[name] == 0
