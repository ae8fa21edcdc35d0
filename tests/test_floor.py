import math

import numpy as np
import pytest
from onnx import TensorProto, helper
from reference_parity import graph_of

from lowprec.errors import ArtifactError, ConfigError
from lowprec.export.float64 import Float64Graph
from lowprec.export.parity.floor import Floor, channel_rms, deviation, noise_floor, perturbed, rms
from lowprec.formats import BF16, FP16, FP32, FP64, round_to


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def one(op, weights=(), shape=("n", 50), **attributes):
    node = helper.make_node(op, ["x", *dict(weights)], ["y"], **attributes)
    return Float64Graph(graph_of([node], {"x": list(shape)}, {"y": ["n"] + [None] * (len(shape) - 1)}, weights))


def off_by(estimate, expected, elements):
    """|estimate / expected - 1| in standard deviations of an rms over that many independent elements.

    The square of a uniform value has the variance 4/45 around 1/3, so a mean of n squares has a relative deviation of
    sqrt(4/45 * 9 / n) = sqrt(0.8 / n), the rms half of it.
    """
    return abs(estimate / expected - 1) / (0.5 * math.sqrt(0.8 / elements))


@pytest.mark.parametrize("storage", [FP16, BF16, FP32])
def test_elementwise_arithmetic_is_off_by_one_rounding(storage):
    x = normal(40, 50)
    # 1/3 of u^2 is the mean square of a uniform value in [-u, u]; x itself is held by fp32 (as float64 it is not).
    x = x.astype(np.float16).astype(np.float64)
    floor = noise_floor(one("Sigmoid"), {"x": x}, storage, draws=8)
    y = 1 / (1 + np.exp(-x))
    rounding = storage.unit_roundoff / math.sqrt(3)
    inputs = 0.0 if storage is not BF16 else rounding * np.where(round_to(x, BF16) == x, 0, np.abs(x)) * y * (1 - y)
    expected = rms(np.sqrt((rounding * y) ** 2 + inputs**2))
    assert off_by(floor.total("y"), expected, x.size * 8) < 5


def test_a_sum_carries_its_accumulators_noise():
    # Whole numbers as inputs: held exactly, so that the floor is that of the result alone.
    x = np.random.default_rng(0).integers(1, 9, (400, 50)).astype(np.float64)
    graph = one("ReduceSum", {"axes": np.array([1])}, keepdims=1)
    floor = noise_floor(graph, {"x": x}, FP32, accumulator=FP16, draws=8)
    sums = x.sum(axis=1)
    expected = rms(sums) / math.sqrt(3) * math.hypot(FP32.unit_roundoff, math.sqrt(50) * FP16.unit_roundoff)
    assert off_by(floor.total("y"), expected, 400 * 8) < 5


def test_moving_values_rounds_nothing():
    x = normal(3, 50)
    for op, attributes in (("Relu", {}), ("Transpose", {"perm": [1, 0]}), ("Identity", {})):
        floor = noise_floor(one(op, **attributes), {"x": x.astype(np.float16)}, FP16)
        assert floor.total("y") == 0


def test_inputs_are_rounded_only_where_the_format_does_not_hold_them():
    x = np.array([[0.5, 1 / 3]])
    floor = noise_floor(one("Identity", shape=("n", 2)), {"x": x}, FP16, draws=50)
    assert floor.rms["y"][0, 0] == 0
    assert 0 < floor.rms["y"][0, 1] <= FP16.unit_roundoff / 3


def test_weights_are_rounded_even_where_the_format_holds_them():
    # The file's weights were rounded once already; the truth's were not.
    graph = one("Mul", {"w": np.array([1.0, 2.0])}, shape=("n", 2))
    x = np.ones((1, 2))
    single = noise_floor(one("Sigmoid", shape=("n", 2)), {"x": x}, FP16, draws=200).total("y") * (1 + math.e**-1)
    both = noise_floor(graph, {"x": x}, FP16, draws=200).total("y")
    # Two roundings (weight, product) against one, of values 1 and 2: sqrt(2) * sqrt(2.5).
    assert abs(both / single / (math.sqrt(2) * math.sqrt(2.5)) - 1) < 5 * math.sqrt(0.2 / 400) * 2


def test_a_lone_literal_stays_what_it_is():
    # A perturbed exponent would turn negative bases into NaN.
    graph = one("Pow", {"two": np.array(2.0)})
    x = -np.abs(normal(4, 50))
    assert np.isfinite(noise_floor(graph, {"x": x}, FP32).rms["y"]).all()
    assert noise_floor(graph, {"x": x}, FP32).total("y") > 0


def test_zeros_and_infinities_are_stored_exactly():
    x = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1.0])
    got = perturbed(x, 1, FP16, FP32, np.random.default_rng(0))
    np.testing.assert_array_equal(got[:5], x[:5])
    assert got[5] != 1
    assert abs(got[5] - 1) <= FP16.unit_roundoff


def test_below_the_normal_range_the_step_is_constant():
    x = np.full(1000, FP16.min_subnormal * 3)
    off = np.abs(perturbed(x, 1, FP16, FP32, np.random.default_rng(0)) - x)
    # Half the step at most, and the largest of 1000 uniform draws above 0.98 of it (0.98^1000 = 2e-9 otherwise).
    assert 0.98 * FP16.min_subnormal / 2 < off.max() <= FP16.min_subnormal / 2


def test_the_floor_is_a_function_of_its_seed_alone():
    x = normal(8, 50)
    graph = one("Sigmoid")
    a, b, c = (noise_floor(graph, {"x": x}, FP16, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(a.rms["y"], b.rms["y"])
    assert not np.array_equal(a.rms["y"], c.rms["y"])
    assert (a.storage, a.accumulator, a.draws, a.seed) == ("fp16", "fp32", 6, 1)


def test_blocks_of_samples_share_the_draws_of_the_weights():
    # Identical samples through a perturbed weight and nothing else: every block must give the same deviations.
    nodes = [
        helper.make_node("Cast", ["x"], ["b"], to=TensorProto.BOOL),
        helper.make_node("Where", ["b", "w", "zero"], ["y"]),
    ]
    weights = {"w": normal(1, 3), "zero": np.zeros((1, 3))}
    graph = Float64Graph(graph_of(nodes, {"x": ["n", 3]}, {"y": ["n", 3]}, weights))
    rows = noise_floor(graph, {"x": np.ones((7, 3))}, FP16, batch=2).rms["y"]
    assert rows.shape == (7, 3)
    np.testing.assert_array_equal(rows, np.broadcast_to(rows[:1], rows.shape))


def test_blocks_of_samples_draw_their_own_noise():
    rows = noise_floor(one("Sigmoid"), {"x": np.ones((4, 50))}, FP16, batch=2).rms["y"]
    assert not np.array_equal(rows[:2], rows[2:])


def test_graphs_of_fixed_size_are_run_whole():
    graph = Float64Graph(graph_of([helper.make_node("Sigmoid", ["x"], ["y"])], {"x": [100, 2]}, {"y": [100, 2]}))
    assert noise_floor(graph, {"x": normal(100, 2)}, FP16).rms["y"].shape == (100, 2)


def test_progress_counts_every_evaluation():
    seen = []
    noise_floor(one("Sigmoid"), {"x": normal(5, 50)}, FP16, draws=2, batch=4, progress=lambda a, b: seen.append((a, b)))
    assert seen == [(1, 6), (2, 6), (4, 6), (5, 6), (6, 6)]


def test_one_draw_is_no_floor():
    with pytest.raises(ConfigError, match="at least 2"):
        noise_floor(one("Sigmoid"), {"x": normal(1, 50)}, FP16, draws=1)


def test_decisions_that_noise_changes_are_counted():
    # Two scores closer than a rounding change places in some draws; two far apart never do.
    nodes = [helper.make_node("Sigmoid", ["x"], ["s"]), helper.make_node("ArgMax", ["s"], ["y"], axis=1, keepdims=0)]
    model = graph_of(nodes, {"x": ["n", 2]}, {"y": ["n"]})
    model.graph.output[0].type.tensor_type.elem_type = 7
    rows = noise_floor(Float64Graph(model), {"x": np.array([[1.0, 1.0 + 1e-9], [1.0, 3.0]])}, FP16, draws=30).rms["y"]
    assert rows[0] > 0.3
    assert rows[1] == 0


def test_an_evaluation_that_breaks_down_does_not_widen_the_floor():
    graph = one("Sqrt", shape=("n", 2))
    # sqrt of a value at the edge of the domain stays finite, of an infinite one infinite: no NaN in the floor.
    floor = noise_floor(graph, {"x": np.array([[np.inf, 4.0]])}, FP16)
    assert floor.rms["y"][0, 0] == 0
    assert floor.rms["y"][0, 1] > 0


def test_a_floor_survives_being_stored(tmp_path):
    floor = noise_floor(one("Sigmoid"), {"x": normal(4, 50)}, BF16, accumulator=FP64, seed=7)
    np.savez(tmp_path / "f.npz", **floor.to_arrays())
    with np.load(tmp_path / "f.npz", allow_pickle=False) as stored:
        back = Floor.from_arrays(dict(stored))
    assert (back.storage, back.accumulator, back.draws, back.seed) == ("bf16", "fp64", 6, 7)
    np.testing.assert_array_equal(back.rms["y"], floor.rms["y"])
    assert back.storage_format is BF16
    np.testing.assert_array_equal(back.take(2).rms["y"], floor.rms["y"][:2])


DAMAGES = {
    "no storage": lambda arrays: arrays.pop("storage"),
    "no outputs": lambda arrays: arrays.pop("rms.y"),
    "negative": lambda arrays: arrays.update({"rms.y": -np.ones(2)}),
    "not a number": lambda arrays: arrays.update({"rms.y": np.array([np.nan])}),
    "another type": lambda arrays: arrays.update({"rms.y": np.ones(2, np.float32)}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_floor_is_refused(damage):
    arrays = Floor("fp16", "fp32", 6, 0, {"y": np.ones(2)}).to_arrays()
    DAMAGES[damage](arrays)
    with pytest.raises(ArtifactError, match="noise floor"):
        Floor.from_arrays(arrays)


def test_rms_is_that_of_the_finite_elements_and_does_not_overflow():
    assert rms(np.array([3.0, 4.0, np.nan, np.inf])) == math.sqrt(12.5)
    assert rms(np.array([1e200, -1e200])) == 1e200
    assert rms(np.zeros(0)) == 0
    np.testing.assert_array_equal(channel_rms(np.array([[3.0, 0.0], [3.0, 0.0]])), [3.0, 0.0])
    np.testing.assert_array_equal(channel_rms(np.array([3.0, 3.0])), [3.0])


def test_deviations_of_integers_are_changes():
    np.testing.assert_array_equal(deviation(np.array([1, 2]), np.array([1, 9])), [0, 1])
    np.testing.assert_array_equal(deviation(np.array([1.0, np.inf]), np.array([1.5, np.inf])), [0.5, np.nan])


def test_totals_and_channels_are_root_mean_squares():
    floor = Floor("fp16", "fp32", 6, 0, {"y": np.array([[1.0, 7.0], [1.0, 1.0]])})
    np.testing.assert_allclose(floor.total("y"), math.sqrt(13), rtol=4 * FP64.unit_roundoff)
    np.testing.assert_allclose(floor.channels("y"), [1.0, 5.0], rtol=4 * FP64.unit_roundoff)
