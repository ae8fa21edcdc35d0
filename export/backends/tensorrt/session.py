"""Runs engines: TensorRT's runtime with the CUDA driver, dynamic shapes, and the profile that fits them."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowprec.errors import ArtifactError, DataError, LowprecError, MissingDependencyError, UnsupportedError
from lowprec.export.backends.base import Session, decoded, narrowed
from lowprec.export.backends.cuda import Driver, driver
from lowprec.export.backends.tensorrt.audit import built_types
from lowprec.export.backends.tensorrt.library import Library, recorder
from lowprec.export.backends.tensorrt.sidecar import source_of
from lowprec.export.onnx_files import load_onnx
from lowprec.export.tensors import TensorSpec

_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT32": "int32", "INT64": "int64",
           "INT8": "int8", "UINT8": "uint8", "BOOL": "bool"}  # fmt: skip


def open_engine(library: Library, path: Path, sidecar: Mapping[str, Any], trusted: bool = False) -> EngineSession:
    """Deserialises an engine whose sidecar was checked, and puts its weights in where it was built without.

    Args:
        library: what it was built by.
        path: the engine.
        sidecar: its content.
        trusted: whether this process built it. A version-compatible engine carries a runtime of its version, which is
            a program for the CPU; one that came from elsewhere is not run.

    Raises:
        ArtifactError: the runtime refuses it, or the ONNX file that holds its weights is not beside it.
        MissingDependencyError: it is version compatible, and not trusted.
        UnsupportedError: it is fp16 or bf16 by its sidecar, and was built to write float32.
    """
    carries_code = "version_compatible" in sidecar["flags"]
    if carries_code and not trusted:
        raise MissingDependencyError(
            f"{path.name} is version compatible and so carries a program for the CPU, which is run by nobody but the "
            "lowprec engine that built it; run that here"
        )
    trt, device = library.load(), driver()
    logger = recorder(library)
    logger.errors.clear()
    runtime = trt.Runtime(logger)
    if carries_code:
        runtime.engine_host_code_allowed = True
    engine = None if logger.errors else runtime.deserialize_cuda_engine(path.read_bytes())
    # Without a driver, or from foreign bytes, the library may hand back something hollow: the log is what counts.
    if engine is None or logger.errors:
        said = logger.errors[0] if logger.errors else "no reason given"
        raise ArtifactError(f"{library.label} cannot load {path}: {said}")
    if "stripped" in sidecar["flags"]:
        _put_weights_in(trt, engine, source_of(path, sidecar), logger)
    types = built_types(trt, engine, sidecar["precision"])
    said = ", ".join(f"{count} layers write {kind}" for kind, count in types.items()) if types else "types not readable"
    gpu = device.gpu()
    arithmetic = f"{library.label} {trt.__version__} on {gpu.name}: {said}" + ("; TF32" if sidecar.get("tf32") else "")
    return EngineSession(trt, engine, device, logger, arithmetic, runtime)


def _put_weights_in(trt: Any, engine: Any, source: Path, logger: Any) -> None:
    load_onnx(source)  # refuses weights outside its folder, which the library would read
    refitter = trt.Refitter(engine, logger)
    onnx_refitter = trt.OnnxParserRefitter(refitter, logger)
    if not onnx_refitter.refit_from_file(str(source)) or not refitter.refit_cuda_engine() or logger.errors:
        said = (logger.errors or ["no reason given"])[0]
        raise ArtifactError(f"the engine was built without weights, and does not take those of {source.name}: {said}")


class EngineSession(Session):
    """A deserialised engine. Memory on the device is kept from run to run, so that timing runs does not time it.

    Args:
        trt: the library's module.
        engine: what it deserialised.
        device: the CUDA driver.
        logger: keeps the errors that the library reports.
        arithmetic: in words.
        runtime: what deserialised it, which has to live as long as it does.
    """

    def __init__(
        self, trt: Any, engine: Any, device: Driver, logger: Any, arithmetic: str, runtime: Any = None
    ) -> None:
        self._engine, self._device, self._logger, self._runtime = engine, device, logger, runtime
        self._memory: dict[str, tuple[int, int]] = {}  # address and size by tensor
        weakref.finalize(self, _give_back, device, self._memory).atexit = False
        self._context = engine.create_execution_context()
        if self._context is None or logger.errors:
            raise UnsupportedError(f"the engine cannot be run: {(logger.errors or ['no reason given'])[0]}")
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        specs = {name: self._spec(name) for name in names}
        super().__init__(
            tuple(specs[name] for name in inputs),
            tuple(specs[name] for name in names if name not in inputs),
            arithmetic,
            {"GPU": engine.num_layers},
        )

    def _spec(self, name: str) -> TensorSpec:
        shape = tuple(None if size < 0 else int(size) for size in self._engine.get_tensor_shape(name))
        return TensorSpec(name, shape, _DTYPES[self._engine.get_tensor_dtype(name).name])

    def batches(self, feeds: Mapping[str, NDArray[Any]]) -> tuple[range, ...]:
        """How many samples it takes at a time: from the profiles that samples of this shape lie in."""
        shapes = {name: array.shape[1:] for name, array in feeds.items()}
        found = []
        for index in range(self._engine.num_optimization_profiles):
            limits = {name: self._limits(name, index) for name in shapes}
            if all(_lies_in(shape, [size[1:] for size in limits[name]]) for name, shape in shapes.items()):
                low = max(smallest[0] for smallest, _, _ in limits.values())
                high = min(largest[0] for _, _, largest in limits.values())
                found += [range(low, high + 1)] if low <= high else []
        if not found:
            raise UnsupportedError(f"samples of the shapes {shapes} lie in no profile of the engine")
        return tuple(sorted(found, key=lambda sizes: (sizes[0], sizes[-1])))

    def _limits(self, name: str, index: int) -> list[tuple[int, ...]]:
        return [tuple(map(int, shape)) for shape in self._engine.get_tensor_profile_shape(name, index)]

    def _run(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        cast = {spec.name: narrowed(feeds[spec.name], spec) for spec in self.inputs}
        self._logger.errors.clear()
        self._device.make_current()
        self._choose_profile({name: array.shape for name, array in cast.items()})
        for name, array in cast.items():
            self._device.to_device(self._bound(name, array.nbytes), array)
        found = {spec.name: np.empty(self._shape(spec.name), np.dtype(spec.dtype)) for spec in self.outputs}
        addresses = {name: self._bound(name, array.nbytes) for name, array in found.items()}
        if not self._context.execute_async_v3(self._device.stream) or self._logger.errors:
            raise UnsupportedError(f"the engine failed: {(self._logger.errors or ['no reason given'])[0]}")
        for name, array in found.items():
            self._device.to_host(array, addresses[name])
        self._device.synchronize()
        return {spec.name: decoded(found[spec.name], spec) for spec in self.outputs}

    def _choose_profile(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """The first optimisation profile that the shapes lie in, and the shapes themselves."""
        engine = self._engine
        fitting = [
            index
            for index in range(engine.num_optimization_profiles)
            if all(_lies_in(shape, self._limits(name, index)) for name, shape in shapes.items())
        ]
        if not fitting:
            limits = [self._limits(name, 0) for name in shapes]
            raise DataError(
                f"the shapes {shapes} lie in no profile of the engine; its first goes from min to max {limits}"
            )
        self._context.set_optimization_profile_async(fitting[0], self._device.stream)
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise DataError(f"the engine refuses the shape {shape} of the input {name!r}")
        missing = self._context.infer_shapes()
        if missing:
            raise UnsupportedError(f"the engine cannot infer its shapes without the values of {', '.join(missing)}")

    def _shape(self, name: str) -> tuple[int, ...]:
        shape = tuple(int(size) for size in self._context.get_tensor_shape(name))
        if any(size < 0 for size in shape):
            raise UnsupportedError(f"the shape of the output {name!r} depends on values; it is {shape} before the run")
        return shape

    def _bound(self, name: str, count: int) -> int:
        """The address of a tensor's memory, so many bytes at least, which the engine is told."""
        if name not in self._memory or self._memory[name][1] < count:
            if name in self._memory:
                self._device.free(self._memory.pop(name)[0])
            self._memory[name] = self._device.allocate(count), count
        address = self._memory[name][0]
        if not self._context.set_tensor_address(name, address):
            raise UnsupportedError(f"the engine refuses the memory of {name!r}")
        return address


def _give_back(device: Driver, memory: dict[str, tuple[int, int]]) -> None:
    with contextlib.suppress(LowprecError):  # a device that failed has given everything back already
        device.make_current()
        for address, _ in memory.values():
            device.free(address)


def _lies_in(shape: Sequence[int], profile: Sequence[Sequence[int]]) -> bool:
    low, _, high = profile
    return len(shape) == len(low) and all(a <= n <= b for a, n, b in zip(low, shape, high, strict=True))
