"""Engines: what is built for every option, what is refused, what the audit and the sidecar say."""

import hashlib
import importlib.util
import json
import os
import resource
import signal

import numpy as np
import onnx
import pytest
from architectures import ARCHITECTURES, example, randomise
from onnx import helper, numpy_helper
from reference_parity import cnn, digits, graph_of, half_typed, trained_weights

from lowprec.errors import ArtifactError, ConfigError, MissingDependencyError, UnsupportedError
from lowprec.export.backends import BACKENDS, BuildOptions, EngineBackend
from lowprec.export.backends.cuda import missing_driver
from lowprec.export.backends.tensorrt import COMPUTE_LAYERS, TensorRT, TypedLayer, audit, build, session
from lowprec.export.backends.tensorrt import RTX as LIBRARY
from lowprec.export.backends.tensorrt.audit import built_types
from lowprec.export.emit import emit_onnx
from lowprec.export.emit.keep import DEFAULT_KEEP
from lowprec.export.emit.narrowing import Narrowing
from lowprec.export.emit.quantise import quantise
from lowprec.export.folding import fold
from lowprec.export.tensors import TensorSpec

needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt-rtx is not installed")
RTX = BACKENDS["tensorrt-rtx"]
ONE_GPU = ((8, 6),)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One network in every precision."""
    folder = tmp_path_factory.mktemp("models")
    weights = trained_weights(width=8)
    model = cnn(weights)
    onnx.save(model, folder / "fp32.onnx")
    onnx.save(half_typed(cnn(weights)), folder / "fp16.onnx")
    for precision in ("bf16", "mixed"):
        onnx.save(Narrowing().in_precision(precision, model, folder, {}, None)[0], folder / f"{precision}.onnx")
    onnx.save(quantise(folder / "fp32.onnx", {"x": digits()[0][:64]}, DEFAULT_KEEP)[0], folder / "int8.onnx")
    return folder


@needs_rtx
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "mixed", "int8"])
def test_engines_are_built_here_the_same_twice(files, tmp_path, precision):
    options = BuildOptions(precision=precision, batch=(1, 4, 8))
    paths = [tmp_path / name for name in ("a.rtx.engine", "b.rtx.engine")]
    sidecars = [RTX.build(files / f"{precision}.onnx", path, options) for path in paths]
    if not sidecars[0]["same_bytes_again"]:
        pytest.skip("this machine does not let a process switch off address space randomisation")
    assert paths[0].read_bytes() == paths[1].read_bytes()
    sidecar = json.loads(json.dumps(sidecars[0]))
    assert sidecar["sha256"] == hashlib.sha256(paths[0].read_bytes()).hexdigest()
    assert sidecar["source"] == f"{precision}.onnx"
    assert sidecar["source_sha256"] == hashlib.sha256((files / f"{precision}.onnx").read_bytes()).hexdigest()
    assert sidecar["profiles"] == [{"x": {"min": [1, 1, 8, 8], "opt": [4, 1, 8, 8], "max": [8, 1, 8, 8]}}]
    assert sidecar["compute_capabilities"] == ["8.0", "8.6", "8.9", "12.0"]
    types = {"fp32": {"FLOAT"}, "fp16": {"HALF"}, "bf16": {"BF16"}, "mixed": {"HALF"}, "int8": {"FLOAT"}}
    assert set(sidecar["layer_types"]) == types[precision]
    assert bool(sidecar["wide_layers"]) == (precision in ("fp32", "int8"))
    assert (sidecar["verification"], sidecar["tf32"], sidecar["flags"]) == ("built, not run", False, [])
    assert sidecar["system"].startswith("Linux")


@needs_rtx
@pytest.mark.parametrize("name", ["resnet_basic", "bn_transformer"])
@pytest.mark.parametrize("precision", ["fp16", "mixed", "int8"])
def test_engines_of_other_networks_are_the_same_twice(tmp_path, name, precision):
    architecture = ARCHITECTURES[name]
    network = randomise(architecture.make(1).eval(), "positive", seed=3)
    model = emit_onnx(fold(network, (example(architecture, batch=2),))[0])
    onnx.save(model, tmp_path / "fp32.onnx")
    feeds = {model.graph.input[0].name: example(architecture, batch=8, seed=1).numpy()}
    narrow, report = Narrowing().in_precision(precision, model, tmp_path / "fp32.onnx", feeds, tmp_path / "m.onnx")
    onnx.save(narrow, tmp_path / "m.onnx")
    options = BuildOptions(precision, wide=frozenset(report.facts["wide"]), compute_capabilities=ONE_GPU)
    engines = [tmp_path / name for name in ("a.rtx.engine", "b.rtx.engine")]
    sidecar, _ = (RTX.build(tmp_path / "m.onnx", path, options) for path in engines)
    if sidecar["same_bytes_again"]:
        assert engines[0].read_bytes() == engines[1].read_bytes()
    assert ("HALF" in sidecar["layer_types"]) == (precision != "int8")


@needs_rtx
def test_a_half_engine_from_a_single_graph_is_refused_by_layer(files, tmp_path):
    path = tmp_path / "m.engine"
    with pytest.raises(
        UnsupportedError, match=r"asked for a fp16 engine, found float32 in conv1, relu1, .* and \d+ more"
    ):
        RTX.build(files / "fp32.onnx", path, BuildOptions(precision="fp16"))
    assert not path.exists()


@needs_rtx
def test_tf32_is_off_unless_asked_for(files, tmp_path):
    for tf32 in (False, True):
        sidecar = RTX.build(files / "fp32.onnx", tmp_path / "m.engine", BuildOptions(tf32=tf32))
        assert sidecar["tf32"] is tf32


@needs_rtx
def test_engines_are_built_for_the_gpus_asked_for(files, tmp_path):
    one = BuildOptions(compute_capabilities=((8, 6),))
    assert RTX.build(files / "fp32.onnx", tmp_path / "m.engine", one)["compute_capabilities"] == ["8.6"]
    with pytest.raises(ConfigError, match=r"does not build for SM90; it builds for 7\.5, 8\.0"):
        RTX.build(files / "fp32.onnx", tmp_path / "n.engine", BuildOptions(compute_capabilities=((9, 0),)))


@needs_rtx
def test_an_error_that_is_only_logged_is_a_failure(files, tmp_path):
    turing = BuildOptions(compute_capabilities=((7, 5),))
    with pytest.raises(UnsupportedError, match=r"cannot build fp32\.onnx: .*Turing") as caught:
        RTX.build(files / "fp32.onnx", tmp_path / "m.engine", turing)
    assert "\n" not in str(caught.value)
    RTX.build(files / "fp32.onnx", tmp_path / "m.engine")  # and it is forgotten by the next build


@needs_rtx
def test_graphs_that_the_parser_cannot_read_are_one_line(tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(graph_of([helper.make_node("Det", ["x"], ["y"], name="det")], {"x": [2, 2]}, {"y": []}), path)
    with pytest.raises(UnsupportedError, match=r"cannot read m\.onnx: node 'det' \(Det\) is not supported"):
        RTX.build(path, tmp_path / "m.engine")
    mixed = graph_of([helper.make_node("MatMul", ["x", "w"], ["y"], name="mm")], {"x": [2, 2]}, {"y": [2, 2]})
    mixed.graph.initializer.append(numpy_helper.from_array(np.ones((2, 2), np.float16), "w"))
    path.write_bytes(mixed.SerializeToString())
    with pytest.raises(UnsupportedError, match=r"node 'mm' \(MatMul\): .*must have same input types") as caught:
        RTX.build(path, tmp_path / "m.engine")
    assert "\n" not in str(caught.value)
    assert "driver" not in str(caught.value)
    with pytest.raises(ArtifactError, match="there is no such file"):
        RTX.build(tmp_path / "none.onnx", tmp_path / "m.engine")


@needs_rtx
def test_every_compute_layer_type_exists():
    import tensorrt_rtx

    assert set(tensorrt_rtx.LayerType.__members__) >= COMPUTE_LAYERS


@needs_rtx
def test_engines_say_why_they_do_not_run_here(files, tmp_path):
    if RTX.cannot_run() is None:
        pytest.skip("engines run here")
    path = tmp_path / "m.engine"
    RTX.build(files / "fp32.onnx", path)
    with pytest.raises(MissingDependencyError, match="backend 'tensorrt-rtx' cannot run here: "):
        RTX.open(path)


def layer(name, dtype, kind="CONVOLUTION"):
    return TypedLayer(name, kind, (f"node_{name}",), dtype)


def test_the_audit_knows_what_may_be_wide():
    layers = [layer("a", "HALF"), layer("n", "FLOAT", "NORMALIZATION"), layer("c", "FLOAT", "CAST")]
    for wide in ({"n"}, {"node_n"}):
        found = audit(layers, BuildOptions(precision="fp16", wide=frozenset(wide)))
        assert found == {"layer_types": {"FLOAT": 1, "HALF": 1}, "wide_layers": ["n"]}
    with pytest.raises(UnsupportedError, match="found float32 in n; convert"):
        audit(layers, BuildOptions(precision="fp16"))
    with pytest.raises(UnsupportedError, match="asked for a bf16 engine, found float32"):
        audit([layer("a", "HALF")], BuildOptions(precision="bf16"))
    audit(layers, BuildOptions(precision="mixed"))
    with pytest.raises(UnsupportedError, match="mixed engine, found no half layer"):
        audit(layers[1:], BuildOptions(precision="mixed"))
    with pytest.raises(UnsupportedError, match="int8 engine, found no quantising layer"):
        audit(layers, BuildOptions(precision="int8"))
    audit([*layers, layer("q", "INT8", "QUANTIZE")], BuildOptions(precision="int8"))
    assert audit([], BuildOptions()) == {"layer_types": {}, "wide_layers": []}


def test_profiles_cover_every_input():
    specs = [TensorSpec("x", ("n", 5), "float32"), TensorSpec("k", (4, 5), "float32")]
    free = TensorSpec("s", ("n", "t"), "float32")
    options = BuildOptions(
        batch=(1, 2, 3), profiles=({"s": ((1, 4), (2, 8), (3, 16))}, {"s": ((1, 1), (1, 1), (1, 2))})
    )
    first, second = options.profiles_of([*specs, free])
    assert first == {"x": ((1, 5), (2, 5), (3, 5)), "k": ((4, 5),) * 3, "s": ((1, 4), (2, 8), (3, 16))}
    assert second["s"][2] == (1, 2)
    assert BuildOptions().profiles_of(specs) == [{"x": ((1, 5), (16, 5), (256, 5)), "k": ((4, 5),) * 3}]
    with pytest.raises(ConfigError, match=r"'s' has free axes besides the batch.*--profile"):
        BuildOptions().profiles_of([free])
    with pytest.raises(ConfigError, match="a profile names the input 's'; the model takes x, k"):
        options.profiles_of(specs)
    for shapes in (((1, 6),) * 3, ((1, 5, 5),) * 3):
        with pytest.raises(ConfigError, match="does not fit its shape"):
            BuildOptions(profiles=({"x": shapes},)).profiles_of(specs)


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch": (2, 1, 3)},
        {"batch": (0, 1, 1)},
        {"builder_level": 6},
        {"profiles": ({"x": ((1, 2), (1,), (1, 2))},)},
        {"profiles": ({"x": ((2, 2), (1, 2), (2, 2))},)},
    ],
)
def test_options_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ConfigError):
        BuildOptions(**wrong)


def test_the_table_holds_engine_builders():
    builders = [name for name, backend in BACKENDS.items() if isinstance(backend, EngineBackend)]
    assert builders == ["tensorrt-rtx", "tensorrt"]


def test_tensorrt_says_what_it_lacks_here(files, tmp_path):
    with pytest.raises(MissingDependencyError, match=r"tensorrt is not installed; pip install lowprec\[tensorrt\]"):
        BACKENDS["tensorrt"].build(files / "fp32.onnx", tmp_path / "m.trt.engine")


def test_engines_go_to_the_library_that_their_name_says():
    for name, takes in (("model.rtx.engine", {"tensorrt-rtx"}), ("model.trt.engine", {"tensorrt"}), ("m.onnx", set())):
        assert {b.name for b in BACKENDS.values() if isinstance(b, EngineBackend) and b.accepts(name)} == takes


@needs_rtx
def test_what_this_process_built_is_trusted(files, tmp_path, monkeypatch):
    engine, seen = tmp_path / "m.rtx.engine", []
    (tmp_path / "fp32.onnx").write_bytes((files / "fp32.onnx").read_bytes())
    content = RTX.build(tmp_path / "fp32.onnx", engine, BuildOptions(compute_capabilities=ONE_GPU))
    (tmp_path / "m.rtx.engine.json").write_text(json.dumps(content))
    monkeypatch.setattr(session, "open_engine", lambda *_, trusted: seen.append(trusted))
    for backend in (RTX, TensorRT(LIBRARY, "of another process")):
        monkeypatch.setattr(backend, "cannot_run", lambda: None)
        backend.open(engine)
    assert seen == [True, False]


# --- options: each is built for real where TensorRT-RTX has it -------------------------------------------------------
@needs_rtx
def test_several_profiles_levels_and_workspace_are_built(files, tmp_path):
    wide = {"x": ((9, 1, 8, 8), (16, 1, 8, 8), (32, 1, 8, 8))}
    options = BuildOptions(
        "fp16", batch=(1, 4, 8), profiles=({}, wide), builder_level=1, workspace=1 << 26, compute_capabilities=ONE_GPU
    )
    sidecar = RTX.build(files / "fp16.onnx", tmp_path / "m.rtx.engine", options)
    assert [profile["x"]["max"][0] for profile in sidecar["profiles"]] == [8, 32]
    assert sidecar["builder_level"] == 1
    alone = RTX.build(
        files / "fp16.onnx", tmp_path / "n.rtx.engine", BuildOptions("fp16", compute_capabilities=ONE_GPU)
    )
    assert (tmp_path / "m.rtx.engine").stat().st_size > (tmp_path / "n.rtx.engine").stat().st_size
    assert alone["sha256"] != sidecar["sha256"]


@needs_rtx
def test_weights_may_be_streamed(files, tmp_path):
    options = BuildOptions("fp16", weight_streaming=True, compute_capabilities=ONE_GPU)
    assert RTX.build(files / "fp16.onnx", tmp_path / "m.rtx.engine", options)["flags"] == ["weight_streaming"]


@needs_rtx
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"version_compatible": True}, "has no option version compatible: its engines are bound to its version"),
        ({"hardware_compatible": "ampere+"}, "has no option hardware compatible: it builds for the compute"),
        ({"timing_cache": "cache.bin"}, "has no option timing cache: it times nothing"),
    ],
)
def test_options_that_tensorrt_rtx_lacks_are_refused(files, tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        RTX.build(files / "fp32.onnx", tmp_path / "m.engine", BuildOptions(**options))
    assert not list(tmp_path.iterdir())


@needs_rtx
@pytest.mark.parametrize("option", ["refittable", "stripped"])
def test_options_that_take_a_driver_say_so(files, tmp_path, option):
    if missing_driver() is None:
        assert RTX.build(files / "fp32.onnx", tmp_path / "m.engine", BuildOptions(**{option: True}))["flags"] == [
            option
        ]
        return
    with pytest.raises(MissingDependencyError, match=f"builds {option} engines only where there is a GPU"):
        RTX.build(files / "fp32.onnx", tmp_path / "m.engine", BuildOptions(**{option: True}))


@needs_rtx
def test_progress_is_reported(files, tmp_path):
    seen = []
    options = BuildOptions(progress=lambda done, total: seen.append((done, total)), compute_capabilities=ONE_GPU)
    RTX.build(files / "fp32.onnx", tmp_path / "m.engine", options)
    assert len(seen) > 10
    assert all(0 < done <= total for done, total in seen)


@needs_rtx
def test_ctrl_c_ends_a_build_and_leaves_nothing(files, tmp_path):
    options = BuildOptions(progress=lambda done, total: os.kill(os.getpid(), signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            RTX.build(files / "fp32.onnx", tmp_path / "m.engine", options)
    finally:
        signal.signal(signal.SIGINT, before)
    assert not list(tmp_path.iterdir())


@needs_rtx
def test_a_full_disk_leaves_nothing(files, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            RTX.build(files / "fp32.onnx", tmp_path / "m.engine", BuildOptions(compute_capabilities=ONE_GPU))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


@needs_rtx
def test_a_crash_of_the_library_is_one_line(files, tmp_path, monkeypatch):
    crash = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    (tmp_path / "tensorrt_rtx.py").write_text(crash)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UnsupportedError, match=r"TensorRT-RTX died while it built fp32\.onnx: SIGSEGV") as caught:
        RTX.build(files / "fp32.onnx", tmp_path / "m.engine", BuildOptions(compute_capabilities=ONE_GPU))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "m.engine").exists()


@needs_rtx
def test_an_operator_that_is_not_supported_is_named_with_its_module(tmp_path):
    model = graph_of([helper.make_node("Det", ["x"], ["y"], name="det")], {"x": [2, 2]}, {"y": []})
    model.graph.node[0].metadata_props.add(key="module_path", value="head.volume")
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(UnsupportedError, match=r"node 'det' \(Det of 'head.volume'\) is not supported"):
        RTX.build(tmp_path / "m.onnx", tmp_path / "m.engine")


# --- what only a GPU host has, with a stand-in of the library ---------------------------------------------------------
class Inspected:
    """An engine whose inspector says what it is given."""

    def __init__(self, text):
        self._text = text

    def create_engine_inspector(self):
        return self

    def get_engine_information(self, form):
        return self._text


def said(*types):
    layers = [
        {"Name": f"l{i}", "Outputs": [{"Format/Datatype": f"Row major linear {t} format"}]} for i, t in enumerate(types)
    ]
    return Inspected(json.dumps({"Layers": layers}))


def test_the_engine_is_audited_where_it_can_be_read():
    import types

    trt = types.SimpleNamespace(LayerInformationFormat=types.SimpleNamespace(JSON="json"))
    assert built_types(trt, said("FP16", "FP16", "FP32"), "fp16") == {"FLOAT": 1, "HALF": 2}
    assert built_types(trt, said("Half", "Int8"), "int8") == {"HALF": 1, "INT8": 1}
    with pytest.raises(UnsupportedError, match="asked for a fp16 engine, and it was built to write float32 in l0, l1"):
        built_types(trt, said("FP32", "FP32"), "fp16")
    for text in ('{"Layers": ["a", "b"]}', "not json", "[]"):
        assert built_types(trt, Inspected(text), "fp16") is None


class Config:
    """Records what a builder's config is asked for, as TensorRT's own does."""

    def __init__(self):
        self.flags = set()
        self.cache = None

    def set_flag(self, flag):
        self.flags.add(flag)

    def create_timing_cache(self, held):
        return None if held == b"foreign" else Cache(held)

    def set_timing_cache(self, cache, ignore):
        self.cache = cache
        return True

    def get_timing_cache(self):
        return self.cache


class Cache:
    def __init__(self, held):
        self.held = held

    def serialize(self):
        return self.held + b"timed"


@pytest.mark.parametrize("empty", [False, True])
def test_a_timing_cache_is_written_once_and_then_pins_the_build(tmp_path, empty):
    import types

    flags = types.SimpleNamespace(EDITABLE_TIMING_CACHE="editable", ERROR_ON_TIMING_CACHE_MISS="error")
    trt, path = types.SimpleNamespace(BuilderFlag=flags), tmp_path / "cache"
    first, second = Config(), Config()
    if empty:
        path.touch()
    build._use_timing_cache(trt, first, path)
    assert first.flags == {"editable"}
    facts = build._store_timing_cache(first, BuildOptions(timing_cache=path))
    assert path.read_bytes() == b"timed"
    build._use_timing_cache(trt, second, path)
    assert second.flags == {"editable", "error"}
    assert build._store_timing_cache(second, BuildOptions(timing_cache=path)) == facts
    path.write_bytes(b"foreign")
    with pytest.raises(ArtifactError, match="no timing cache of this version and this GPU"):
        build._use_timing_cache(trt, Config(), path)
    assert LIBRARY.lacks["timing_cache"]
