"""Fused training kernels: L1, L-infinity and top-k norm with ReLU and residual addition.

`reference` says in torch what is computed; `native` (C, on CPUs) and `triton_norm` (on GPUs) compute the same;
`operators` registers it with torch and picks one; `choice` says what the backward may start from.
"""

from __future__ import annotations

from lowprec.kernels.choice import BackwardChoice, output_suffices
from lowprec.kernels.operators import fused_norm, kernels_apply, without_kernels

__all__ = ["BackwardChoice", "fused_norm", "kernels_apply", "output_suffices", "without_kernels"]
