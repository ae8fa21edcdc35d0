"""Networks for the fold tests: for every rule what it folds, and each of its refusals."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from lowprec.norm import L1BatchNorm2d


class Lambda(nn.Module):
    """Layers by name, and a forward that uses them."""

    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


class BatchNormAct(nn.BatchNorm2d):
    """A subclass with its own forward, as timm's: only what it computes says that it folds."""

    def forward(self, x):
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return F.leaky_relu(y, 0.1)


@dataclass(frozen=True)
class Case:
    """One network.

    Args:
        network: makes it; parameters and statistics are randomised by the test.
        shape: of one example input.
        changed: names and words of report rows that must be there.
        refused: likewise.
        norms_left: how many norm calls stay.
    """

    network: Callable[[], nn.Module]
    shape: tuple[int, ...]
    changed: tuple[tuple[str, str], ...] = ()
    refused: tuple[tuple[str, str], ...] = ()
    norms_left: int = 0


def chain(*layers):
    return nn.Sequential(*layers)


IMAGE = (1, 4, 7, 6)
INTO_0 = (("1", "folded into '0'"),)


def _per_channel(values):
    return torch.tensor(values).view(-1, 1, 1)


FOLD_CASES = {
    "identity-affine": {
        "times-one": Case(
            lambda: Lambda(lambda m, x: F.relu(m.c(x) * 1.0 + 0.0), c=nn.Conv2d(4, 3, 3)),
            IMAGE,
            changed=(("mul", "multiplies by one"), ("add", "multiplies by one")),
        ),
    },
    "affine-after-linear": {
        "conv1d": Case(lambda: chain(nn.Conv1d(4, 3, 3), nn.BatchNorm1d(3)), (1, 4, 9), INTO_0),
        "conv2d-padded": Case(lambda: chain(nn.Conv2d(4, 3, 3, padding=1), nn.BatchNorm2d(3)), IMAGE, INTO_0),
        "conv2d-same": Case(lambda: chain(nn.Conv2d(4, 3, 3, padding="same"), nn.BatchNorm2d(3)), IMAGE, INTO_0),
        "conv2d-circular": Case(
            lambda: chain(nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(3)), IMAGE, INTO_0
        ),
        "conv2d-grouped": Case(
            lambda: chain(nn.Conv2d(4, 6, 3, groups=2, bias=False, stride=2), nn.BatchNorm2d(6)), IMAGE, INTO_0
        ),
        "conv2d-depthwise": Case(
            lambda: chain(nn.Conv2d(4, 4, 3, groups=4, dilation=2), nn.BatchNorm2d(4)), IMAGE, INTO_0
        ),
        "conv3d": Case(lambda: chain(nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3)), (1, 2, 4, 4, 4), INTO_0),
        "conv-transpose1d": Case(lambda: chain(nn.ConvTranspose1d(4, 3, 3), nn.BatchNorm1d(3)), (1, 4, 5), INTO_0),
        "conv-transpose2d-grouped": Case(
            lambda: chain(nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2, output_padding=1), nn.BatchNorm2d(6)),
            IMAGE,
            INTO_0,
        ),
        "conv-transpose3d-depthwise": Case(
            lambda: chain(nn.ConvTranspose3d(2, 2, 2, groups=2, bias=False), nn.BatchNorm3d(2)), (1, 2, 3, 3, 3), INTO_0
        ),
        "linear": Case(lambda: chain(nn.Linear(5, 3), nn.BatchNorm1d(3)), (1, 5), INTO_0),
        "embedding": Case(
            lambda: Lambda(
                lambda m, x: F.gelu(m.b(m.e((x[:, 0] > 0).long()))), e=nn.Embedding(2, 5), b=nn.BatchNorm1d(5)
            ),
            (1, 4),
            changed=(("b", "folded into 'e'"),),
        ),
        "no-affine": Case(lambda: chain(nn.Linear(5, 3), nn.BatchNorm1d(3, affine=False)), (1, 5), INTO_0),
        "own-norm": Case(lambda: chain(nn.Conv2d(4, 3, 3), L1BatchNorm2d(3)), IMAGE, INTO_0),
        "sync": Case(lambda: chain(nn.Conv2d(4, 3, 3), nn.SyncBatchNorm(3)), IMAGE, INTO_0),
        "instance-norm-with-statistics": Case(
            lambda: chain(nn.Conv2d(4, 3, 3), nn.InstanceNorm2d(3, affine=True, track_running_stats=True)),
            IMAGE,
            INTO_0,
        ),
        "subclass": Case(lambda: chain(nn.Conv2d(4, 3, 3), BatchNormAct(3)), IMAGE, INTO_0),
        "in-place-after": Case(
            lambda: chain(nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3), nn.ReLU(inplace=True)), IMAGE, INTO_0
        ),
        "chain": Case(
            lambda: chain(nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3), L1BatchNorm2d(3), nn.BatchNorm2d(3)),
            IMAGE,
            changed=(*INTO_0, ("2", "folded into '0'"), ("3", "folded into '0'")),
        ),
        "arithmetic": Case(
            lambda: Lambda(
                lambda m, x: (
                    -(3 - torch.sub(torch.rsub(m.c(x), 2, alpha=3), 1, alpha=2) / _per_channel([1.0, 2.0, -4.0]))
                ),
                c=nn.Conv2d(4, 3, 1),
            ),
            IMAGE,
            changed=tuple((name, "folded into 'c'") for name in ("rsub", "sub", "div", "rsub_1", "neg")),
        ),
        "constant-over-a-tensor": Case(
            lambda: Lambda(
                lambda m, x: _per_channel([1.0, 2.0, -4.0]) / m.n(m.c(x)).exp(),
                c=nn.Conv2d(4, 3, 1),
                n=nn.BatchNorm2d(3),
            ),
            IMAGE,
            changed=(("n", "folded into 'c'"),),
        ),
        "constant-first": Case(
            lambda: Lambda(
                lambda m, x: torch.add(torch.sub(_per_channel([1.0, 2.0, 3.0]), m.c(x), alpha=2), 1.5, alpha=-1),
                c=nn.Conv2d(4, 3, 1),
            ),
            IMAGE,
            changed=(("sub", "folded into 'c'"), ("add", "folded into 'c'")),
        ),
        "shared-conv": Case(
            lambda: Lambda(
                lambda m, x: m.b1(m.c(x)) + F.relu(m.b2(m.c(x))) + m.c(F.relu(x)),
                c=nn.Conv2d(4, 3, 3),
                b1=nn.BatchNorm2d(3),
                b2=nn.BatchNorm2d(3),
            ),
            IMAGE,
            changed=(("b1", "folded into 'c'"), ("b2", "folded into 'c'")),
        ),
        "hook": Case(lambda: _hooked(), IMAGE, changed=(("0", "folded into '0'"), *INTO_0)),
        "other-axis": Case(
            lambda: chain(nn.Linear(5, 5), nn.BatchNorm1d(5)),
            (1, 5, 5),
            refused=(("1", "its scale would have to pass an output of the network"),),
            norms_left=1,
        ),
        "also-read": Case(
            lambda: Lambda(lambda m, x: _residual(m, m.c(x)), c=nn.Conv2d(4, 3, 3), b=nn.BatchNorm2d(3)),
            IMAGE,
            refused=(("b", r"its scale would have to pass an output of the network or 'add' \(add\)"),),
            norms_left=1,
        ),
        "also-output": Case(
            lambda: Lambda(lambda m, x: _both(m, m.c(x)), c=nn.Conv2d(4, 3, 3), b=nn.BatchNorm2d(3)),
            IMAGE,
            refused=(("b", "its scale would have to pass an output of the network"),),
            norms_left=1,
        ),
        "dynamic-weight": Case(
            lambda: Lambda(
                lambda m, x: m.b(F.conv2d(x, m.w * x.mean())),
                w=nn.Parameter(torch.ones(3, 4, 3, 3)),
                b=nn.BatchNorm2d(3),
            ),
            IMAGE,
            refused=(("b", "its scale would have to pass an output of the network"),),
            norms_left=1,
        ),
        "enlarging": Case(
            lambda: Lambda(
                lambda m, x: F.relu(m.c(x) + m.k), c=nn.Conv2d(4, 1, 3), k=nn.Parameter(torch.ones(3, 1, 1))
            ),
            IMAGE,
        ),
        "not-per-channel": Case(
            lambda: Lambda(
                lambda m, x: F.relu(m.c(x) * m.k), c=nn.Conv2d(4, 3, 3), k=nn.Parameter(torch.ones(3, 5, 1))
            ),
            IMAGE,
        ),
        "rounded-division": Case(
            lambda: Lambda(lambda m, x: torch.div(m.c(x), 2.0, rounding_mode="floor"), c=nn.Conv2d(4, 3, 3)), IMAGE
        ),
        "not-finite": Case(
            lambda: Lambda(lambda m, x: m.c(x) / torch.tensor([1.0, 0.0, 2.0]).view(3, 1, 1), c=nn.Conv2d(4, 3, 3)),
            IMAGE,
            refused=(("div", "constants of 'div' are not finite"),),
        ),
        "one-norm-in-training": Case(
            lambda: chain(nn.Conv2d(4, 3, 3), _training(nn.BatchNorm2d(3))),
            IMAGE,
            refused=(("1", r"in training mode, so its statistics still change; call model.eval\(\)"),),
            norms_left=1,
        ),
        "own-norm-in-training": Case(
            lambda: chain(nn.Conv2d(4, 3, 3), _training(L1BatchNorm2d(3))),
            IMAGE,
            refused=(("1", r"in training mode, so its statistics still change"),),
            norms_left=1,
        ),
        "no-statistics": Case(
            lambda: chain(nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3, track_running_stats=False)),
            IMAGE,
            refused=(("1", "keeps no running statistics"),),
            norms_left=1,
        ),
        "per-sample": Case(
            lambda: chain(nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.LayerNorm(4), nn.RMSNorm(4)),
            IMAGE,
            refused=tuple((str(index), "takes its statistics from each sample") for index in range(1, 5)),
            norms_left=4,
        ),
    },
    "parallel-branches": {
        "kernels-norms-and-identity": Case(
            lambda: _branches(nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Identity()),
            IMAGE,
            changed=(("add", "'1' merged into '0'"), ("add_1", "'2' merged into '0'"), ("add_2", "its input merged")),
        ),
        "depthwise": Case(
            lambda: _branches(
                nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, groups=4), nn.Conv2d(4, 4, 5, padding=2, groups=4, bias=False)
            ),
            IMAGE,
            changed=(("add", "'0' merged into '1'"), ("add_1", "'1' merged into '2'")),
        ),
        "strided": Case(
            lambda: _branches(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Conv2d(4, 6, 1, stride=2)),
            IMAGE,
            changed=(("add", "'1' merged into '0'"),),
        ),
        "depthwise-into-dense": Case(
            lambda: _branches(
                nn.Conv2d(4, 4, 3, padding=1, groups=2), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 4, 1)
            ),
            IMAGE,
            changed=(("add", "'1' merged into '0'"),),
            refused=(("add_1", "its branches have windows of different places"),),
        ),
        "dilated": Case(
            lambda: _branches(
                nn.Conv1d(4, 4, 3, dilation=2, padding=2), nn.Conv1d(4, 4, 5, padding=2), nn.Conv1d(4, 4, 1)
            ),
            (1, 4, 9),
            changed=(("add", "'0' merged into '1'"), ("add_1", "'2' merged into '1'")),
        ),
        "taps-between": Case(
            lambda: _branches(nn.Conv1d(4, 4, 3, dilation=2, padding=2), nn.Conv1d(4, 4, 3, padding=1)),
            (1, 4, 9),
            refused=(("add", "its branches have windows of different places"),),
        ),
        "even-kernels": Case(
            lambda: _branches(nn.Conv1d(4, 4, 4, padding="same"), nn.Conv1d(4, 4, 2, padding="same")),
            (1, 4, 9),
            changed=(("add", "'1' merged into '0'"),),
        ),
        "asymmetric": Case(
            lambda: _branches(nn.Conv2d(4, 4, (3, 1), padding=(1, 0)), nn.Conv2d(4, 4, (1, 3), padding=(0, 1))),
            IMAGE,
            refused=(("add", "its branches have windows of different places"),),
        ),
        "linear-weighted": Case(
            lambda: Lambda(
                lambda m, x: F.relu(torch.sub(m.a(x), m.b(x), alpha=3) - x), a=nn.Linear(5, 5), b=nn.Linear(5, 5)
            ),
            (1, 5),
            changed=(("sub", "'b' merged into 'a'"), ("sub_1", "its input merged into 'a'")),
        ),
        "mixer": Case(
            lambda: Lambda(
                lambda m, x: F.relu(x + _per_channel([1.0, 2.0, -3.0, 0.5]) * (m.b(m.c(x)) - m.n(x))),
                c=nn.Conv2d(4, 4, 3, padding=1, groups=4),
                b=nn.BatchNorm2d(4),
                n=nn.BatchNorm2d(4),
            ),
            IMAGE,
            changed=(("sub", "'n' merged into 'c'"), ("add", "its input merged into 'c'")),
        ),
        "affines": Case(
            lambda: Lambda(lambda m, x: F.relu(m.n(x) - x), n=nn.BatchNorm2d(4)),
            IMAGE,
            changed=(("sub", "'n' and its input became one affine"),),
            refused=(("n", "its scale would have to pass an output of the network"),),
            norms_left=1,
        ),
        "read-elsewhere": Case(
            lambda: Lambda(lambda m, x: _fork(m, m.a(x), x), a=nn.Conv2d(4, 4, 1), b=nn.Conv2d(4, 4, 1)), IMAGE
        ),
    },
    "affine-after-affine": {
        "two-norms-first": Case(
            lambda: chain(nn.BatchNorm2d(4), L1BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3)),
            IMAGE,
            changed=(("1", "merged with '0'"),),
            refused=(("0", r"a negative scale would have to pass '2' \(relu\)"),),
            norms_left=1,
        ),
        "scalar-and-channels": Case(
            lambda: Lambda(lambda m, x: (F.relu(x) * 2 + _per_channel([1.0, 2.0, 3.0, 4.0])) / 0.3),
            IMAGE,
            changed=(("add", "merged with 'mul'"), ("div", "merged with 'mul'")),
            refused=(("mul", "its scale would have to pass an output of the network"),),
        ),
        "norm-takes-the-name": Case(
            lambda: Lambda(lambda m, x: m.b(F.relu(x) * 2), b=nn.BatchNorm2d(4)),
            IMAGE,
            changed=(("b", "merged with 'mul'"),),
            refused=(("b", "its scale would have to pass an output of the network"),),
            norms_left=1,
        ),
        "also-read": Case(
            lambda: Lambda(lambda m, x: _residual(m, F.relu(x) * 2), b=nn.BatchNorm2d(4)),
            IMAGE,
            refused=(
                ("b", "its scale would have to pass an output of the network"),
                ("mul", "its scale would have to pass an output of the network"),
            ),
            norms_left=1,
        ),
        "not-finite": Case(
            lambda: Lambda(lambda m, x: F.relu(x) / 0.0 * 2),
            IMAGE,
            refused=(("div", "are not finite"), ("mul", "its scale would")),
        ),
        "last-axis": Case(
            lambda: Lambda(lambda m, x: F.relu(x) * torch.ones(6) * torch.arange(6.0) + 1),
            IMAGE,
            changed=(("add", "merged with 'mul_1'"),),
            refused=(("mul_1", "channel 0 has a scale of zero"),),
        ),
    },
    "silent-channels": {
        "behind-a-pool": Case(
            lambda: chain(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.AvgPool2d(2), _zero_gamma(4), nn.Conv2d(4, 3, 1)),
            IMAGE,
            changed=(("3", "1 channels with a scale of zero became zero in '0'"),),
        ),
        "without-a-bias": Case(
            lambda: chain(
                nn.ConvTranspose2d(4, 4, 2, groups=2, bias=False),
                nn.ReLU(),
                _zero_gamma(4),
                nn.ReLU(),
                nn.Conv2d(4, 3, 1),
            ),
            IMAGE,
            changed=(("2", "1 channels with a scale of zero became zero in '0'"),),
            refused=(("2", "a negative scale would have to pass '3'"),),
            norms_left=1,
        ),
        "tokens": Case(
            lambda: Lambda(
                lambda m, x: m.b(m.a(x).flatten(0, 1)).view(x.shape[0], -1, 3),
                a=nn.Linear(5, 3),
                b=_zero_gamma(3, axes=1),
            ),
            (1, 4, 5),
            changed=(("b", "1 channels with a scale of zero became zero in 'a'"),),
        ),
        "some-of-a-channel": Case(
            lambda: chain(nn.Conv2d(4, 2, 3), nn.Flatten(), _zero_gamma(40, axes=1), nn.Linear(40, 3)),
            IMAGE,
            refused=(("2", "channel 1 has a scale of zero"),),
            norms_left=1,
        ),
        "mixed-channels": Case(
            lambda: chain(
                nn.Conv2d(4, 4, 1), Lambda(lambda m, x: x.mean(1, keepdim=True)), _all_zero(), nn.Conv2d(1, 3, 1)
            ),
            IMAGE,
            refused=(("2", "channel 0 has a scale of zero"),),
            norms_left=1,
        ),
        "read-elsewhere": Case(
            lambda: Lambda(lambda m, x: _residual(m, F.avg_pool2d(m.c(x), 2)), c=nn.Conv2d(4, 4, 1), b=_zero_gamma(4)),
            IMAGE,
            refused=(("b", "channel 1 has a scale of zero"),),
            norms_left=1,
        ),
    },
    "channel-gauges": {
        "norm-first": Case(
            lambda: chain(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2, stride=2)), IMAGE, (("0", "into '1'"),)
        ),
        "norm-first-transposed": Case(
            lambda: chain(
                nn.Conv2d(4, 4, 1), nn.AvgPool2d(2), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 3, groups=2)
            ),
            IMAGE,
            changed=(("2", "folded into '3', '0'"),),
        ),
        "norm-first-padded": Case(
            lambda: chain(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1)),
            IMAGE,
            refused=(("0", r"its shift would have to pass '1' \(conv2d\)"),),
            norms_left=1,
        ),
        "norm-first-transposed-kernel-of-one": Case(
            lambda: chain(nn.BatchNorm1d(4), nn.ConvTranspose1d(4, 6, 1, groups=2)), (1, 4, 5), (("0", "into '1'"),)
        ),
        "norm-first-reflected": Case(
            lambda: chain(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")),
            IMAGE,
            changed=(("0", "into '1'"),),
        ),
        "norm-first-linear": Case(lambda: chain(nn.BatchNorm1d(5), nn.Linear(5, 3)), (1, 5), (("0", "into '1'"),)),
        "shift-goes-backward": Case(
            lambda: chain(
                nn.ConvTranspose2d(4, 6, 2), nn.AvgPool2d(2), nn.BatchNorm2d(6), nn.Conv2d(6, 3, 3, padding=1)
            ),
            IMAGE,
            changed=(("2", "folded into '3', '0'"),),
        ),
        "pool-that-counts-its-padding": Case(
            lambda: chain(
                nn.Conv2d(4, 4, 1), nn.AvgPool2d(2, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3, padding=1)
            ),
            IMAGE,
            refused=(("2", r"its shift would have to pass '1' \(avg_pool2d\) or '3' \(conv2d\)"),),
            norms_left=1,
        ),
        "pool-that-leaves-its-padding-out": Case(
            lambda: chain(
                nn.Conv2d(4, 4, 1),
                nn.AvgPool2d(2, padding=1, count_include_pad=False),
                nn.BatchNorm2d(4),
                nn.Conv2d(4, 3, 3, padding=1),
            ),
            IMAGE,
            changed=(("2", "folded into '3', '0'"),),
        ),
        "through-activations": Case(
            lambda: chain(
                nn.Conv2d(4, 4, 1),
                nn.ReLU(),
                _shiftless(4),
                nn.LeakyReLU(),
                nn.MaxPool2d(2),
                nn.PReLU(4),
                nn.Upsample(scale_factor=2),
                nn.Conv2d(4, 3, 1),
            ),
            IMAGE,
            changed=(("2", "folded into '7', '0'"),),
        ),
        **{
            name: Case(
                lambda layer=layer: chain(nn.Conv2d(4, 4, 1), layer, nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1), nn.ReLU6()),
                IMAGE,
                changed=(("2", "into '3'"),),
            )
            for name, layer in (("after-gelu", nn.GELU()), ("after-relu6", nn.ReLU6()))
        },
        "before-silu": Case(
            lambda: chain(nn.Conv2d(4, 4, 1), nn.AvgPool2d(2), nn.BatchNorm2d(4), nn.SiLU()),
            IMAGE,
            (("2", "into '0'"),),
        ),
        "before-a-maximum": Case(
            lambda: Lambda(lambda m, x: m.l(m.n(x).amax((2, 3))), n=nn.BatchNorm2d(4), l=nn.Linear(4, 3)),
            IMAGE,
            refused=(("n", r"a negative scale would have to pass 'amax' \(amax\)"),),
            norms_left=1,
        ),
        "before-a-pad-of-ones": Case(
            lambda: Lambda(
                lambda m, x: m.c(F.pad(m.n(x), (1, 1, 1, 1), value=1.0)), n=_shiftless(4), c=nn.Conv2d(4, 3, 3)
            ),
            IMAGE,
            refused=(("n", r"its scale would have to pass 'pad' \(pad\)"),),
            norms_left=1,
        ),
        "channels-picked-by-the-batch": Case(
            lambda: Lambda(
                lambda m, x: m.l(F.relu(m.n(x)).reshape(-1).narrow(0, x.shape[0], 4)),
                n=_positive(4, axes=1),
                l=nn.Linear(4, 3),
            ),
            (2, 4),
            refused=(("n", "its scale would have to pass"),),
            norms_left=1,
        ),
        "between-silus": Case(
            lambda: chain(nn.SiLU(), nn.BatchNorm2d(4), nn.SiLU()),
            IMAGE,
            refused=(("1", r"its scale would have to pass '(0|2)' \(silu\)"),),
            norms_left=1,
        ),
        "between-clamp-and-silu": Case(
            lambda: Lambda(
                lambda m, x: F.silu(m.n(m.c(x).clamp(0, 2))),
                c=nn.Conv2d(4, 4, 1),
                n=nn.BatchNorm2d(4),
            ),
            IMAGE,
            refused=(("n", r"its scale would have to pass '(clamp|silu)' \((clamp|silu)\)"),),
            norms_left=1,
        ),
        "flatten": Case(
            lambda: chain(nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(168, 3)), IMAGE, (("0", "folded into '2'"),)
        ),
        "tokens": Case(
            lambda: Lambda(
                lambda m, x: m.b(m.a(x).flatten(0, 1)).view(x.shape[0], -1, 3), a=nn.Linear(5, 3), b=nn.BatchNorm1d(3)
            ),
            (1, 4, 5),
            changed=(("b", "folded into 'a'"),),
        ),
        "channels-of-a-sequence": Case(
            lambda: Lambda(
                lambda m, x: m.c(m.b(m.a(x).transpose(1, 2)).transpose(1, 2)),
                a=nn.Linear(5, 3),
                b=nn.BatchNorm1d(3),
                c=nn.Linear(3, 2),
            ),
            (1, 4, 5),
            changed=(("b", "folded into 'c', 'a'"),),
        ),
        "concat-split-and-shuffle": Case(
            lambda: Lambda(
                lambda m, x: _shuffled(m, x),
                a=nn.Conv2d(4, 4, 3),
                b=nn.Conv2d(4, 2, 3),
                c=nn.Conv2d(3, 2, 1),
                n=_positive(6),
            ),
            IMAGE,
            changed=(("n", "folded into 'c', 'a', 'b'"),),
        ),
        "zero-channels": Case(
            lambda: Lambda(
                lambda m, x: m.c(m.b(F.pad(m.a(x), (1, 1, 0, 1, 2, 1)))),
                a=nn.Conv2d(4, 3, 1),
                b=_shiftless(6),
                c=nn.Conv2d(6, 2, 3, padding=1),
            ),
            IMAGE,
            changed=(("b", "folded into 'c', 'a'"),),
        ),
        "residual-stream": Case(
            lambda: Lambda(
                lambda m, x: _pre_activated(m, x),
                stem=nn.Conv2d(4, 3, 1),
                a=nn.Conv2d(3, 3, 3, padding=1),
                n1=_positive(3),
                n2=_positive(3),
                b=nn.Conv2d(3, 2, 3, padding=1),
            ),
            IMAGE,
            changed=(("n1", "folded into 'a', 'stem'"), ("n2", "folded into 'b', 'stem', 'a'")),
        ),
        "residual-stream-of-both-signs": Case(
            lambda: Lambda(
                lambda m, x: _pre_activated(m, x),
                stem=nn.Conv2d(4, 3, 1),
                a=nn.Conv2d(3, 3, 3, padding=1),
                n1=nn.BatchNorm2d(3),
                n2=nn.BatchNorm2d(3),
                b=nn.Conv2d(3, 2, 3, padding=1),
            ),
            IMAGE,
            changed=(("n1", "folded into 'a', 'stem'"),),
            refused=(("n2", "a negative scale would have to pass 'relu_1'"),),
            norms_left=1,
        ),
        "own-sum": Case(
            lambda: Lambda(lambda m, x: m.c(m.b(F.relu(x)) + F.relu(x)), b=nn.BatchNorm2d(4), c=nn.Conv2d(4, 3, 1)),
            IMAGE,
            refused=(("b", "its scale would have to pass 'add'"),),
            norms_left=1,
        ),
        "gate": Case(
            lambda: Lambda(
                lambda m, x: m.c(F.avg_pool2d(m.a(x), 2) * _per_channel([2.0, -3.0, 1.0, 0.5]) * _gate(x)),
                a=nn.Conv2d(4, 4, 1),
                c=nn.Conv2d(4, 3, 1),
            ),
            IMAGE,
            changed=(("mul", "into 'c', 'a'"),),
        ),
        "gate-of-higher-rank": Case(
            lambda: Lambda(
                lambda m, x: m.c(F.max_pool2d(m.w(x).amax(0) * F.gelu(x), 2) * 2),
                w=nn.Conv2d(4, 4, 1),
                c=nn.Conv2d(4, 3, 1),
            ),
            IMAGE,
            changed=(("mul_1", "folded into 'c'"),),
        ),
        "gate-with-a-shift": Case(
            lambda: Lambda(lambda m, x: m.c(m.b(F.relu(x)) * _gate(x)), b=nn.BatchNorm2d(4), c=nn.Conv2d(4, 3, 1)),
            IMAGE,
            refused=(("b", "its shift would have to pass 'mul'"),),
            norms_left=1,
        ),
        "embedding": Case(
            lambda: Lambda(
                lambda m, x: m.c(m.b((m.e((x > 0).long()) + m.p).transpose(1, 2)).transpose(1, 2)),
                e=nn.Embedding(2, 5),
                p=nn.Parameter(torch.ones(4, 5)),
                b=nn.BatchNorm1d(5),
                c=nn.Linear(5, 3),
            ),
            (1, 4),
            changed=(("b", "folded into 'c', 'e'"),),
        ),
        "attention-scale": Case(
            lambda: Lambda(
                lambda m, x: (m.q(x) @ m.k(x).transpose(1, 2) * 0.3 + m.p).softmax(-1) @ m.v(x),
                q=nn.Linear(5, 3),
                k=nn.Linear(5, 3),
                v=nn.Linear(5, 4),
                p=nn.Parameter(torch.ones(4, 4)),
            ),
            (1, 4, 5),
            changed=(("mul", "into 'q'"),),
        ),
        "norm-behind-attention": Case(
            lambda: Lambda(
                lambda m, x: F.gelu(m.n(F.scaled_dot_product_attention(x, F.relu(x), m.v(x)).transpose(1, 2))),
                v=nn.Linear(5, 4),
                n=nn.BatchNorm1d(4),
            ),
            (1, 6, 5),
            changed=(("n", "folded into 'v'"),),
        ),
        "norm-of-a-query": Case(
            lambda: Lambda(
                lambda m, x: F.scaled_dot_product_attention(m.n(x), x, m.v(x)), v=nn.Linear(5, 4), n=nn.BatchNorm1d(6)
            ),
            (1, 6, 5),
            refused=(("n", "its scale would have to pass 'scaled_dot_product_attention'"),),
            norms_left=1,
        ),
        "norms-of-tokens-around-attention": Case(
            lambda: Lambda(
                lambda m, x: m.b(F.scaled_dot_product_attention(x, x, m.a(m.v(x)))),
                v=nn.Linear(5, 4),
                a=nn.BatchNorm1d(6),
                b=nn.BatchNorm1d(6),
            ),
            (1, 6, 5),
            refused=(
                ("a", r"meet again in 'scaled_dot_product_attention' \(scaled_dot_product_attention\)"),
                ("b", "its scale would have to pass an output of the network"),
            ),
            norms_left=2,
        ),
        "norm-behind-weighted-means": Case(
            lambda: Lambda(
                lambda m, x: F.gelu(m.n(((x @ x.transpose(1, 2)).softmax(-1) @ m.v(x)).transpose(1, 2))),
                v=nn.Linear(5, 4),
                n=nn.BatchNorm1d(4),
            ),
            (1, 6, 5),
            changed=(("n", "folded into 'v'"),),
        ),
        "norm-behind-other-products": Case(
            lambda: Lambda(
                lambda m, x: F.gelu(m.n(((x @ x.transpose(1, 2)).softmax(1) @ m.v(x)).transpose(1, 2))),
                v=nn.Linear(5, 4),
                n=nn.BatchNorm1d(4),
            ),
            (1, 6, 5),
            refused=(("n", "its shift would have to pass"),),
            norms_left=1,
        ),
        "scale-along-the-summed-axis": Case(
            lambda: Lambda(
                lambda m, x: F.relu(x) * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]) @ F.gelu(x).transpose(1, 2)
            ),
            (1, 4, 5),
            refused=(("mul", "its scale would have to pass"),),
        ),
        "zero-gamma": Case(
            lambda: chain(nn.ReLU(), _zero_gamma(4), nn.Conv2d(4, 3, 1)),
            IMAGE,
            refused=(("1", "channel 1 has a scale of zero"),),
            norms_left=1,
        ),
        "tiny-gamma": Case(
            lambda: Lambda(
                lambda m, x: _pre_activated(m, x),
                stem=nn.Conv2d(4, 3, 1),
                a=nn.Conv2d(3, 3, 3, padding=1),
                n1=_tiny_gamma(3),
                n2=_positive(3),
                b=nn.Conv2d(3, 2, 3, padding=1),
            ),
            IMAGE,
            changed=(("n2", "folded into 'b', 'stem', 'a'"),),
            refused=(("n1", "its shift over its scale is up to .* cost more than twice the precision"),),
            norms_left=1,
        ),
    },
}


def _branches(*layers):
    """Parallel layers, added one after the other, and a ReLU."""
    network = nn.ModuleList(layers)

    class Branches(nn.Sequential):
        def forward(self, x):
            total = self[0](x)
            for layer in list(self)[1:]:
                total = total + layer(x)
            return F.relu(total)

    return Branches(*network)


def _fork(network, h, x):
    return F.relu(h + network.b(x)) + F.relu(h)


def _gate(x):
    return torch.sigmoid(x.mean((2, 3), keepdim=True))


def _shuffled(network, x):
    y = network.n(F.max_pool2d(torch.cat([network.a(x), network.b(x)], 1), 1).flip(1))
    y = y.view(y.shape[0], 2, 3, *y.shape[2:]).transpose(1, 2).flatten(1, 2)
    first, second = y.chunk(2, 1)
    return network.c(first) + F.gelu(network.c(second[:, [2, 1, 0]]))


def _pre_activated(network, x):
    x = network.stem(x)
    x = x + network.a(F.relu(network.n1(x)))
    return network.b(F.relu(network.n2(x)))


def _with_gamma(channels, change, axes=2):
    norm = (nn.BatchNorm1d if axes == 1 else nn.BatchNorm2d)(channels)
    norm.after_randomising = lambda: change(norm)
    return norm


def _positive(channels, axes=2):
    return _with_gamma(channels, lambda norm: norm.weight.abs_().add_(0.3), axes)


def _shiftless(channels):
    def change(norm):
        norm.weight.abs_().add_(0.3)
        norm.bias.zero_()
        norm.running_mean.zero_()

    return _with_gamma(channels, change)


def _zero_gamma(channels, axes=2):
    return _with_gamma(channels, lambda norm: norm.weight[1].zero_(), axes)


def _all_zero():
    return _with_gamma(1, lambda norm: norm.weight.zero_())


def _tiny_gamma(channels):
    return _with_gamma(channels, lambda norm: norm.weight.abs_().add_(0.3)[1].fill_(1e-7))


def _hooked():
    network = chain(nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3))
    network[0].register_forward_hook(lambda module, args, output: output * 2 + 1)
    return network


def _training(module):
    module.keep_training = True
    return module


def _residual(network, h):
    return network.b(h) + F.relu(h)


def _both(network, h):
    return network.b(h), h


def make(case: Case, seed: int = 0) -> nn.Module:
    """The case's network in evaluation mode, with random parameters and statistics (gammas of both signs)."""
    torch.manual_seed(seed)
    network = case.network().eval()
    randomise(network)
    for module in network.modules():
        with torch.no_grad():
            getattr(module, "after_randomising", int)()
        if getattr(module, "keep_training", False):
            module.train()
    return network


@torch.no_grad()
def randomise(network: nn.Module) -> nn.Module:
    """Random parameters and running statistics, in place."""
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if not tensor.is_floating_point():
            continue
        if name.endswith(("running_var", "running_scale")):
            tensor.uniform_(0.5, 2.0)
        else:
            tensor.normal_(0.0, 0.5)
    return network
