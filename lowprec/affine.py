"""The per-channel affine: what every foldable layer is at inference.

Kept free of torch, so that the fold rules serve traced modules and ONNX files alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, eq=False)
class ChannelAffine:
    """y[:, c, ...] = scale[c] * x[:, c, ...] + shift[c], in float64.

    Args:
        scale: shape (C,).
        shift: shape (C,).
    """

    scale: NDArray[np.float64]
    shift: NDArray[np.float64]

    @classmethod
    def of(cls, scale: ArrayLike, shift: ArrayLike) -> ChannelAffine:
        """Builds one from anything that broadcasts to one (C,) shape."""
        a, c = np.broadcast_arrays(np.asarray(scale, np.float64), np.asarray(shift, np.float64))
        return cls(np.atleast_1d(a).copy(), np.atleast_1d(c).copy())

    @classmethod
    def from_statistics(
        cls, mean: ArrayLike, spread: ArrayLike, gamma: ArrayLike = 1.0, beta: ArrayLike = 0.0
    ) -> ChannelAffine:
        """gamma * (x - mean) / spread + beta as one affine: scale = gamma / spread, shift = beta - mean * scale."""
        scale = np.asarray(gamma, np.float64) / np.asarray(spread, np.float64)
        return cls.of(scale, np.asarray(beta, np.float64) - np.asarray(mean, np.float64) * scale)

    @property
    def channels(self) -> int:
        """Number of channels C."""
        return int(self.scale.shape[0])

    def then(self, later: ChannelAffine) -> ChannelAffine:
        """The affine that applies `self` first and `later` after it."""
        return ChannelAffine.of(later.scale * self.scale, later.scale * self.shift + later.shift)
