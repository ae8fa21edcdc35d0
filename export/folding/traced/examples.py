"""Example inputs and free axes in the form that torch.export needs.

torch.export takes an axis of length 1 for a constant, so an example with one sample would give, in silence, a network
for one sample: free axes of length 1 are repeated to 2.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from lowprec.errors import UnsupportedError

BATCH = "batch"
# The trace and the fold's own check need no more samples; a whole data set as the example would be run several times.
_MAX_SAMPLES = 8


@dataclass(frozen=True, eq=False)
class Examples:
    """What torch.export is called with.

    Args:
        args: positional arguments.
        dynamic_shapes: one entry per argument, names of axes among them.
    """

    args: tuple[Any, ...]
    dynamic_shapes: tuple[Any, ...]

    def input_names(self, network: nn.Module, placeholders: Sequence[str]) -> list[str]:
        """Forward's parameter names; torch.export's own (`x_0`) where an argument is nested or has no name of its own.

        torch.export's placeholders alone would not do: it renames those called like a Python builtin (`input_1`).
        """
        parameters = list(inspect.signature(network.forward).parameters.values())[: len(self.args)]
        plain = all(parameter.kind is not parameter.VAR_POSITIONAL for parameter in parameters)
        if plain and len(parameters) == len(placeholders) == len(self.args):
            return [parameter.name for parameter in parameters]
        return list(placeholders)

    def axis_names(self, lengths: Mapping[str, Sequence[Any]]) -> dict[str, dict[int, str]]:
        """Names of the free axes of each tensor input; axes that are always equally long share one.

        A name given as such or with `Dim("name")` is kept. Else the first free first axis is `batch`, and others are
        called by their input and number.

        Args:
            lengths: the traced shape of each tensor input, an int where it is fixed.
        """
        given = self._given_names()
        names: dict[str, str] = {}
        result: dict[str, dict[int, str]] = {}
        for position, (name, shape) in enumerate(lengths.items()):
            free = [(axis, str(length.node.expr)) for axis, length in enumerate(shape) if not isinstance(length, int)]
            for axis, symbol in free:
                fresh = BATCH if axis == 0 and BATCH not in names.values() else f"{name}_{axis}"
                names.setdefault(symbol, given.get((position, axis), fresh))
            result[name] = {axis: names[symbol] for axis, symbol in free}
        return result

    def _given_names(self) -> dict[tuple[int, int], str]:
        """Names that the user gave by position of the tensor input and axis, where no argument is nested."""
        tensors = [
            (arg, axes) for arg, axes in zip(self.args, self.dynamic_shapes, strict=True) if isinstance(arg, Tensor)
        ]
        return {
            (position, axis): dim if isinstance(dim, str) else dim.__name__
            for position, (_, axes) in enumerate(tensors)
            for axis, dim in _axes(axes).items()
            if isinstance(dim, Dim | str)
        }


def prepare_examples(network: nn.Module, args: tuple[Any, ...], dynamic_shapes: Any, dtype: torch.dtype) -> Examples:
    """Example arguments on the CPU in the network's type, with free axes of length 1 repeated to 2.

    Args:
        network: gives the parameter names where `dynamic_shapes` is a mapping.
        args: the user's example inputs.
        dynamic_shapes: the user's, or None for one free first axis; a string names a free axis.
        dtype: the type of floating inputs.

    Raises:
        UnsupportedError: no tensor among the arguments, or one entry too many or too few in `dynamic_shapes`.
    """
    args = pytree.tree_map_only(Tensor, lambda t: _plain(t, dtype), args)
    tensors = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, Tensor)]
    if not tensors:
        raise UnsupportedError("example_inputs holds no tensor; give the tuple of arguments that the network takes")
    if dynamic_shapes is None:
        return _with_batch_axis(args, tensors)
    per_arg = _per_argument(network, dynamic_shapes, len(args))
    repeated = tuple(
        _repeat(arg, [axis for axis, dim in _axes(axes).items() if _is_free(dim)]) if isinstance(arg, Tensor) else arg
        for arg, axes in zip(args, per_arg, strict=True)
    )
    return Examples(repeated, per_arg)


def _with_batch_axis(args: tuple[Any, ...], tensors: list[Tensor]) -> Examples:
    """The default: first axes that are as long as that of the first tensor with any are one free axis."""
    lead = next((tensor.shape[0] for tensor in tensors if tensor.ndim), None)
    batch = Dim(BATCH)

    def has_batch(value: Any) -> bool:
        return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == lead

    shapes = pytree.tree_map(lambda value: {0: batch} if has_batch(value) else None, args)
    few = pytree.tree_map(lambda value: _repeat(value[:_MAX_SAMPLES], [0]) if has_batch(value) else value, args)
    return Examples(few, shapes)


def _plain(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    tensor = tensor.detach().cpu()
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _repeat(tensor: Tensor, axes: Sequence[int]) -> Tensor:
    """Repeats a tensor to length 2 along those of `axes` where it has length 1."""
    counts = [2 if axis in axes and length == 1 else 1 for axis, length in enumerate(tensor.shape)]
    return tensor.repeat(counts) if max(counts, default=1) > 1 else tensor


def _per_argument(network: nn.Module, dynamic_shapes: Any, count: int) -> tuple[Any, ...]:
    """`dynamic_shapes` as a tuple with one entry per argument; mappings go by forward's parameter names."""
    if isinstance(dynamic_shapes, Mapping):
        names = list(inspect.signature(network.forward).parameters)[:count]
        unknown = [str(name) for name in dynamic_shapes if name not in names]
        if unknown:
            raise UnsupportedError(
                f"dynamic_shapes names {', '.join(unknown)}, but the example inputs are {', '.join(names)}"
            )
        return tuple(dynamic_shapes.get(name) for name in names)
    if len(dynamic_shapes) != count:
        raise UnsupportedError(
            f"dynamic_shapes has {len(dynamic_shapes)} entries for {count} example inputs; give one entry per input"
        )
    return tuple(dynamic_shapes)


def _axes(axes: Any) -> dict[int, Any]:
    """One tensor's entry of `dynamic_shapes` as a mapping from axis."""
    if axes is None:
        return {}
    return dict(axes) if isinstance(axes, Mapping) else dict(enumerate(axes))


def _is_free(dim: Any) -> bool:
    return dim is not None and not isinstance(dim, int) and dim is not Dim.STATIC
