"""ONNX graphs evaluated in float64, whatever float types they declare: the truth behind every verdict."""

from lowprec.export.float64.graph import Float64Graph, Kind, Visit, Watch
from lowprec.export.float64.widening import EXACT_OPS

__all__ = ["EXACT_OPS", "Float64Graph", "Kind", "Visit", "Watch"]
