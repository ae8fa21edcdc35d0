"""The network that comes out of folding: fixed weights, one function, any batch size.

An `ExportedProgram.module()` would be the obvious thing to hand out, but its `.eval()` raises, `training` reads True
and its guards refuse other batch sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, fx, nn

from lowprec.errors import UnsupportedError
from lowprec.export.folding.traced.interface import Interface
from lowprec.export.folding.traced.program import PATH, Program


class FoldedModule(nn.Module):
    """A traced network with constant weights, for inference only.

    Called like the network it came from, with positional arguments; floating inputs are cast to `dtype`. The weights
    do not require gradients, `.eval()` changes nothing and `.train()` raises. It can be deep-copied, saved and loaded.

    Args:
        program: operations and constants.
        interface: inputs, outputs and their structure.
        dtype: the floating type of weights and arithmetic.
        shares: whether weights may be the program's own tensors; those that are narrower are then widened each time
            they are used, so that no second copy of the weights is held.

    Attributes:
        network: the flat graph: tensors in, tuple of tensors out.
        input_names: forward's parameter names, one per tensor input.
        output_names: `output`, or `output_0`, `output_1`, ...
        dynamic_shapes: per input, the name of each axis whose length is free (`{0: "batch"}`).
        example_inputs: the tensors it was traced with, in the order of `input_names`.
        file: where its large weights are; None for in memory.
    """

    def __init__(self, program: Program, interface: Interface, dtype: torch.dtype, shares: bool = False) -> None:
        super().__init__()
        self.dtype = dtype
        self.input_names = interface.input_names
        self.output_names = interface.output_names
        self.dynamic_shapes = interface.dynamic_shapes
        self.example_inputs = tuple(
            value.to(dtype) if value.is_floating_point() else value for value in interface.example_inputs
        )
        self.file = program.file
        self._interface = interface
        self.network = _graph_module(program, dtype, shares)
        # In order and not by name: a loaded fx graph has other node names.
        self._paths = tuple(str(node.meta.get(PATH, "")) for node in _calls(self.network))
        super().train(False)

    @property
    def module_paths(self) -> dict[str, str]:
        """For each operation of `network`, the module path in the original network, empty for its own forward."""
        return {node.name: path for node, path in zip(_calls(self.network), self._paths, strict=True)}

    def forward(self, *args: Any) -> Any:
        """What the original network returns for these arguments, in the same structure."""
        outputs = self.run_flat(self._interface.tensors_from_args(args))
        return self._interface.result_from_outputs(outputs)

    def run_flat(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Outputs in the order of `output_names` for inputs in the order of `input_names`."""
        cast = [value.to(self.dtype) if value.is_floating_point() else value for value in inputs]
        with torch.no_grad():
            result: tuple[Tensor, ...] = self.network(*cast)
        self.release()
        return result

    def release(self) -> None:
        """Takes weights that are kept in a file out of memory, until they are needed again."""
        if self.file is not None:
            self.file.release()

    def train(self, mode: bool = True) -> FoldedModule:
        """Raises `UnsupportedError` for `mode=True`; a folded network has no training mode."""
        if mode:
            _refuse_training()
        return self


def _refuse_training() -> NoReturn:
    raise UnsupportedError(
        "a folded network cannot be put in training mode, its norms are part of its weights; "
        "train the original network and fold it again"
    )


def _calls(network: fx.GraphModule) -> list[fx.Node]:
    return [node for node in network.graph.nodes if node.op == "call_function"]


def _graph_module(program: Program, dtype: torch.dtype, shares: bool) -> fx.GraphModule:
    """A GraphModule that owns its constants, in `dtype`, under names that are module paths."""
    root, narrower = nn.Module(), set()
    for name in program.constants:
        tensor = program.tensor(name)
        if shares and tensor.is_floating_point() and tensor.dtype.itemsize < dtype.itemsize:
            narrower.add(name)
            value = tensor.contiguous()
        else:
            value = (tensor.to(dtype) if tensor.is_floating_point() else tensor).contiguous()
        _set_constant(root, name, value if shares or value is not tensor else value.clone())
    graph = program.copy().graph
    _widen_at_use(graph, narrower, dtype)
    for node in graph.nodes:
        node.meta = {key: value for key, value in node.meta.items() if isinstance(value, str)}
        if node.op == "call_function":
            node.args = fx.node.map_aggregate(node.args, lambda value: _narrow(value, dtype))
            node.kwargs = fx.node.map_aggregate(node.kwargs, lambda value: _narrow(value, dtype))
    return fx.GraphModule(root, graph, "FoldedNetwork")


def _widen_at_use(graph: fx.Graph, names: set[str], dtype: torch.dtype) -> None:
    """Casts constants just before the first operation that reads them; fx's code drops the cast ones after the last."""
    order = {node: index for index, node in enumerate(graph.nodes)}
    for constant in [node for node in graph.nodes if node.op == "get_attr" and node.target in names and node.users]:
        readers = list(constant.users)
        with graph.inserting_before(min(readers, key=order.__getitem__)):
            wide = graph.call_function(torch.ops.aten.to.dtype, (constant, dtype))
        for reader in readers:
            reader.replace_input_with(constant, wide)


def _narrow(value: Any, dtype: torch.dtype) -> Any:
    """A floating type named by an operation becomes the module's own."""
    return dtype if isinstance(value, torch.dtype) and value.is_floating_point else value


def _set_constant(root: nn.Module, name: str, value: Tensor) -> None:
    *parents, leaf = name.split(".")
    owner = root
    for parent in parents:
        if parent not in owner._modules:
            owner.add_module(parent, nn.Module())
        owner = owner.get_submodule(parent)
    if value.is_floating_point():
        owner.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
    else:
        owner.register_buffer(leaf, value)
