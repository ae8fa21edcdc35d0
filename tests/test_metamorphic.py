"""Checks without a reference: what holds for a right session, and each defect that they are for."""

import numpy as np
import pytest
from reference_parity import cnn, digits, trained_weights

from lowprec.export.backends import BACKENDS, Session
from lowprec.export.float64 import Float64Graph
from lowprec.export.golden import Golden
from lowprec.export.metamorphic import metamorphic_checks
from lowprec.export.parity import Limits, noise_floor
from lowprec.formats import FP32


@pytest.fixture(scope="module")
def model():
    return cnn(trained_weights(width=8))


@pytest.fixture(scope="module")
def golden(model):
    feeds = {"x": digits()[0][:20]}
    graph = Float64Graph(model)
    return Golden(feeds, graph.run(feeds), None, {"fp32": noise_floor(graph, feeds, FP32)})


class Faulty(Session):
    """A right session whose outputs are changed."""

    def __init__(self, session, change):
        super().__init__(session.inputs, session.outputs, "faulty")
        self._session, self._change = session, change
        self.calls, self.sizes, self.ranges = 0, [], None

    def batches(self, feeds):
        return self.ranges or super().batches(feeds)

    def _run(self, feeds):
        assert any(len(feeds["x"]) in sizes for sizes in self.batches(feeds))
        self.calls += 1
        self.sizes.append(len(feeds["x"]))
        found = self._session.run(feeds)
        return {name: np.asarray(self._change(self, value.copy())) for name, value in found.items()}


def verdicts(session, golden):
    return {check.name: check.verdict for check in metamorphic_checks(session, golden, "fp32", Limits())}


@pytest.mark.parametrize(
    ("ranges", "asked"),
    [
        (None, {1, 2, 8, 16}),
        ((range(1, 41),), {1, 2, 8, 16, 40}),  # and the largest that it takes
        ((range(1, 5), range(8, 33)), {1, 2, 4, 8, 16, 32}),
        ((range(3, 8),), {3, 7}),
        ((range(24, 33),), {24, 32}),  # more than there are samples
    ],
)
def test_a_right_session_holds_in_every_batch_that_it_takes(model, golden, ranges, asked):
    session = Faulty(BACKENDS["onnxruntime"].open(model), lambda session, y: y)
    session.ranges = ranges
    assert verdicts(session, golden) == {"twice": "pass", "batch": "pass", "rows": "pass"}
    assert set(session.sizes) == asked


def leaks(session, y):
    y[1:] += 1e-3 * y[:-1]
    return y


def tail(session, y):
    y[len(y) // 4 * 4 :] *= 1.01  # rows beyond the last four are another kernel's, and wrong
    return y


def races(session, y):
    y[0, 0] = np.nextafter(y[0, 0], np.float32(np.inf)) if session.calls % 2 else y[0, 0]
    return y


def nan_in_large(session, y):
    if len(y) > 20:
        y[3] = np.nan
    return y


@pytest.mark.parametrize(
    ("change", "failing"),
    [(leaks, "rows"), (leaks, "batch"), (tail, "batch"), (races, "twice"), (nan_in_large, "batch")],
)
def test_a_defect_is_found(model, golden, change, failing):
    session = Faulty(BACKENDS["onnxruntime"].open(model), change)
    session.ranges = (range(1, 41),)
    assert verdicts(session, golden)[failing] == "fail"


def test_a_model_that_fixes_its_batch_is_asked_in_it_alone(model, golden):
    fixed = type(model).FromString(model.SerializeToString())
    for value in (*fixed.graph.input, *fixed.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 4
    del fixed.graph.value_info[:]
    session = Faulty(BACKENDS["reference"].open(fixed), lambda session, y: y)
    assert verdicts(session, golden) == {"twice": "pass", "rows": "pass"}
    assert set(session.sizes) == {4}
