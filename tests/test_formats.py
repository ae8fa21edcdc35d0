import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowprec.errors import ConfigError
from lowprec.formats import BF16, FORMATS, FP16, FP32, FP64, format_named, round_to, rounding_loss, spacing

EVERY_HALF = np.arange(2**16, dtype=np.uint16).view(np.float16)
FLOATS = st.floats(width=64, allow_nan=False)


@pytest.mark.parametrize(("fmt", "dtype"), [(FP16, torch.float16), (BF16, torch.bfloat16), (FP32, torch.float32)])
def test_parameters_are_those_of_torch(fmt, dtype):
    info = torch.finfo(dtype)
    assert (fmt.max, fmt.min_normal, fmt.eps) == (info.max, info.tiny, info.eps)
    assert fmt.unit_roundoff == info.eps / 2


@given(FLOATS)
def test_rounding_to_half_and_single_is_the_hardware_cast(x):
    with np.errstate(over="ignore"):
        assert round_to(x, FP16) == np.float16(x)
        assert round_to(x, FP32) == np.float32(x)


@given(st.floats(width=32, allow_nan=False))
def test_rounding_a_single_to_bfloat16_is_torchs_cast(x):
    assert round_to(x, BF16) == torch.tensor(x, dtype=torch.float32).bfloat16().double()


@given(FLOATS, st.sampled_from(list(FORMATS.values())))
def test_rounding_is_idempotent_and_odd(x, fmt):
    once = round_to(x, fmt)
    assert np.array_equal(round_to(once, fmt), once)
    assert np.array_equal(round_to(-x, fmt), -once)


@given(FLOATS, FLOATS, st.sampled_from(list(FORMATS.values())))
def test_rounding_is_monotone(x, y, fmt):
    low, high = sorted((x, y))
    assert round_to(low, fmt) <= round_to(high, fmt)


def test_a_double_that_two_roundings_would_get_wrong_is_rounded_once():
    # Just above the midpoint between two bfloat16 values: through float32 it lands on the midpoint and then on even.
    x = 1.0 + 2.0**-8 + 2.0**-40
    assert round_to(x, BF16) == 1.0 + 2.0**-7
    assert torch.tensor(x, dtype=torch.float64).float().bfloat16().double() == 1.0


def test_every_half_is_a_fixed_point_and_non_finite_values_stay():
    rounded = round_to(EVERY_HALF, FP16)
    assert np.array_equal(rounded, EVERY_HALF.astype(np.float64), equal_nan=True)


def test_spacing_is_the_distance_to_the_next_half():
    finite = np.abs(EVERY_HALF[np.isfinite(EVERY_HALF)])
    finite = finite[finite < FP16.max]
    assert np.array_equal(spacing(finite, FP16), np.spacing(finite).astype(np.float64))


def test_rounding_loss_counts_each_kind():
    loss = rounding_loss([1e5, -7e4, 1e-9, 1e-6, 1.0, 0.0, math.inf], FP16)
    assert (loss.overflow, loss.vanished, loss.subnormal) == (2, 1, 1)
    assert not rounding_loss([1.0, 0.5], FP16)


def test_headroom_is_log2_of_max_over_absmax():
    assert FP16.headroom_bits(FP16.max) == 0
    assert FP16.headroom_bits(FP16.max / 8) == 3
    assert FP16.headroom_bits(0.0) == math.inf
    assert FP16.headroom_bits(math.inf) == -math.inf


def test_unknown_format_names_the_valid_ones():
    with pytest.raises(ConfigError, match="unknown number format 'fp12'; choose one of fp64, fp32, fp16, bf16"):
        format_named("fp12")
    assert format_named("fp64") is FP64
