"""Lengths of free axes by name: `height`, or `2*height + 1` where a length is bound to a free one."""

from __future__ import annotations

import re
from typing import Any

from torch.export import Dim
from torch.utils import _pytree as pytree

from lowprec.errors import UnsupportedError

_LINEAR = re.compile(r"(?:(\d+)\*)?([A-Za-z_]\w*)(?: *([+-]) *(\d+))?")  # as torch spells the names of derived dims


def dim_named(name: str) -> Dim:
    """torch.export's dimension of a name, `[factor*]name[ + constant]`; equal names are equal lengths.

    Raises:
        UnsupportedError: another form.
    """
    factor, root, sign, constant = _parts(name)
    dim = Dim(root)
    if factor is not None:
        dim = int(factor) * dim
    if constant is not None:
        dim = dim + int(f"{sign}{constant}")
    return dim


def without_names(dynamic_shapes: Any) -> Any:
    """`dynamic_shapes` for torch.export, where a string may stand for an axis.

    A name alone leaves the limits of its length to torch, which refuses a length that the code fixes. A bound length
    is stated as torch's derived dimension, and so is the one that it is bound to.
    """
    texts = [leaf for leaf in pytree.tree_leaves(dynamic_shapes) if isinstance(leaf, str)]
    roots = {_parts(text)[1] for text in texts if not text.isidentifier()}

    def for_torch(text: str) -> Any:
        return dim_named(text) if _parts(text)[1] in roots else Dim.DYNAMIC

    return pytree.tree_map_only(str, for_torch, dynamic_shapes)


def _parts(name: str) -> tuple[Any, ...]:
    parts = _LINEAR.fullmatch(name)
    if parts is None:
        raise UnsupportedError(f"{name!r} names no free axis; give a name such as height, or 2*height + 1")
    return parts.groups()
