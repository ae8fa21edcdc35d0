"""The backward kernels of `triton_norm`: sums, dx, and dx at the extremes. How they run: `triton_tiles`."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disallow-untyped-calls=False

import triton
import triton.language as tl

from lowprec.kernels.triton_tiles import by_first, channels_here, load_bits, tile_of, total, value


@triton.jit
def _incoming(
    grad_y, kept, flags, centre, offset, mask, L1: tl.constexpr, RELU: tl.constexpr, FROM_OUTPUT: tl.constexpr
):
    """Of one tile: g behind the ReLU, what it is multiplied with (z or d), and sgn d for L1; `flags` are the bits."""
    g = tl.load(grad_y + offset, mask, 0.0).to(tl.float32)
    other = tl.load(kept + offset, mask, 0.0).to(tl.float32)
    signs = g
    if FROM_OUTPUT:
        if RELU:
            g = tl.where(other <= 0, 0.0, g)
        if L1:
            signs = tl.where(mask, flags.to(tl.float32) * 2 - 1, 0.0)
    else:
        if RELU:
            g = tl.where(flags == 0, 0.0, g)
        other = other - centre
        if L1:
            signs = tl.where(mask, tl.where(other >= 0, 1.0, -1.0), 0.0)
    return tl.where(mask, g, 0.0), tl.where(mask, other, 0.0), signs


@triton.jit
def gradient_sums_kernel(
    grad_y, kept, bits, mean, partial, tiles, blocks, samples, channels, length,
    L1: tl.constexpr, RELU: tl.constexpr, FROM_OUTPUT: tl.constexpr, BITS: tl.constexpr,
    R: tl.constexpr, B: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """partial[0..2, block, channel] = sum(g), sum(g z) or sum(g d), and for L1 sum(sgn d)."""
    channel, exists = channels_here(channels, B, AXIS)
    centre = tl.load(mean + channel, exists, 0.0)
    sums = tl.zeros((R, B), tl.float32)
    products = tl.zeros((R, B), tl.float32)
    above = tl.zeros((R, B), tl.float32)
    for tile in range(tl.program_id(0), tiles, blocks):
        offset, mask, _ = tile_of(tile, channel, samples, channels, length, R, B, AXIS)
        flags = mask
        if BITS:
            flags = load_bits(bits, tile, channel, samples, channels, length, R, B, AXIS)
        g, other, signs = _incoming(grad_y, kept, flags, centre, offset, mask, L1, RELU, FROM_OUTPUT)
        sums += g
        products += g * other
        if L1:
            above += signs
    target = partial + tl.program_id(0) * channels + channel
    step = blocks * channels
    tl.store(target, tl.sum(sums, axis=AXIS, keep_dims=True), exists)
    tl.store(target + step, tl.sum(products, axis=AXIS, keep_dims=True), exists)
    if L1:
        tl.store(target + 2 * step, tl.sum(above, axis=AXIS, keep_dims=True), exists)


@triton.jit
def _slopes(
    partial, extremes, scale, weight, bias, grad_mean, grad_scale, dweight, dbias, channel, exists, blocks, count,
    channels, constant, k, L1: tl.constexpr, FROM_OUTPUT: tl.constexpr, B: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """factor, shift and step of dx = factor * g + shift + step * sgn d; writes the gradients of weight and bias."""
    step = blocks * channels
    sum_g = total(partial, blocks, channel, exists, channels, B, AXIS)
    products = total(partial + step, blocks, channel, exists, channels, B, AXIS)
    spread = tl.where(exists, tl.load(scale + channel, exists, 1.0), 1.0)
    gamma = value(weight, channel, exists, 1.0)
    if FROM_OUTPUT:
        moment = products - value(bias, channel, exists, 0.0) * sum_g
        grad_gamma = moment / tl.where(exists, gamma, 1.0)
    else:
        grad_gamma = products / spread
        moment = gamma * grad_gamma
    tl.store(dweight + channel, grad_gamma, by_first(exists))
    tl.store(dbias + channel, sum_g, by_first(exists))
    factor = gamma / spread
    slope = (value(grad_scale, channel, exists, 0.0) - moment / spread) * constant
    offset = value(grad_mean, channel, exists, 0.0) - factor * sum_g
    if L1:
        signs = total(partial + 2 * step, blocks, channel, exists, channels, B, AXIS)
        slope = slope / count
    else:
        signs = tl.zeros_like(channel).to(tl.float32)
        for rank in range(k):
            code = tl.load(extremes + channel * k + rank, exists, 0)
            signs += tl.where(code >= 0, 1.0, -1.0)
        slope = slope / k
    return factor, (offset - slope * signs) / count, slope


@triton.jit
def dx_kernel(
    grad_y, kept, bits, extremes, mean, scale, weight, bias, grad_mean, grad_scale, partial, dx, dresidual, dweight,
    dbias, slopes, tiles, blocks, count, samples, channels, length, constant, k,
    L1: tl.constexpr, RELU: tl.constexpr, FROM_OUTPUT: tl.constexpr, BITS: tl.constexpr,
    R: tl.constexpr, B: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """dx, the residual's gradient and those of weight and bias; `extremes_dx_kernel` mends dx for top-k."""
    channel, exists = channels_here(channels, B, AXIS)
    centre = tl.load(mean + channel, exists, 0.0)
    factor, shift, slope = _slopes(
        partial, extremes, scale, weight, bias, grad_mean, grad_scale, dweight, dbias, channel, exists, blocks, count,
        channels, constant, k, L1, FROM_OUTPUT, B, AXIS,
    )  # fmt: skip
    if not L1:
        first = by_first(exists)
        tl.store(slopes + channel, factor, first)
        tl.store(slopes + channels + channel, shift, first)
        tl.store(slopes + 2 * channels + channel, slope, first)
    for tile in range(tl.program_id(0), tiles, blocks):
        offset, mask, _ = tile_of(tile, channel, samples, channels, length, R, B, AXIS)
        flags = mask
        if BITS:
            flags = load_bits(bits, tile, channel, samples, channels, length, R, B, AXIS)
        g, _, signs = _incoming(grad_y, kept, flags, centre, offset, mask, L1, RELU, FROM_OUTPUT)
        out = factor * g + shift
        if L1:
            out += slope * signs
        tl.store(dx + offset, out.to(dx.dtype.element_ty), mask)
        if dresidual is not None:
            tl.store(dresidual + offset, g.to(dx.dtype.element_ty), mask)


@triton.jit
def extremes_dx_kernel(
    grad_y, kept, bits, extremes, slopes, dx, samples, channels, length, k,
    RELU: tl.constexpr, FROM_OUTPUT: tl.constexpr, BITS: tl.constexpr, K: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """dx at a channel's k extremes, where sgn d counts; computed anew, so that it is rounded once."""
    channel = tl.program_id(0)
    slot = tl.arange(0, K)
    mask = slot < k
    code = tl.load(extremes + channel * k + slot, mask, 0)
    position = tl.where(code >= 0, code, -1 - code)
    if AXIS == 0:
        offset = position * channels + channel
        byte = position * ((channels + 7) // 8) + channel // 8
        bit = channel % 8 + tl.zeros_like(slot)
    else:
        plane = position // length * channels + channel
        inside = position % length
        offset = plane * length + inside
        byte = plane * ((length + 7) // 8) + inside // 8
        bit = (inside % 8).to(tl.int32)
    flags = mask
    if BITS:
        flags = (tl.load(bits + byte, mask, 0).to(tl.int32) >> bit) & 1
    g, _, _ = _incoming(grad_y, kept, flags, 0.0, offset, mask, False, RELU, FROM_OUTPUT)
    factor = tl.load(slopes + channel)
    shift = tl.load(slopes + channels + channel)
    slope = tl.load(slopes + 2 * channels + channel)
    out = factor * g + shift + slope * tl.where(code >= 0, 1.0, -1.0)
    tl.store(dx + offset, out.to(dx.dtype.element_ty), mask)
