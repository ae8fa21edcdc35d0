"""The algebra of folding against plain loops, over random shapes."""

import numpy as np
import pytest
import reference_fold as reference
from hypothesis import given, settings
from hypothesis import strategies as st

from lowprec.affine import ChannelAffine
from lowprec.export.folding import algebra
from lowprec.export.folding.algebra import channel_magnitudes, fold_affine, output_channels, scaled, unfold_input
from lowprec.export.folding.gauges.scales import Scales

EPS = np.finfo(np.float64).eps


@st.composite
def conv_cases(draw):
    axes = draw(st.integers(1, 3))
    groups, per_group_in, per_group_out = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    kernel = [draw(st.integers(1, 2 if axes == 3 else 3)) for _ in range(axes)]
    dilation = draw(st.integers(1, 2))
    # Long enough for one window even without padding.
    space = [dilation * (k - 1) + 1 + draw(st.integers(0, 1 if axes == 3 else 2)) for k in kernel]
    return {
        "groups": groups,
        "channels": groups * per_group_in,
        "outputs": groups * per_group_out,
        "kernel": kernel,
        "space": space,
        "stride": draw(st.integers(1, 2)),
        "padding": draw(st.integers(0, 1)),
        "dilation": dilation,
        "has_bias": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**32 - 1)),
    }


def _affine(rng, channels):
    """Scales of both signs, some zero."""
    return ChannelAffine(rng.normal(size=channels) * rng.integers(0, 4, channels), rng.normal(size=channels))


def _tolerance(length, magnitude):
    """Twice the classic bound n * u * sum|terms| of a sum of `length` products, plus scaling and shift (3 roundings).

    Twice, because both sides are computed; `magnitude` is the same operation on absolute values.
    """
    return 2 * (length + 3) * (EPS / 2) * magnitude + np.finfo(np.float64).tiny


@settings(max_examples=60, deadline=None)
@given(conv_cases(), st.sampled_from(["conv", "conv_transpose"]))
def test_folded_convolution_equals_convolution_then_affine(case, kind):
    rng = np.random.default_rng(case["seed"])
    groups, channels, outputs = case["groups"], case["channels"], case["outputs"]
    x = rng.normal(size=(2, channels, *case["space"]))
    first, second = (outputs, channels // groups) if kind == "conv" else (channels, outputs // groups)
    weight = rng.normal(size=(first, second, *case["kernel"]))
    bias = rng.normal(size=outputs) if case["has_bias"] else None
    affine = _affine(rng, outputs)
    run = getattr(reference, kind)
    padding = min(case["padding"], *(k - 1 for k in case["kernel"])) if kind == "conv_transpose" else case["padding"]
    geometry = {"stride": case["stride"], "padding": padding, "dilation": case["dilation"], "groups": groups}

    folded_weight, folded_bias = fold_affine(kind, weight, bias, affine, groups)

    expected = reference.affine(run(x, weight, bias, **geometry), affine.scale, affine.shift)
    found = run(x, np.asarray(folded_weight), folded_bias, **geometry)
    magnitude = reference.affine(
        run(abs(x), abs(weight), None if bias is None else abs(bias), **geometry),
        abs(affine.scale),
        abs(affine.shift),
    )
    length = channels // groups * int(np.prod(case["kernel"])) + 1
    assert output_channels(kind, weight, groups) == outputs
    assert np.all(abs(found - expected) <= _tolerance(length, magnitude))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.booleans(), st.integers(0, 2**32 - 1))
def test_folded_linear_equals_linear_then_affine(channels, outputs, has_bias, seed):
    rng = np.random.default_rng(seed)
    x, weight = rng.normal(size=(3, channels)), rng.normal(size=(outputs, channels))
    bias, affine = rng.normal(size=outputs) if has_bias else None, _affine(rng, outputs)

    folded_weight, folded_bias = fold_affine("linear", weight, bias, affine)

    expected = reference.affine(reference.linear(x, weight, bias), affine.scale, affine.shift)
    magnitude = reference.affine(
        reference.linear(abs(x), abs(weight), None if bias is None else abs(bias)), abs(affine.scale), abs(affine.shift)
    )
    found = reference.linear(x, np.asarray(folded_weight), folded_bias)
    assert np.all(abs(found - expected) <= _tolerance(channels + 1, magnitude))


@pytest.mark.parametrize("kind", ["conv", "conv_transpose", "linear"])
def test_arguments_stay_and_half_weights_are_folded_in_float64(kind):
    weight = np.full((2, 2), 1 / 3, np.float16)
    bias = np.ones(2, np.float16)
    affine = ChannelAffine(np.array([3.0, 1e6]), np.array([0.5, -0.5]))

    folded_weight, folded_bias = fold_affine(kind, weight, bias, affine)

    assert np.asarray(folded_weight).dtype == folded_bias.dtype == np.float64
    assert np.isfinite(np.asarray(folded_weight)).all()  # 1e6 / 3 would be infinite in half
    assert (weight == np.float16(1 / 3)).all()
    assert (bias == 1).all()


def test_grouped_transposed_weight_takes_each_scale_in_its_own_group():
    weight = np.ones((4, 2, 1))  # 4 input channels in 2 groups, 2 output channels per group

    folded, _ = fold_affine("conv_transpose", weight, None, ChannelAffine(np.arange(1.0, 5.0), np.zeros(4)), groups=2)

    assert np.asarray(folded)[:, :, 0].tolist() == [[1, 2], [1, 2], [3, 4], [3, 4]]


@settings(max_examples=40, deadline=None)
@given(conv_cases(), st.sampled_from(["conv", "conv_transpose"]), st.integers(1, 60))
def test_a_weight_that_is_not_multiplied_out_rounds_once_and_block_by_block(case, kind, block):
    rng = np.random.default_rng(case["seed"])
    groups, channels, outputs = case["groups"], case["channels"], case["outputs"]
    first, second = (outputs, channels // groups) if kind == "conv" else (channels, outputs // groups)
    weight = rng.normal(size=(first, second, *case["kernel"])).astype(np.float32)
    before, after = _affine(rng, channels), _affine(rng, outputs)

    folded, _ = unfold_input(kind, weight, None, before, groups)
    folded, _ = fold_affine(kind, folded, None, after, groups)

    per_group = {"in": channels // groups, "out": outputs // groups}
    expected = np.zeros(weight.shape)
    for index in np.ndindex(*weight.shape):
        if kind == "conv":
            out, into = index[0], index[0] // per_group["out"] * per_group["in"] + index[1]
        else:
            out, into = index[0] // per_group["in"] * per_group["out"] + index[1], index[0]
        expected[index] = float(weight[index]) * before.scale[into] * after.scale[out]
    old, algebra._BLOCK = algebra._BLOCK, block
    try:
        rounded = folded.rounded(np.float32)
    finally:
        algebra._BLOCK = old
    # Two products on either side, in another order.
    assert np.all(abs(np.asarray(folded) - expected) <= 4 * EPS * abs(expected))
    assert np.array_equal(rounded, np.asarray(folded).astype(np.float32))
    rows, columns = channel_magnitudes(kind, folded, groups)
    by_rows, by_columns = channel_magnitudes(kind, np.asarray(folded), groups)
    assert np.allclose(rows, by_rows, rtol=4 * EPS, atol=0)
    assert np.allclose(columns, by_columns, rtol=4 * EPS, atol=0)


def test_factors_add_up_and_the_stored_weight_stays():
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)

    twice = scaled(scaled(weight, np.array([[2.0], [3.0]])), np.array([[5.0], [7.0]]))

    assert len(twice.factors) == 1
    assert np.asarray(twice).tolist() == [[0, 10, 20], [63, 84, 105]]
    assert weight.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_signs_of_scales_that_are_tied_by_negative_factors():
    """S1 = -2 S2: one of both is negative, and a demand that cannot be met leaves everything as it was."""
    scales = Scales()
    scales.add(2)

    assert scales.tie(1, 2, -2.0, "tie") is None
    assert scales.demand_positive(1, "first") is None
    assert scales.value(1) > 0 > scales.value(2)
    assert scales.demand_positive(2, "second") == "a negative scale would have to pass second or first"
    assert scales.value(1) == -2 * scales.value(2)
