"""Which optional packages are here, without importing them."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata
from importlib.util import find_spec


def is_installed(module: str) -> bool:
    """Whether `import module` can be expected to work; False too where an import hook forbids it."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # a hook that raises; a None that stands in sys.modules
        return False


def installed_versions(distributions: Iterable[str]) -> dict[str, str]:
    """Version by distribution name, those that are not installed left out."""
    found = {}
    for name in distributions:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
