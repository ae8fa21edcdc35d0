"""Folding random networks: whatever they are made of, the folded one is the same function.

`LOWPREC_FOLD_EXAMPLES=2000 python -m pytest tests/test_fold_random.py` draws more than the 200 of every run;
`--hypothesis-seed` draws others.
"""

import contextlib
import copy
import logging
import math
import os
import re
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, assume, event, given, note, settings
from hypothesis import strategies as st
from random_networks import KINDS, NORM_LAYERS, TINY, Program, draw_program, sampled_programs

from lowprec.export.folding import RULES, fold_traced, trace
from lowprec.export.folding.accuracy import MAX_FLOAT32_RATIO, Measured
from lowprec.export.folding.attempts import Attempt
from lowprec.export.folding.traced.apply import fold_with_rules

EXAMPLES = int(os.environ.get("LOWPREC_FOLD_EXAMPLES", "200"))

UNIT = 2.0**-53
# At most 20 lines of sums of at most 150 products, both networks computed, and three roundings per folded constant:
# 2 * 20 * 150 * u = 7e-13 if all roundings agreed in sign, on values whose size the random weights keep.
FLOAT64 = 1e-12
# A shift is divided by a gamma of 1e-4, so 1 / TINY times a tensor's size is added and taken away again, which makes as
# much of each rounding: u / TINY = 1e-12 for a single sum, a hundred times that for the longest ones.
FLOAT64_WITH_TINY_GAMMAS = 100 * UNIT / TINY
# An attempt that is dropped because it costs too much in float32 may have gone through two tiny gammas, u / TINY^2 =
# 1e-8, again with ten for the lengths. What is really wrong is wrong in the first digits.
DROPPED = 10 * UNIT / TINY**2
# Where terms of size one cancel exactly in one order of summing, another order leaves a few units.
NOTHING = 100 * UNIT

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


@pytest.fixture(autouse=True, scope="module")
def one_thread_and_no_log():
    """Tensors this small lose time to a second thread, and torch.export fills a failure with its debug log."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable(logging.DEBUG)
    yield
    logging.disable(logging.NOTSET)
    torch.set_num_threads(threads)


@contextlib.contextmanager
def recorded_attempts():
    """How each attempt to fold was judged, those included that were dropped."""
    judgements: list[Measured] = []
    original = Attempt.judged

    def judged(*args, **kwargs):
        attempt = original(*args, **kwargs)
        judgements.append(attempt.measured)
        return attempt

    with mock.patch.object(Attempt, "judged", judged):
        yield judgements


def fold_without_gauges(traced):
    return fold_with_rules(traced, [rule for name, rule in RULES.items() if name != "channel-gauges"])


def float32_ratio(report):
    """None where the network as it was makes no error at all."""
    ratio = report.facts["float32_error_ratio"]
    return math.inf if ratio is None else ratio


def check(program: Program):
    """Folds a random network and holds the result against everything that is promised; returns the report."""
    network = program.network()
    before = copy.deepcopy(network.state_dict())
    traced = trace(network, (program.inputs(2, seed=1),))
    with recorded_attempts() as attempts:
        folded, report = fold_traced(traced)

    after = network.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(value, after[name]) for name, value in before.items())

    limit = FLOAT64_WITH_TINY_GAMMAS if program.has_tiny_gammas else FLOAT64
    check_same_function(program, network, folded, limit)
    # A wrong attempt must not hide behind a cautious one that took its place: all of them are right.
    assert report.facts["float64_error"] <= limit
    assert all(measured.float64_error <= (DROPPED if program.has_tiny_gammas else FLOAT64) for measured in attempts)

    if float32_ratio(report) > MAX_FLOAT32_RATIO:  # then the gauges are not to blame: nothing was folded across
        without = float32_ratio(fold_without_gauges(traced)[1])
        assert float32_ratio(report) <= without, f"{without} without gauges; {report}"
    check_report(program, network, report)
    return report


def check_same_function(program, network, folded, limit):
    """Fresh inputs at another batch size; in float64, or as far as float32 goes."""
    x = program.inputs(program.fresh_batch, seed=2)
    with torch.no_grad():
        expected = copy.deepcopy(network).double()(x.double() if x.is_floating_point() else x)
    found = folded(x)
    wider = 1.0 if program.dtype == torch.float64 else 2.0**29
    for a, b in zip(*(value if isinstance(value, tuple) else (value,) for value in (expected, found)), strict=True):
        assert b.dtype == program.dtype
        assert a.shape == b.shape
        error, size = float((a - b.double()).abs().max()), float(a.square().mean().sqrt())
        assert error <= wider * (limit * size + NOTHING), f"off by {error:.2g} in an output of size {size:.2g}"


def check_report(program, network, report):
    """Each call of a norm is folded, or left with a reason."""
    norms = {name for name, layer in network.named_children() if isinstance(layer, NORM_LAYERS)}
    calls = [name for line in program.lines for name in re.findall(r"\bm\.(\w+)\(", line.code) if name in norms]
    facts = report.facts
    assert facts["norms_found"] == len(calls)
    assert facts["norms_found"] == facts["norms_folded"] + facts["norms_left"]
    assert sum(row.name in norms for row in report.refused) >= facts["norms_left"], report
    assert all(row.reason for row in (*report.changed, *report.refused))


@st.composite
def programs(draw):
    return draw_program(lambda options: draw(st.sampled_from(list(options))))


PASSED: set[str] = set()


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(programs())
def test_a_random_network_folds_to_the_same_function(program):
    text = str(program)
    assume(text not in PASSED)  # hypothesis varies what it has drawn, and often in lines that nothing reads
    note(text)
    report = check(program)
    PASSED.add(text)
    event("folds some" if report.facts["norms_folded"] else "folds none")


def test_the_generator_makes_every_kind_of_operation():
    """Else the test above would say less than its name."""
    drawn = [program.kinds for program in sampled_programs(400)]
    counts = {kind: sum(kind in kinds for kinds in drawn) for kind in KINDS}
    assert min(counts.values()) >= 3, counts


def test_much_of_what_is_generated_folds():
    folding, across, total = 0, 0, 60
    for program in sampled_programs(total, seed=1):
        facts = check(program).facts
        before = fold_without_gauges(trace(program.network(), (program.inputs(2, seed=1),)))[1].facts
        folding += facts["norms_folded"] > 0
        across += facts["norms_folded"] > before["norms_folded"]
    # Found: 37 and 29. A rule that stops folding shows here, and so does a generator that makes only obstacles.
    assert folding >= total / 2
    assert across >= total / 5, across
