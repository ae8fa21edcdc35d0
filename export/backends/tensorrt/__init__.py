"""Every TensorRT there is behind one adapter: built anywhere or on the GPU, audited, run where there is one."""

from lowprec.export.backends.tensorrt.audit import COMPUTE_LAYERS, TypedLayer, audit
from lowprec.export.backends.tensorrt.backend import TensorRT
from lowprec.export.backends.tensorrt.library import RTX, TENSORRT, Library

__all__ = ["COMPUTE_LAYERS", "RTX", "TENSORRT", "Library", "TensorRT", "TypedLayer", "audit"]
