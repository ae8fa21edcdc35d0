"""Every name, method and enumeration member of TensorRT that the adapter uses exists: in 11.4, 10.16 and RTX."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tensorrt_names import ADAPTER, CLASSES, keywords_used, names_used

HERE = Path(__file__).parent
VERSIONS = {"11.4.0.106": 11, "10.16.1.11": 10}
# What the bindings ask of NVIDIA's libraries when they are imported; nothing of it is called.
ENTRY_POINTS = [
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
]


@pytest.fixture(scope="module", params=VERSIONS)
def bindings(request, tmp_path_factory):
    """The environment of a process that can import NVIDIA's bindings of one version."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler for the stand-ins of NVIDIA's libraries")
    folder = tmp_path_factory.mktemp("bindings")
    wheel = f"tensorrt-cu13-bindings=={request.param}"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), wheel]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{wheel} cannot be had: {done.stderr.strip().splitlines()[-1]}")
    source = folder / "stand_in.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in ENTRY_POINTS))
    for library in ("nvinfer", "nvonnxparser", "nvinfer_plugin"):
        target = folder / f"lib{library}.so.{VERSIONS[request.param]}"
        subprocess.run(["cc", "-shared", "-fPIC", "-o", str(target), str(source)], check=True)
    return {**os.environ, "PYTHONPATH": str(folder), "LD_LIBRARY_PATH": str(folder)}


def missing(names, tmp_path, environment, module):
    (tmp_path / "names.json").write_text(json.dumps(sorted(names)))
    command = [sys.executable, str(HERE / "tensorrt_names.py"), module, str(tmp_path / "names.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_names_are_found_in_the_source():
    used = names_used(only_rtx=False)
    assert {
        "Builder",
        "BuilderFlag.TF32",
        "BuilderFlag.REFIT",
        "IBuilderConfig.set_flag",
        "LayerType.CONVOLUTION",
    } <= used
    assert {"IProgressMonitor.step_complete", "HardwareCompatibilityLevel.AMPERE_PLUS", "DataType.HALF"} <= used
    assert {"ICudaEngine.get_tensor_profile_shape", "IExecutionContext.execute_async_v3"} <= used
    assert names_used(only_rtx=True) >= {"ComputeCapability.__members__", "IBuilderConfig.set_compute_capability"}
    assert set(CLASSES.values()) <= {name.split(".")[0] for name in used}


def test_everything_is_passed_by_position():
    """So no keyword of a version can be wrong."""
    assert keywords_used() == []


def test_nvidias_bindings_have_every_name(bindings, tmp_path):
    assert missing(names_used(only_rtx=False), tmp_path, bindings, "tensorrt_bindings") == []


def test_tensorrt_rtx_has_every_name(tmp_path):
    pytest.importorskip("tensorrt_rtx")
    names = names_used(only_rtx=False) | names_used(only_rtx=True)
    assert missing(names, tmp_path, dict(os.environ), "tensorrt_rtx") == []


@pytest.mark.parametrize(
    ("file", "right", "wrong"),
    [
        ("build.py", "builder.create_network(", "builder.create_netwrok("),
        ("build.py", "trt.BuilderFlag.TF32", "trt.BuilderFlag.TF23"),
        ("build.py", '"REFIT"', '"REFITTED"'),
        ("session.py", "self._context.execute_async_v3", "self._context.execute_async_v4"),
        ("audit.py", '"CONVOLUTION"', '"CONVOLUTIONS"'),
        ("build.py", "def step_complete(", "def step_completed("),
    ],
)
def test_a_misspelt_name_is_found(bindings, tmp_path, file, right, wrong):
    text = (ADAPTER / file).read_text()
    assert right in text
    names = names_used(only_rtx=False, sources={file: text.replace(right, wrong)})
    assert len(missing(names, tmp_path, bindings, "tensorrt_bindings")) == 1
