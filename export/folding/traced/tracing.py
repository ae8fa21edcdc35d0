"""Traces a network into a program of aten operations in float64: the truth that every later stage is held against.

torch.export in non-strict mode runs the network's own Python, so hooks, parametrisations and subclasses are traced as
what they compute. The trace runs in the network's own types and is widened afterwards: code that says `.float()` would
not run with float64 weights. `torch.fx.symbolic_trace`, the alternative, sees modules instead of operations and so
trusts what a layer is called.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.utils import _pytree as pytree

from lowprec.errors import FoldError, UnsupportedError
from lowprec.export.folding.traced.declared import declared_affines, with_affines
from lowprec.export.folding.traced.dims import without_names
from lowprec.export.folding.traced.examples import Examples, prepare_examples
from lowprec.export.folding.traced.interface import Interface
from lowprec.export.folding.traced.lift import lift_program
from lowprec.export.folding.traced.module import FoldedModule
from lowprec.export.folding.traced.program import NormLayer, Program
from lowprec.export.folding.traced.quiet import quiet_exporter
from lowprec.export.folding.traced.reasons import reason_from_failure
from lowprec.kernels import without_kernels
from lowprec.norm import is_norm
from lowprec.precision import without_half_hooks

_HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Traced:
    """A network in float64 with nothing folded yet.

    Its weights are the network's own tensors: a network that is trained on is to be traced anew.

    Args:
        program: its operations and constants, float64.
        interface: how it is called.
        module: the same as a callable module in float64: the truth.
        source_dtype: float64 if the network's own parameters are, else float32.
        declared: paths of layers that `program` takes at their word (see `declared_affines`), while `module` runs
            what they really compute, so that the float64 check also checks the word.
    """

    program: Program
    interface: Interface
    module: FoldedModule
    source_dtype: torch.dtype
    declared: tuple[str, ...] = ()

    @property
    def input_names(self) -> tuple[str, ...]:
        """Forward's parameter names, one per tensor input."""
        return self.interface.input_names

    @property
    def output_names(self) -> tuple[str, ...]:
        """`output`, or `output_0`, `output_1`, ..."""
        return self.interface.output_names

    @property
    def example_inputs(self) -> tuple[Tensor, ...]:
        """The tensors that it was traced with, one per input name."""
        return self.interface.example_inputs

    @property
    def dynamic_shapes(self) -> tuple[dict[int, str], ...]:
        """Per input, the name of each axis whose length is free."""
        return self.interface.dynamic_shapes


def trace(model: nn.Module, example_inputs: tuple[Any, ...], dynamic_shapes: Any = None) -> Traced:
    """Traces `model`, which stays as it is, in float64.

    Args:
        model: in evaluation mode; on any device, in any floating type, also one that `Precision.prepare` narrowed.
        example_inputs: as for torch.export. Axes of length 1 that are to be free are repeated to 2 for the trace.
        dynamic_shapes: as for torch.export, or with names of axes in place of its dimensions (`{"x": {0: "batch", 2:
            "2*height"}}`); by default axis 0 of every tensor that has the leading length of the first one is one free
            axis named `batch`.

    Raises:
        FoldError: the network is in training mode, torch.export refuses it, or it is not one fixed function.
    """
    if not isinstance(example_inputs, tuple):
        raise UnsupportedError(
            f"example_inputs is the tuple of arguments that the network is called with; found "
            f"{type(example_inputs).__name__}; write (x,) for one input"
        )
    _refuse_training(model)
    network = _private_copy(model)
    source_dtype = _source_dtype(network)
    norms = {path: NormLayer(module.training) for path, module in network.named_modules() if is_norm(module)}
    _widen_halves(network)
    examples = prepare_examples(network, example_inputs, dynamic_shapes, source_dtype)
    exported = _export(network, examples)
    truth = program = lift_program(exported, norms)
    interface = _interface(network, exported, examples)
    if declared := declared_affines(network):
        norms |= {path: NormLayer(training=False) for path in declared}
        program = lift_program(_export(with_affines(network, declared), examples), norms)
    module = FoldedModule(truth, interface, torch.float64, shares=True)
    return Traced(program, interface, module, source_dtype, tuple(declared))


def _refuse_training(model: nn.Module) -> None:
    if not model.training:
        return
    for path, module in model.named_modules():
        if module.training and is_norm(module):
            raise FoldError(
                f"'{path or type(module).__name__}' is in training mode, so its statistics still change; "
                f"call model.eval() before fold(model)"
            )
    raise FoldError("the network is in training mode; call model.eval() before fold(model)")


def _private_copy(model: nn.Module) -> nn.Module:
    """A deep copy on the CPU without the hooks of half precision; weights that stay as they are are shared with it."""
    kept = [tensor for tensor in (*model.parameters(), *model.buffers()) if _stays(tensor)]
    try:
        copied = copy.deepcopy(model, {id(tensor): tensor for tensor in kept})
    except (RuntimeError, TypeError) as error:
        raise FoldError(
            f"the network cannot be copied ({str(error).splitlines()[0]}), and fold leaves its argument alone; "
            f"make it deep-copyable"
        ) from None
    return without_half_hooks(copied).cpu()


def _stays(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype not in _HALVES


def _source_dtype(network: nn.Module) -> torch.dtype:
    """float64 for a network whose floating parameters and buffers all are, else float32."""
    tensors = [*network.parameters(), *network.buffers()]
    dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
    return torch.float64 if dtypes == {torch.float64} else torch.float32


def _widen_halves(network: nn.Module) -> None:
    """Half parameters and buffers become float32, exactly, so that the network's own arithmetic runs on a CPU."""
    for tensor in [*network.parameters(), *network.buffers()]:
        if tensor.dtype in _HALVES:
            tensor.data = tensor.data.float()


def _export(network: nn.Module, examples: Examples) -> torch.export.ExportedProgram:
    """torch.export, quietly; its failure in one line that names the module."""
    shapes = without_names(examples.dynamic_shapes)
    try:
        with quiet_exporter(), without_kernels(), torch.no_grad(), torch.random.fork_rng(devices=[]):
            return torch.export.export(network, examples.args, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch.export raises dozens of types, the user's own code any
        raise FoldError(reason_from_failure(error, network)) from None


def _interface(network: nn.Module, exported: torch.export.ExportedProgram, examples: Examples) -> Interface:
    leaves, arguments = pytree.tree_flatten(examples.args)
    signature = exported.graph_signature
    placeholders = [spec.arg.name for spec in signature.input_specs if spec.kind is InputKind.USER_INPUT]
    values = {node.name: node.meta.get("val") for node in exported.graph.nodes if node.op == "placeholder"}
    names = examples.input_names(network, placeholders)
    tensors = {name: leaf for name, leaf in zip(names, leaves, strict=True) if isinstance(leaf, Tensor)}
    shapes = {name: values[node].shape for name, node in zip(names, placeholders, strict=True) if name in tensors}
    axes = examples.axis_names(shapes)
    outputs = sum(spec.kind is OutputKind.USER_OUTPUT for spec in signature.output_specs)
    result = exported.call_spec.out_spec
    assert result is not None
    try:
        structures = pytree.treespec_dumps(arguments), pytree.treespec_dumps(result)
    except NotImplementedError as error:
        raise FoldError(
            f"the structure of the network's arguments or result cannot be written down "
            f"({str(error).splitlines()[0]}); use tuples, lists and dicts"
        ) from None
    return Interface(
        input_names=tuple(tensors),
        output_names=("output",) if outputs == 1 else tuple(f"output_{index}" for index in range(outputs)),
        dynamic_shapes=tuple(axes[name] for name in tensors),
        example_inputs=tuple(tensor.clone() for tensor in tensors.values()),
        fixed={index: leaf for index, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)},
        arguments=structures[0],
        result=structures[1],
    )
