"""The main job, end to end, on real data."""

import json
import re

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file

METHODS = ("l1", "mimic_norm")


def test_it_exits_0_within_three_minutes(demo):
    _, done = demo
    assert done.status == 0, done.stderr
    assert done.seconds < 180


def test_both_methods_reach_98_percent(demo):
    _, done = demo
    for method in METHODS:
        accuracy = re.search(rf"^{method} +([\d.]+)%", done.stdout, re.MULTILINE)
        assert float(accuracy[1]) >= 98.0


@pytest.mark.parametrize("method", METHODS)
def test_the_waterfall_goes_from_the_fold_to_the_engine(demo, method):
    folder, done = demo
    parity = json.loads((folder / method / "bundle" / "parity.json").read_text())
    assert parity["passed"]
    installed = ("torch", "reference", "onnxruntime", "tensorrt-rtx")  # by the demo's own command
    assert [(s["backend"], s["status"]) for s in parity["stages"] if s["backend"] in installed] == [
        ("torch", "ran"),
        ("torch", "ran"),
        ("reference", "ran"),
        ("onnxruntime", "ran"),
        ("reference", "ran"),
        ("onnxruntime", "ran"),
        ("tensorrt-rtx", "built, not run here"),
        ("reference", "ran"),
        ("reference", "ran"),
    ]
    for stage in parity["stages"]:
        assert stage["name"] in done.stdout or stage["status"] == "not available here"
    assert "not available here: onnxruntime-cuda: " in done.stdout


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_left_of_the_norms_and_the_weights_were_half(demo, method):
    folder, _ = demo
    model = onnx.load(folder / method / "bundle" / "model.onnx")
    left = {node.op_type for node in model.graph.node}
    assert left <= {"Conv", "Relu", "Add", "Gemm", "ReduceMean", "GlobalAveragePool", "Flatten", "Reshape"}
    weights = load_file(folder / method / "run" / "model.safetensors")
    convolutions = [name for name, value in weights.items() if value.ndim == 4]
    assert convolutions
    assert all(weights[name].dtype == np.float16 for name in convolutions)


def test_the_report_is_one_self_contained_page(demo):
    folder, _ = demo
    page = (folder / "report.html").read_text()
    assert all(f"<h2>{method}: " in page for method in METHODS)
    assert "built, not run here" in page
    assert not re.search(r"""(src|href)\s*=\s*["']?\s*(https?:|//|data:)|@import|<script""", page)


def test_the_engine_says_that_it_was_never_run(demo):
    folder, _ = demo
    sidecar = json.loads((folder / "l1" / "bundle" / "model.rtx.engine.json").read_text())
    assert sidecar["precision"] == "fp16"
    assert sidecar["source"] == "model.fp16.onnx"
    assert "not run" in json.dumps(sidecar)
