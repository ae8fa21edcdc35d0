"""Finds the edits that move a script from apex.amp or torch.cuda.amp to this library. The script is read, never run.

Edits replace spans of the source text, found through its syntax tree, so that comments and layout stay. What a span
cannot express is left, with the line and what to do there.
"""

from __future__ import annotations

import ast
import difflib
from dataclasses import dataclass, field

from lowprec.compat.script import Left, Script, imported
from lowprec.compat.torch_amp import edit_torch_amp
from lowprec.errors import DataError

_APEX_BY_HAND = {
    "DistributedDataParallel": "make it with precision.data_parallel(), see lowprec.Precision",
    "convert_syncbn_model": "use lowprec.norm's synchronised norms, or torch's",
    "SyncBatchNorm": "use lowprec.norm.SyncL2BatchNorm, which runs on any device",
    "FP16_Optimizer": "use lowprec.Precision('fp16-master') with the plain optimizer",
    "network_to_half": "drop it: lowprec.Precision('fp16-master').prepare narrows the network",
    "LARC": "has no counterpart here",
}


@dataclass
class Migration:
    """A script before and after.

    Args:
        before: its text.
        after: with all edits.
        left: what they do not cover, by line.
    """

    before: str
    after: str
    left: list[Left] = field(default_factory=list)

    def diff(self, name: str) -> str:
        """The edits as a unified diff."""
        lines = (self.before.splitlines(keepends=True), self.after.splitlines(keepends=True))
        return "".join(difflib.unified_diff(*lines, f"a/{name}", f"b/{name}"))


def migrate(text: str, name: str = "the script") -> Migration:
    """The edits for one script.

    Raises:
        DataError: the text is not Python.
    """
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        where = f" in line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise DataError(f"{name} is not Python that can be read{where}: {error}") from None
    script = Script(text, tree)
    _apex(script)
    edit_torch_amp(script)
    return Migration(text, script.edited(), sorted(script.left, key=lambda left: left.line))


def _apex(script: Script) -> None:
    """`from apex import amp` is from here; the rest of apex is for a person."""
    for node in ast.walk(script.tree):
        if isinstance(node, ast.ImportFrom) and node.module == "apex":
            others = [alias for alias in node.names if alias.name != "amp"]
            amp = [alias for alias in node.names if alias.name == "amp"]
            if amp:
                ours = f"from lowprec.compat import {imported(amp[0])}"
                rest = f"from apex import {', '.join(map(imported, others))}"
                script.replace(node, ours if not others else f"{ours}\n{' ' * node.col_offset}{rest}")
            for alias in others:
                script.leave(node, f"apex.{alias.name} is not part of lowprec; see what is used of it")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("apex."):
            for alias in node.names:
                if alias.name in _APEX_BY_HAND:
                    script.leave(node, f"{node.module}.{alias.name}: {_APEX_BY_HAND[alias.name]}")
                elif node.module == "apex.amp":
                    script.leave(node, f"import it from lowprec.compat.amp: {alias.name}")
        elif isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "apex" for alias in node.names):
            script.leave(node, "write 'from lowprec.compat import amp' and call amp.initialize, amp.scale_loss")
