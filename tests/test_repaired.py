"""Operators of the float64 truth that onnx's own reference gets wrong, against torch and onnxruntime."""

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper

from lowprec.export.float64 import Float64Graph

X = np.random.default_rng(0).normal(size=(2, 5, 4, 6))
WIDE = torch.from_numpy(X)
# A handful of operations on sums of at most 120 terms, all of about the same size: n * u, times 8 for the operations.
FLOAT64 = 8 * 120 * 2.0**-53
FLOAT32 = 8 * 120 * 2.0**-24


def model_of(op, opset, weights=None, outputs=("y",), kind=TensorProto.DOUBLE, **attributes):
    weights = {} if weights is None else weights
    node = helper.make_node(op, ["x", *weights], outputs, **attributes)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", kind, X.shape)],
        [helper.make_tensor_value_info("y", kind, None)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def run(*args, **attributes):
    return Float64Graph(model_of(*args, **attributes)).run({"x": X})["y"]


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=FLOAT64, atol=FLOAT64 * np.abs(expected).max())


@pytest.mark.parametrize("opset", [7, 8, 9, 13, 14, 15])
def test_a_norm_takes_the_statistics_that_it_is_given(opset):
    gamma, beta, mean, variance = (np.random.default_rng(seed).uniform(0.5, 2, 5) for seed in range(4))
    found = run("BatchNormalization", opset, {"g": gamma, "b": beta, "m": mean, "v": variance}, epsilon=0.25)
    tensors = (torch.from_numpy(value) for value in (mean, variance, gamma, beta))
    close(found, F.batch_norm(WIDE, *tensors, eps=0.25).numpy())


def test_a_norm_of_every_element_has_as_many_statistics():
    constants = [np.random.default_rng(seed).uniform(0.5, 2, X.shape[1:]) for seed in range(4)]
    found = run("BatchNormalization", 7, dict(zip("gbmv", constants, strict=True)), spatial=0, epsilon=0.0)
    gamma, beta, mean, variance = constants
    close(found, gamma * (X - mean) / np.sqrt(variance) + beta)


def test_a_norm_in_training_takes_those_of_the_batch():
    weights = {name: np.ones(5) for name in "gbmv"}
    found = run("BatchNormalization", 15, weights, ("y", "m2", "v2"), training_mode=1, epsilon=0.0)
    close(found, (X - X.mean((0, 2, 3), keepdims=True)) / X.std((0, 2, 3), keepdims=True) + 1)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_neighbouring_channels_are_those_of_each_channel(size):
    found = run("LRN", 13, size=size, alpha=0.5, beta=0.75, bias=2.0)
    # torch takes one neighbour more before than after where the size is even, ONNX one more after.
    expected = F.local_response_norm(WIDE.flip(1), size, 0.5, 0.75, 2.0).flip(1)
    close(found, expected.numpy())


@pytest.mark.parametrize(("opset", "rows"), [(11, True), (13, False)])
@pytest.mark.parametrize("axis", [None, 1, 2, -1])
@pytest.mark.parametrize(("op", "function"), [("Softmax", torch.softmax), ("LogSoftmax", torch.log_softmax)])
def test_a_softmax_is_that_of_its_opset(op, function, axis, opset, rows):
    found = run(op, opset, **({} if axis is None else {"axis": axis}))
    if rows:
        start = {None: 1, -1: 3}.get(axis, axis)
        expected = function(WIDE.flatten(start), start).reshape(WIDE.shape)
    else:
        expected = function(WIDE, -1 if axis is None else axis)
    close(found, expected.numpy())


def test_a_hardmax_of_an_old_opset_has_one_winner_per_sample():
    found = run("Hardmax", 9)
    assert found.reshape(2, -1).argmax(1).tolist() == X.reshape(2, -1).argmax(1).tolist()
    assert found.sum() == 2


def test_mean_and_variance_are_those_of_each_channel():
    centred = X - X.mean((0, 2, 3), keepdims=True)
    close(run("MeanVarianceNormalization", 13), centred / (X.std((0, 2, 3), keepdims=True) + 1e-9))


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize(("op", "opset"), [("Upsample", 9), ("Resize", 10)])
def test_resizing_in_old_opsets_is_that_of_the_runtime(op, opset, mode):
    scales = {"s": np.array([1, 1, 2, 1.5], np.float32)}
    model = model_of(op, opset, scales, kind=TensorProto.FLOAT, mode=mode)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {"x": X.astype(np.float32)})
    found = Float64Graph(model).run({"x": X})["y"]
    np.testing.assert_allclose(found, expected, rtol=FLOAT32, atol=FLOAT32)


def test_weights_of_cubic_interpolation_add_up_to_one_in_float64():
    found = Float64Graph(model_of("Resize", 18, {"r": np.zeros(0), "s": np.array([1, 1, 2.5, 3.0])}, mode="cubic"))
    # Four weights along each of two axes, each a cubic whose terms are below 16.
    np.testing.assert_allclose(found.run({"x": np.ones_like(X)})["y"], 1.0, rtol=0, atol=2 * 4 * 16 * 2.0**-53)
