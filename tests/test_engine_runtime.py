"""Running engines, with stand-ins for what is not here: the CUDA driver in C, TensorRT's runtime in Python.

No engine has been run on a GPU by these tests; they hold the adapter's own logic.
"""

import ctypes
import gc
import json
import shutil
import subprocess
import threading
import types
from pathlib import Path

import numpy as np
import pytest
from reference_parity import cnn, trained_weights

from lowprec.artifacts import sha256_of
from lowprec.errors import ArtifactError, DataError, MissingDependencyError, UnsupportedError
from lowprec.export.backends.cuda import Driver, Gpu
from lowprec.export.backends.tensorrt import session as sessions
from lowprec.export.backends.tensorrt.library import RTX, TENSORRT, Library
from lowprec.export.backends.tensorrt.session import EngineSession
from lowprec.export.backends.tensorrt.sidecar import check_sidecar, source_of
from lowprec.export.stages import run_batched


@pytest.fixture(scope="module")
def cuda(tmp_path_factory):
    if shutil.which("cc") is None:
        pytest.skip("no C compiler for the stand-in of the CUDA driver")
    target = tmp_path_factory.mktemp("cuda") / "libcuda.so.1"
    source = Path(__file__).with_name("stand_in_cuda.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(target), str(source)], check=True)
    return target


@pytest.fixture
def driver(cuda):
    made = Driver(str(cuda))
    yield made
    gc.collect()  # sessions, which give their memory back when they go
    ctypes.CDLL(str(cuda)).stand_in_fail(0)
    assert ctypes.CDLL(str(cuda)).stand_in_live() == 0  # whatever happened, memory was given back


INPUT, OUTPUT = object(), object()
TRT = types.SimpleNamespace(TensorIOMode=types.SimpleNamespace(INPUT=INPUT, OUTPUT=OUTPUT), __version__="0.0")


class Context:
    """Doubles its input, as an engine would on the device: through addresses."""

    def __init__(self, engine):
        self._engine, self._shapes, self._addresses, self.profile = engine, {}, {}, None

    def set_optimization_profile_async(self, index, stream):
        self.profile = index
        return True

    def set_input_shape(self, name, shape):
        self._shapes[name] = shape
        return True

    def infer_shapes(self):
        return self._engine.uninferred

    def get_tensor_shape(self, name):
        return (-1, 2) if self._engine.depends else self._shapes["x"]

    def set_tensor_address(self, name, address):
        self._addresses[name] = address
        return True

    def execute_async_v3(self, stream):
        if self._engine.fails:
            return False
        count = int(np.prod(self._shapes["x"]))
        x = np.ctypeslib.as_array((ctypes.c_float * count).from_address(self._addresses["x"]))
        y = np.ctypeslib.as_array((ctypes.c_uint16 * count).from_address(self._addresses["y"]))
        y[:] = (2 * x).astype(np.float16).view(np.uint16)
        return True


class Engine:
    """x (n, 2) float32 -> y (n, 2) float16; two profiles: 1 to 4 rows, 5 to 9."""

    num_io_tensors, num_optimization_profiles, num_layers = 2, 2, 3
    uninferred, depends, fails = (), False, False

    def get_tensor_name(self, index):
        return "xy"[index]

    def get_tensor_mode(self, name):
        return INPUT if name == "x" else OUTPUT

    def get_tensor_dtype(self, name):
        return types.SimpleNamespace(name="FLOAT" if name == "x" else "HALF")

    def get_tensor_shape(self, name):
        return (-1, 2)

    profiles = (((1, 2), (2, 2), (4, 2)), ((5, 2), (6, 2), (9, 2)))

    def get_tensor_profile_shape(self, name, index):
        return self.profiles[index]

    def create_execution_context(self):
        self.context = Context(self)
        return self.context


def opened(driver, **faults):
    engine = Engine()
    for name, value in faults.items():
        setattr(engine, name, value)
    logger = types.SimpleNamespace(errors=[])
    return EngineSession(TRT, engine, driver, logger, "stand-in"), engine


@pytest.mark.parametrize(("rows", "profile"), [(1, 0), (4, 0), (5, 1), (9, 1)])
def test_a_batch_runs_in_the_profile_that_holds_it(driver, rows, profile):
    session, engine = opened(driver)
    x = np.random.default_rng(0).normal(size=(rows, 2))
    y = session.run({"x": x})["y"]
    assert engine.context.profile == profile
    assert y.dtype == np.float16
    assert np.array_equal(y, (2 * x.astype(np.float32)).astype(np.float16))
    assert [(spec.name, spec.shape, spec.dtype) for spec in (*session.inputs, *session.outputs)] == [
        ("x", (None, 2), "float32"), ("y", (None, 2), "float16")
    ]  # fmt: skip
    assert session.placement == {"GPU": 3}


@pytest.mark.parametrize(
    ("profiles", "samples", "calls"),
    [
        (Engine.profiles, 20, [9, 9, 2]),
        (Engine.profiles, 3, [3]),
        (Engine.profiles[1:] * 2, 20, [9, 9, 9]),  # two samples are fewer than it takes, so the rest is filled
        (Engine.profiles[1:] * 2, 2, [9]),
        ((((1, 3),) * 3, ((2, 2), (3, 2), (3, 2))), 7, [3, 3, 3]),  # the other profile is for other samples
    ],
)
def test_samples_are_given_in_batches_that_the_engine_takes(driver, monkeypatch, profiles, samples, calls):
    session, _ = opened(driver, profiles=profiles)
    run, seen = session._run, []
    monkeypatch.setattr(session, "_run", lambda feeds: seen.append(len(feeds["x"])) or run(feeds))
    x = np.random.default_rng(0).normal(size=(samples, 2))
    y = run_batched(session, {"x": x})["y"]
    assert seen == calls
    assert np.array_equal(y, (2 * x.astype(np.float32)).astype(np.float16))


def test_samples_that_no_profile_holds_are_one_line(driver):
    session, _ = opened(driver, profiles=(((1, 3),) * 3,) * 2)
    with pytest.raises(UnsupportedError, match=r"samples of the shapes \{'x': \(2,\)\} lie in no profile"):
        run_batched(session, {"x": np.zeros((4, 2))})


@pytest.mark.parametrize(
    ("faults", "rows", "kind", "words"),
    [
        ({}, 10, DataError, "lie in no profile of the engine"),
        ({"uninferred": ("s",)}, 2, UnsupportedError, "without the values of s"),
        ({"depends": True}, 2, UnsupportedError, "depends on values"),
        ({"fails": True}, 2, UnsupportedError, "the engine failed: no reason given"),
    ],
)
def test_what_goes_wrong_is_one_line_and_gives_memory_back(driver, faults, rows, kind, words):
    session, _ = opened(driver, **faults)
    with pytest.raises(kind, match=words):
        session.run({"x": np.zeros((rows, 2))})


def test_memory_is_kept_from_run_to_run_and_grows(driver, cuda):
    session, _ = opened(driver)
    count = ctypes.CDLL(str(cuda)).stand_in_allocations
    before, seen = count(), []
    for rows in (4, 4, 1, 9, 5):
        x = np.full((rows, 2), rows, np.float32)
        assert np.array_equal(session.run({"x": x})["y"], 2 * x)
        seen.append(count() - before)
    assert seen == [2, 2, 2, 4, 4]
    assert ctypes.CDLL(str(cuda)).stand_in_live() == 2
    del session
    gc.collect()
    assert ctypes.CDLL(str(cuda)).stand_in_live() == 0


def test_an_engine_runs_in_another_thread(driver):
    session, _ = opened(driver)
    found = []
    thread = threading.Thread(target=lambda: found.append(session.run({"x": np.ones((2, 2))})["y"]))
    thread.start()
    thread.join()
    assert np.array_equal(found, [[[2, 2], [2, 2]]])


def test_errors_of_the_driver_are_its_own_words(driver, cuda):
    session, _ = opened(driver)
    ctypes.CDLL(str(cuda)).stand_in_fail(700)
    with pytest.raises(UnsupportedError, match=r"refuses cuStreamSynchronize: an illegal memory access .* \(700\)"):
        session.run({"x": np.zeros((2, 2))})


def test_a_machine_without_a_device_says_so(cuda):
    ctypes.CDLL(str(cuda)).stand_in_fail(100)
    try:
        with pytest.raises(MissingDependencyError, match="refuses cuInit: no CUDA-capable device"):
            Driver(str(cuda))
    finally:
        ctypes.CDLL(str(cuda)).stand_in_fail(0)
    with pytest.raises(MissingDependencyError, match="no NVIDIA driver"):
        Driver("libcuda-that-is-not-there.so")


def test_the_device_is_named(driver):
    assert driver.gpu() == Gpu("Stand-in 1", "8.6", "13.2")


class Loading:
    """A library whose runtime logs an error, hands back nothing, or hands back an engine without its weights."""

    label, __version__ = "TensorRT", "0"
    TensorIOMode = TRT.TensorIOMode
    LayerInformationFormat = types.SimpleNamespace(JSON="json")

    def __init__(self, log=None, engine=None, refits=True, commits=True):
        library = self
        self.refitted, self.runtimes = [], []

        class Runtime:
            engine_host_code_allowed = False

            def __init__(self, logger):
                library.runtimes.append(self)
                logger.errors += [log] if log else []

            def deserialize_cuda_engine(self, data):
                return engine

        class Refitter:
            def __init__(self, found, logger):
                assert found is engine

            def refit_cuda_engine(self):
                return commits

        class OnnxParserRefitter:
            def __init__(self, refitter, logger):
                assert isinstance(refitter, Refitter)

            def refit_from_file(self, path):
                library.refitted += [path] if refits else []
                return refits

        self.Runtime, self.Refitter, self.OnnxParserRefitter = Runtime, Refitter, OnnxParserRefitter

    def load(self):
        return self


@pytest.fixture
def load(driver, monkeypatch, tmp_path):
    """Opens an engine of a stand-in of the library."""
    monkeypatch.setattr(sessions, "recorder", lambda library: types.SimpleNamespace(errors=[]))
    monkeypatch.setattr(sessions, "driver", lambda: driver)
    (tmp_path / "m.engine").write_bytes(b"engine")
    (tmp_path / "m.onnx").write_bytes(cnn(trained_weights(width=4)).SerializeToString())

    def opening(library, flags=(), trusted=False):
        source = {"source": "m.onnx", "source_sha256": sha256_of(tmp_path / "m.onnx")}
        content = {"flags": list(flags), "precision": "fp32", **source}
        return sessions.open_engine(library, tmp_path / "m.engine", content, trusted)

    return opening


class Readable(Engine):
    def create_engine_inspector(self):
        return types.SimpleNamespace(get_engine_information=lambda form: "{}")


@pytest.mark.parametrize(("log", "engine"), [("Error 35: no driver", object()), (None, None)])
def test_a_hollow_engine_is_never_taken_for_one(load, log, engine):
    with pytest.raises(ArtifactError, match=r"TensorRT cannot load .*m\.engine: (Error 35|no reason given)"):
        load(Loading(log, engine))


def test_a_program_for_the_cpu_is_run_only_where_it_was_built(load):
    library = Loading(engine=Readable())
    with pytest.raises(MissingDependencyError, match=r"m\.engine is version compatible and so carries a program"):
        load(library, ["version_compatible"])
    assert not library.runtimes
    load(library, ["version_compatible"], trusted=True)
    load(library, trusted=True)
    assert [runtime.engine_host_code_allowed for runtime in library.runtimes] == [True, False]


def test_an_engine_without_weights_gets_them_from_the_file_that_it_was_built_from(load, tmp_path):
    library = Loading(engine=Readable())
    load(library)
    assert not library.refitted
    session = load(library, ["stripped"])
    assert library.refitted == [str(tmp_path / "m.onnx")]
    assert session.run({"x": np.ones((2, 2))})["y"].tolist() == [[2, 2], [2, 2]]
    for faults in ({"refits": False}, {"commits": False}):
        with pytest.raises(ArtifactError, match=r"does not take those of m\.onnx: no reason given"):
            load(Loading(engine=Readable(), **faults), ["stripped"])


@pytest.mark.parametrize("change", [lambda path: path.unlink(), lambda path: path.write_bytes(b"another")])
def test_weights_that_are_not_those_of_the_build_are_refused(tmp_path, change):
    engine = written(tmp_path, TENSORRT)
    content = json.loads((tmp_path / "m.engine.json").read_text())
    assert source_of(engine, content) == tmp_path / "m.onnx"
    with pytest.raises(ArtifactError, match="points outside the folder"):
        source_of(engine, content | {"source": "../m.onnx"})
    change(tmp_path / "m.onnx")
    with pytest.raises(ArtifactError, match=r"m\.engine holds no weights; they come from m\.onnx beside it"):
        source_of(engine, content)


# --- sidecars: checked before the library is asked --------------------------------------------------------------------
def written(tmp_path, library: Library, **changed):
    import platform

    engine = tmp_path / "m.engine"
    engine.write_bytes(b"engine")
    (tmp_path / "m.onnx").write_bytes(b"source")
    content = {
        "backend": library.backend,
        "version": "1.0",
        "system": f"{platform.system()} {platform.machine()}",
        "sha256": sha256_of(engine),
        "source": "m.onnx",
        "source_sha256": sha256_of(tmp_path / "m.onnx"),
        "precision": "fp16",
        "flags": [],
        "built_on": {"name": "GPU A", "capability": "8.6", "driver": "13.0"},
    } | ({"compute_capabilities": ["8.0", "8.6", "12.0"]} if library is RTX else {})
    (tmp_path / "m.engine.json").write_text(json.dumps(content | changed))
    return engine


@pytest.fixture
def version(monkeypatch):
    monkeypatch.setattr(Library, "load", lambda self: types.SimpleNamespace(__version__="1.0"))


A, OTHER = Gpu("GPU A", "8.6", "13.0"), Gpu("GPU B", "8.6", "13.0")


@pytest.mark.usefixtures("version")
@pytest.mark.parametrize(
    ("library", "changed", "gpu"),
    [
        (RTX, {}, A),
        (RTX, {}, Gpu("GPU C", "12.0", "13.0")),
        (TENSORRT, {}, A),
        (TENSORRT, {"hardware_compatible": "same"}, OTHER),
        (TENSORRT, {"hardware_compatible": "ampere+"}, Gpu("GPU H", "9.0", "13.0")),
        (TENSORRT, {"version": "0.9", "flags": ["version_compatible"]}, A),
    ],
)
def test_an_engine_that_fits_is_loaded(tmp_path, library, changed, gpu):
    assert check_sidecar(written(tmp_path, library, **changed), library, gpu)["backend"] == library.backend


@pytest.mark.usefixtures("version")
@pytest.mark.parametrize(
    ("library", "changed", "gpu", "kind", "words"),
    [
        (RTX, {"version": "1.1"}, A, MissingDependencyError, r"built for TensorRT-RTX version 1\.1, here is 1\.0"),
        (
            TENSORRT,
            {"version": "1.0.1", "flags": ["version_compatible"]},
            A,
            MissingDependencyError,
            r"built for TensorRT version 1\.0\.1 and newer, here is 1\.0;",
        ),
        (RTX, {"system": "Windows AMD64"}, A, MissingDependencyError, "system Windows AMD64, here is Linux"),
        (
            RTX,
            {},
            Gpu("H", "9.0", "13.0"),
            MissingDependencyError,
            r"compute capability 8\.0, 8\.6, 12\.0; this GPU, H",
        ),
        (TENSORRT, {}, Gpu("GPU A", "8.6", "12.9"), MissingDependencyError, r"a driver for CUDA 13\.0, this machine's"),
        (RTX, {"backend": "tensorrt"}, A, ArtifactError, "is not the sidecar of a TensorRT-RTX engine"),
        (RTX, {"sha256": "0" * 64}, A, ArtifactError, "is not the file that m.engine.json speaks of"),
        (TENSORRT, {}, OTHER, MissingDependencyError, r"was built on GPU A .*this GPU is GPU B \(8\.6\)"),
        (
            TENSORRT,
            {"hardware_compatible": "same"},
            Gpu("C", "8.9", "13.0"),
            MissingDependencyError,
            "compatible: same",
        ),
        (
            TENSORRT,
            {"hardware_compatible": "ampere+"},
            Gpu("T", "7.5", "13.0"),
            MissingDependencyError,
            "this GPU is T",
        ),
    ],
)
def test_an_engine_for_something_else_is_one_line(tmp_path, library, changed, gpu, kind, words):
    with pytest.raises(kind, match=words) as caught:
        check_sidecar(written(tmp_path, library, **changed), library, gpu)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("version")
@pytest.mark.parametrize(
    "changed",
    [
        {"version": None},
        {"system": 3},
        {"flags": None},
        {"flags": [["tf32"]]},
        {"compute_capabilities": 8.6},
        {"compute_capabilities": [8.6]},
        {"built_on": "GPU A"},
        {"built_on": {"name": "GPU A"}},
        {"hardware_compatible": "all"},
        {"hardware_compatible": ["same"]},
        {"source": None},
        {"precision": 16},
    ],
)
def test_a_damaged_sidecar_is_one_line(tmp_path, changed):
    engine = written(tmp_path, TENSORRT, **changed)
    with pytest.raises(ArtifactError, match=r"m\.engine\.json is damaged, or of another version of lowprec"):
        check_sidecar(engine, TENSORRT, A)


@pytest.mark.usefixtures("version")
def test_an_engine_without_a_sidecar_is_not_trusted(tmp_path):
    with pytest.raises(ArtifactError, match="no engine at"):
        check_sidecar(tmp_path / "m.engine", RTX, A)
    engine = written(tmp_path, RTX)
    (tmp_path / "m.engine.json").unlink()
    with pytest.raises(ArtifactError, match="sidecar"):
        check_sidecar(engine, RTX, A)
