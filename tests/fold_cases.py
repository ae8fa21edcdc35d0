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
            refused=(("1", r"acts along axis 1 of a tensor with 3 axes, but '0' makes its channels on axis 2"),),
            norms_left=1,
        ),
        "also-read": Case(
            lambda: Lambda(lambda m, x: _residual(m, m.c(x)), c=nn.Conv2d(4, 3, 3), b=nn.BatchNorm2d(3)),
            IMAGE,
            refused=(("b", r"the output of 'c' is also read by 'relu' \(relu\)"),),
            norms_left=1,
        ),
        "also-output": Case(
            lambda: Lambda(lambda m, x: _both(m, m.c(x)), c=nn.Conv2d(4, 3, 3), b=nn.BatchNorm2d(3)),
            IMAGE,
            refused=(("b", "the output of 'c' is also an output of the network"),),
            norms_left=1,
        ),
        "dynamic-weight": Case(
            lambda: Lambda(
                lambda m, x: m.b(F.conv2d(x, m.w * x.mean())),
                w=nn.Parameter(torch.ones(3, 4, 3, 3)),
                b=nn.BatchNorm2d(3),
            ),
            IMAGE,
            refused=(("b", r"it follows 'conv2d' \(conv2d\)"),),
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
    "affine-after-affine": {
        "two-norms-first": Case(
            lambda: chain(nn.BatchNorm2d(4), L1BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3)),
            IMAGE,
            changed=(("1", "merged with '0'"),),
            refused=(("0", r"it follows 'input_1' \(input\)"),),
            norms_left=1,
        ),
        "scalar-and-channels": Case(
            lambda: Lambda(lambda m, x: (F.relu(x) * 2 + _per_channel([1.0, 2.0, 3.0, 4.0])) / 0.3),
            IMAGE,
            changed=(("add", "merged with 'mul'"), ("div", "merged with 'mul'")),
        ),
        "norm-takes-the-name": Case(
            lambda: Lambda(lambda m, x: m.b(F.relu(x) * 2), b=nn.BatchNorm2d(4)),
            IMAGE,
            changed=(("b", "merged with 'mul'"),),
            refused=(("b", r"it follows 'relu' \(relu\)"),),
            norms_left=1,
        ),
        "also-read": Case(
            lambda: Lambda(lambda m, x: _residual(m, F.relu(x) * 2), b=nn.BatchNorm2d(4)),
            IMAGE,
            refused=(("b", r"the output of 'mul' is also read by 'relu_1' \(relu\)"),),
            norms_left=1,
        ),
        "not-finite": Case(
            lambda: Lambda(lambda m, x: F.relu(x) / 0.0 * 2), IMAGE, refused=(("mul", "are not finite"),)
        ),
        "last-axis": Case(lambda: Lambda(lambda m, x: F.relu(x) * torch.ones(6) * torch.arange(6.0) + 1), IMAGE),
    },
}


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
