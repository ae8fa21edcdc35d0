"""Float64 references for the parity tests, written as plain loops, and small ONNX graphs to judge."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FLOAT = {"float16": TensorProto.FLOAT16, "float32": TensorProto.FLOAT, "float64": TensorProto.DOUBLE}


def graph_of(nodes, inputs, outputs, weights=(), dtype="float32", opset=20, **extra):
    """A model from nodes; inputs and outputs as {name: shape}, weights as {name: array}, floats all of `dtype`."""
    kind = FLOAT[dtype]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in outputs.items()],
        [
            numpy_helper.from_array(array.astype(dtype) if array.dtype.kind == "f" else array, name)
            for name, array in dict(weights).items()
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10, **extra)


def single(op, inputs, outputs, opset=20, **attributes):
    """A float64 model of one node whose inputs are all graph inputs of free shape."""
    node = helper.make_node(op, list(inputs), list(outputs), **attributes)
    free = {name: [None] * array.ndim for name, array in inputs.items()}
    graph = helper.make_graph(
        [node],
        "one",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(inputs[name].dtype), shape)
            for name, shape in free.items()
        ],
        [helper.make_tensor_value_info(name, TensorProto.DOUBLE, None) for name in outputs],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)


def conv_loops(x, w, stride, dilation, pad, groups):
    """2-D cross-correlation with zero padding `pad` on all sides, one multiplication at a time."""
    samples, _, height, width = x.shape
    outputs, depth, kh, kw = w.shape
    oh = (height + 2 * pad - dilation * (kh - 1) - 1) // stride + 1
    ow = (width + 2 * pad - dilation * (kw - 1) - 1) // stride + 1
    y = np.zeros((samples, outputs, oh, ow))
    for n, o, i, j in itertools.product(range(samples), range(outputs), range(oh), range(ow)):
        first = o // (outputs // groups) * depth
        for c, a, b in itertools.product(range(depth), range(kh), range(kw)):
            row, column = i * stride + a * dilation - pad, j * stride + b * dilation - pad
            if 0 <= row < height and 0 <= column < width:
                y[n, o, i, j] += w[o, c, a, b] * x[n, first + c, row, column]
    return y


def dot_error(terms, magnitude):
    """Bound on the difference of two float64 sums of `terms` products of size up to `magnitude`, in any order.

    Each sum is within gamma_n * sum|a b| of the truth, gamma_n = n u / (1 - n u) (Higham, 2002, section 3.1).
    """
    u = 2.0**-53
    return 2 * (terms + 2) * u / (1 - (terms + 2) * u) * terms * magnitude


def cnn(weights, dtype="float32", pad_mode=None):
    """x -> conv -> relu -> conv -> add -> relu -> mean -> linear, on (N, 1, 8, 8); optionally another padding."""
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], name="conv1", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"], name="relu1"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], name="conv2", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c2", "r1"], ["s"], name="add"),
        helper.make_node("Relu", ["s"], ["r2"], name="relu2"),
        helper.make_node("AveragePool", ["r2"], ["p"], name="pool", kernel_shape=[4, 4], strides=[4, 4]),
        helper.make_node("Flatten", ["p"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "w3", "b3"], ["scores"], name="linear", transB=1),
    ]
    weights = dict(weights)
    if pad_mode:
        weights["pads"] = np.array([0, 0, 1, 1, 0, 0, 1, 1])
        nodes[2] = helper.make_node("Conv", ["padded", "w2", "b2"], ["c2"], name="conv2")
        nodes.insert(2, helper.make_node("Pad", ["r1", "pads"], ["padded"], name="pad", mode=pad_mode))
    return graph_of(nodes, {"x": ["batch", 1, 8, 8]}, {"scores": ["batch", 10]}, weights, dtype)


def trained_weights(samples=1000, width=16, seed=0):
    """Weights for `cnn`: two random convolutions and a last layer fitted by ridge regression to the digits.

    A closed form in place of training: real images, real decisions (about 9 in 10 right), no minutes.
    """
    images, labels = digits()
    generator = np.random.default_rng(seed)
    weights = {
        "w1": generator.normal(0, 1 / 3, (width, 1, 3, 3)),
        "b1": generator.normal(0, 0.1, width),
        "w2": generator.normal(0, 1 / (3 * np.sqrt(width)), (width, width, 3, 3)),
        "b2": generator.normal(0, 0.1, width),
        "w3": np.eye(4 * width),
        "b3": np.zeros(4 * width),
    }
    from lowprec.export.float64 import Float64Graph

    features = cnn(weights)
    features.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 4 * width
    h = Float64Graph(features).run({"x": images[:samples]})["scores"]
    h1 = np.hstack([h, np.ones((len(h), 1))])
    target = np.eye(10)[labels[:samples]]
    solved = np.linalg.solve(h1.T @ h1 + np.eye(h1.shape[1]), h1.T @ target)
    weights["w3"], weights["b3"] = solved[:-1].T.copy(), solved[-1].copy()
    return {name: array.astype(np.float32).astype(np.float64) for name, array in weights.items()}


def digits():
    """scikit-learn's digits as float32 images (N, 1, 8, 8) in 0..1, and their labels."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return (found.images / 16).astype(np.float32)[:, None], found.target.astype(np.int64)


def half_typed(model):
    """The same float32 graph in float16, with one cast at each edge."""
    half = onnx.ModelProto()
    half.CopyFrom(model)
    for index, tensor in enumerate(half.graph.initializer):
        array = numpy_helper.to_array(tensor)
        if array.dtype == np.float32:
            half.graph.initializer[index].CopyFrom(numpy_helper.from_array(array.astype(np.float16), tensor.name))
    source, target = half.graph.input[0].name, half.graph.output[0].name
    for node in half.graph.node:
        node.input[:] = [f"{name}_half" if name == source else name for name in node.input]
        node.output[:] = [f"{name}_half" if name == target else name for name in node.output]
    half.graph.node.insert(
        0, helper.make_node("Cast", [source], [f"{source}_half"], name="cast_in", to=TensorProto.FLOAT16)
    )
    half.graph.node.append(
        helper.make_node("Cast", [f"{target}_half"], [target], name="cast_out", to=TensorProto.FLOAT)
    )
    return half
