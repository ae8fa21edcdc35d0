"""`lowprec engine`: from its words to a renewed bundle, and a bundle that stays when something goes wrong."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from test_export_onnx import WITHOUT_TORCH as WITHOUT
from test_quantise import Small, randomise, samples

from lowprec.cli import build_parser
from lowprec.cli.build_options import build_options_from
from lowprec.errors import ArtifactError, ConfigError, MissingDependencyError
from lowprec.export import compare, export, rebuild, verify
from lowprec.export.backends import BACKENDS, BuildOptions
from lowprec.export.backends.cuda import Gpu
from lowprec.export.backends.tensorrt import sidecar
from lowprec.export.bundle import open_bundle
from lowprec.export.rebuild import add_engine

pytest.importorskip("tensorrt_rtx")
WITHOUT_TORCH = WITHOUT.replace('"tensorrt_rtx", ', "").replace(', "tensorrt_rtx"', "")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("made") / "bundle"
    example = (torch.from_numpy(samples()),)
    export(randomise(Small().eval()), example, folder, precision=["fp16", "mixed", "int8"])
    return folder


@pytest.fixture
def bundle(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "bundle"))


def test_words_become_options(tmp_path):
    words = "--batch 1:4:8 --profile a=1x2:1x3:1x4 b=1:2:3 --profile a=1x5:1x5:1x5 --builder-level 2 --workspace 2g "
    words += "--timing-cache c --hardware-compatible same --tf32 --compute-capability 8.6 12.0"
    for command in (["engine", "bundle"], ["export", "m.onnx", "-o", "b"]):
        assert build_options_from(build_parser().parse_args([*command, *words.split()])) == BuildOptions(
            batch=(1, 4, 8),
            profiles=({"a": ((1, 2), (1, 3), (1, 4)), "b": ((1,), (2,), (3,))}, {"a": ((1, 5),) * 3}),
            builder_level=2,
            workspace=2 << 30,
            timing_cache=Path("c"),
            hardware_compatible="same",
            tf32=True,
            compute_capabilities=((8, 6), (12, 0)),
        )


@pytest.mark.parametrize(
    "words",
    ["--batch 4", "--batch 1:2", "--profile a=1x2", "--profile 1:2:3", "--workspace 2T", "--compute-capability 86"],
)
def test_words_that_say_nothing_are_refused(words):
    with pytest.raises(ConfigError, match=f"{words.split()[0]} takes"):
        build_options_from(build_parser().parse_args(["engine", "bundle", *words.split()]))


@pytest.mark.parametrize("precision", [None, "fp16", "mixed", "fp32"])
def test_an_engine_is_added_and_the_bundle_renewed(bundle, command, precision):
    before = open_bundle(bundle)
    stages_before = len(before.parity.stages)
    words = [] if precision is None else ["--precision", precision]
    done = command("engine", str(bundle), *words, "--batch", "1:4:8", "--compute-capability", "8.6", cwd=bundle.parent)
    assert done.status == 0, done.stdout + done.stderr
    after = open_bundle(bundle)
    assert set(after.files) - set(before.files) == {"model.rtx.engine", "model.rtx.engine.json"}
    same = set(before.files) - {"parity.json", "report.html"}
    assert {name: after.files[name] for name in same} == {name: before.files[name] for name in same}
    sidecar = after.record("model.rtx.engine.json")
    assert sidecar["precision"] == precision or (precision is None and sidecar["precision"] == "int8")
    stages = [stage for stage in after.parity.stages if stage.artefact == "model.rtx.engine"]
    assert [stage.backend for stage in stages] == ["tensorrt-rtx"]
    assert len(after.parity.stages) == stages_before + 1
    assert after.manifest["provenance"]["renewed"]["engine"] == "model.rtx.engine"
    assert "model.rtx.engine" in (bundle / "report.html").read_text()
    assert verify(bundle).passed
    stages_after = len(after.parity.stages)
    again = add_engine(bundle, options=BuildOptions(batch=(1, 4, 8), compute_capabilities=((8, 6),)))
    assert again.record("model.rtx.engine.json")["precision"] == sidecar["precision"]  # the engine that is replaced
    assert len(again.parity.stages) == stages_after


def test_an_engine_that_runs_is_judged_asked_in_other_ways_and_noted(bundle, monkeypatch):
    """With onnxruntime in the engine's place: what happens on the machine with the card, but for the card."""
    backend = BACKENDS["tensorrt-rtx"]
    session = BACKENDS["onnxruntime"].open(bundle / "model.fp16.onnx")
    run, asked = session._run, set()
    monkeypatch.setattr(session, "batches", lambda feeds: (range(1, 9),))
    monkeypatch.setattr(session, "_run", lambda feeds: asked.add(len(feeds["x"])) or run(feeds))
    monkeypatch.setattr(backend, "cannot_run", lambda: None)
    monkeypatch.setattr(backend, "_open", lambda path: session)
    np.savez(bundle.parent / "data.npz", x=samples(seed=9))
    options = BuildOptions(batch=(1, 4, 8), compute_capabilities=((8, 6),))
    renewed = add_engine(bundle, precision="fp16", options=options, data=str(bundle.parent / "data.npz"))
    stages = [stage for stage in renewed.parity.stages if stage.artefact == "model.rtx.engine"]
    assert [stage.name for stage in stages] == [
        "fp16 on tensorrt-rtx",
        "fp16 on tensorrt-rtx, asked in other ways",
        "fp16 on tensorrt-rtx on further data",
    ]
    assert [check.name for check in stages[1].checks] == ["twice", "batch", "rows"]
    assert {stage.verdict for stage in stages} == {"pass"}
    noted = renewed.record("model.rtx.engine.json")
    assert (noted["verification"], noted["arithmetic"]) == ("run on this machine: pass", session.arithmetic)
    assert asked == {1, 2, 4, 8}


def test_an_engine_for_another_gpu_is_listed_unless_it_was_asked_for(bundle, monkeypatch):
    add_engine(bundle, precision="fp16", options=BuildOptions(batch=(1, 4, 8), compute_capabilities=((8, 6),)))
    monkeypatch.setattr(BACKENDS["tensorrt-rtx"], "cannot_run", lambda: None)
    monkeypatch.setattr(sidecar, "gpu_or_none", lambda: Gpu("Hopper", "9.0", "13.0"))
    report = verify(bundle)
    assert report.passed
    (stage,) = [stage for stage in report.stages if stage.artefact == "model.rtx.engine"]
    assert stage.status == "built, not run here"
    assert "was built for compute capability 8.6; this GPU, Hopper, has 9.0" in stage.reason
    with pytest.raises(MissingDependencyError, match=r"this GPU, Hopper, has 9\.0"):
        verify(bundle, ["tensorrt-rtx"])
    kept = add_engine(bundle, options=BuildOptions(compute_capabilities=((8, 6),)))  # the bundle has its engine
    assert kept.record("model.rtx.engine.json")["verification"] == "built, not run"


def test_an_engine_is_compared_where_it_runs(bundle, command, monkeypatch):
    add_engine(bundle, precision="fp16", options=BuildOptions(batch=(1, 4, 64), compute_capabilities=((8, 6),)))
    np.savez(bundle.parent / "data.npz", x=samples(seed=9))
    words = ("compare", "bundle/model.onnx", "bundle/model.rtx.engine", "--data", "data.npz")
    done = command(*words, cwd=bundle.parent)
    assert done.status == 3
    assert "built, not run here" in done.stdout
    done = command("compare", "bundle/model.rtx.engine", "bundle/model.onnx", "--data", "data.npz", cwd=bundle.parent)
    assert done.status == 2
    assert "an engine, which has no float64 truth; give it as the candidate" in done.stderr
    backend = BACKENDS["tensorrt-rtx"]
    monkeypatch.setattr(backend, "cannot_run", lambda: None)
    monkeypatch.setattr(backend, "_open", lambda path: BACKENDS["onnxruntime"].open(bundle / "model.fp16.onnx"))
    report = compare(bundle / "model.onnx", bundle / "model.rtx.engine", str(bundle.parent / "data.npz"))
    assert (report.verdict, report.facts["precision"]) == ("pass", "fp16")
    (bundle / "model.rtx.engine.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"does not say what model\.rtx\.engine was built for"):
        compare(bundle / "model.onnx", bundle / "model.rtx.engine", str(bundle.parent / "data.npz"))


def test_engines_are_added_where_torch_is_absent(bundle, process):
    done = process("engine", "bundle", "--compute-capability", "8.6", cwd=bundle.parent, before=WITHOUT_TORCH)
    assert done.status == 0, done.stderr
    assert verify(bundle).passed


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--target", "tensorrt"], 3, "the target tensorrt was asked for and cannot be built here"),
        (["--target", "onnx"], 2, "unknown target 'onnx'; engines are built for tensorrt-rtx, tensorrt"),
        (["--precision", "bf16"], 2, "asked for a bf16 engine; "),
        (["--compute-capability", "9.0"], 2, "does not build for SM90"),
        (["--profile", "image=1x3x8x8:1x3x8x8:1x3x8x8"], 2, "a profile names the input 'image'; the model takes x"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_leaves_the_bundle(bundle, command, words, status, said):
    before = open_bundle(bundle).manifest_sha256
    done = command("engine", str(bundle), *words, cwd=bundle.parent)
    assert done.status == status
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("lowprec: ")]
    assert said in line
    assert open_bundle(bundle).manifest_sha256 == before
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_a_full_disk_leaves_the_bundle(bundle, monkeypatch):
    before = open_bundle(bundle).manifest_sha256

    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rebuild, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        add_engine(bundle, options=BuildOptions(compute_capabilities=((8, 6),)))
    assert open_bundle(bundle).manifest_sha256 == before
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_a_killed_renewal_leaves_the_bundle(bundle):
    before = open_bundle(bundle).manifest_sha256
    child = os.fork()
    if child == 0:
        slow = BuildOptions(compute_capabilities=((8, 6),))
        rebuild.render_page = lambda parts: time.sleep(60)
        try:
            add_engine(bundle, options=slow)
        finally:
            os._exit(0)
    deadline = time.monotonic() + 30
    while not list(bundle.parent.glob(".bundle.*/parity.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(bundle.parent.glob(".bundle.*/parity.json"))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert open_bundle(bundle).manifest_sha256 == before
    add_engine(bundle, options=BuildOptions(compute_capabilities=((8, 6),)))  # and what was left is cleared away
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]
    assert json.loads((bundle / "model.rtx.engine.json").read_text())["precision"] == "int8"
