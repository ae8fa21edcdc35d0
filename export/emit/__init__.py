"""Writes folded networks as ONNX, and rounds ONNX graphs to half precision."""

from lowprec.export.emit.network import emit_onnx
from lowprec.export.emit.precision import convert_precision

__all__ = ["convert_precision", "emit_onnx"]
