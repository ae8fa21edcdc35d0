"""Imports what a config or the command line names as `module:function`, and says in one line why it cannot.

The current folder is put first on the module path only while user code runs, so that a folder which happens to hold a
`random.py` does not change what anything else imports.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from lowprec.errors import ConfigError, LowprecError


def import_factory(spec: str) -> Callable[..., Any]:
    """The callable that `module:function` names, imported with the current folder on the module path.

    Raises:
        ConfigError: not of that form, no such module or attribute, not callable, or the module raised.
    """
    module_name, colon, attribute = spec.partition(":")
    if not colon or not module_name or not attribute:
        raise ConfigError(f"{spec!r} is not of the form module:function")
    with _current_folder_first():
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            missing = error.name or module_name
            if module_name == missing or module_name.startswith(f"{missing}."):
                raise ConfigError(f"{spec!r}: there is no module {missing!r} in {os.getcwd()} or installed") from None
            raise ConfigError(f"{spec!r}: {module_name} imports {missing!r}, which is not installed") from None
        except Exception as error:
            raise ConfigError(f"{spec!r}: importing {module_name} raised {_one_line(error)}") from error
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, dir(found), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{spec!r}: {module_name} has no {part!r}{hint}")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(f"{spec!r} is of type {type(found).__name__}; it must be a function that returns a module")
    factory: Callable[..., Any] = found
    return factory


def build_model(spec: str, args: Mapping[str, Any] | None = None) -> tuple[nn.Module, tuple[Any, ...] | None]:
    """Calls the factory and returns its module, and its example inputs if it gives any.

    Raises:
        ConfigError: as `import_factory`, or the factory raised, or returned something else.
    """
    factory = import_factory(spec)
    with _current_folder_first():
        try:
            made = factory(**dict(args or {}))
        except LowprecError:
            raise
        except Exception as error:
            given = ", ".join(f"{key}={value!r}" for key, value in (args or {}).items())
            raise ConfigError(f"{spec!r} called with ({given}) raised {_one_line(error)}") from error
    if isinstance(made, nn.Module):
        return made, None
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module):
        examples = made[1]
        return made[0], examples if isinstance(examples, tuple) else (examples,)
    raise ConfigError(
        f"{spec!r} returned {type(made).__name__}; it must return a torch.nn.Module or (module, example_inputs)"
    )


@contextlib.contextmanager
def _current_folder_first() -> Iterator[None]:
    folder = os.getcwd()
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
