"""Random problems for the fused norms, put to the operators and compared with the float64 reference."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch

from lowprec.kernels import fused_norm, output_suffices
from tests.reference_kernels import Problem, bounds, clear, rows, solve, unrows

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SHAPES = [
    (2, 3),  # two elements per channel
    (2, 3, 1, 1),
    (19, 7),  # a plain row layout
    (7, 5, 3),
    (4, 3, 5, 5),
    (3, 17, 7, 7),  # one channel more than two vectors of eight
    (5, 1, 6, 6),  # one channel
    (9, 8, 1, 1),  # one place
    (1, 5, 13),  # one sample
    (3, 33, 2, 2),  # shorter places than a vector
    (2, 4, 2, 3, 5),
    (2, 16, 14, 14),
]
KS = (0, 1, 10)
# gamma and beta of the channels, in turn.
AFFINE = list(itertools.product((1.0, -1.0, 0.0, 1e-3), (0.0, 1.0, 5.0)))


@dataclass(frozen=True)
class Mode:
    """What is fused, and what the loss looks at."""

    relu: bool = True
    residual: bool = False
    from_output: bool = False
    affine: str = "weight and bias"
    statistics: bool = False  # the loss sees mean and scale too


MODES = {
    "relu": Mode(),
    "from output": Mode(from_output=True),
    "residual and relu": Mode(residual=True),
    "norm": Mode(relu=False),
    "residual": Mode(relu=False, residual=True),
    "no affine": Mode(affine="none"),
    "no affine, from output": Mode(affine="none", from_output=True),
    "weight alone, from output": Mode(affine="weight", from_output=True),
    "statistics": Mode(statistics=True),
    "statistics, from output": Mode(statistics=True, from_output=True),
}


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def tensor(values_Cn, shape, dtype, layout="planes"):
    made = torch.from_numpy(np.ascontiguousarray(unrows(values_Cn, shape))).to(dtype)
    return made.movedim(1, -1).contiguous().movedim(-1, 1) if layout == "rows" and len(shape) > 2 else made


def parameters(channels, mode, dtype, turn):
    """Weight and bias, float64 values that float32 holds; for a backward from the output only those that allow it."""
    pairs = []
    for i in range(channels):
        gamma, beta = AFFINE[(i + turn) % len(AFFINE)]
        one = torch.tensor([gamma]), torch.tensor([beta])
        pairs.append((gamma, beta) if not mode.from_output or output_suffices(*one, dtype) else (1.0, min(beta, 1.0)))
    weight, bias = np.float32(pairs).astype(np.float64).T
    return (None if mode.affine == "none" else weight), (bias if mode.affine == "weight and bias" else None)


@cache
def problem(shape, dtype, k, mode, seed=0, likely=False):
    """A random problem whose answer no rounding tips over; channels that could be are drawn again."""
    random = np.random.default_rng(seed)

    def draw():
        values = torch.from_numpy(random.standard_normal((shape[1], int(np.prod(shape)) // shape[1])))
        return values.to(dtype).double().numpy()

    weight, bias = parameters(shape[1], mode, dtype, seed)
    ask = Problem(draw(), draw(), weight, bias, draw() if mode.residual else None, k, relu=mode.relu)
    if mode.statistics:
        sums = np.float32(random.standard_normal((2, shape[1]))).astype(np.float64)
        ask = replace(ask, grad_mean=sums[0], grad_scale=sums[1])
    for _ in range(100):
        out = solve(ask)
        off = bounds(ask, out, name_of(dtype), mode.from_output, likely)
        bad = ~clear(ask, out, off)
        if not bad.any():
            return ask, out, off
        ask.x[bad] = draw()[bad]
    raise AssertionError("no clear problem found")


def solved(ask, shape, dtype, mode, layout):
    """The operator's answer, as a dict of tensors, and what it was given."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = tensor(ask.x, shape, dtype, layout).requires_grad_()
    given = {"x": x, "weight": None, "bias": None, "residual": None}
    for name in ("weight", "bias"):
        values = getattr(ask, name)
        given[name] = None if values is None else torch.from_numpy(values).to(wide).requires_grad_()
    if ask.residual is not None:
        given["residual"] = tensor(ask.residual, shape, dtype, layout).requires_grad_()
    options = {"k": ask.k, "eps": ask.eps, "relu": mode.relu, "from_output": mode.from_output}
    out = fused_norm(given["x"], given["weight"], given["bias"], given["residual"], **options)
    heads, grads = [out.y], [tensor(ask.g, shape, dtype, layout)]
    if mode.statistics:
        heads += [out.mean, out.scale]
        grads += [torch.from_numpy(v).to(wide) for v in (ask.grad_mean, ask.grad_scale)]
    leaves = {name: value for name, value in given.items() if value is not None}
    # Not .backward(): what accumulates gradients would put them in the layout of x.
    found = torch.autograd.grad(heads, list(leaves.values()), grads)
    return out, dict(zip(leaves, found, strict=True)), x


def assert_within(got, want_Cn, off_Cn, what, shape=None):
    """|got - want| <= off, elementwise; names the worst element."""
    got_Cn = got.detach().double().numpy()
    got_Cn = rows(got_Cn) if shape is not None else got_Cn.reshape(want_Cn.shape)
    off_Cn = np.broadcast_to(off_Cn, want_Cn.shape) + np.finfo(float).tiny  # where 0 is asked for, 0 / 0 is no excess
    excess = np.abs(got_Cn - want_Cn) / off_Cn
    at = np.unravel_index(np.argmax(np.nan_to_num(excess, nan=np.inf)), excess.shape)
    assert (excess <= 1).all(), f"{what}{at}: {got_Cn[at]!r}, not {want_Cn[at]!r}: {excess[at]:.3g} of its bound"


def strides(x):
    """The strides that say something: those of axes with more than one element."""
    return [stride for stride, length in zip(x.stride(), x.shape, strict=True) if length > 1]
