"""When the backward of norm + ReLU may start from the output.

From the output, sum(g d) is had as (sum(g z) - bias sum(g)) / weight: where |weight| is small against |bias| the two
terms cancel and leave the rounding of z. With u the unit roundoff of z's type, each stored z_i = weight d_i / S + bias
is off by at most u z_i, which is an error of u (|weight| |d_i / S| + |bias|) in a quantity that is divided by weight:

    |error of d_i / S| <= u (|d_i / S| + |bias / weight|)

so the gradient of weight, and the term of dL/dx that it makes, lose a factor 1 + |bias / weight| against storing d / S
itself. The output is used while |weight| > LIMIT u (|weight| + |bias|) in every channel, which bounds that error by
1 / LIMIT of max(1, |d_i / S|). Otherwise, for instance at weight = 0 where nothing of d is left in z, the input is
kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowprec.formats import BF16, FP16, FP32, FP64
from lowprec.kernels import native

LIMIT = 64
"""The error of d / S is at most 1/64 of max(1, |d / S|) in every element; its average over a channel is far smaller."""

REVIEW_EVERY = 16
"""Training forwards between two readings of the parameters on a device where reading them waits for it."""

_ROUNDOFF = {
    torch.bfloat16: BF16.unit_roundoff,
    torch.float16: FP16.unit_roundoff,
    torch.float32: FP32.unit_roundoff,
    torch.float64: FP64.unit_roundoff,
}


def output_suffices(weight_C: Tensor | None, bias_C: Tensor | None, dtype: torch.dtype) -> Tensor | bool:
    """Whether a backward from an output of `dtype` is accurate: the bound of the module docstring, over all channels.

    Returns:
        a bool where it is known at once, else a 0-d bool tensor on the parameters' device.
    """
    if weight_C is None:
        return bias_C is None
    limit = LIMIT * _ROUNDOFF[dtype]
    if weight_C.device.type == "cpu" and (known := native.output_suffices(weight_C, bias_C, limit)) is not None:
        return known
    size_C = weight_C.detach().abs().float()
    whole_C = size_C if bias_C is None else size_C + bias_C.detach().abs()
    return (size_C > limit * whole_C).all()


class BackwardChoice:
    """From the output or from the input: remembered per module, taken anew when the parameters may have moved.

    On a CPU at every training forward; elsewhere at the first and then every `REVIEW_EVERY`, because reading the
    parameters waits for the device. Never at construction: parameters are loaded and initialised after it. A compiled
    graph holds the choice as it was when it was traced, at first the input; a change of it traces again.
    """

    def __init__(self) -> None:
        self.from_output = False
        self._calls = 0

    def review(self, weight_C: Tensor | None, bias_C: Tensor | None, x: Tensor) -> bool:
        """The choice for a forward of `x`."""
        if torch.compiler.is_compiling():
            return self.from_output
        if x.device.type != "cpu":
            if _capturing(x) or _in_backward():  # a checkpoint's second forward must choose as the first did
                return self.from_output
            self._calls += 1
        if x.device.type == "cpu" or self._calls % REVIEW_EVERY == 1:
            self.from_output = bool(output_suffices(weight_C, bias_C, x.dtype))
        return self.from_output


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
