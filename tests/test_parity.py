import json
import math

import numpy as np
import pytest
from reference_parity import cnn, digits, graph_of, half_typed, trained_weights

from lowprec.errors import ArtifactError, ConfigError, DataError, ParityError
from lowprec.export.backends import BACKENDS
from lowprec.export.float64 import Float64Graph
from lowprec.export.parity import METRICS, Check, Floor, Limits, ParityReport, Stage, judge, noise_floor, worst
from lowprec.export.parity.intervals import (
    normal_quantile,
    paired_drop_interval,
    samples_for_margin,
    samples_for_share,
    wilson_interval,
)
from lowprec.export.parity.measured import Context, allowed_error, largest_of_normals, ratio, smoothed_floor
from lowprec.formats import BF16, FP16, FP32, FP64, round_to

CLOSE = 16 * FP64.unit_roundoff  # a handful of float64 operations


def context(floor, labels=None, storage=FP32, **limits):
    return Context(np.asarray(floor, np.float64), storage.name, Limits(**limits), labels)


# --- each metric by hand --------------------------------------------------------------------------------------------
R = np.array([[3.0, 1.0], [0.0, 4.0], [2.0, 1.0]])
C = np.array([[3.0, 1.0], [4.0, 0.0], [2.0, 1.0]])
ONES = np.ones((3, 2))
NAN, INF = math.nan, math.inf
# Without slack an element's bands are t(N) * f; with a floor of one everywhere f is one.
HAND = {
    "non_finite": (np.array([NAN, INF, -INF, 1.0, NAN]), np.array([NAN, INF, INF, NAN, 1.0]), context(np.ones(5)), 3.0),
    "rho": (R, C, context(ONES * 2), math.sqrt(32 / 6) / 2),
    "rho_channel": (
        np.zeros((30, 2)),
        np.stack([np.zeros(30), np.full(30, 3.0)], axis=1),
        context(np.stack([np.ones(30), np.full(30, 2.0)], axis=1)),
        1.5,
    ),
    "elementwise": (R, C, context(ONES), 4 / math.sqrt(2 * math.log(12))),
    "unexplained_flips": (R, C, context(ONES * 0.01), 1.0),
    "agreement": (R, C, context(ONES), 2 / 3),
    "accuracy_drop": (R, C, context(ONES, labels=np.array([0, 1, 1])), 1 / 3),
    "max_abs": (R, C, context(ONES), 4.0),
    "rms": (R, C, context(ONES), math.sqrt(32 / 6)),
    "cosine": (R, C, context(ONES), (9 + 1 + 4 + 1) / 31),
    "snr_db": (R, C, context(ONES), 10 * math.log10(31 / 32)),
}


def test_every_metric_has_a_value_computed_by_hand():
    assert set(HAND) == set(METRICS)
    assert all(name == metric.name for name, metric in METRICS.items())


@pytest.mark.parametrize("name", HAND)
def test_metrics_are_what_the_hand_computes(name):
    reference, candidate, about, expected = HAND[name]
    assert METRICS[name].measure(reference, candidate, about).value == pytest.approx(expected, rel=CLOSE)


@pytest.mark.parametrize("name", METRICS)
def test_identical_outputs_are_perfect(name):
    scores = np.random.default_rng(0).normal(size=(40, 3))
    for floor in (np.zeros((40, 3)), np.ones((40, 3))):
        got = METRICS[name].measure(scores, scores.copy(), context(floor, labels=np.zeros(40, np.int64)))
        assert got.value == pytest.approx(METRICS[name].perfect, rel=CLOSE)
        assert got.verdict in ("pass", "info")


def test_the_bands_are_pass_warn_fail():
    limits = Limits()
    assert [limits.band(rho) for rho in (0, 3, 3.01, 6, 6.01, math.inf, math.nan)] == [
        "pass", "pass", "warn", "warn", "fail", "fail", "fail",
    ]  # fmt: skip
    assert Limits(warn=1, fail=2).band(1.5) == "warn"


@pytest.mark.parametrize(
    "bad",
    [{"warn": 7.0}, {"warn": 0.0}, {"confidence": 1.0}, {"min_agreement": 1.0}, {"margin": 0.0}, {"fail": math.inf}],
)
def test_limits_that_make_no_sense_are_refused(bad):
    with pytest.raises(ConfigError, match="limits: "):
        Limits(**bad)


def test_a_floor_of_zero_allows_nothing_but_equality():
    assert (ratio(0.0, 0.0), ratio(1e-300, 0.0), ratio(1.0, 2.0)) == (0.0, math.inf, 0.5)
    zeros = np.zeros((40, 2))
    off = zeros.copy()
    off[3, 1] = 1e-30
    for name in ("rho", "rho_channel"):
        assert METRICS[name].measure(zeros, off, context(zeros)).verdict == "fail"
    # 1e-30 is far above 2 ulp of zero, which are two subnormal steps.
    assert METRICS["elementwise"].measure(zeros, off, context(zeros)).value == math.inf


def test_one_bad_element_among_many_fails_alone():
    generator = np.random.default_rng(0)
    reference = generator.normal(size=(1000, 10))
    candidate = reference + 1e-3 * generator.normal(size=reference.shape)
    floor = np.full(reference.shape, 1e-3)
    assert METRICS["elementwise"].measure(reference, candidate, context(floor)).verdict == "pass"
    candidate[7, 3] += 0.03
    assert METRICS["rho"].measure(reference, candidate, context(floor)).verdict == "pass"
    found = METRICS["elementwise"].measure(reference, candidate, context(floor))
    assert found.verdict == "fail"
    assert "[7, 3]" in found.text


def test_the_smoothed_floor_leans_on_its_channel():
    floor = np.ones((30, 2)) * [1.0, 100.0]
    floor[0, 0] = 0.0
    got = smoothed_floor(floor)
    channel = math.sqrt(29 / 30)
    assert got[0, 0] == pytest.approx(channel / math.sqrt(2), rel=CLOSE)
    assert got[1, 0] == pytest.approx(math.sqrt((1 + channel**2) / 2), rel=CLOSE)
    assert got[1, 1] == pytest.approx(100.0, rel=CLOSE)
    # Too few elements per channel: the whole output lends its rms.
    assert smoothed_floor(np.array([[0.0, 2.0]]))[0, 0] == pytest.approx(1.0, rel=CLOSE)


def test_the_largest_of_normals_is_about_that():
    generator = np.random.default_rng(0)
    for n in (10, 1000):
        seen = np.abs(generator.normal(size=(2000, n))).max(axis=1).mean()
        assert seen < largest_of_normals(n) < 1.35 * seen
    assert largest_of_normals(0) == largest_of_normals(1)


def test_the_allowed_error_grows_with_the_multiple_and_never_below_two_ulp():
    about = context(np.zeros(1), storage=FP16)
    assert allowed_error(np.array([1.5]), about, 6.0)[0] == 2 * FP16.eps
    one = allowed_error(np.array([1.5]), context(np.ones(1)), 1.0)[0]
    assert one == pytest.approx(math.sqrt(2 * math.log(2)) + 2 * FP32.eps, rel=CLOSE)


def test_integer_outputs_are_judged_by_where_noise_changes_them():
    reference, candidate = np.arange(100), np.arange(100)
    candidate[0] = -1
    noisy = np.zeros(100)
    noisy[0] = 1.0
    assert METRICS["rho"].measure(reference, candidate, context(noisy)).value == 1.0
    assert METRICS["rho"].measure(reference, candidate, context(np.zeros(100))).verdict == "fail"
    assert METRICS["cosine"].measure(reference, candidate, context(noisy)) is None


def test_flips_are_explained_by_narrow_margins_only():
    reference = np.array([[1.0, 1.0 - 1e-6], [1.0, 0.0]])
    floor = np.full((2, 2), 1e-6)
    flipped = reference[:, ::-1]
    found = METRICS["unexplained_flips"].measure(reference, flipped, context(floor))
    assert (found.value, found.verdict) == (1.0, "fail")
    assert "sample 1" in found.text


# --- claims ---------------------------------------------------------------------------------------------------------
def test_intervals_are_the_textbooks():
    # Newcombe 1998, table I: 81 of 263 gives 0.2553 to 0.3662; 0 of 20 gives 0 to 0.1611.
    assert [round(bound, 4) for bound in wilson_interval(81, 263, 0.95)] == [0.2553, 0.3662]
    assert [round(bound, 4) for bound in wilson_interval(0, 20, 0.95)] == [0.0, 0.1611]
    assert wilson_interval(0, 0, 0.95) == (0.0, 1.0)
    assert normal_quantile(0.95) == pytest.approx(1.959963984540054, rel=CLOSE)
    # By hand: lost 5, gained 1 of 98: 4/100 -+ z sqrt(6 + 1 - 16/100)/100.
    half = normal_quantile(0.95) * math.sqrt(7 - 0.16) / 100
    assert paired_drop_interval(5, 1, 98, 0.95) == pytest.approx((0.04 - half, 0.04 + half), rel=CLOSE)
    assert paired_drop_interval(0, 0, 0, 0.95) == (-1.0, 1.0)


def test_sample_sizes_are_the_least_that_do():
    n = samples_for_share(1.0, 0.99, 0.95)
    assert wilson_interval(n, n, 0.95)[0] >= 0.99 > wilson_interval(n - 1, n - 1, 0.95)[0]
    assert samples_for_share(0.9, 0.99, 0.95) is None
    wanted = samples_for_margin(1, 1, 100, 0.01, 0.95)
    assert paired_drop_interval(round(wanted / 100), round(wanted / 100), wanted, 0.95)[1] <= 0.01
    assert samples_for_margin(5, 0, 100, 0.01, 0.95) is None


def scores_that_agree(n, wrong=0):
    reference = np.tile([1.0, 0.0], (n, 1))
    candidate = reference.copy()
    candidate[:wrong] = candidate[:wrong, ::-1]
    return reference, candidate


@pytest.mark.parametrize(
    ("n", "wrong", "verdict", "words"),
    [(10, 0, "inconclusive", "about 381 samples"), (1000, 0, "pass", "agree"), (1000, 50, "fail", "agree"),
     (100, 2, "inconclusive", "no number of samples")],
)  # fmt: skip
def test_a_claimed_agreement_is_decided_or_says_what_it_takes(n, wrong, verdict, words):
    reference, candidate = scores_that_agree(n, wrong)
    found = METRICS["agreement"].measure(reference, candidate, context(np.ones((n, 2)), min_agreement=0.99))
    assert found.verdict == verdict
    assert words in found.text


@pytest.mark.parametrize(("n", "wrong", "verdict"), [(20, 0, "inconclusive"), (1000, 0, "pass"), (1000, 50, "fail")])
def test_a_claimed_margin_is_decided_or_inconclusive(n, wrong, verdict):
    reference, candidate = scores_that_agree(n, wrong)
    about = context(np.ones((n, 2)), labels=np.zeros(n, np.int64), margin=0.01)
    assert METRICS["accuracy_drop"].measure(reference, candidate, about).verdict == verdict


def test_decisions_need_class_scores():
    for odd in (np.ones((4, 1)), np.ones((4, 2, 2)), np.ones(4), np.full((4, 2), np.nan)):
        assert METRICS["agreement"].measure(odd, odd, context(np.ones(odd.shape))) is None
    scores = np.ones((4, 2))
    assert METRICS["accuracy_drop"].measure(scores, scores, context(scores)) is None


# --- judging --------------------------------------------------------------------------------------------------------
def floor_of(**outputs):
    return Floor("fp32", "fp32", 6, 0, {name: np.asarray(value, np.float64) for name, value in outputs.items()})


def verdict_of(checks):
    return worst([check.verdict for check in checks])


def test_outputs_are_matched_by_name_and_a_lone_one_by_itself():
    a, b = np.ones(40), np.zeros(40)
    floor = floor_of(a=a / 10, b=a / 10)
    assert verdict_of(judge({"a": a, "b": b}, {"b": b, "a": a}, floor)) == "pass"
    assert verdict_of(judge({"a": a}, {"other": a}, floor)) == "pass"
    assert verdict_of(judge({"a": a, "b": b}, {"a": b, "b": a}, floor)) == "fail"


MISMATCHES = {
    "names": ({"candidate": {"a": np.ones(4), "c": np.ones(4)}}, "the outputs differ: the reference has a, b"),
    "shapes": ({"candidate": {"a": np.ones(4), "b": np.ones(5)}}, r"'b' has shape \(5,\) where the reference has"),
    "kinds": ({"candidate": {"a": np.ones(4), "b": np.ones(4, int)}}, "holds int64 where the reference holds float64"),
    "floor": ({"floor": floor_of(a=np.ones(4), b=np.ones(3))}, "noise floor was not measured on these samples"),
    "no outputs": ({"reference": {}}, "the reference has no outputs"),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_things_that_cannot_be_compared_are_refused(case):
    changes, message = MISMATCHES[case]
    same = {"a": np.ones(4), "b": np.ones(4)}
    arguments = {"reference": same, "candidate": same, "floor": floor_of(**same)} | changes
    with pytest.raises(DataError, match=message):
        judge(**arguments)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.zeros(3, int), "one whole number for each of the 4"),
        (np.zeros(4), "one whole number"),
        (np.array([0, 1, 2, 0]), "from 0 to 2; the model has 2 classes"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, message):
    scores = np.ones((4, 2))
    with pytest.raises(DataError, match=message):
        judge({"y": scores}, {"y": scores}, floor_of(y=scores), labels=labels)


def test_nothing_to_compare_is_inconclusive():
    empty, nans = np.zeros((0, 10)), np.full((4, 2), np.nan)
    assert verdict_of(judge({"y": empty}, {"y": empty}, floor_of(y=empty))) == "inconclusive"
    assert verdict_of(judge({"y": nans}, {"y": nans}, floor_of(y=np.zeros((4, 2))))) == "inconclusive"


def test_one_nan_in_a_rare_place_fails():
    reference = np.random.default_rng(0).normal(size=(100, 10))
    candidate = reference.copy()
    candidate[17, 3] = np.nan
    checks = judge({"y": reference}, {"y": candidate}, floor_of(y=np.ones((100, 10))))
    assert [check.name for check in checks if check.verdict == "fail"] == ["non_finite:y"]


def test_half_outputs_are_compared_wide():
    # In float16 the difference of these two would overflow.
    reference = np.full((40, 2), 60000.0)
    candidate = -reference.astype(np.float16)
    checks = {check.name: check for check in judge({"y": reference}, {"y": candidate}, floor_of(y=np.ones((40, 2))))}
    assert checks["max_abs:y"].value == 120000.0


# --- a real network: valid variants hold, defects do not -----------------------------------------------------------
@pytest.fixture(scope="module")
def net():
    images, labels = digits()
    weights = trained_weights()
    graph = Float64Graph(cnn(weights))
    feeds, labels = {"x": images[1000:1256]}, labels[1000:1256]
    truth = graph.run(feeds)
    floors = {fmt.name: noise_floor(graph, feeds, fmt) for fmt in (FP32, FP16, BF16)}
    assert np.mean(truth["scores"].argmax(axis=1) == labels) > 0.8, "the network should have learnt something"
    return {"weights": weights, "graph": graph, "feeds": feeds, "labels": labels, "truth": truth, "floors": floors}


def judged(net, outputs, precision):
    return judge(net["truth"], outputs, net["floors"][precision], net["labels"])


def value(checks, name):
    return next(check.value for check in checks if check.name == f"{name}:scores")


@pytest.mark.parametrize("fmt", [FP32, FP16, BF16])
def test_really_rounding_every_stored_value_lands_on_the_floor(net, fmt):
    rounded = net["graph"].run(
        net["feeds"], lambda name, kind, v, terms: round_to(v, fmt) if v.dtype.kind == "f" else v
    )
    checks = judged(net, rounded, fmt.name)
    assert verdict_of(checks) == "pass"
    if fmt is not FP32:  # without its accumulation term, fp32 is mere storage of values that fp32 holds
        assert 0.3 < value(checks, "rho") < 2


def test_onnxruntime_holds_in_every_batch_size(net):
    session = BACKENDS["onnxruntime"].open(cnn(net["weights"]))
    x = net["feeds"]["x"]
    for size in (256, 1, 37):
        parts = [session.run({"x": x[start : start + size]})["scores"] for start in range(0, len(x), size)]
        assert verdict_of(judged(net, {"scores": np.concatenate(parts)}, "fp32")) == "pass"


def test_a_half_typed_file_holds_at_the_half_floor_and_not_at_the_single_one(net):
    outputs = BACKENDS["onnxruntime"].open(half_typed(cnn(net["weights"]))).run(net["feeds"])
    assert verdict_of(judged(net, outputs, "fp16")) == "pass"
    assert verdict_of(judged(net, outputs, "fp32")) == "fail"


def test_half_weights_hold_at_the_half_floor(net):
    weights = {name: round_to(w, FP16) for name, w in net["weights"].items()}
    assert verdict_of(judged(net, Float64Graph(cnn(weights)).run(net["feeds"]), "fp16")) == "pass"


def changed(net, **edits):
    weights = {name: w.copy() for name, w in net["weights"].items()}
    for name, edit in edits.items():
        weights[name] = edit(weights[name])
    return Float64Graph(cnn(weights)).run(net["feeds"])


def zero_first(w):
    w[0] = 0
    return w


def swap_rows(w):
    w[[0, 1]] = w[[1, 0]]
    return w


DEFECTS = {
    "edge padding": lambda net: Float64Graph(cnn(net["weights"], pad_mode="edge")).run(net["feeds"]),
    "gain of one percent": lambda net: changed(net, w2=lambda w: w * 1.01),
    "swapped filters": lambda net: changed(net, w1=swap_rows),
    "mirrored filters": lambda net: changed(net, w1=lambda w: w[..., ::-1].copy()),
    "zeroed channel": lambda net: changed(net, w2=zero_first),
    "dropped bias": lambda net: changed(net, b2=np.zeros_like),
    "swapped classes": lambda net: changed(net, w3=swap_rows),
    "shifted samples": lambda net: {"scores": np.roll(net["truth"]["scores"], 1, axis=0)},
    "scaled inputs": lambda net: net["graph"].run({"x": net["feeds"]["x"] * np.float32(1.01)}),
}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("defect", DEFECTS)
def test_defects_fail(net, defect, precision):
    checks = judged(net, DEFECTS[defect](net), precision)
    assert verdict_of(checks) == "fail"
    assert value(checks, "rho") > 6


def test_a_gain_of_half_a_permille_fails_in_single_precision(net):
    assert verdict_of(judged(net, changed(net, w2=lambda w: w * 1.0005), "fp32")) == "fail"


# --- the report -----------------------------------------------------------------------------------------------------
GOOD = Check("rho:y", "pass", 1.2, 6.0, "y: fine")
BAD = Check("rho:y", "fail", math.inf, 6.0, "y: far off")


def stage(name="fp16 on cpu", **changes):
    return Stage(**{"name": name, "artefact": "m.onnx", "backend": "onnxruntime", "arithmetic": "float32"} | changes)


def test_the_worst_stage_decides():
    ran, bad = stage(checks=(GOOD,)), stage("bad", checks=(GOOD, BAD))
    idle = stage("engine", status="built, not run here", reason="no driver")
    info = stage("info", checks=(Check("rms:y", "info", 1.0, None, ""),))
    cases = [((ran, idle), "pass"), ((ran, bad), "fail"), ((idle,), "inconclusive"), ((), "inconclusive"),
             ((info,), "inconclusive"), ((stage("e", status="failed to run", reason="crashed"), ran), "fail"),
             ((stage(checks=(Check("a", "warn", 4.0, 6.0, ""),)), ran), "warn")]  # fmt: skip
    for stages, expected in cases:
        report = ParityReport(stages)
        assert report.verdict == expected
        assert report.passed == (expected in ("pass", "warn"))


def test_verdicts_are_ordered_by_what_they_decide():
    assert worst(["info", "pass", "warn", "inconclusive", "fail"]) == "fail"
    assert worst(["pass", "warn", "inconclusive"]) == "inconclusive"
    assert worst(["warn", "pass", "info"]) == "warn"
    assert worst(["info"]) == worst([]) == "inconclusive"


def test_a_failure_names_stage_check_and_figures():
    ParityReport((stage(checks=(GOOD,)),)).raise_if_failed()
    with pytest.raises(ParityError, match=r"stage 'fp16 on cpu', check 'rho:y' \(value inf, limit 6\): y: far off"):
        ParityReport((stage("first", checks=(GOOD,)), stage(checks=(GOOD, BAD)))).raise_if_failed()
    with pytest.raises(ParityError, match="could not be run: it crashed"):
        ParityReport((stage(status="failed to run", reason="it crashed"),)).raise_if_failed()
    with pytest.raises(ParityError, match="undecided: no stage ran here"):
        ParityReport((stage(status="not available here"),)).raise_if_failed()
    with pytest.raises(ParityError, match="undecided in stage"):
        ParityReport((stage(checks=(Check("agreement:y", "inconclusive", 1.0, 0.99, "few"),)),)).raise_if_failed()
    with pytest.raises(ParityError, match="holds no check that decides"):
        ParityReport((stage(checks=()),)).raise_if_failed()


def test_reports_survive_strict_json():
    odd = Check("snr_db:y", "info", math.nan, None, "é <b>")
    report = ParityReport((stage(checks=(GOOD, BAD, odd)),), {"floor": {"fp16": math.inf}, "list": (1, 2)})
    text = report.to_json()
    data = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    back = ParityReport.from_dict(data)
    assert back.stages[0].checks[:2] == (GOOD, BAD)
    assert math.isnan(back.stages[0].checks[2].value)
    assert back.to_json() == text
    assert data["verdict"] == "fail"


DAMAGED = [
    {},
    {"stages": [{}], "facts": {}},
    {"stages": 3, "facts": {}},
    {"stages": [{**stage().to_dict(), "status": "maybe"}], "facts": {}},
    {"stages": [{**stage().to_dict(), "checks": [{"name": "x", "verdict": "great"}]}], "facts": {}},
    {"stages": [{**stage().to_dict(), "checks": [{**GOOD.to_dict(), "value": "many"}]}], "facts": {}},
]


@pytest.mark.parametrize("data", DAMAGED)
def test_damaged_reports_are_one_line(data):
    with pytest.raises(ArtifactError, match="damaged") as caught:
        ParityReport.from_dict(data)
    assert "\n" not in str(caught.value)


def test_verdicts_are_derived_and_not_believed():
    data = ParityReport((stage(checks=(BAD,)),)).to_dict()
    data["verdict"], data["passed"], data["stages"][0]["verdict"] = "pass", True, "pass"
    assert not ParityReport.from_dict(data).passed


def test_parity_needs_no_torch():
    import subprocess
    import sys

    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'rich', 'jinja2', 'safetensors', 'sklearn')));"
        "import lowprec.export.parity, lowprec.export.backends, lowprec.export.float64"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_graphs_of_many_outputs_are_judged_one_by_one():
    from onnx import helper

    nodes = [helper.make_node("Sigmoid", ["x"], ["a"]), helper.make_node("Tanh", ["x"], ["b"])]
    graph = Float64Graph(graph_of(nodes, {"x": ["n", 4]}, {"a": ["n", 4], "b": ["n", 4]}))
    feeds = {"x": np.random.default_rng(0).normal(size=(50, 4))}
    truth, floor = graph.run(feeds), noise_floor(graph, feeds, FP16)
    broken = truth | {"b": truth["b"] * 1.05}
    failed = {check.name for check in judge(truth, broken, floor) if check.verdict == "fail"}
    assert "rho:b" in failed
    assert not any(name.endswith(":a") for name in failed)
