"""Public names of a package that resolve on first use, so that importing the package loads nothing heavy (PEP 562)."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def resolver(package: str, home: Mapping[str, str]) -> Callable[[str], Any]:
    """A module's `__getattr__`: imports a public name from the module that holds it.

    Args:
        package: the package's own name, for the error.
        home: the module of each public name.
    """

    def resolve(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(home[name]), name)

    return resolve
