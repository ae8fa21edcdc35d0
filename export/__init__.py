"""From a trained network to a bundle whose parity is proven: fold, emit, build, run, judge.

Public names resolve on first use: verifying a bundle needs neither torch nor the exporter.
"""

from __future__ import annotations

if __name__ != "lowprec.export":
    raise ImportError(f"import lowprec.export, not {__name__}: a second copy of its types would not match the first")

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lowprec.export.comparison import compare
    from lowprec.export.folding import fold
    from lowprec.export.pipeline import export
    from lowprec.export.verification import verify

__all__ = ["compare", "export", "fold", "verify"]

_HOME = {
    "compare": "lowprec.export.comparison",
    "export": "lowprec.export.pipeline",
    "fold": "lowprec.export.folding",
    "verify": "lowprec.export.verification",
}


def __getattr__(name: str) -> Any:
    try:
        home = _HOME[name]
    except KeyError:
        raise AttributeError(f"module 'lowprec.export' has no attribute {name!r}") from None
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
