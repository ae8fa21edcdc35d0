"""The edits that turn a GradScaler and its autocasts into one `lowprec.Precision`."""

from __future__ import annotations

import ast
from collections.abc import Sequence

from lowprec.compat.script import Script, imported

_MODULES = ("torch.cuda.amp", "torch.amp")
_SCALER_OPTIONS = ("init_scale", "growth_factor", "backoff_factor", "growth_interval")


def edit_torch_amp(script: Script) -> None:
    """GradScaler and autocast become one `precision`."""
    names = _names_of_torch_amp(script)
    scalers = _assigned(script, "GradScaler", names)
    autocasts = [node for node in ast.walk(script.tree) if isinstance(node, ast.Call) and _is(node, "autocast", names)]
    if not scalers and not autocasts:
        return
    if len(scalers) != 1:
        at = scalers[1] if scalers else autocasts[0]
        found = f"{len(scalers)} GradScalers" if scalers else "autocast without a GradScaler"
        script.leave(
            at, f"{found}: make one lowprec.Precision per model and optimizer, prepare them, and write its forward()"
        )
        return
    scaler = scalers[0]
    half = "bf16" if any("bfloat16" in script.text(call) for call in autocasts) else "fp16-autocast"
    _replace_imports(script)
    _replace_scaler(script, scaler, half)
    _replace_autocasts(script, autocasts)
    _replace_steps(script, scaler.targets[0].id)  # type: ignore[attr-defined]


def _names_of_torch_amp(script: Script) -> dict[str, str]:
    """By the name under which the script knows it: GradScaler or autocast."""
    names = {f"{module}.{name}": name for module in _MODULES for name in ("GradScaler", "autocast")}
    names |= {"amp.GradScaler": "GradScaler", "amp.autocast": "autocast", "torch.autocast": "autocast"}
    for node in ast.walk(script.tree):
        if isinstance(node, ast.ImportFrom) and node.module in _MODULES:
            names |= {alias.asname or alias.name: alias.name for alias in node.names}
    return names


def _is(call: ast.Call, name: str, names: dict[str, str]) -> bool:
    return names.get(ast.unparse(call.func)) == name


def _assigned(script: Script, name: str, names: dict[str, str]) -> list[ast.Assign]:
    return [
        node
        for node in ast.walk(script.tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and _is(node.value, name, names)
        and isinstance(node.targets[0], ast.Name)
    ]


def _replace_imports(script: Script) -> None:
    done = False
    for node in ast.walk(script.tree):
        if isinstance(node, ast.ImportFrom) and node.module in (*_MODULES, "torch.cuda", "torch"):
            ours = ("GradScaler", "autocast") if node.module in _MODULES else ("amp", "autocast")
            others = [alias for alias in node.names if alias.name not in ours]
            if len(others) == len(node.names):
                continue
            kept = f"from {node.module} import {', '.join(map(imported, others))}" if others else ""
            lines = [*([] if done else ["import lowprec"]), *([kept] if kept else [])]
            script.replace(node, f"\n{' ' * node.col_offset}".join(lines) or "pass")
            done = True
    if not done:
        last = [node for node in script.tree.body if isinstance(node, (ast.Import, ast.ImportFrom))][-1]
        script.insert_after(last, "import lowprec")


def _replace_scaler(script: Script, scaler: ast.Assign, mode: str) -> None:
    """The scaler becomes a Precision, which prepares model and optimizer as soon as all three are there."""
    call = scaler.value
    assert isinstance(call, ast.Call)
    options = "".join(f", {key.arg}={script.text(key.value)}" for key in call.keywords if key.arg in _SCALER_OPTIONS)
    made = f'precision = lowprec.Precision("{mode}"{options})'
    for key in call.keywords:
        if key.arg == "enabled":
            script.leave(scaler, f"enabled={script.text(key.value)}: choose the mode by it, 'fp32' where it is false")
    target = scaler.targets[0]
    assert isinstance(target, ast.Name)
    optimizer, model = _optimizer_and_model(script, target.id)
    places = [scaler, *(_assignments(script, name) for name in (optimizer, model) if name)]
    body = next((body for body in script.bodies() if scaler in body), [])
    known = [place for place in places if place in body]
    if optimizer is None or model is None or len(known) < 3:
        script.replace(scaler, made)
        script.leave(scaler, "write 'model, optimizer = precision.prepare(model, optimizer)' where all three are there")
        return
    line = f"{model}, {optimizer} = precision.prepare({model}, {optimizer})"
    last = max(known, key=lambda place: place.lineno)
    assert isinstance(last, ast.stmt)
    if last is scaler:
        script.replace(scaler, f"{made}\n{' ' * scaler.col_offset}{line}")
    else:
        script.replace(scaler, made)
        script.insert_after(last, line)


def _optimizer_and_model(script: Script, scaler: str) -> tuple[str | None, str | None]:
    """Names: of what `scaler.step` is given, and of what its parameters are of."""
    steps = [call for call in _calls(script.tree, scaler, "step") if call.args and isinstance(call.args[0], ast.Name)]
    optimizer = steps[0].args[0].id if steps else None  # type: ignore[attr-defined]
    made = _assignments(script, optimizer) if optimizer else None
    for node in ast.walk(made) if made is not None else ():
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(called, ast.Attribute) and called.attr == "parameters" and isinstance(called.value, ast.Name):
            return optimizer, called.value.id
    return optimizer, None


def _assignments(script: Script, name: str | None) -> ast.Assign | None:
    """The last statement that gives `name` a value."""
    found = None
    for node in ast.walk(script.tree):
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            found = node if found is None or node.lineno > found.lineno else found
    return found


def _calls(tree: ast.AST, name: str, method: str | None = None) -> list[ast.Call]:
    """Calls of `name.method`, or of any method of `name`."""
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == name
        and (method is None or node.func.attr == method)
    ]


def _replace_autocasts(script: Script, autocasts: Sequence[ast.Call]) -> None:
    contexts = {
        id(item.context_expr) for node in ast.walk(script.tree) if isinstance(node, ast.With) for item in node.items
    }
    for call in autocasts:
        if id(call) in contexts:
            script.replace(call, "precision.forward()")
        else:
            script.leave(call, "autocast as a decorator or a value: wrap the call of the model in precision.forward()")


def _replace_steps(script: Script, scaler: str) -> None:
    """`scale(loss).backward()`, `unscale_`, clipping, `step`, `update`: one call where they follow one another."""
    done: set[int] = set()
    for body in script.bodies():
        for index, statement in enumerate(body):
            loss = _scaled_loss(statement, scaler)
            if loss is None:
                continue
            run = body[index : index + 5]
            clip = _clip_norm(script, run, scaler)
            length = 5 if clip else 3
            short = (
                not clip and len(run) >= 3 and [_method(run[1], scaler), _method(run[2], scaler)] == ["step", "update"]
            )
            if clip or short:
                given = f"{script.text(loss)}, clip_norm={clip}" if clip else script.text(loss)
                script.replace(statement, f"precision.step({given})", until=run[length - 1])
                done |= {id(node) for each in run[:length] for node in ast.walk(each)}
    for node in ast.walk(script.tree):
        if isinstance(node, ast.Expr) and id(node) not in done and (loss := _scaled_loss(node, scaler)) is not None:
            script.replace(node, f"precision.backward({script.text(loss)})")
            done |= {id(inner) for inner in ast.walk(node)}
        elif isinstance(node, ast.Expr) and id(node) not in done and _method(node, scaler) == "update":
            script.remove(node)
            done |= {id(inner) for inner in ast.walk(node)}
    for call in _calls(script.tree, scaler):
        if id(call) not in done:
            _replace_call(script, call, scaler)


def _replace_call(script: Script, call: ast.Call, scaler: str) -> None:
    assert isinstance(call.func, ast.Attribute)
    method = call.func.attr
    simple = {"unscale_": "precision.unscale()", "step": "precision.step()", "get_scale": "precision.scale",
              "state_dict": "precision.state_dict()"}  # fmt: skip
    if method in simple:
        script.replace(call, simple[method])
    elif method == "load_state_dict":
        script.replace(call.func.value, "precision")
        script.leave(call, "a stored GradScaler state is not a Precision state: start its scale afresh")
    else:
        script.leave(call, f"{scaler}.{method} has no counterpart; see lowprec.Precision")


def _method(statement: ast.stmt, scaler: str) -> str | None:
    """The method of the scaler that a statement calls and nothing else."""
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        function = statement.value.func
        if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) and function.value.id == scaler:
            return function.attr
    return None


def _scaled_loss(statement: ast.stmt, scaler: str) -> ast.expr | None:
    """The loss in `scaler.scale(loss).backward()`."""
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call) and not statement.value.keywords:
        function = statement.value.func
        if isinstance(function, ast.Attribute) and function.attr == "backward" and not statement.value.args:
            inner = _calls(function.value, scaler, "scale")
            if inner and inner[0] is function.value and len(inner[0].args) == 1:
                return inner[0].args[0]
    return None


def _clip_norm(script: Script, run: Sequence[ast.stmt], scaler: str) -> str | None:
    """The norm that is clipped to, where a run of statements is unscale, clip, step, update."""
    if len(run) < 5 or [_method(run[i], scaler) for i in (1, 3, 4)] != ["unscale_", "step", "update"]:
        return None
    clip = run[2]
    if not (isinstance(clip, ast.Expr) and isinstance(clip.value, ast.Call)):
        return None
    call = clip.value
    if ast.unparse(call.func).rpartition(".")[2] != "clip_grad_norm_" or (
        call.keywords and call.keywords[0].arg != "max_norm"
    ):
        return None
    limits = [*call.args[1:2], *(key.value for key in call.keywords if key.arg == "max_norm")]
    return script.text(limits[0]) if len(limits) == 1 and len(call.args) + len(call.keywords) == 2 else None
