"""Turns what torch.export returns into a `Program`: no guards, no mutations, float64 throughout."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.export.graph_signature import InputKind, OutputKind

from lowprec.errors import FoldError
from lowprec.export.folding.algebra import Scaled
from lowprec.export.folding.traced.functionalise import functionalise
from lowprec.export.folding.traced.program import (
    CALL,
    PATH,
    NormLayer,
    Program,
    arguments_by_name,
    is_float,
    operator_name,
    place,
)

_aten = torch.ops.aten

# Operations that return their first argument unchanged at inference.
_IDENTITIES = {_aten.alias, _aten.contiguous, _aten.detach, _aten.lift_fresh, _aten.lift_fresh_copy}
# Casts between types; between two floating types they are identities here, where there is one floating type.
_CASTS = {_aten.to, _aten._to_copy, _aten.type_as}
# Random in training mode, identities otherwise.
_DROPOUTS = {_aten.dropout, _aten.feature_dropout, _aten.alpha_dropout, _aten.feature_alpha_dropout}


def lift_program(exported: torch.export.ExportedProgram, norms: dict[str, NormLayer]) -> Program:
    """The exported graph, computing in float64.

    Args:
        exported: from torch.export; its tensors become the program's constants, in the type that they have.
        norms: norm layers by module path, kept with the program.

    Raises:
        FoldError: an autocast region or another hidden one, a random operation, or an in-place operation that
            cannot be renamed away.
    """
    program = _program_from_export(exported)
    program.norms = norms
    changed = functionalise(program)
    for node in program.calls():
        _refuse_random(node)
        _drop_statistics_update(node)
    for node in program.calls():
        _widen_types(node)
        source = _identity_source(node)
        if source is not None:
            node.replace_all_uses_with(source)
        elif node.target is _aten.view.default:
            # A view depends on strides, which a fold may change; a reshape is the same values without that demand.
            node.target = _aten.reshape.default
    program.erase_dead()
    for name, where in changed.items():
        if name in program.constants:
            raise FoldError(
                f"{where} changes the buffer '{name}' as the network runs, and the result depends on it, so the "
                f"network is not one fixed function; leave the update out in evaluation mode"
            )
    return program


def _program_from_export(exported: torch.export.ExportedProgram) -> Program:
    """Placeholders of parameters become `get_attr`, placeholders of fixed arguments vanish, asserts stay behind."""
    signature = exported.graph_signature
    specs = {spec.arg.name: spec for spec in signature.input_specs}
    graph, constants, copies = fx.Graph(), dict[str, Tensor | Scaled](), dict[fx.Node, fx.Node]()
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            spec = specs[node.name]
            if spec.kind is InputKind.USER_INPUT:
                if isinstance(node.meta.get("val"), Tensor):
                    copies[node] = graph.placeholder(node.name)
                    copies[node].meta = {"val": node.meta["val"]}
                continue
            name = str(spec.target)
            constants[name] = _constant(exported, name)
            copies[node] = graph.create_node("get_attr", name)
            copies[node].meta = {"val": node.meta["val"]}
        elif node.op == "call_function":
            _copy_call(exported.graph_module, node, graph, copies)
    returned = [
        _result(spec.arg, copies, exported) for spec in signature.output_specs if spec.kind is OutputKind.USER_OUTPUT
    ]
    graph.output(tuple(returned))
    return Program(graph, constants)


def _copy_call(owner: fx.GraphModule, node: fx.Node, graph: fx.Graph, copies: dict[fx.Node, fx.Node]) -> None:
    """Copies an operation, and what is inside of a region that changes nothing here (gradients off, autocast off).

    Args:
        owner: the module of the node's graph, which holds its regions.
        node: the operation.
        graph: where the copy goes.
        copies: of the values before; gets those of the operation.
    """
    region = next((value for value in node.all_input_nodes if value.op == "get_attr"), None)
    if region is not None:
        _copy_region(owner, node, region, graph, copies)
    elif not _is_assertion(node) and node not in copies:
        copies[node] = graph.node_copy(node, lambda value: _copied(copies, value))
        copies[node].meta = {"val": node.meta.get("val"), **_origin(node)}


def _copy_region(
    owner: fx.GraphModule, node: fx.Node, region: fx.Node, graph: fx.Graph, copies: dict[fx.Node, fx.Node]
) -> None:
    inner = owner.get_submodule(str(region.target))
    assert isinstance(inner, fx.GraphModule)
    position = node.args.index(region)
    name = operator_name(node)
    # What comes before the region are its settings; of autocast the third says whether it is on.
    if not (name == "wrap_with_set_grad_enabled" or (name == "wrap_with_autocast" and node.args[2] is False)):
        raise FoldError(_opaque_region(inner, name))
    placeholders = [value for value in inner.graph.nodes if value.op == "placeholder"]
    for placeholder, given in zip(placeholders, node.args[position + 1 :], strict=True):
        assert isinstance(given, fx.Node)
        copies[placeholder] = _copied(copies, given)
    for value in inner.graph.nodes:
        if value.op == "call_function":
            _copy_call(inner, value, graph, copies)
    (results,) = next(value for value in inner.graph.nodes if value.op == "output").args
    for user in node.users:
        assert isinstance(results, tuple | list)
        copies[user] = copies[results[user.args[1]]]  # type: ignore[index]


def _copied(copies: dict[fx.Node, fx.Node], node: fx.Node) -> fx.Node:
    if node not in copies:
        raise FoldError(f"'{node.name}' is an argument that is not a tensor but is computed with; pass a tensor")
    return copies[node]


def _result(argument: Any, copies: dict[fx.Node, fx.Node], exported: torch.export.ExportedProgram) -> fx.Node:
    by_name = {node.name: node for node in exported.graph.nodes}
    node = by_name.get(getattr(argument, "name", None))
    if node is None or not isinstance(node.meta.get("val"), Tensor):
        raise FoldError(f"the network returns something that is not a tensor ({argument}); return tensors only")
    return copies[node]


def _constant(exported: torch.export.ExportedProgram, name: str) -> Tensor:
    value = exported.state_dict.get(name, exported.constants.get(name))
    if not isinstance(value, Tensor):
        raise FoldError(f"the network holds '{name}', a {type(value).__name__}; use tensors only")
    return value.detach()


def _origin(node: fx.Node) -> dict[str, str]:
    """Module path of an operation, and which call of that module it belongs to."""
    stack = node.meta.get("nn_module_stack") or {}
    # torch marks operations without a stack with a placeholder entry whose path is not a path.
    entries = [(call, entry[0]) for call, entry in stack.items() if not call.startswith("_empty")]
    if not entries:
        return {PATH: "", CALL: ""}
    call, path = entries[-1]
    return {PATH: str(path), CALL: str(call)}


def _is_assertion(node: fx.Node) -> bool:
    name = getattr(node.target, "_opname", getattr(node.target, "__name__", ""))
    return name.startswith(("_assert", "sym_constrain"))


def _refuse_random(node: fx.Node) -> None:
    """Operations that draw random numbers."""
    where = place(node)
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()) or not _draws(node):
        return
    if node.target.overloadpacket in _DROPOUTS:  # type: ignore[union-attr]
        raise FoldError(f"{where} applies a dropout in training mode; call model.eval() before fold(model)")
    raise FoldError(
        f"{where} draws random numbers ({operator_name(node)}), so the network is not one fixed function; "
        f"leave it out in evaluation mode"
    )


def _draws(node: fx.Node) -> bool:
    """Whether an operation that can be random is, with the arguments that it has here."""
    given = arguments_by_name(node)
    for switch in ("train", "training", "dropout_p"):
        if switch in given:
            return bool(given[switch])
    return True


def _opaque_region(inner: fx.GraphModule, name: str) -> str:
    """Why a region that torch.export keeps as a graph of its own cannot be folded; its first operation says where."""
    origins = [_origin(node)[PATH] for node in inner.graph.nodes if node.op == "call_function"]
    where = f"'{origins[0]}'" if origins and origins[0] else "the network's own forward"
    if "autocast" in name:
        return f"{where} runs under torch.autocast, which hides its operations; take the autocast region out of forward"
    return f"{where} uses {name}, a region whose operations are hidden; write it without"


def _drop_statistics_update(node: fx.Node) -> None:
    """A batch norm in training mode returns the same without its running buffers, which it would change."""
    if getattr(node.target, "overloadpacket", None) in (_aten.batch_norm, _aten.instance_norm) and node.args[5]:
        node.args = (*node.args[:3], None, None, *node.args[5:])


def _widen_types(node: fx.Node) -> None:
    """Floating types that an operation names, or makes by default, become float64."""
    node.args = fx.node.map_aggregate(node.args, _wide_type)
    node.kwargs = fx.node.map_aggregate(node.kwargs, _wide_type)
    schema = getattr(node.target, "_schema", None)
    makes = schema is not None and any(argument.name == "dtype" for argument in schema.arguments)
    reads = any(isinstance(value.meta.get("val"), Tensor) for value in node.all_input_nodes)
    if makes and not reads and node.kwargs.get("dtype") is None and is_float(node):
        node.kwargs = {**node.kwargs, "dtype": torch.float64}


def _wide_type(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value


def _identity_source(node: fx.Node) -> fx.Node | None:
    """The argument that an operation returns unchanged, if it does."""
    packet = getattr(node.target, "overloadpacket", None)
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    casts = packet in _CASTS and is_float(node) and is_float(source)
    if packet in _IDENTITIES or packet in _DROPOUTS or casts:
        return source
    return None
