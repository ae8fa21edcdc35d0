"""int8 by onnxruntime's `quantize_static`: Q/DQ pairs with MinMax scales, one per channel for weights.

Symmetric throughout, because TensorRT takes no other zero point than 0, and with biases left in float32, because it
takes no int32 ones. Better scales and equalisation are calibration's work; this is the plain, reproducible way.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from lowprec.errors import DataError, MissingDependencyError, UnsupportedError
from lowprec.export.emit.keep import KeepList
from lowprec.export.external_data import check_model
from lowprec.export.onnx_files import first_line, load_onnx, module_path
from lowprec.export.tensors import fixed_batch, specs_of
from lowprec.packages import is_installed
from lowprec.report import ChangeReport

Arrays = Mapping[str, NDArray[Any]]

_BATCH = 64  # samples per call; ranges do not depend on it


def check_quantiser() -> None:
    """Raises `MissingDependencyError` where onnxruntime is not installed."""
    if not is_installed("onnxruntime"):
        raise MissingDependencyError(
            "int8 was asked for, and onnxruntime, whose quantiser makes it, is not installed; pip install lowprec[cpu]"
        )


def quantise(path: Path, feeds: Arrays, keep: KeepList) -> tuple[onnx.ModelProto, ChangeReport]:
    """An int8 copy of a float32 model with Q/DQ pairs.

    A scale is the largest magnitude that was seen over 127, of each tensor or of each output channel of a weight.

    Args:
        path: the model's file.
        feeds: samples along axis 0 of every input, which the scales of activations are taken from.
        keep: nodes that are not quantised.

    Returns:
        The model; a report with a `refused` row per node that was kept, and the facts `wide` (by the name of the node,
        why), `quantised_tensors` and `samples`.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
        DataError: samples that no scale can be taken from: not finite, 0 throughout, or fewer than a fixed batch.
        UnsupportedError: it cannot run or quantise this model.
    """
    check_quantiser()
    _check_samples(feeds)
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    source = load_onnx(path)
    report, wide = ChangeReport(), {}
    for node in source.graph.node:
        if reason := keep.reason(node):
            report.refuse(module_path(node) or node.name, reason)
            wide[node.name] = reason
    batches = _Batches(source, feeds)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".quantise-") as folder, _quiet():
        target = Path(folder) / "quantised.onnx"
        try:
            quantize_static(
                str(path),
                str(target),
                batches,
                quant_format=QuantFormat.QDQ,
                calibrate_method=CalibrationMethod.MinMax,
                per_channel=True,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=list(wide),
                use_external_data_format=any(tensor.external_data for tensor in source.graph.initializer),
                extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False},
            )
        except Exception as error:  # onnxruntime's quantiser raises every kind
            raise UnsupportedError(f"onnxruntime cannot quantise this model: {first_line(error)}") from None
        result = load_onnx(target)
        for tensor in result.graph.initializer:  # the folder goes; what it holds is read now
            _read(tensor)
    result.producer_name, result.producer_version = source.producer_name, source.producer_version
    del result.metadata_props[:]
    check_model(result)
    count = sum(node.op_type == "DequantizeLinear" for node in result.graph.node)
    report.facts.update(wide=wide, quantised_tensors=count, samples=len(next(iter(feeds.values()))))
    return result, report


def _check_samples(feeds: Arrays) -> None:
    for name, array in feeds.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise DataError(f"int8 takes its scales from the samples, and those of input {name!r} are not all finite")
        if array.dtype.kind == "f" and not array.any():
            raise DataError(f"int8 takes its scales from the samples, and those of input {name!r} are 0 throughout")


class _Batches:
    """onnxruntime's calibration reader over arrays: equal batches, each read once.

    Where the model fixes its batch, samples that do not fill the last one are left out.
    """

    def __init__(self, model: onnx.ModelProto, feeds: Arrays) -> None:
        weights = {tensor.name for tensor in model.graph.initializer}
        specs = specs_of([value for value in model.graph.input if value.name not in weights])
        fixed, total = fixed_batch(specs), len(next(iter(feeds.values())))
        if fixed and total < fixed:
            raise DataError(f"the model takes {fixed} samples at a time, and there are {total} to take scales from")
        whole = {name: array[: total - total % fixed] for name, array in feeds.items()} if fixed else feeds
        self._batches = _batches(whole, {spec.name: spec.dtype for spec in specs}, fixed or _BATCH)

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        """The next batch, None behind the last."""
        return next(self._batches, None)


def _batches(feeds: Arrays, dtypes: Mapping[str, str], size: int) -> Iterator[dict[str, NDArray[Any]]]:
    for start in range(0, len(next(iter(feeds.values()))), size):
        yield {n: np.ascontiguousarray(a[start : start + size], np.dtype(dtypes[n])) for n, a in feeds.items()}


def _read(tensor: onnx.TensorProto) -> None:
    from onnx.external_data_helper import uses_external_data

    from lowprec.export.external_data import array_of

    if uses_external_data(tensor):
        values = np.array(array_of(tensor))
        del tensor.external_data[:]
        tensor.data_location = onnx.TensorProto.DEFAULT
        tensor.raw_data = values.tobytes()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the quantiser's advice on the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
