"""From a trained network to a bundle whose parity is proven: fold, emit, build, run, judge.

Public names resolve on first use: verifying a bundle needs neither torch nor the exporter.
"""

from __future__ import annotations

if __name__ != "lowprec.export":
    raise ImportError(f"import lowprec.export, not {__name__}: a second copy of its types would not match the first")

from typing import TYPE_CHECKING

from lowprec.lazy import resolver

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


__getattr__ = resolver(__name__, _HOME)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
