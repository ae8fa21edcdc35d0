"""Statistics of which every intermediate is rounded to a narrow type: what a norm does on a machine without wide sums.

This is the arithmetic that the published claims about batch norms in half precision are about; it exists to reproduce
them, not to train well. Torch's own half kernels never compute like this: they hold half and reduce in float32. Every
operation below is a torch operation on tensors of the narrow type, which rounds its result once; n, eps and the
constants are exact scalars. A compiler that fuses such operations may skip the rounding in between (torch's inductor
does unless told to emulate the casts), so claims are to be measured on the eager path.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lowprec.errors import ConfigError
from lowprec.functional import cast, rows_by_channel

Accumulation = Literal["tree", "naive"]


def tree_sum(x_Cn: Tensor) -> Tensor:
    """The sum of each row by pairs, pairs of pairs, ..., rounded at each of the log2(n) levels."""
    while x_Cn.shape[1] > 1:
        even = x_Cn.shape[1] // 2 * 2
        x_Cn = torch.cat([x_Cn[:, 0:even:2] + x_Cn[:, 1:even:2], x_Cn[:, even:]], 1)
    return x_Cn[:, 0]


def naive_sum(x_Cn: Tensor) -> Tensor:
    """The sum of each row, one element after the other, rounded each time: 5000 ones give 2048 in half."""
    total_C = torch.zeros_like(x_Cn[:, 0])
    for column_C in x_Cn.t().contiguous().unbind():
        total_C = total_C + column_C
    return total_C


SUMS: Mapping[str, Callable[[Tensor], Tensor]] = {"tree": tree_sum, "naive": naive_sum}
NARROW = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class RoundedArithmetic:
    """Means in a narrow type.

    Args:
        dtype: float16 or bfloat16.
        accumulation: "tree" for pairwise partial sums, "naive" for one after the other.

    Raises:
        ConfigError: another dtype or accumulation.
    """

    dtype: torch.dtype
    accumulation: Accumulation

    def __post_init__(self) -> None:
        if self.dtype not in NARROW:
            raise ConfigError(
                f"stats_dtype={self.dtype} is not a narrow type; use torch.float16, torch.bfloat16, or None for wide"
            )
        if self.accumulation not in SUMS:
            raise ConfigError(f"accumulation={self.accumulation!r} is unknown; choose one of {', '.join(SUMS)}")

    def average(self, x_NCX: Tensor) -> Tensor:
        """The sum of x / n per channel, every term and every partial sum rounded.

        Divided first: a sum of 4096 elements of 16 leaves the range of half, a mean of them does not, and the question
        asked of narrow statistics is what the squares do, not what an avoidable overflow does. Terms that are too
        small for x / n vanish, as they would.
        """
        rows_Cn = rows_by_channel(cast(x_NCX, self.dtype))
        return SUMS[self.accumulation](rows_Cn / rows_Cn.shape[1])

    def mean(self, x_NCX: Tensor) -> Tensor:
        """`average`, put back between the extremes of the channel where rounding took a finite one out of them.

        A constant channel then has deviations of exactly zero, and not of a few units in the last place that a small
        scale would blow up. An infinite or undefined average stays.
        """
        rows_Cn, mean_C = rows_by_channel(cast(x_NCX, self.dtype)), self.average(x_NCX)
        inside_C = torch.minimum(torch.maximum(mean_C, rows_Cn.amin(1)), rows_Cn.amax(1))
        return torch.where(torch.isfinite(mean_C), inside_C, mean_C)
