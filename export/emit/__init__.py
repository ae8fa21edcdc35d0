"""Writes folded networks as ONNX, and rounds ONNX graphs to half precision.

Rounding works on ONNX alone and loads no torch; what writes traced networks resolves on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lowprec.export.emit.precision import convert_precision

if TYPE_CHECKING:
    from lowprec.export.emit.network import emit_onnx

__all__ = ["convert_precision", "emit_onnx"]


def __getattr__(name: str) -> Any:
    if name != "emit_onnx":
        raise AttributeError(f"module 'lowprec.export.emit' has no attribute {name!r}")
    from lowprec.export.emit.network import emit_onnx

    return emit_onnx
