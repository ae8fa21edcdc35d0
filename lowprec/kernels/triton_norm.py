"""The fused norm on a CUDA device: `reference`'s two functions, computed by the kernels of
`triton_forward` and `triton_backward`.

Three passes forward (sum; deviations from the mean; apply) and two backward (sums; dx), top-k one small launch more
each way. Nothing is read back by the host. Results have the reference's meaning and layout, so that the two can be
mixed. With TRITON_INTERPRET=1 set before Triton is imported the same code runs on CPU tensors, slowly: for tests.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from lowprec.functional import L1_CONSTANT, linf_constant
from lowprec.kernels import triton_backward, triton_forward
from lowprec.kernels.layout import bits_shape, is_rows
from lowprec.kernels.reference import Gradients, Normalised

# Elements of a tile, 64 bytes of fp16 for each thread of WARPS warps: 16 warps of these on each of a large card's
# multiprocessors keep some 32 KiB on the way, which is what its memory needs to be busy.
TILE = 8192
WARPS = 8
# Channels of a tile in rows: 256 bytes of fp16, whole cache lines.
TILE_CHANNELS = 128
# Programs of a launch, about four for each multiprocessor of a large card, and of them for one channel at most: every
# program of the next pass reads the partial results of all that share its channels.
PROGRAMS = 512
BLOCKS = 256
# Candidates of a channel, k times BLOCKS, are chosen from by one program.
MOST_EXTREMES = 32


class Plan(NamedTuple):
    """How a tensor is cut into tiles; `each` counts a channel's elements; `meta` is compiled in."""

    tiles: int
    blocks: int
    samples: int
    channels: int
    length: int
    each: int
    channel_blocks: int
    meta: dict[str, int]

    @property
    def grid(self) -> tuple[int, int]:
        """Programs along the positions and along the channels."""
        return self.blocks, self.channel_blocks

    @property
    def sizes(self) -> tuple[int, int, int]:
        """What every kernel must know to find an element."""
        return self.samples, self.channels, self.length


def can_run(x: Tensor, k: int) -> bool:
    """Whether the kernels know tensors like `x`: positions in a channel are 32 bits, and k is small."""
    known = x.dtype in (torch.float32, torch.float16, torch.bfloat16)
    # The factor 8 is room for planes padded to whole bytes and for the tail of the last tile.
    return known and x.numel() > 0 and x.numel() // x.shape[1] * 8 < 2**31 and k <= MOST_EXTREMES


def norm_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    k: int,
    eps: float,
    relu: bool,
    from_output: bool,
) -> Normalised:
    """`reference.norm_forward` where `can_run`; x and residual in one canonical layout."""
    plan = _plan(x)
    active, sign = relu and not from_output, from_output and k == 0
    mean, scale = (torch.empty(plan.channels, device=x.device) for _ in range(2))
    y = torch.empty_like(x)
    bits = torch.empty(bits_shape(x) if active or sign else 0, dtype=torch.uint8, device=x.device)
    extremes = torch.empty((plan.channels, min(k, plan.each)) if k else 0, dtype=torch.int64, device=x.device)
    partial = torch.empty(2, plan.blocks, plan.channels, device=x.device)
    with _on_device_of(x):
        _launch(triton_forward.sum_kernel, plan, x, partial[0], plan.tiles, plan.blocks, *plan.sizes)
        common = (plan.tiles, plan.blocks, plan.each, *plan.sizes)
        if k == 0:
            _launch(triton_forward.deviation_kernel, plan, x, partial[0], partial[1], mean, *common)
        else:
            _find_extremes(plan, x, partial[0], mean, scale, extremes, eps)
        _launch(
            triton_forward.apply_kernel, plan, x, partial[1], mean, scale, weight, bias, residual, y, bits, *common,
            L1_CONSTANT, eps, L1=k == 0, RELU=relu, ACTIVE=active, SIGN=sign,
        )  # fmt: skip
    return Normalised(y, mean, scale, bits, extremes)


def norm_backward(
    grad_y: Tensor,
    kept: Tensor,
    mean: Tensor,
    scale: Tensor,
    bits: Tensor,
    extremes: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    grad_mean: Tensor | None,
    grad_scale: Tensor | None,
    k: int,
    relu: bool,
    from_output: bool,
    has_residual: bool,
) -> Gradients:
    """`reference.norm_backward` where `can_run`; grad_y and kept in one canonical layout."""
    plan = _plan(kept)
    ranks = extremes.shape[1] if k else 0
    constant = linf_constant(plan.each) if k else L1_CONSTANT
    dresidual = torch.empty_like(kept) if relu and has_residual else None
    dx, dweight, dbias = torch.empty_like(kept), torch.empty_like(scale), torch.empty_like(scale)
    partial = torch.empty(3, plan.blocks, plan.channels, device=kept.device)
    slopes = torch.empty(3, plan.channels, device=kept.device)
    has_bits = (relu and not from_output) or (from_output and k == 0)
    flags = {"RELU": relu, "FROM_OUTPUT": from_output, "BITS": has_bits}
    with _on_device_of(kept):
        _launch(
            triton_backward.gradient_sums_kernel, plan, grad_y, kept, bits, mean, partial, plan.tiles, plan.blocks,
            *plan.sizes, L1=k == 0, **flags,
        )  # fmt: skip
        _launch(
            triton_backward.dx_kernel, plan, grad_y, kept, bits, extremes, mean, scale, weight, bias,
            _dense(grad_mean), _dense(grad_scale), partial, dx, dresidual, dweight, dbias, slopes,
            plan.tiles, plan.blocks, plan.each, *plan.sizes, constant, ranks, L1=k == 0, **flags,
        )  # fmt: skip
        if k:
            triton_backward.extremes_dx_kernel[(plan.channels,)](
                grad_y, kept, bits, extremes, slopes, dx, *plan.sizes, ranks,
                **flags, K=triton.next_power_of_2(ranks), AXIS=plan.meta["AXIS"],
            )  # fmt: skip
    return Gradients(dx, dweight, dbias, kept.new_empty(0) if dresidual is None else dresidual)


def _find_extremes(
    plan: Plan, x: Tensor, sums: Tensor, mean: Tensor, scale: Tensor, extremes: Tensor, eps: float
) -> None:
    """Writes mean, scale and extremes of a top-k norm."""
    ranks = extremes.shape[1]
    keys = torch.empty(plan.blocks, ranks, plan.channels, device=x.device)
    codes = torch.empty(plan.blocks, ranks, plan.channels, dtype=torch.int32, device=x.device)
    common = (plan.tiles, plan.blocks, plan.each, *plan.sizes)
    _launch(
        triton_forward.extremes_kernel,
        plan,
        x,
        sums,
        keys,
        codes,
        mean,
        *common,
        ranks,
        K=triton.next_power_of_2(ranks),
    )
    candidates = plan.blocks * ranks
    triton_forward.choose_kernel[(plan.channels,)](
        keys, codes, mean, scale, extremes, candidates, plan.channels, ranks, linf_constant(plan.each), eps,
        Q=triton.next_power_of_2(candidates),
    )  # fmt: skip


def _plan(x: Tensor) -> Plan:
    rows, channels, count = is_rows(x), x.shape[1], x.numel() // x.shape[1]
    samples = count if rows else x.shape[0]
    length = count // samples
    if rows:
        inner = min(TILE_CHANNELS, TILE, max(8, triton.next_power_of_2(channels)))
        outer = max(1, min(TILE // inner, triton.next_power_of_2(count)))
        tiles, channel_blocks = -(-count // outer), -(-channels // inner)
    else:
        padded = samples * (-(-length // 8) * 8)
        inner, outer = max(8, min(TILE, triton.next_power_of_2(padded))), 1
        tiles, channel_blocks = -(-padded // inner), channels
    blocks = max(1, min(tiles, BLOCKS, PROGRAMS // channel_blocks))
    meta = {"R": outer, "B": inner, "AXIS": 0 if rows else 1}
    return Plan(tiles, blocks, samples, channels, length, count, channel_blocks, meta)


def _launch(kernel: Any, plan: Plan, *arguments: Any, **options: Any) -> None:
    kernel[plan.grid](*arguments, **options, **plan.meta, num_warps=WARPS, enable_fp_fusion=True)


def _dense(value_C: Tensor | None) -> Tensor | None:
    """Gradients of the statistics may come expanded from one number."""
    return None if value_C is None else value_C.contiguous()


def _on_device_of(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever its arguments lie on."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
