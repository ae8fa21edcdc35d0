"""Fused training kernels: L1, L-infinity and top-k norm with ReLU and residual addition."""

from __future__ import annotations

from lowprec.kernels.choice import BackwardChoice, output_suffices
from lowprec.kernels.operators import fused_norm, kernels_apply, without_kernels

__all__ = ["BackwardChoice", "fused_norm", "kernels_apply", "output_suffices", "without_kernels"]
