"""The keep-list: which nodes of a graph stay float32, and why.

The file, which people write and calibration will:

    {"kind": "lowprec-keep", "schema": 1,
     "keep": [{"match": "op:Softmax", "reason": "sums of exponentials"},
              {"match": "module:layer4.*"}, {"match": "node:node_conv2d_3"}]}

`op:` is the operator's type, `node:` the node's name, `module:` the path of the module that it came from, or of one
above it; each a shell pattern, upper and lower case told apart. Other fields of an entry are the writer's own.

A node that only moves values (a reshape, a concatenation) has the type of its neighbours, kept or not: it loses nothing
in either type, and to widen around it would only add casts.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import onnx

from lowprec.artifacts import read_json
from lowprec.errors import ArtifactError, ConfigError
from lowprec.export.onnx_files import module_path

KIND, SCHEMA = "lowprec-keep", 1
_MATCH = re.compile(r"(op|node|module):(.+)")


@dataclass(frozen=True)
class Entry:
    """One line of a keep-list.

    Args:
        match: `op:PATTERN`, `node:PATTERN` or `module:PATTERN`.
        reason: why, for reports.
    """

    match: str
    reason: str = "kept wide as asked"

    def __post_init__(self) -> None:
        if not isinstance(self.match, str) or not _MATCH.fullmatch(self.match):
            raise ConfigError(
                f"a keep-list names nodes by op:PATTERN, node:PATTERN or module:PATTERN; found {self.match!r}"
            )

    def matches(self, node: onnx.NodeProto) -> bool:
        """Whether it speaks of a node."""
        kind, _, pattern = self.match.partition(":")
        if kind == "module":
            path = module_path(node)
            return bool(path) and (fnmatchcase(path, pattern) or fnmatchcase(path, f"{pattern}.*"))
        return fnmatchcase(node.op_type if kind == "op" else node.name, pattern)


@dataclass(frozen=True)
class KeepList:
    """Which nodes stay float32.

    Args:
        entries: the first that matches a node gives the reason.
    """

    entries: tuple[Entry, ...] = ()

    def reason(self, node: onnx.NodeProto) -> str | None:
        """Why a node stays wide, or None."""
        return next((entry.reason for entry in self.entries if entry.matches(node)), None)

    def check(self, model: onnx.ModelProto) -> None:
        """Raises `ConfigError` for an entry that matches nothing, with the names that are nearest to it."""
        for entry in self.entries:
            if not any(entry.matches(node) for node in model.graph.node):
                kind, _, pattern = entry.match.partition(":")
                near = difflib.get_close_matches(pattern, _names(model, kind), 3, 0.0)
                raise ConfigError(
                    f"the keep-list names {entry.match}, and no node of the network matches it; "
                    + (f"the nearest are {', '.join(near)}" if near else f"it has none with a {kind}")
                )

    def to_dict(self) -> dict[str, Any]:
        """The content of the file."""
        entries = [{"match": entry.match, "reason": entry.reason} for entry in self.entries]
        return {"kind": KIND, "schema": SCHEMA, "keep": entries}


def _names(model: onnx.ModelProto, kind: str) -> list[str]:
    read = {"op": lambda node: node.op_type, "node": lambda node: node.name, "module": module_path}[kind]
    return sorted({name for name in map(read, model.graph.node) if name})


def read_keep_list(path: Path) -> KeepList:
    """A keep-list from its file; raises `ArtifactError` for a damaged one, `ConfigError` for a wrong entry."""
    content = read_json(path, "the keep-list")
    if not isinstance(content, dict) or content.get("kind") != KIND or not isinstance(content.get("keep"), list):
        needed = f'{{"kind": "{KIND}", "schema": {SCHEMA}, "keep": [...]}}'
        raise ArtifactError(f"{path} is no keep-list; it holds {needed}")
    if content.get("schema") != SCHEMA:
        raise ArtifactError(f"{path} has schema {content.get('schema')!r}; this version reads schema {SCHEMA}")
    entries = []
    for position, given in enumerate(content["keep"]):
        if not isinstance(given, dict) or not isinstance(given.get("match"), str):
            raise ArtifactError(f'{path}: entry {position} needs a "match", such as {{"match": "op:Softmax"}}')
        reason = given.get("reason")
        entries.append(Entry(given["match"], reason) if isinstance(reason, str) and reason else Entry(given["match"]))
    return KeepList(tuple(entries))


def keep_list(asked: KeepList | str | Path | Sequence[str]) -> KeepList:
    """A keep-list from what a caller may give: one, its file, or entries such as `op:Softmax`, files among them."""
    if isinstance(asked, KeepList):
        return asked
    words: Iterable[str | Path] = [asked] if isinstance(asked, str | Path) else asked
    entries: list[Entry] = []
    for word in words:
        if isinstance(word, str) and _MATCH.fullmatch(word):
            entries.append(Entry(word))
        elif Path(word).suffix == ".json":
            entries += read_keep_list(Path(word)).entries
        else:
            raise ConfigError(f"--keep takes op:PATTERN, node:PATTERN, module:PATTERN or a .json file; found {word!r}")
    return KeepList(tuple(entries))


def _list_of(operators: str, reason: str) -> tuple[Entry, ...]:
    return tuple(Entry(f"op:{name}", reason) for name in operators.split())


# What half precision hurts most: the operators that torch.amp runs in float32, under ONNX's names. Means of feature
# maps and the sums inside convolutions and matrix products are not among them: kernels form these in float32.
DEFAULT_KEEP = KeepList(
    _list_of("Softmax LogSoftmax ReduceLogSum ReduceLogSumExp", "sums of exponentials, which leave the range of a half")
    + _list_of("Exp Log Pow Reciprocal Sinh Cosh Tan Asin Acos Softplus", "its values leave the range of a half")
    + _list_of("ReduceSum ReduceProd ReduceL1 ReduceL2 ReduceSumSquare CumSum", "long sums and products in half")
    + _list_of(
        "LayerNormalization GroupNormalization InstanceNormalization RMSNormalization LpNormalization",
        "its statistics are sums of squares",
    )
)
"""What `mixed` keeps in float32 where no keep-list is given."""
