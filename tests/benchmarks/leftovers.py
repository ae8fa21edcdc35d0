"""What onnxruntime's CPU takes for a per-channel affine, written as a norm, a depthwise convolution or arithmetic.

    python -m tests.benchmarks.leftovers

What no algebra folds ends as one of these; `export/emit/per_channel.py` and the two `write.py` of the fold choose. Each
stands between operations that it cannot be fused with: over images between two convolutions, which onnxruntime keeps in
a blocked layout, elsewhere between two sigmoids. A figure is the median time of what is added to the network without
the affine, in microseconds of one thread; the four are run in turns.
"""

from __future__ import annotations

import statistics
import sys
import time

import numpy as np
import onnx
from onnx import helper, numpy_helper

SHAPES = ((1, 128, 200), (8, 128, 200), (1, 512, 32), (1, 64, 56, 56), (1, 256, 14, 14), (1, 32, 8, 28, 28))
WAYS = ("nothing", "norm", "depthwise", "arithmetic")
ROUNDS, CALLS = 40, 10


def network(way: str, shape: tuple[int, ...]) -> onnx.ModelProto:
    """Two operations and, between them, an affine written in one of `WAYS`."""
    chance, (_, channels, *space) = np.random.default_rng(0), shape
    weights: list[onnx.TensorProto] = []

    def constant(*sizes: int) -> str:
        values = chance.uniform(0.5, 1.5, sizes).astype(np.float32)
        weights.append(numpy_helper.from_array(values, f"constant_{len(weights)}"))
        return weights[-1].name

    def around(source: str, result: str) -> list[onnx.NodeProto]:
        if len(space) != 2:
            return [helper.make_node("Sigmoid", [source], [result])]
        convolution = helper.make_node("Conv", [source, constant(channels, channels, 1, 1)], [f"{result}_conv"])
        return [convolution, helper.make_node("Sigmoid", [f"{result}_conv"], [result])]

    ones = [1] * len(space)
    affine = {
        "nothing": [helper.make_node("Identity", ["a"], ["b"])],
        "norm": [helper.make_node("BatchNormalization", ["a", *(constant(channels) for _ in range(4))], ["b"])],
        "depthwise": [
            helper.make_node("Conv", ["a", constant(channels, 1, *ones), constant(channels)], ["b"], group=channels)
        ],
        "arithmetic": [
            helper.make_node("Mul", ["a", constant(channels, *ones)], ["c"]),
            helper.make_node("Add", ["c", constant(channels, *ones)], ["b"]),
        ],
    }[way]
    nodes = [*around("x", "a"), *affine, *around("b", "y")]
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", *shape[1:]]) for name in "xy"]
    graph = helper.make_graph(nodes, "leftover", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def measured(shape: tuple[int, ...]) -> dict[str, float]:
    """Microseconds that each way adds."""
    from tests.benchmarks.folding import session

    sessions = {way: session(network(way, shape).SerializeToString()) for way in WAYS}
    x = np.random.default_rng(1).standard_normal(shape, np.float32)
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(ROUNDS):
        for way, called in sessions.items():
            started = time.thread_time()
            for _ in range(CALLS):
                called.run(None, {"x": x})
            times[way].append(1e6 * (time.thread_time() - started) / CALLS)
    middle = {way: statistics.median(values) for way, values in times.items()}
    return {way: middle[way] - middle["nothing"] for way in WAYS[1:]}


def main() -> int:
    """Prints a line per shape."""
    for shape in SHAPES:
        found = measured(shape)
        print(f"{'x'.join(map(str, shape)):16}" + "".join(f"{way} {value:7.1f} us   " for way, value in found.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
