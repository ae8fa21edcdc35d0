"""What the Triton kernels share: tiles of the two layouts, their bits, and totals of partial results.

A tile is two-dimensional and its second axis lies along memory, which is also the axis that bits are packed along:

    rows     (R, B): R positions by B channels; a channel's elements lie along axis 0
    planes   (1, B): B places of one channel; along axis 1. Places are counted with every plane padded to whole bytes,
             so that a tile begins and ends at a byte.

So AXIS, the axis to reduce, is 0 or 1, and a value per channel is (1, B) or (1, 1), which broadcasts against the tile.
A program takes every `blocks`-th tile of its channels, adds element by element in float32 and writes one partial result
per channel; the kernel that needs the total adds the partial results again, in the same order in every program. No
atomics, so equal input gives equal bits.

Only what Triton has had since 3.0 is used. No annotations but `tl.constexpr`, which is Triton's own syntax.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disallow-untyped-calls=False

import triton
import triton.language as tl

# Partial results that are added per step.
FINISH = tl.constexpr(32)


@triton.jit
def channels_here(channels, B: tl.constexpr, AXIS: tl.constexpr):
    """The channels of this program and which of them exist."""
    if AXIS == 0:
        channel = tl.program_id(1) * B + tl.arange(0, B)[None, :]
    else:
        channel = tl.program_id(1) + tl.arange(0, 1)[None, :]
    return channel, channel < channels


@triton.jit
def tile_of(tile, channel, samples, channels, length, R: tl.constexpr, B: tl.constexpr, AXIS: tl.constexpr):
    """Of one tile: offsets into memory, which elements exist, positions in the channel."""
    if AXIS == 0:
        position = tile * R + tl.arange(0, R)[:, None]
        wide = position.to(tl.int64)
        offset = wide * channels + channel
        mask = (position < samples) & (channel < channels)
    else:
        plane = (length + 7) // 8 * 8
        place = tile * B + tl.arange(0, B)[None, :]
        sample = place // plane
        inside = place % plane
        wide = sample.to(tl.int64) * channels + channel
        offset = wide * length + inside
        mask = (sample < samples) & (inside < length)
        position = sample * length + inside
    return offset, mask, position


@triton.jit
def byte_tile(tile, channel, samples, channels, length, R: tl.constexpr, B: tl.constexpr, AXIS: tl.constexpr):
    """Offsets of the bytes that hold the bits of one tile, (R, B / 8), and which of them exist."""
    if AXIS == 0:
        row = tile * R + tl.arange(0, R)[:, None]
        width = (channels + 7) // 8
        byte = tl.program_id(1) * (B // 8) + tl.arange(0, B // 8)[None, :]
        offset = row.to(tl.int64) * width + byte
        mask = (row < samples) & (byte < width)
    else:
        width = (length + 7) // 8
        place = tile * (B // 8) + tl.arange(0, B // 8)[None, :]
        sample = place // width
        offset = (sample.to(tl.int64) * channels + channel) * width + place % width
        mask = sample < samples
    return offset, mask


@triton.jit
def store_bits(
    bits, flags, tile, channel, samples, channels, length, R: tl.constexpr, B: tl.constexpr, AXIS: tl.constexpr
):
    """Packs the (R, B) flags, eight to a byte, least first, and stores them."""
    powers = 1 << tl.arange(0, 8)[None, None, :]
    packed = tl.sum(tl.reshape(flags.to(tl.int32), (R, B // 8, 8)) * powers, axis=2)
    offset, mask = byte_tile(tile, channel, samples, channels, length, R, B, AXIS)
    tl.store(bits + offset, packed.to(tl.uint8), mask)


@triton.jit
def load_bits(bits, tile, channel, samples, channels, length, R: tl.constexpr, B: tl.constexpr, AXIS: tl.constexpr):
    """The inverse of `store_bits`: (R, B) of 0 and 1."""
    offset, mask = byte_tile(tile, channel, samples, channels, length, R, B, AXIS)
    packed = tl.load(bits + offset, mask, 0).to(tl.int32)
    return tl.reshape((packed[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1, (R, B))


@triton.jit
def total(partial, blocks, channel, exists, channels, B: tl.constexpr, AXIS: tl.constexpr):
    """The sum per channel of `blocks` partial results, a pairwise sum of FINISH running ones."""
    WIDTH: tl.constexpr = B if AXIS == 0 else 1
    running = tl.zeros((FINISH, WIDTH), tl.float32)
    for start in range(0, blocks, FINISH):
        block = start + tl.arange(0, FINISH)[:, None]
        running += tl.load(partial + block * channels + channel, (block < blocks) & exists, 0.0)
    return tl.sum(running, axis=0, keep_dims=True)


@triton.jit
def by_first(exists):
    """What the first program of each channel writes for all of them."""
    first = tl.zeros_like(exists).to(tl.int32) + tl.program_id(0)
    return exists & (first == 0)


@triton.jit
def value(values, channel, exists, default):
    """A value per channel in float32; `default` where there is no such tensor."""
    if values is None:
        found = tl.zeros_like(channel).to(tl.float32) + default
    else:
        found = tl.load(values + channel, exists, 0.0).to(tl.float32)
    return found
