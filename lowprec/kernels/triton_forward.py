"""The forward kernels of `triton_norm`: sum, deviations or extremes, apply. How they run: `triton_tiles`."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disallow-untyped-calls=False

import triton
import triton.language as tl

from lowprec.kernels.triton_tiles import by_first, channels_here, store_bits, tile_of, total, value

# Later than any position.
NOWHERE = tl.constexpr(2**31 - 1)


@triton.jit
def sum_kernel(
    x, partial, tiles, blocks, samples, channels, length, R: tl.constexpr, B: tl.constexpr, AXIS: tl.constexpr
):
    """partial[block, channel] = sum(x - first element of the channel)."""
    channel, exists = channels_here(channels, B, AXIS)
    first = tl.load(x + channel.to(tl.int64) * length, exists, 0.0).to(tl.float32)
    running = tl.zeros((R, B), tl.float32)
    for tile in range(tl.program_id(0), tiles, blocks):
        offset, mask, _ = tile_of(tile, channel, samples, channels, length, R, B, AXIS)
        running += tl.where(mask, tl.load(x + offset, mask, 0.0).to(tl.float32) - first, 0.0)
    tl.store(partial + tl.program_id(0) * channels + channel, tl.sum(running, axis=AXIS, keep_dims=True), exists)


@triton.jit
def _mean(x, sums, mean, channel, exists, blocks, count, channels, length, B: tl.constexpr, AXIS: tl.constexpr):
    """The mean from what `sum_kernel` found; the first program of each channel writes it."""
    first = tl.load(x + channel.to(tl.int64) * length, exists, 0.0).to(tl.float32)
    centre = first + total(sums, blocks, channel, exists, channels, B, AXIS) / count
    tl.store(mean + channel, centre, by_first(exists))
    return centre


@triton.jit
def deviation_kernel(
    x, sums, partial, mean, tiles, blocks, count, samples, channels, length,
    R: tl.constexpr, B: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """partial[block, channel] = sum |x - mean|; writes the mean."""
    channel, exists = channels_here(channels, B, AXIS)
    centre = _mean(x, sums, mean, channel, exists, blocks, count, channels, length, B, AXIS)
    running = tl.zeros((R, B), tl.float32)
    for tile in range(tl.program_id(0), tiles, blocks):
        offset, mask, _ = tile_of(tile, channel, samples, channels, length, R, B, AXIS)
        running += tl.where(mask, tl.abs(tl.load(x + offset, mask, 0.0).to(tl.float32) - centre), 0.0)
    tl.store(partial + tl.program_id(0) * channels + channel, tl.sum(running, axis=AXIS, keep_dims=True), exists)


@triton.jit
def extremes_kernel(
    x, sums, keys, codes, mean, tiles, blocks, count, samples, channels, length, k,
    K: tl.constexpr, R: tl.constexpr, B: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """The k largest |x - mean| that this program sees, (block, k, channel): |d| and position, ~position where d < 0.

    K, a power of two, are kept per channel; those beyond k are infinite and never replaced. Whatever in a tile is
    larger than the smallest kept takes its place, largest first. Of equals the earlier position stays: tiles come in
    ascending order, so only a strictly larger one replaces, and it replaces the last of equals. NaN counts as infinite.
    """
    channel, exists = channels_here(channels, B, AXIS)
    centre = _mean(x, sums, mean, channel, exists, blocks, count, channels, length, B, AXIS)
    slot = tl.arange(0, K)[:, None] + tl.zeros_like(channel)
    kept = tl.where(slot < k, -1.0, float("inf"))
    place = slot
    code = slot
    for tile in range(tl.program_id(0), tiles, blocks):
        offset, mask, position = tile_of(tile, channel, samples, channels, length, R, B, AXIS)
        d = tl.load(x + offset, mask, 0.0).to(tl.float32) - centre
        key = tl.where(mask, tl.where(d != d, float("inf"), tl.abs(d)), -1.0)
        best = tl.max(key, axis=AXIS, keep_dims=True)
        worst = tl.min(kept, axis=0, keep_dims=True)
        while tl.max(tl.max((best > worst).to(tl.int32), axis=1), axis=0) > 0:
            found = tl.min(tl.where(key == best, position, NOWHERE), axis=AXIS, keep_dims=True)
            here = (position == found) & mask
            negative = tl.max((here & ~(d >= 0)).to(tl.int32), axis=AXIS, keep_dims=True)
            last = tl.max(tl.where(kept == worst, place, -1), axis=0, keep_dims=True)
            replaced = (best > worst) & (kept == worst) & (place == last)
            key = tl.where(here & (best > worst), -1.0, key)
            kept = tl.where(replaced, best, kept)
            place = tl.where(replaced, found, place)
            code = tl.where(replaced, tl.where(negative > 0, -1 - found, found), code)
            best = tl.max(key, axis=AXIS, keep_dims=True)
            worst = tl.min(kept, axis=0, keep_dims=True)
    target = (tl.program_id(0) * k + slot) * channels + channel
    tl.store(keys + target, kept, (slot < k) & exists)
    tl.store(codes + target, code, (slot < k) & exists)


@triton.jit
def choose_kernel(keys, codes, mean, scale, extremes, candidates, channels, k, constant, eps, Q: tl.constexpr):
    """Of a channel's candidates the k largest, of equals the first, and the scale that they make.

    x - x is 0 where the mean is finite and NaN where it is not, which a maximum could hide.
    """
    channel = tl.program_id(0)
    slot = tl.arange(0, Q)
    mask = slot < candidates
    key = tl.load(keys + slot * channels + channel, mask, -1.0)
    code = tl.load(codes + slot * channels + channel, mask, 0)
    position = tl.where(code >= 0, code, -1 - code)
    sum_of_best = 0.0
    for rank in range(k):
        best = tl.max(key, axis=0)
        found = tl.min(tl.where(key == best, position, NOWHERE), axis=0)
        here = (key == best) & (position == found)
        tl.store(extremes + channel * k + rank, tl.sum(tl.where(here, code, 0), axis=0).to(tl.int64))
        sum_of_best += best
        key = tl.where(here, -1.0, key)
    centre = tl.load(mean + channel)
    tl.store(scale + channel, constant * (sum_of_best / k) + eps + (centre - centre))


@triton.jit
def apply_kernel(
    x, sums, mean, scale, weight, bias, residual, y, bits, tiles, blocks, count, samples, channels, length,
    constant, eps, L1: tl.constexpr, RELU: tl.constexpr, ACTIVE: tl.constexpr, SIGN: tl.constexpr,
    R: tl.constexpr, B: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """y = relu(weight * (x - mean) / scale + bias + residual) and the bits; for L1 the scale too."""
    channel, exists = channels_here(channels, B, AXIS)
    centre = tl.load(mean + channel, exists, 0.0)
    if L1:
        spread = constant * (total(sums, blocks, channel, exists, channels, B, AXIS) / count) + eps
        tl.store(scale + channel, spread, by_first(exists))
    else:
        spread = tl.load(scale + channel, exists, 1.0)
    spread = tl.where(exists, spread, 1.0)
    factor = value(weight, channel, exists, 1.0) / spread
    beta = value(bias, channel, exists, 0.0)
    for tile in range(tl.program_id(0), tiles, blocks):
        offset, mask, _ = tile_of(tile, channel, samples, channels, length, R, B, AXIS)
        d = tl.load(x + offset, mask, 0.0).to(tl.float32) - centre
        out = d * factor + beta
        if residual is not None:
            out += tl.load(residual + offset, mask, 0.0).to(tl.float32)
        if RELU:
            out = tl.where(out <= 0, 0.0, out)  # not a maximum: NaN stays NaN
        stored = out.to(y.dtype.element_ty)
        tl.store(y + offset, stored, mask)
        if ACTIVE:
            flags = mask & ~(stored.to(tl.float32) <= 0)
            store_bits(bits, flags, tile, channel, samples, channels, length, R, B, AXIS)
        if SIGN:
            store_bits(bits, mask & (d >= 0), tile, channel, samples, channels, length, R, B, AXIS)
