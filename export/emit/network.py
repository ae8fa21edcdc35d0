"""Writes a folded network as ONNX: dynamic axes, stable bytes, module paths on the nodes.

torch.onnx does the translation. What it adds about itself (stack traces, symbol tables, class names of its wrappers) is
taken out again: it names files of the machine that exported, and makes equal networks unequal files.
"""

from __future__ import annotations

import copy
from typing import Protocol

import onnx
import onnx_ir as ir
import torch
from torch import Tensor

import lowprec
from lowprec.errors import UnsupportedError
from lowprec.export.emit.opset import DEFAULT_OPSET, check_opset, ir_version_for
from lowprec.export.emit.per_channel import write_as_arithmetic
from lowprec.export.folding.traced.dims import dim_named
from lowprec.export.folding.traced.module import FoldedModule
from lowprec.export.folding.traced.quiet import quiet_exporter
from lowprec.export.onnx_files import MODULE_PATH, module_path
from lowprec.export.weight_file import WeightFile


class CallInterface(Protocol):
    """How a network is called; `Traced` and `FoldedModule` both say so."""

    @property
    def input_names(self) -> tuple[str, ...]:
        """One per input."""

    @property
    def output_names(self) -> tuple[str, ...]:
        """One per output."""

    @property
    def example_inputs(self) -> tuple[Tensor, ...]:
        """One tensor per input."""

    @property
    def dynamic_shapes(self) -> tuple[dict[int, str], ...]:
        """Names of the free axes of each input."""


def emit_onnx(
    folded: FoldedModule, interface: CallInterface | None = None, opset: int = DEFAULT_OPSET
) -> onnx.ModelProto:
    """The ONNX model of a folded network.

    Equal networks give equal bytes. Each node that comes from a module carries its path as metadata `module_path`.

    Args:
        folded: from `fold`.
        interface: names, example and free axes of the inputs; the folded network's own by default.
        opset: the ONNX operator set, 18 or newer.

    Raises:
        UnsupportedError: torch.onnx has no translation for an operation, or does not write this operator set.
    """
    called: CallInterface = folded if interface is None else interface
    weights = (*folded.network.parameters(), *folded.network.buffers())
    network = copy.deepcopy(folded.network, {id(tensor): tensor for tensor in weights})  # the graph is edited, they not
    for node in network.graph.nodes:
        if node.op == "call_function":
            path = folded.module_paths.get(node.name, "")
            node.meta["nn_module_stack"] = {"network": ("", "Network"), path or "root": (path, "Module")}
    write_as_arithmetic(network)
    try:
        with quiet_exporter(), torch.no_grad():
            program = torch.onnx.export(
                network,
                tuple(
                    value.to(folded.dtype) if value.is_floating_point() else value for value in called.example_inputs
                ),
                dynamo=True,
                input_names=list(called.input_names),
                output_names=list(called.output_names),
                dynamic_shapes=_free_axes(called),
                opset_version=opset,
                verbose=False,
            )
    except Exception as error:  # torch.onnx wraps the failures of every one of its stages differently
        where = _place(folded, str(error))
        raise UnsupportedError(f"the folded network cannot be written as ONNX{where}: {_reason(error)}") from None
    assert program is not None
    if folded.file is not None:
        _refer_to_file(program, folded.file)
    model = program.model_proto
    check_opset(model, opset)
    _clean(model)
    return model


def _refer_to_file(program: torch.onnx.ONNXProgram, file: WeightFile) -> None:
    """Weights that are in a file already are written as references to it."""
    for value in program.model.graph.initializers.values():
        held = value.const_value
        array = None if held is None else held.numpy()
        place = None if array is None else file.find(array)
        if held is not None and array is not None and place is not None:
            where, shape = str(file.path.absolute()), ir.Shape(array.shape)
            value.const_value = ir.ExternalTensor(where, *place, held.dtype, shape=shape, name=value.name or "")


def _free_axes(called: CallInterface) -> tuple[dict[int, torch.export.Dim], ...]:
    return tuple({axis: dim_named(name) for axis, name in axes.items()} for axes in called.dynamic_shapes)


def _place(folded: FoldedModule, message: str) -> str:
    """The modules whose operations a message names, as words; empty where it names none."""
    nodes = [node for node in folded.network.graph.nodes if node.op == "call_function"]
    named = [node for node in nodes if str(node.target).removesuffix(".default") in message]
    paths = dict.fromkeys(folded.module_paths.get(node.name, "") for node in named)
    shown = ", ".join(f"'{path}'" for path in paths if path)
    return f" (in {shown})" if shown else ""


def _reason(error: BaseException) -> str:
    """The innermost message, one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]


def _clean(model: onnx.ModelProto) -> None:
    """Takes out what torch.onnx says about itself and adds module paths."""
    model.producer_name, model.producer_version = "lowprec", lowprec.__version__
    model.ir_version = ir_version_for(model)
    model.graph.name = "network"
    del model.metadata_props[:]
    del model.graph.metadata_props[:]
    for node in model.graph.node:
        path = module_path(node)
        del node.metadata_props[:]
        node.doc_string = ""
        if path:
            node.metadata_props.add(key=MODULE_PATH, value=path)
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        del value.metadata_props[:]
        value.doc_string = ""
    for tensor in model.graph.initializer:
        del tensor.metadata_props[:]
        tensor.doc_string = ""
