"""Weights that stay in a file: a model in memory refers to them by absolute path, a model on disk by a name beside it.

One protobuf message ends at 2 GiB, and a model of that size should not be in memory twice. So large weights are left
where they are, mapped where they are read, and written beside the model as ONNX's external data. ONNX itself allows
relative paths alone; absolute ones are this library's own and never leave memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from lowprec.artifacts import write_bytes, written_whole
from lowprec.export.weight_file import ALIGNMENT, LARGE, SMALLEST, WeightFile


def array_of(tensor: TensorProto) -> NDArray[Any]:
    """The values of a tensor; of one that is in a file a read-only map of it."""
    if not uses_external_data(tensor):
        return numpy_helper.to_array(tensor)
    info = ExternalDataInfo(tensor)
    kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return np.memmap(info.location, kind, "r", info.offset or 0, tuple(tensor.dims))


def refer(tensor: TensorProto, location: str, offset: int, length: int) -> None:
    """Makes a tensor a reference to bytes in a file."""
    tensor.ClearField("raw_data")
    del tensor.external_data[:]
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


def move_into(file: WeightFile, tensor: TensorProto) -> None:
    """Makes a tensor a reference to its bytes in the file, if it is worth a place there."""
    place = file.find(file.add(np.frombuffer(tensor.raw_data, np.uint8)))
    if place is not None:
        refer(tensor, str(file.path), *place)
        file.release()


def check_model(model: onnx.ModelProto, full: bool = True) -> None:
    """onnx's own check of a model whose weights may be in a file; raises its `ValidationError` or `InferenceError`."""
    onnx.checker.check_model(weights_as_inputs(model), full_check=full)


def without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a model that lacks the weights of its main graph."""
    result = onnx.ModelProto()
    for field, value in model.ListFields():
        if field.name != "graph":
            _copy_field(result, field.name, value)
    for field, value in model.graph.ListFields():
        if field.name != "initializer":
            _copy_field(result.graph, field.name, value)
    return result


def _copy_field(message: Any, name: str, value: Any) -> None:
    current = getattr(message, name)
    if hasattr(current, "extend"):
        current.extend(value)
    elif hasattr(current, "CopyFrom"):
        current.CopyFrom(value)
    else:
        setattr(message, name, value)


def weights_as_inputs(model: onnx.ModelProto) -> onnx.ModelProto:
    """A model whose weights in files are inputs of their shapes, for what looks at types and shapes alone; the model
    itself where it has none.
    """
    external = [tensor for tensor in model.graph.initializer if uses_external_data(tensor)]
    if not external:
        return model
    result = without_weights(model)
    result.graph.initializer.extend(tensor for tensor in model.graph.initializer if not uses_external_data(tensor))
    known = {value.name for value in result.graph.input}
    for tensor in external:
        if tensor.name not in known:
            value = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            result.graph.input.append(value)
    return result


def external_path(path: Path) -> Path:
    """Where the large weights of the model at a path are."""
    return path.with_name(f"{path.name}.data").absolute()


def write_model(path: Path, model: onnx.ModelProto) -> None:
    """Writes a model whole or not at all; one with large weights as two files, `path` and `path`.data.

    The weights of such a model are then in that file only: `model` refers to it.

    Raises:
        OSError: the disk is full.
    """
    data = external_path(path)
    move_weights(data, model)
    on_disk = model
    if any(uses_external_data(tensor) for tensor in model.graph.initializer):
        on_disk = onnx.ModelProto()
        on_disk.CopyFrom(model)
        for tensor in on_disk.graph.initializer:
            if uses_external_data(tensor):
                info = ExternalDataInfo(tensor)
                refer(tensor, data.name, info.offset or 0, info.length or 0)
    write_bytes(path, on_disk.SerializeToString(deterministic=True))


def move_weights(data: Path, model: onnx.ModelProto) -> None:
    """Puts every large weight into the file `data`, if together they are too large for a message."""
    elsewhere = list(_outside(data, model))
    if not any(uses_external_data(tensor) for tensor in elsewhere) and sum(map(_bytes, elsewhere)) < LARGE:
        return
    large = [tensor for tensor in model.graph.initializer if uses_external_data(tensor) or _bytes(tensor) >= SMALLEST]
    places = []
    with written_whole(data) as file:
        for tensor in large:
            places.append(_append(file, array_of(tensor)))
    for tensor, place in zip(large, places, strict=True):
        refer(tensor, str(data), *place)


def _outside(data: Path, model: onnx.ModelProto) -> Iterator[TensorProto]:
    for tensor in model.graph.initializer:
        if not uses_external_data(tensor) or os.path.abspath(ExternalDataInfo(tensor).location) != str(data):
            yield tensor


def _append(file: IO[bytes], array: NDArray[Any]) -> tuple[int, int]:
    start = -(-file.tell() // ALIGNMENT) * ALIGNMENT
    file.seek(start)
    file.write(np.ascontiguousarray(array).view(np.uint8).data if array.size else b"")
    return start, array.nbytes


def _bytes(tensor: TensorProto) -> int:
    return len(tensor.raw_data) if tensor.HasField("raw_data") else tensor.ByteSize()
