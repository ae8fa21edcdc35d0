"""Real network families at small size, each with the least number of per-channel operations that folding can leave.

The counts follow from what lets a per-channel storage, true = S * stored + T, pass. Layers with weights absorb any S
and T, but a convolution that reads zero padding (and a transposed one wider than 1) wants T = 0 at its input. An affine
is free where S_out = a S_in and T_out = a T_in + c. ReLU, LeakyReLU and PReLU want S > 0 and T = 0, max-pool S > 0, a
gate T = 0, a sum one S for all; averages, upsampling, concatenation, slices and reshapes let everything pass; all else,
and the network's ends, want S = 1 and T = 0. Parallel linear branches of one input are one convolution. What is left
counts one for each tensor that has to be stored a second way.

The modules with a wiring of their own are in `architecture_blocks`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from architecture_blocks import (
    VOCABULARY,
    AlignedPoints,
    Attention,
    BothSigns,
    Cat,
    Chomp,
    ClassToken,
    DeepLab,
    DenseBlock,
    DualPath,
    Embedding,
    FirstToken,
    FixupBlock,
    FrozenNorm,
    Hierarchy,
    HighResolution,
    Join,
    LastStep,
    LayerScale,
    LevitAttention,
    LinearNorm,
    MeanTokens,
    NormFreeBlock,
    NormGate,
    PadChannels,
    Pick,
    PoolMixer,
    Pyramid,
    RepMixer,
    ResUNet,
    SelectiveKernel,
    Shift,
    Shuffle,
    Siamese,
    Speaker,
    SqueezeExcite,
    Standardise,
    Subsample,
    Sum,
    TaskNorms,
    Times,
    TokenNorm,
    ToTokens,
    TransformerLayer,
    Transposed,
    UNet,
    WaveNet,
    YoloNeck,
    basic,
    bottleneck,
    chain,
    cn,
    cna,
    conv,
    head,
    inverted,
    leaky,
    lna,
    na,
    plus,
    preact_basic,
    preact_bottleneck,
    replace,
    resnet_stem,
    separable,
    shortcut,
    stages,
    up,
)
from torch import Tensor, nn
from torch.nn.utils import parametrize

Make = Callable[[int], nn.Module]
Signs = Literal["positive", "mixed", "tiny"]


@dataclass(frozen=True)
class Architecture:
    """One family.

    Args:
        make: a network for a width multiplier: 1 is tiny, `bench_width` realistic.
        shape: of one example input for tests.
        bench_shape: of a realistic one for latencies.
        bench_width: the multiplier for latencies.
        positive: least number of per-channel operations left when all gammas are positive.
        mixed: the same when each gamma has a random sign.
        why: the argument for both counts.
        tokens: the input is integers below `VOCABULARY`.
        merged: convolutions that merging of parallel branches takes away.
    """

    make: Make
    shape: tuple[int, ...]
    bench_shape: tuple[int, ...]
    bench_width: int
    positive: int
    mixed: int
    why: str
    tokens: bool = False
    merged: int = 0


ARCHITECTURES: dict[str, Architecture] = {}
IMAGE, BENCH, SMALL = (1, 3, 32, 32), (1, 3, 224, 224), (1, 3, 64, 64)
PLAN = ((8, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1))
OWN = "Every norm reads a convolution (or linear layer) that nobody else reads, and disappears into it."


def family(
    least: tuple[int, int],
    why: str,
    *,
    shape: tuple[int, ...] = IMAGE,
    bench_shape: tuple[int, ...] = BENCH,
    bench_width: int = 8,
    tokens: bool = False,
    merged: int = 0,
) -> Callable[[Make], Make]:
    """Enters the decorated maker in `ARCHITECTURES` under its own name; `least` is the counts, positive and mixed."""

    def enter(make: Make) -> Make:
        ARCHITECTURES[make.__name__] = Architecture(make, shape, bench_shape, bench_width, *least, why, tokens, merged)
        return make

    return enter


def example(architecture: Architecture, batch: int = 1, seed: int = 0, *, bench: bool = False) -> Tensor:
    """An input: normal numbers, or tokens. No input depends on the width."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, *(architecture.bench_shape if bench else architecture.shape)[1:])
    if architecture.tokens:
        return torch.randint(VOCABULARY, shape, generator=generator)
    return torch.randn(shape, generator=generator)


@torch.no_grad()
def randomise(network: nn.Module, signs: Signs, seed: int = 0) -> nn.Module:
    """Random parameters and running statistics in place, activations of about one.

    Args:
        network: whose norms keep `running_mean` beside `weight`; factors per channel are called `scale...`.
        signs: of norm weights and scales: all positive; both signs at random, at least one of each in every tensor of
            several channels; or the same with a tenth 1e-4 times smaller and a few exactly zero.
        seed: of the numbers.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor: Tensor, low: float, high: float) -> None:
        tensor.uniform_(low, high, generator=generator)

    gammas: list[Tensor] = []
    for module in network.modules():
        norm = hasattr(module, "running_mean")
        buffers = module.named_buffers(recurse=False) if norm else ()
        for name, tensor in (*module.named_parameters(recurse=False), *buffers):
            if not tensor.is_floating_point():
                continue
            if name == "running_var":
                uniform(tensor, 0.5, 2)
            elif name.startswith("scale") or (norm and name == "weight"):
                _gamma(tensor, signs, generator)
                gammas.append(tensor)
            elif isinstance(module, nn.PReLU):
                uniform(tensor, 0.1, 0.4)
            elif isinstance(module, nn.LayerNorm) and name == "weight":
                uniform(tensor, 0.5, 1.5)
            elif name == "weight":
                tensor.normal_(0, _deviation(module), generator=generator)
            else:
                tensor.normal_(0, 0.5 if name == "running_mean" else 0.3, generator=generator)
    if signs == "tiny" and gammas:
        gammas[0].view(-1)[0] = 0
    return network


def _gamma(tensor: Tensor, signs: Signs, generator: torch.Generator) -> None:
    tensor.uniform_(0.5, 1.5, generator=generator)
    if signs == "positive":
        return
    sign = torch.randint(2, tensor.shape, generator=generator).to(tensor) * 2 - 1
    if tensor.numel() > 1 and bool((sign == sign.view(-1)[0]).all()):
        sign.view(-1)[0] *= -1
    tensor.mul_(sign)
    if signs == "tiny":
        chance = torch.rand(tensor.shape, generator=generator)
        tensor[chance < 0.13] *= 1e-4
        tensor[chance < 0.03] = 0


def _deviation(module: nn.Module) -> float:
    """Of weights that keep the size of what follows a ReLU."""
    if isinstance(module, nn.Embedding):
        return 1.0
    weight = module.weight
    fan = weight[0].numel()
    if isinstance(module, nn.ConvTranspose2d):
        fan = weight[:, 0].numel() / (module.groups * module.stride[0] * module.stride[1])
    return (1.2 / fan) ** 0.5


# Plain chains and residual networks


@family((0, 0), OWN)
def vgg(w: int) -> nn.Module:
    """Simonyan and Zisserman 2015 with norms, biases before them as in torchvision."""
    first, second = cna(3, 8 * w, bias=True), chain(cna(8 * w, 16 * w, bias=True), cna(16 * w, 16 * w, bias=True))
    end = (nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64 * w, 32 * w), nn.ReLU(), nn.Dropout())
    return chain(first, nn.MaxPool2d(2), second, nn.MaxPool2d(2), *end, nn.Linear(32 * w, 10))


@family((0, 0), f"{OWN} The stream after each sum is a ReLU's: any S > 0 and T = 0.")
def resnet_basic(w: int) -> nn.Module:
    """He et al. 2016a, as ResNet-18."""
    return chain(resnet_stem(w), stages(basic, w, *PLAN), head(32 * w))


@family((0, 0), OWN)
def resnet_bottleneck(w: int) -> nn.Module:
    """He et al. 2016a, as ResNet-50 (the stride in the 3x3)."""
    return chain(resnet_stem(w), stages(bottleneck, w, *PLAN), head(32 * w))


@family((0, 0), f"{OWN} The average pool counts no padding, and its input has T = 0 anyway.")
def resnet_d(w: int) -> nn.Module:
    """He et al. 2019, bag of tricks: three convolutions as the stem, an average pool before the shortcut's 1x1."""

    def block(i: int, o: int, s: int) -> nn.Module:
        pool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False) if s == 2 else nn.Identity()
        return bottleneck(i, o, s, short=nn.Identity() if i == o and s == 1 else chain(pool, cn(i, o, 1)))

    stem = chain(cna(3, 4 * w, 3, 2), cna(4 * w, 4 * w), cna(4 * w, 8 * w), nn.MaxPool2d(3, 2, 1))
    return chain(stem, stages(block, w, *PLAN), head(32 * w))


@family((0, 0), OWN)
def resnext(w: int) -> nn.Module:
    """Xie et al. 2017: the bottleneck's 3x3 in groups."""

    def block(i: int, o: int, s: int) -> nn.Module:
        return bottleneck(i, o, s, o // 2, cna(o // 2, o // 2, 3, s, 4))

    return chain(resnet_stem(w), stages(block, w, *PLAN), head(32 * w))


@family((0, 0), f"{OWN} The padded shortcut carries a ReLU's tensor, S > 0 and T = 0, S = 1 if the padding wants it.")
def resnet_cifar(w: int) -> nn.Module:
    """He et al. 2016a for CIFAR: shortcuts without weights (option A), subsampled and padded with zero channels."""

    def block(i: int, o: int, s: int) -> nn.Module:
        short = nn.Identity() if i == o else chain(Subsample(), PadChannels((o - i) // 2, (o - i) // 2))
        return chain(Sum(chain(cna(i, o, 3, s), cn(o, o)), short), nn.ReLU())

    return chain(cna(3, 8 * w), stages(block, w, (8, 8, 1), (8, 16, 2), (16, 32, 2)), head(32 * w))


@family((0, 0), f"{OWN} Written as x * scale + bias they are the same affines.")
def resnet_frozen(w: int) -> nn.Module:
    """ResNet with Detectron2's FrozenBatchNorm2d: buffers and arithmetic in place of a norm."""
    return replace(resnet_basic(w), nn.BatchNorm2d, lambda norm: FrozenNorm(norm.num_features))


@family((0, 0), f"{OWN} The gate reads and multiplies a tensor with T = 0.")
def se_resnet(w: int) -> nn.Module:
    """Hu et al. 2018: a gate at the end of each residual branch."""
    return chain(resnet_stem(w), stages(basic, w, *PLAN, after=SqueezeExcite), head(32 * w))


@family(
    (2, 2),
    "In each of the two gates x needs T = 0 for the product, while its norm under the sigmoid needs T = -c/a: one "
    "affine is left per gate (norm and weight are two affines in a row), whatever the signs.",
)
def nam_resnet(w: int) -> nn.Module:
    """Liu et al. 2021: ResNet whose branches end in a gate made of a norm."""
    return chain(resnet_stem(w), stages(basic, w, (8, 16, 1), (16, 16, 1), after=NormGate), head(16 * w))


@family((0, 0), OWN)
def sknet(w: int) -> nn.Module:
    """Li et al. 2019: bottlenecks around a softmax over branches."""

    def block(i: int, o: int, s: int) -> nn.Module:
        return bottleneck(i, o, s, o // 2, SelectiveKernel(o // 2, s))

    return chain(resnet_stem(w), stages(block, w, *PLAN), head(32 * w))


@family((0, 0), f"{OWN} The average pool counts its padding but reads slices of a ReLU's tensor, T = 0.")
def res2net(w: int) -> nn.Module:
    """Gao et al. 2019."""

    def block(i: int, o: int, s: int) -> nn.Module:
        return bottleneck(i, o, s, o, Hierarchy(o, s, first=i != o))

    return chain(resnet_stem(w), stages(block, w, *PLAN), head(32 * w))


@family(
    (0, 0),
    "No norms, only constant factors: those after a ReLU go into the convolutions that read it, and gain, alpha and "
    "the gate's 2 pass the gate (T = 0) into the branch's last convolution.",
)
def nfnet(w: int) -> nn.Module:
    """Brock et al. 2021: normaliser-free, the standardised weights baked in."""
    plan = ((8, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1))
    body = (conv(3, 8 * w, 3, 2, bias=True), stages(NormFreeBlock, w, *plan), conv(32 * w, 32 * w, 1, bias=True))
    network = chain(*body, nn.ReLU(), Times(1.7139588594436646), head(32 * w))
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
            parametrize.register_parametrization(module, "weight", Standardise())
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    return network


@family(
    (4, 4),
    "No norms, but scalar biases: in each of the two blocks bias1a and bias2a are added to a ReLU's tensor (T = 0) "
    "right before a padded convolution (T = 0): two additions per block. The other biases and the factor follow "
    "convolutions.",
)
def fixup_resnet(w: int) -> nn.Module:
    """Zhang et al. 2019, Fixup: scalar biases around convolutions and a factor on the branch."""
    body = (conv(3, 8 * w, 3, 2), Shift(), nn.ReLU(), stages(FixupBlock, w, (8, 16, 2), (16, 16, 1)))
    return chain(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), Shift(), nn.Linear(16 * w, 10))


@family(
    (0, 0),
    "The scalars follow convolutions, the one norm follows the classifier: all disappear into them.",
)
def mimicnorm(w: int) -> nn.Module:
    """Fei et al. 2020: a constant on every convolution, one norm, without weights, on the logits."""

    def scaled(i: int, o: int, s: int = 1) -> nn.Module:
        return chain(conv(i, o, 3, s, bias=True), Times(0.7))

    def block(i: int, o: int, s: int) -> nn.Module:
        short = nn.Identity() if i == o else chain(conv(i, o, 1, s, bias=True), Times(0.7))
        return chain(Sum(chain(scaled(i, o, s), nn.ReLU(), scaled(o, o)), short), nn.ReLU())

    return chain(
        scaled(3, 8 * w, 2), nn.ReLU(), stages(block, w, *PLAN), head(32 * w), nn.BatchNorm1d(10, affine=False)
    )


# Norms before convolutions


@family(
    (0, 3),
    "Positive: each block's last convolution sets the T that the next norm on the stream wants. Mixed: the sign of S "
    "is free once per stream; each of the three streams (a projection of the activated tensor begins one) is read by "
    "two norms under ReLU, the last by the final one, which leaves one each.",
    bench_shape=SMALL,
)
def wide_resnet(w: int) -> nn.Module:
    """Zagoruyko and Komodakis 2016: pre-activation (He et al. 2016b), three groups of two blocks."""
    plan = ((8, 16, 1), (16, 16, 1), (16, 24, 2), (24, 24, 1), (24, 32, 2), (32, 32, 1))
    return chain(conv(3, 8 * w), stages(preact_basic, w, *plan), *na(32 * w), head(32 * w))


@family(
    (0, 3),
    "Positive: as for every pre-activation stream, 0. Mixed: the stem's max-pool wants S > 0 where the first norm "
    "wants the sign of gamma, one; then two norms on each of the two streams, one each.",
)
def preact_bottleneck_resnet(w: int) -> nn.Module:
    """He et al. 2016b for ImageNet as timm writes it: the stem is a convolution and a max-pool without a norm."""
    plan = ((16, 32, 1), (32, 32, 1), (32, 32, 2), (32, 32, 1))
    stem = (conv(3, 16 * w, 7, 2), nn.MaxPool2d(3, 2, 1))
    return chain(*stem, stages(preact_bottleneck, w, *plan), *na(32 * w), head(32 * w))


@family(
    (2, 4),
    "Positive: bn_data shifts the input before a padded convolution, and the first block's norm shifts what the "
    "stem's ReLU and max-pool leave at T = 0. Mixed: besides, two norms read each of the two streams, one left each.",
)
def mxnet_resnet(w: int) -> nn.Module:
    """ResNet v2 as in MXNet's symbol file: a norm on the data, norm, ReLU and max-pool in the stem, pre-activation."""
    plan = ((8, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1))
    stem = (nn.BatchNorm2d(3), cna(3, 8 * w, 7, 2), nn.MaxPool2d(3, 2, 1))
    return chain(*stem, stages(preact_basic, w, *plan), *na(32 * w), head(32 * w))


@family(
    (0, 3),
    "LeakyReLU wants S > 0 and T = 0 as ReLU does. Mixed: three norms read the first stream (the third projects its "
    "activated tensor), two the second with the final one: 2 + 1.",
    bench_shape=SMALL,
)
def preact_leaky(w: int) -> nn.Module:
    """He et al. 2016b with LeakyReLU."""
    plan = ((16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1))
    body = stages(preact_basic, w, *plan, act=nn.LeakyReLU)
    return chain(conv(3, 16 * w), body, *na(32 * w, nn.LeakyReLU), head(32 * w))


@family(
    (0, 3),
    "PReLU wants S > 0 and T = 0 whatever its slopes. One stream without projections is read by four norms: mixed "
    "signs leave three.",
    bench_shape=SMALL,
)
def preact_prelu(w: int) -> nn.Module:
    """He et al. 2016b with PReLU, slopes per channel, and identity shortcuts only."""
    body = stages(preact_basic, w, *((16, 16, 1),) * 3, act=nn.PReLU)
    return chain(conv(3, 16 * w, 3, 2), body, *na(16 * w, nn.PReLU), head(16 * w))


@family(
    (1, 1),
    "A block's first norm goes straight into a padded convolution: any sign of S, and the T = -c/a that it wants is "
    "set by the block before. Only the first reads the stem's PReLU, T = 0: one addition. The last norm is read "
    "linearly.",
    bench_shape=(1, 3, 112, 112),
)
def iresnet(w: int) -> nn.Module:
    """Deng et al. 2019, ArcFace: norm, conv, norm, PReLU, conv, norm; embeddings end in a norm."""

    def block(i: int, o: int, s: int) -> nn.Module:
        return Sum(chain(nn.BatchNorm2d(i), cna(i, o, act=nn.PReLU), cn(o, o, 3, s)), shortcut(i, o, s))

    body = stages(block, w, (16, 16, 2), (16, 16, 1), (16, 32, 2), (32, 32, 1))
    end = (nn.BatchNorm2d(32 * w), nn.Dropout(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return chain(cna(3, 16 * w, act=nn.PReLU), body, *end, nn.Linear(128 * w, 16 * w), nn.BatchNorm1d(16 * w))


@family(
    (0, 0),
    "The blocks' first norms go straight into padded convolutions: any sign, and each T is set by the block before. "
    "Only the final norm, under ReLU, chooses the sign of the one stream; zero channels are zero at any S.",
    bench_shape=SMALL,
)
def pyramidnet(w: int) -> nn.Module:
    """Han et al. 2017: no ReLU at a block's ends, channels grow by zero padding, an average pool as shortcut."""

    def block(i: int, o: int, s: int) -> nn.Module:
        short = chain(nn.AvgPool2d(2) if s == 2 else nn.Identity(), PadChannels(0, o - i))
        return Sum(chain(nn.BatchNorm2d(i), cna(i, o, 3, s), cn(o, o)), short)

    body = stages(block, w, (16, 20, 1), (20, 24, 2), (24, 28, 2))
    return chain(cn(3, 16 * w), body, *na(28 * w), head(28 * w))


@family(
    (5, 5),
    "ReLU's tensor (T = 0, S > 0), a norm, a padded convolution (T = 0): one addition for each of the five 3x3 "
    "convolutions in the blocks, whatever the signs. Norms before 1x1 convolutions and the classifier leave nothing.",
    bench_shape=SMALL,
)
def ic_resnet(w: int) -> nn.Module:
    """Chen et al. 2019, independent components: ReLU, norm, dropout, convolution."""

    def ic(i: int, o: int, k: int = 3, s: int = 1) -> nn.Module:
        return chain(nn.ReLU(), nn.BatchNorm2d(i), nn.Dropout(0.1), conv(i, o, k, s))

    c, d = 16 * w, 32 * w
    down = Sum(chain(ic(c, d, 3, 2), ic(d, d)), conv(c, d, 1, 2))
    blocks = (plus(ic(c, c), ic(c, c)), down, plus(ic(d, c, 1), ic(c, c), ic(c, d, 1)))
    return chain(conv(3, c), *blocks, nn.ReLU(), nn.BatchNorm2d(d), head(d))


@family((1, 1), "A shift of the input before a padded convolution: one addition; the scale goes into the weights.")
def norm_on_input(w: int) -> nn.Module:
    """A norm in place of normalised data (as in many Keras and speech networks), then conv, norm, ReLU."""
    return chain(nn.BatchNorm2d(3), cna(3, 8 * w, 5, 2), cna(8 * w, 16 * w, 3, 2), head(16 * w))


@family(
    (6, 6),
    "A block's input channels are read by its three layers' norms and the one after the block (transition or final), "
    "each wanting another T = -c/a: one of four is free, three are left in each of two blocks, whatever the signs.",
    bench_shape=SMALL,
)
def densenet(w: int) -> nn.Module:
    """Huang et al. 2017 for CIFAR: a bare convolution as the stem, transitions with average pools."""

    def block(c: int) -> nn.Module:
        return DenseBlock([chain(*na(c + 4 * w * n), conv(c + 4 * w * n, 4 * w)) for n in range(3)], nested=True)

    transition = (*na(28 * w), conv(28 * w, 12 * w, 1), nn.AvgPool2d(2))
    return chain(conv(3, 16 * w), block(16 * w), *transition, block(12 * w), *na(24 * w), head(24 * w))


@family(
    (5, 5),
    "The first block's input comes from the stem's ReLU, T = 0, so all three norms on it (two layers, transition) "
    "are left; of the three on the second block's input one is free. Norms after the 1x1 convolutions disappear.",
)
def densenet_bc(w: int) -> nn.Module:
    """Huang et al. 2017 for ImageNet: bottleneck layers, the stem with norm, ReLU and max-pool."""

    def block(c: int) -> nn.Module:
        widths = [c + 4 * w * n for n in range(2)]
        layers = [chain(*na(i), conv(i, 16 * w, 1), *na(16 * w), conv(16 * w, 4 * w)) for i in widths]
        return DenseBlock(layers, nested=False)

    transition = (*na(24 * w), conv(24 * w, 12 * w, 1), nn.AvgPool2d(2))
    stem = (cna(3, 16 * w, 7, 2), nn.MaxPool2d(3, 2, 1))
    return chain(*stem, block(16 * w), *transition, block(12 * w), *na(20 * w), head(20 * w))


@family(
    (5, 5),
    "The stem's ReLU fixes T = 0 for the first block's two norms: 2. The first stage's dense channels are read by "
    "three norms (second block; branch and projection of the next stage), each with its own T: 2. The second stage's "
    "by two, the second block's and the final one: 1. Signs add nothing, the same affines carry them.",
)
def dpn(w: int) -> nn.Module:
    """Chen et al. 2017, dual path networks."""
    first = (DualPath(16 * w, 8 * w, 4 * w, 1, True), DualPath(20 * w, 8 * w, 4 * w, 1, False))
    second = (DualPath(24 * w, 16 * w, 4 * w, 2, True), DualPath(28 * w, 16 * w, 4 * w, 1, False))
    stem = (cna(3, 16 * w, 7, 2), nn.MaxPool2d(3, 2, 1))
    return chain(*stem, *first, *second, Join(), *na(32 * w), head(32 * w))


@family(
    (0, 3),
    "Convolution, max-pool, norm: with positive gammas S > 0 and the T pass the pool into the convolution. A "
    "negative gamma wants S < 0 where the max-pool wants S > 0: one affine in each of three groups. The rest follows "
    "convolutions.",
    bench_shape=(1, 3, 32, 32),
)
def airbench(w: int) -> nn.Module:
    """Jordan 2024 (after Page 2019): pool before the norm, GELU, logits divided by nine."""

    def group(i: int, o: int) -> nn.Module:
        first = (conv(i, o), nn.MaxPool2d(2), *na(o, nn.GELU))
        return chain(*first, *cna(o, o, act=nn.GELU))

    body = (group(24, 16 * w), group(16 * w, 16 * w), group(16 * w, 16 * w))
    end = (nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(16 * w, 10, bias=False), Times(1 / 9))
    return chain(nn.Conv2d(3, 24, 2), nn.GELU(), *body, *end)


@family(
    (2, 2),
    "Each C.ReLU reads one tensor under two affines and ReLUs, +a x + c and -b x + d: their T differ, so one of the "
    "two is left for each of the two layers, whatever the signs; the norm before goes into its convolution.",
)
def pvanet(w: int) -> nn.Module:
    """Kim et al. 2016: early layers compute one half of their features as the other's negatives."""
    body = (cn(3, 8 * w, 7, 2), BothSigns(8 * w), nn.MaxPool2d(3, 2, 1), cn(16 * w, 8 * w), BothSigns(8 * w))
    return chain(*body, cna(16 * w, 16 * w), head(16 * w))


@family(
    (1, 1),
    "One convolution's output is read by both tasks' norms under ReLU, whose T = -c/a differ: one affine. After it, "
    "each task calls the second convolution by itself, and the norm goes into a copy of the weights.",
)
def task_norms(w: int) -> nn.Module:
    """Bilen and Vedaldi 2017, universal representations, both tasks at once."""
    return TaskNorms(w)


# Multi-branch and efficient networks


def _inception_a(i: int, w: int) -> nn.Module:
    """Szegedy et al. 2016: the pool branch averages over counted zero padding."""
    c = 4 * w
    pool = chain(nn.AvgPool2d(3, 1, 1), cna(i, c, 1))
    return Cat(cna(i, c, 1), chain(cna(i, c, 1), cna(c, c, 5)), chain(cna(i, c, 1), cna(c, c), cna(c, c)), pool)


@family((0, 0), f"{OWN} Pools read what ReLUs made, concatenated.")
def inception_v1(w: int) -> nn.Module:
    """Szegedy et al. 2015 with norms (Ioffe and Szegedy 2015): max-pool branches."""
    c = 4 * w

    def block(i: int) -> nn.Module:
        pool = chain(nn.MaxPool2d(3, 1, 1, ceil_mode=True), cna(i, c, 1))
        return Cat(cna(i, c, 1), chain(cna(i, c, 1), cna(c, c)), chain(cna(i, c, 1), cna(c, c, 5)), pool)

    return chain(resnet_stem(w), block(8 * w), block(16 * w), nn.MaxPool2d(3, 2, 1), block(16 * w), head(16 * w))


@family((0, 0), f"{OWN} The average pools count padding but read what ReLUs made, T = 0.")
def inception_v3(w: int) -> nn.Module:
    """Szegedy et al. 2016: asymmetric convolutions, reduction by pool and stride, split ends."""
    c, d = 4 * w, 16 * w
    reduce = Cat(cna(d, c, 3, 2), chain(cna(d, c, 1), cna(c, c), cna(c, c, 3, 2)), nn.MaxPool2d(3, 2, 1))
    seven = chain(cna(24 * w, c, 1), cna(c, c, (1, 7)), cna(c, c, (7, 1)))
    asymmetric = Cat(cna(24 * w, c, 1), seven, chain(nn.AvgPool2d(3, 1, 1), cna(24 * w, c, 1)))
    split = chain(cna(12 * w, c, 1), Cat(cna(c, c, (1, 3)), cna(c, c, (3, 1))))
    end = Cat(cna(12 * w, c, 1), split, chain(nn.AvgPool2d(3, 1, 1), cna(12 * w, c, 1)))
    return chain(cna(3, 8 * w, 3, 2), _inception_a(8 * w, w), reduce, asymmetric, end, head(16 * w))


@family((0, 0), f"{OWN} The factor 0.17 follows a convolution too.")
def inception_resnet(w: int) -> nn.Module:
    """Szegedy et al. 2017: the branches' 1x1 has a bias, no norm, and a factor before the sum."""
    c, d = 4 * w, 16 * w

    def block(last: nn.Module) -> nn.Module:
        branches = Cat(cna(d, c, 1), chain(cna(d, c, 1), cna(c, c, (1, 7)), cna(c, c, (7, 1))))
        return chain(plus(branches, conv(8 * w, d, 1, bias=True), Times(0.17)), last)

    return chain(cna(3, 8 * w, 3, 2), _inception_a(8 * w, w), block(nn.ReLU()), block(nn.Identity()), head(d))


@family((0, 0), OWN)
def squeezenet(w: int) -> nn.Module:
    """Iandola et al. 2016 with norms: squeeze, two expansions concatenated, a convolution as classifier."""

    def fire(i: int, squeeze: int, expand: int) -> nn.Module:
        return chain(cna(i, squeeze, 1), Cat(cna(squeeze, expand, 1), cna(squeeze, expand)))

    body = (resnet_stem(w), fire(8 * w, 4 * w, 8 * w), nn.MaxPool2d(3, 2, ceil_mode=True), fire(16 * w, 4 * w, 16 * w))
    return chain(*body, nn.Dropout(), conv(32 * w, 10, 1, bias=True), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@family((0, 0), OWN)
def mobilenet_v1(w: int) -> nn.Module:
    """Howard et al. 2017: depthwise and pointwise, each with norm and ReLU."""
    body = (separable(8 * w, 16 * w), separable(16 * w, 16 * w, s=2), separable(16 * w, 32 * w, s=2))
    return chain(cna(3, 8 * w, 3, 2), *body, head(32 * w))


@family((0, 0), f"{OWN} ReLU6 wants S = 1, which the norm's output has.")
def mobilenet_v2(w: int) -> nn.Module:
    """Sandler et al. 2018: inverted residuals with linear ends, ReLU6."""
    act = nn.ReLU6
    body = (inverted(8 * w, 8 * w, 1, 1, act), inverted(8 * w, 12 * w, 2, 4, act), inverted(12 * w, 12 * w, 1, 4, act))
    return chain(cna(3, 8 * w, 3, 2, act=act), *body, cna(12 * w, 32 * w, 1, act=act), head(32 * w))


@family((0, 0), OWN)
def mobilenet_v3(w: int) -> nn.Module:
    """Howard et al. 2019: hardswish, gates with hardsigmoid, a linear layer with hardswish in the head."""

    def gate(c: int) -> nn.Module:
        return SqueezeExcite(c, gate=nn.Hardsigmoid)

    first = inverted(8 * w, 8 * w, 2, 2, nn.ReLU, attention=gate(16 * w))
    second = inverted(8 * w, 12 * w, 2, 3, nn.Hardswish, 5, gate(24 * w))
    third = inverted(12 * w, 12 * w, 1, 3, nn.Hardswish, 5, gate(36 * w))
    end = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32 * w, 32 * w), nn.Hardswish(), nn.Linear(32 * w, 10))
    stem, last = cna(3, 8 * w, 3, 2, act=nn.Hardswish), cna(12 * w, 32 * w, 1, act=nn.Hardswish)
    return chain(stem, first, second, third, last, *end)


@family((0, 0), OWN)
def efficientnet(w: int) -> nn.Module:
    """Tan and Le 2019: inverted residuals with SiLU and gates."""

    def block(i: int, o: int, s: int, t: int, k: int) -> nn.Module:
        return inverted(i * w, o * w, s, t, nn.SiLU, k, SqueezeExcite(i * w * t, nn.SiLU))

    body = (block(8, 8, 1, 1, 3), block(8, 12, 2, 4, 3), block(12, 12, 1, 4, 5), block(12, 16, 2, 4, 5))
    stem, last = cna(3, 8 * w, 3, 2, act=nn.SiLU), cna(16 * w, 32 * w, 1, act=nn.SiLU)
    return chain(stem, *body, last, head(32 * w))


@family((0, 0), OWN)
def mnasnet(w: int) -> nn.Module:
    """Tan et al. 2019: a separable stem without a last ReLU, inverted residuals of two kernel sizes."""
    stem = (cna(3, 8 * w, 3, 2), cna(8 * w, 8 * w, 3, 1, 8 * w), cn(8 * w, 8 * w, 1))
    body = (inverted(8 * w, 12 * w, 2, 3, nn.ReLU, 3), inverted(12 * w, 12 * w, 1, 3, nn.ReLU, 5))
    return chain(*stem, *body, cna(12 * w, 32 * w, 1), head(32 * w))


@family((0, 0), f"{OWN} The average pool counts padding but reads a ReLU's tensor, T = 0; shuffles permute S and T.")
def shufflenet_v1(w: int) -> nn.Module:
    """Zhang et al. 2018: grouped 1x1 convolutions, a shuffle, a sum or a concatenation with an average pool."""

    def block(i: int, o: int, s: int) -> nn.Module:
        mid, end = o // 2, o - i if s == 2 else o
        body = chain(cna(i, mid, 1, g=2), Shuffle(2), cn(mid, mid, 3, s, mid), cn(mid, end, 1, g=2))
        return chain(Cat(nn.AvgPool2d(3, 2, 1), body) if s == 2 else plus(body), nn.ReLU())

    return chain(resnet_stem(w), stages(block, w, (8, 16, 2), (16, 16, 1), (16, 32, 2), (32, 32, 1)), head(32 * w))


@family((0, 0), f"{OWN} Split, concatenation and shuffle permute S and T of ReLUs' tensors.")
def shufflenet_v2(w: int) -> nn.Module:
    """Ma et al. 2018: one half of the channels passes by."""

    def block(i: int, o: int, s: int) -> nn.Module:
        half = o // 2
        begin = i if s == 2 else half
        right = (cna(begin, half, 1), cn(half, half, 3, s, half), cna(half, half, 1))
        if s == 2:
            return chain(Cat(chain(cn(i, i, 3, 2, i), cna(i, half, 1)), chain(*right)), Shuffle(2))
        return chain(Cat(Pick(0, half), chain(Pick(half, o), *right)), Shuffle(2))

    body = stages(block, w, (8, 16, 2), (16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1))
    return chain(cna(3, 8 * w, 3, 2), body, cna(32 * w, 32 * w, 1), head(32 * w))


def _ghost(i: int, o: int, act: Callable[..., nn.Module]) -> nn.Module:
    """Han et al. 2020: half of the features are cheap functions of the other half."""
    half = o // 2
    return chain(cna(i, half, 1, act=act), Cat(nn.Identity(), cna(half, half, 3, 1, half, act=act)))


@family((0, 0), OWN)
def ghostnet(w: int) -> nn.Module:
    """Han et al. 2020: bottlenecks of two ghost modules, the second linear."""

    def block(i: int, o: int, s: int, gate: bool) -> nn.Module:
        mid = 2 * i
        down = cn(mid, mid, 3, s, mid) if s == 2 else nn.Identity()
        attention = SqueezeExcite(mid, gate=nn.Hardsigmoid) if gate else nn.Identity()
        body = chain(_ghost(i, mid, nn.ReLU), down, attention, _ghost(mid, o, nn.Identity))
        short = nn.Identity() if i == o and s == 1 else chain(cn(i, i, 3, s, i), cn(i, o, 1))
        return Sum(body, short)

    body = (block(8 * w, 8 * w, 1, False), block(8 * w, 12 * w, 2, True), block(12 * w, 12 * w, 1, True))
    return chain(cna(3, 8 * w, 3, 2), *body, cna(12 * w, 32 * w, 1), head(32 * w))


@family(
    (0, 0),
    "Each block is one convolution: 3x3, 1x1 and the identity's norm read one input and are added. Merging takes "
    "away the 1x1 of each of four blocks; without it a negative gamma on the identity would leave an affine.",
    merged=4,
)
def repvgg(w: int) -> nn.Module:
    """Ding et al. 2021a: 3x3, 1x1 and identity, each with a norm, in training form."""

    def block(i: int, o: int, s: int) -> nn.Module:
        identity = (nn.BatchNorm2d(i),) if i == o and s == 1 else ()
        return chain(Sum(*identity, cn(i, o, 3, s), cn(i, o, 1, s)), nn.ReLU())

    return chain(block(3, 8 * w, 2), stages(block, w, (8, 16, 2), (16, 16, 1), (16, 16, 1)), head(16 * w))


@family(
    (0, 0),
    "Each block is one convolution. Merging takes away one of two equal branches in each of five blocks, and the 1x1 "
    "beside the 3x3 in the three that have one.",
    merged=8,
)
def mobileone(w: int) -> nn.Module:
    """Vasu et al. 2023a: identity norm, 1x1 scale branch and two equal branches, depthwise and pointwise in turn."""

    def block(i: int, o: int, k: int, s: int, g: int, gate: nn.Module | None = None) -> nn.Module:
        identity = (nn.BatchNorm2d(i),) if i == o and s == 1 else ()
        scale = (cn(i, o, 1, s, g),) if k > 1 else ()
        branches = Sum(*identity, *scale, cn(i, o, k, s, g), cn(i, o, k, s, g))
        return chain(branches, gate or nn.Identity(), nn.ReLU())

    c, d = 8 * w, 16 * w
    body = (block(c, c, 3, 2, c), block(c, d, 1, 1, 1), block(d, d, 3, 1, d, SqueezeExcite(d)), block(d, d, 1, 1, 1))
    return chain(block(3, c, 3, 2, 1), *body, head(d))


@family(
    (0, 0),
    "The depthwise mixer (3x3 with norm, 1x1, identity) is one convolution, and the norm after the sum goes into it; "
    "two mixers lose their 1x1. All other norms follow convolutions.",
    merged=2,
)
def repvit(w: int) -> nn.Module:
    """Wang et al. 2024: depthwise mixer with parallel branches, gate, then x + FFN of 1x1 convolutions."""

    def ffn(c: int) -> nn.Module:
        return plus(cna(c, 2 * c, 1, act=nn.GELU), cn(2 * c, c, 1))

    def block(i: int, o: int, s: int) -> nn.Module:
        if s == 2:
            return chain(cn(i, i, 3, 2, i), SqueezeExcite(i), cn(i, o, 1), ffn(o))
        mixer = Sum(cn(i, i, 3, 1, i), conv(i, i, 1, 1, i, bias=True), nn.Identity())
        return chain(mixer, nn.BatchNorm2d(i), SqueezeExcite(i), ffn(i))

    stem = (cna(3, 4 * w, 3, 2, act=nn.GELU), cn(4 * w, 8 * w, 3, 2))
    end = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(16 * w), nn.Linear(16 * w, 10))
    return chain(*stem, stages(block, w, (8, 8, 1), (8, 16, 2), (16, 16, 1)), *end)


@family(
    (0, 0),
    "A RepMixer is linear in x, so all of it is one depthwise convolution (two lose a 1x1); the patch embedding's "
    "7x7 and 3x3 are one too. The other norms and the layer scales follow convolutions.",
    merged=3,
)
def fastvit(w: int) -> nn.Module:
    """Vasu et al. 2023b: RepMixer, then a convolutional FFN with layer scale; large kernels between stages."""

    def block(c: int) -> nn.Module:
        ffn = (cn(c, c, 7, 1, c), conv(c, 2 * c, 1, bias=True), nn.GELU(), conv(2 * c, c, 1, bias=True))
        return chain(RepMixer(c), plus(*ffn, LayerScale(c)))

    c, d = 8 * w, 16 * w
    embed = chain(Sum(cn(c, d, 7, 2, c), cn(c, d, 3, 2, c)), nn.GELU(), cna(d, d, 1, act=nn.GELU))
    stem = (cna(3, c, 3, 2, act=nn.GELU), cna(c, c, 3, 2, c, act=nn.GELU))
    return chain(*stem, block(c), embed, block(d), head(d))


@family(
    (0, 0),
    "3x3, 1x3 and 3x1 of one input are added: one convolution once each has its norm in it; merging takes away two "
    "in each of three blocks.",
    merged=6,
)
def acnet(w: int) -> nn.Module:
    """Ding et al. 2019: asymmetric convolution blocks in training form."""

    def block(i: int, o: int, s: int) -> nn.Module:
        return chain(Sum(cn(i, o, 3, s), cn(i, o, (1, 3), s), cn(i, o, (3, 1), s)), nn.ReLU())

    return chain(block(3, 8 * w, 2), block(8 * w, 16 * w, 2), block(16 * w, 16 * w, 1), head(16 * w))


@family((0, 0), OWN)
def darknet(w: int) -> nn.Module:
    """Redmon and Farhadi 2018: 1x1 and 3x3 with LeakyReLU, added to x after the activation."""

    def stage(i: int, o: int) -> nn.Module:
        return chain(leaky(i, o, 3, 2), plus(leaky(o, o // 2, 1), leaky(o // 2, o)))

    return chain(leaky(3, 8 * w), stage(8 * w, 16 * w), stage(16 * w, 32 * w), head(32 * w))


@family((0, 0), OWN)
def cspnet(w: int) -> nn.Module:
    """Wang et al. 2020: half of the channels pass the blocks by and join before the transition."""

    def stage(i: int, o: int) -> nn.Module:
        half, blocks = o // 2, [plus(leaky(o // 2, o // 2, 1), leaky(o // 2, o // 2)) for _ in range(2)]
        through = chain(Pick(half, o), *blocks, leaky(half, half, 1))
        return chain(leaky(i, o, 3, 2), leaky(o, o, 1), Cat(Pick(0, half), through), leaky(o, o, 1))

    return chain(leaky(3, 8 * w), stage(8 * w, 16 * w), stage(16 * w, 32 * w), head(32 * w))


@family(
    (0, 0),
    "Norms follow their convolutions, or the concatenation of two convolutions that nobody else reads and that "
    "absorb a slice each.",
    bench_shape=(1, 3, 256, 256),
)
def yolo(w: int) -> nn.Module:
    """Jocher et al. 2020, YOLOv5's first release: CSP blocks in a two-way neck."""
    return YoloNeck(w)


@family((0, 0), f"{OWN} ReLUs come before the convolutions and read sums of norms' outputs, S = 1 and T = 0.")
def xception(w: int) -> nn.Module:
    """Chollet 2017: ReLU, separable convolution, norm; max-pool and a 1x1 with norm where the size halves."""

    def sep(i: int, o: int) -> nn.Module:
        return chain(nn.ReLU(), conv(i, i, 3, 1, i), cn(i, o, 1))

    c, d = 8 * w, 16 * w
    entry = Sum(chain(sep(c, d), sep(d, d), nn.MaxPool2d(3, 2, 1)), cn(c, d, 1, 2))
    exit_ = (conv(d, d, 3, 1, d), cna(d, 2 * d, 1))
    return chain(cna(3, c, 3, 2), cna(c, c), entry, plus(sep(d, d), sep(d, d), sep(d, d)), *exit_, head(2 * d))


@family(
    (2, 2),
    "GELU's tensor (S = 1, T = 0), a norm, then a padded depthwise convolution (T = 0) and the sum with the next "
    "norm's output: in each of two blocks one affine gives T = 0 and the S that the sum needs. Norms before 1x1 "
    "convolutions and the head leave nothing.",
)
def convmixer(w: int) -> nn.Module:
    """Trockman and Kolter 2023: GELU before the norm, depthwise convolutions with a sum, 1x1 convolutions."""
    c = 16 * w

    def gelu_norm(layer: nn.Module) -> nn.Module:
        return chain(layer, nn.GELU(), nn.BatchNorm2d(c))

    def block() -> nn.Module:
        depthwise = nn.Conv2d(c, c, 5, groups=c, padding="same")
        return chain(plus(gelu_norm(depthwise)), gelu_norm(nn.Conv2d(c, c, 1)))

    return chain(gelu_norm(nn.Conv2d(3, c, 4, 4)), block(), block(), head(c))


@family(
    (2, 2),
    "The mixer has no weights: norm, pool minus identity and layer scale multiply S by a * scale, where the sum with "
    "x wants it unchanged: one factor in each of two blocks, whatever the signs (T cancels). The FFN absorbs its "
    "norm and scale.",
)
def poolformer(w: int) -> nn.Module:
    """Yu et al. 2022 with batch norm: x + scale * mixer(norm(x)), x + scale * ffn(norm(x))."""

    def block(c: int) -> nn.Module:
        ffn = (conv(c, 2 * c, 1, bias=True), nn.GELU(), conv(2 * c, c, 1, bias=True))
        mixer = plus(nn.BatchNorm2d(c), PoolMixer(), LayerScale(c))
        return chain(mixer, plus(nn.BatchNorm2d(c), *ffn, LayerScale(c)))

    c, d = 8 * w, 16 * w
    stem, embed = conv(3, c, 7, 4, bias=True), conv(c, d, 3, 2, bias=True)
    return chain(stem, block(c), embed, block(d), nn.BatchNorm2d(d), head(d))


@family(
    (0, 0),
    "The first stage's norms are read by 1x1 convolutions or follow their own. x + depthwise(x) is one convolution "
    "with T = 0 at both ends; the last stage has LayerNorm.",
)
def coatnet(w: int) -> nn.Module:
    """Dai et al. 2021 with the position encoding of Chu et al. 2023: x + depthwise(x), norm-first MBConv, attention."""

    def block(i: int, o: int, s: int) -> nn.Module:
        mid = 2 * i
        wide = (cna(i, mid, 1, act=nn.GELU), cna(mid, mid, 3, s, mid, act=nn.GELU), SqueezeExcite(mid, nn.SiLU))
        body = chain(nn.BatchNorm2d(i), *wide, conv(mid, o, 1, bias=True))
        short = nn.Identity() if i == o else chain(nn.MaxPool2d(2), conv(i, o, 1, bias=True))
        return chain(plus(conv(i, i, 3, 1, i, bias=True)), Sum(body, short))

    c, d = 8 * w, 16 * w
    stem = (cna(3, c, 3, 2, act=nn.GELU), conv(c, c, bias=True))
    tokens = (ToTokens(), TransformerLayer(d, nn.LayerNorm, pre=True), nn.LayerNorm(d), MeanTokens(), nn.Linear(d, 10))
    return chain(*stem, block(c, c, 1), block(c, d, 2), plus(conv(d, d, 3, 1, d, bias=True)), *tokens)


@family(
    (0, 0),
    f"{OWN} Flattened tokens change no channel, the factor on the queries follows their linear layer, and the head's "
    "norm is read by one.",
)
def levit(w: int) -> nn.Module:
    """Graham et al. 2021: convolutions to tokens, linear layers with norms, hardswish, a subsampling attention."""

    def ffn(c: int) -> nn.Module:
        return plus(LinearNorm(c, 2 * c), nn.Hardswish(), LinearNorm(2 * c, c))

    c, d = 8 * w, 16 * w
    stem = (cna(3, c, 3, 2, act=nn.Hardswish), cna(c, c, 3, 2, act=nn.Hardswish), cn(c, c, 3, 2), ToTokens())
    body = (plus(LevitAttention(c, c)), ffn(c), LevitAttention(c, d, 2), ffn(d), plus(LevitAttention(d, d)))
    return chain(*stem, *body, MeanTokens(), nn.BatchNorm1d(d), nn.Linear(d, 10))


@family(
    (0, 0),
    "Between two norms everything that reads or adds to the stream is linear, so each norm only multiplies its S "
    "(any sign) and moves its T, up to the mean and the classifier.",
    shape=(1, 12),
    bench_shape=(1, 128),
    tokens=True,
)
def bn_transformer(w: int) -> nn.Module:
    """Shen et al. 2020, Zerveas et al. 2021: the post-norm transformer with batch norm over (N, C, L)."""
    c = 16 * w
    layers = [TransformerLayer(c, TokenNorm, pre=False) for _ in range(2)]
    return chain(Embedding(c), *layers, MeanTokens(), nn.Linear(c, 5))


@family(
    (0, 0),
    "The norms before attention and FFN are read by linear layers, those inside the FFN follow one, the last is read "
    "by the classifier; the stream stays as it is.",
    bench_shape=(1, 3, 64, 64),
)
def vit_bn(w: int) -> nn.Module:
    """Dosovitskiy et al. 2021 with the norms of Yao et al. 2021: batch norm before each branch and inside the FFN."""
    c = 16 * w
    layers = [TransformerLayer(c, TokenNorm, pre=True, inner=True) for _ in range(2)]
    return chain(
        nn.Conv2d(3, c, 4, 4), ToTokens(), ClassToken(c), *layers, TokenNorm(c), FirstToken(), nn.Linear(c, 10)
    )


# Dense prediction


@family((0, 0), OWN, bench_shape=(1, 3, 128, 128))
def hrnet(w: int) -> nn.Module:
    """Sun et al. 2019."""
    return HighResolution(w)


def _hourglass_block(i: int, o: int) -> nn.Module:
    mid = o // 2
    body = (
        *na(i),
        conv(i, mid, 1, bias=True),
        *na(mid),
        conv(mid, mid, bias=True),
        *na(mid),
        conv(mid, o, 1, bias=True),
    )
    return Sum(chain(*body), nn.Identity() if i == o else conv(i, o, 1, bias=True))


def _hourglass(c: int, depth: int) -> nn.Module:
    """Newell et al. 2016: a residual at full size beside pool, residuals and upsampling."""
    inner = _hourglass_block(c, c) if depth == 1 else _hourglass(c, depth - 1)
    low = chain(nn.MaxPool2d(2), _hourglass_block(c, c), inner, _hourglass_block(c, c), up())
    return Sum(_hourglass_block(c, c), low)


@family(
    (3, 10),
    "Positive: the first residual's norm reads the stem's ReLU (T = 0): 1; at each of two depths the norm beside and "
    "the norm below the max-pool read one tensor with different T: 2. Mixed: sums, pools and upsampling tie the rest "
    "to one S, which max-pools hold positive against the signs of nine norms under ReLU: 9, which also carry those "
    "two T, and 1.",
    bench_shape=(1, 3, 128, 128),
)
def hourglass(w: int) -> nn.Module:
    """Newell et al. 2016: one hourglass of depth two with pre-activation residuals, heatmaps out."""
    c = 16 * w
    stem = (cna(3, 8 * w, 7, 2, bias=True), _hourglass_block(8 * w, c), nn.MaxPool2d(2), _hourglass_block(c, c))
    end = (_hourglass_block(c, c), cna(c, c, 1, bias=True), nn.Conv2d(c, 5, 1))
    return chain(*stem, _hourglass(c, 2), *end)


@family(
    (0, 0),
    f"{OWN} That holds for transposed convolutions, also in groups.",
    bench_shape=(1, 3, 128, 128),
    bench_width=4,
)
def unet(w: int) -> nn.Module:
    """Ronneberger et al. 2015: transposed convolutions with norms, one with ReLU, one in groups and without."""
    a, b, c = 8 * w, 16 * w, 32 * w
    down = [
        chain(cna(3, a), cna(a, a)),
        chain(nn.MaxPool2d(2), cna(a, b), cna(b, b)),
        chain(nn.MaxPool2d(2), cna(b, c)),
    ]
    first = chain(nn.ConvTranspose2d(c, b, 2, 2, bias=False), nn.BatchNorm2d(b), nn.ReLU())
    second = chain(nn.ConvTranspose2d(b, a, 4, 2, 1, groups=2, bias=False), nn.BatchNorm2d(a))
    return UNet((a, b, c), down, [first, second])


@family(
    (2, 2),
    "Each of two skip tensors is read by two norms under ReLU, the next unit's and, concatenated, the decoder's, "
    "with different T: one each. Shortcuts are 1x1 convolutions of the raw tensor and absorb anything.",
    bench_shape=(1, 3, 128, 128),
    bench_width=4,
)
def resunet(w: int) -> nn.Module:
    """Zhang et al. 2018b: U-Net of pre-activation residual units."""
    return ResUNet(w)


@family((0, 0), OWN)
def fpn(w: int) -> nn.Module:
    """Lin et al. 2017 with norms, as in Detectron2, on a residual backbone."""
    return Pyramid(w)


@family((0, 0), OWN)
def deeplab(w: int) -> nn.Module:
    """Chen et al. 2017b, DeepLabv3."""
    return DeepLab(w)


@family((0, 0), f"{OWN} The long sum adds to a PReLU's tensor.", bench_shape=SMALL)
def srresnet(w: int) -> nn.Module:
    """Ledig et al. 2017: residual blocks with PReLU inside, a long sum, pixel shuffle."""
    c = 8 * w
    blocks = [plus(cna(c, c, act=nn.PReLU), cn(c, c)) for _ in range(2)]
    rise = (conv(c, 4 * c, bias=True), nn.PixelShuffle(2), nn.PReLU())
    return chain(conv(3, c, 9, bias=True), nn.PReLU(), plus(*blocks, cn(c, c)), *rise, conv(c, 3, 9, bias=True))


# Generators, vectors, sequences, points, video


@family(
    (0, 0),
    f"{OWN} The first norm's channels are blocks of 16 outputs of a linear layer; reshaping keeps them apart.",
    shape=(1, 16),
    bench_shape=(1, 16),
)
def dcgan(w: int) -> nn.Module:
    """Radford et al. 2016: linear, reshape, norm, transposed convolutions, tanh."""

    def rise(i: int, o: int) -> nn.Module:
        return chain(nn.ConvTranspose2d(i, o, 4, 2, 1, bias=False), *na(o))

    c, d = 16 * w, 8 * w
    start = (nn.Linear(16, 16 * c, bias=False), nn.Unflatten(1, (c, 4, 4)), *na(c))
    return chain(*start, rise(c, d), rise(d, d), nn.ConvTranspose2d(d, 3, 4, 2, 1), nn.Tanh())


@family(
    (0, 0),
    "Two streams, each read by one norm under ReLU and, raw, by a 1x1 convolution after upsampling, which absorbs "
    "the S and T that the norm wants; the linear layer or the two convolutions that make the stream set them.",
    shape=(1, 16),
    bench_shape=(1, 16),
)
def sngan(w: int) -> nn.Module:
    """Miyato et al. 2018: the generator's residual blocks, norm and ReLU first, upsampling in both paths."""

    def block(i: int, o: int) -> nn.Module:
        return Sum(
            chain(*na(i), up(), conv(i, o, bias=True), *na(o), conv(o, o, bias=True)), chain(up(), conv(i, o, 1))
        )

    c, d = 16 * w, 8 * w
    start = (nn.Linear(16, 16 * c), nn.Unflatten(1, (c, 4, 4)))
    return chain(*start, block(c, c), *na(c), conv(c, d, bias=True), nn.ReLU(), conv(d, 3, bias=True), nn.Tanh())


@family(
    (0, 0),
    f"{OWN} The decoder's first norm follows a linear layer and a reshape, and gives the transposed convolution T = 0.",
    bench_shape=(1, 3, 32, 32),
)
def autoencoder(w: int) -> nn.Module:
    """Hinton and Salakhutdinov 2006 as it is written today: strides down, a code with a norm, transposed up."""
    c, d = 8 * w, 16 * w
    encode = (cna(3, c, 3, 2), cna(c, d, 3, 2), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * d, c, bias=False))
    code = (nn.BatchNorm1d(c), nn.Linear(c, 16 * d, bias=False), nn.Unflatten(1, (d, 4, 4)), nn.BatchNorm2d(d))
    rise = (
        nn.ConvTranspose2d(d, c, 4, 2, 1, bias=False),
        *na(c),
        nn.ConvTranspose2d(c, c, 4, 2, 1, bias=False),
        *na(c),
    )
    return chain(*encode, *code, *rise, nn.ConvTranspose2d(c, 3, 4, 2, 1), nn.Sigmoid())


@family(
    (0, 0),
    f"{OWN} A shared convolution is called once for each norm, and every call gets weights of its own.",
    shape=(1, 6, 32, 32),
    bench_shape=(1, 6, 224, 224),
)
def siamese(w: int) -> nn.Module:
    """Bromley et al. 1993, Chang et al. 2019: shared weights, norms per domain."""
    return Siamese(w)


@family(
    (0, 0),
    "The norm on the input and the one after ReLU are read by linear layers, which absorb any S and T; the others "
    "follow one.",
    shape=(1, 12),
    bench_shape=(1, 12),
)
def mlp(w: int) -> nn.Module:
    """Ioffe and Szegedy 2015 on vectors: a norm on the input, and norms before and after ReLU."""
    c = 16 * w
    after = (nn.Linear(c, c), nn.ReLU(), nn.BatchNorm1d(c))
    return chain(nn.BatchNorm1d(12), lna(12, c), *after, lna(c, c, nn.ReLU), nn.Linear(c, 3))


@family(
    (0, 0),
    "The blocks' norms are read by linear layers, any S and T; only the final norm, under ReLU, chooses the stream's "
    "sign and last T.",
    shape=(1, 12),
    bench_shape=(1, 12),
)
def tabular_resnet(w: int) -> nn.Module:
    """Gorishniy et al. 2021: x + linear(relu(linear(norm(x)))), a norm and ReLU before the last layer."""
    c = 16 * w
    blocks = [plus(nn.BatchNorm1d(c), nn.Linear(c, 2 * c), nn.ReLU(), nn.Linear(2 * c, c)) for _ in range(2)]
    return chain(nn.Linear(12, c), *blocks, nn.BatchNorm1d(c), nn.ReLU(), nn.Linear(c, 3))


@family(
    (0, 0),
    "After ReLU and max-pool the norm is read, through an average and flattening, by a linear layer: each of its "
    "inputs takes S and T of its channel. The others follow their layers.",
)
def norm_flatten(w: int) -> nn.Module:
    """LeCun et al. 1998 with norms, one of them between pool and flattening."""
    c = 8 * w
    body = (
        cna(3, c, 5),
        nn.MaxPool2d(2),
        conv(c, 2 * c, 5, bias=True),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(2 * c),
    )
    return chain(*body, nn.AdaptiveAvgPool2d(4), nn.Flatten(), lna(32 * c, 4 * c), nn.Linear(4 * c, 10))


@family(
    (0, 0),
    f"{OWN} The maximum over points after a norm without ReLU then sees the norm's own output, S = 1; the identity is "
    "a bias of its linear layer.",
    shape=(1, 3, 40),
    bench_shape=(1, 3, 1024),
)
def pointnet(w: int) -> nn.Module:
    """Qi et al. 2017: the same layers for every point, a predicted rotation, a maximum."""
    return AlignedPoints(w)


@family(
    (0, 0),
    f"{OWN} A cut along time lies between, which changes no channel.",
    shape=(1, 4, 24),
    bench_shape=(1, 4, 256),
)
def tcn(w: int) -> nn.Module:
    """Bai et al. 2018 with norms: dilated causal convolutions, ReLU after the sum."""

    def layer(i: int, o: int, d: int) -> nn.Module:
        return chain(nn.Conv1d(i, o, 3, padding=2 * d, dilation=d), Chomp(2 * d), nn.BatchNorm1d(o), nn.ReLU())

    def block(i: int, o: int, d: int) -> nn.Module:
        body = chain(layer(i, o, d), nn.Dropout(), layer(o, o, d), nn.Dropout())
        return chain(Sum(body, nn.Identity() if i == o else nn.Conv1d(i, o, 1)), nn.ReLU())

    c = 16 * w
    return chain(block(4, c, 1), block(c, c, 2), block(c, c, 4), LastStep(), nn.Linear(c, 3))


@family(
    (0, 0),
    "The gates' norms follow their convolutions; the last reads a sum of 1x1 convolutions, each of which takes its "
    "S, and one its T.",
    shape=(1, 1, 24),
    bench_shape=(1, 1, 1024),
)
def wavenet(w: int) -> nn.Module:
    """Van den Oord et al. 2016 with norms under the gates and on the sum of skips."""
    return WaveNet(16 * w)


@family(
    (0, 0),
    f"{OWN} The halves of the feed-forward layers go into their linear layers.",
    shape=(1, 16, 12),
    bench_shape=(1, 200, 12),
)
def conformer(w: int) -> nn.Module:
    """Gulati et al. 2020: half a feed-forward, attention, gated pointwise and depthwise convolution with norm, half."""
    c = 16 * w

    def ffn() -> nn.Module:
        return plus(nn.LayerNorm(c), nn.Linear(c, 2 * c), nn.SiLU(), nn.Linear(2 * c, c), Times(0.5))

    depthwise = (nn.Conv1d(c, c, 7, padding=3, groups=c), nn.BatchNorm1d(c), nn.SiLU())
    module = Transposed(nn.Conv1d(c, 2 * c, 1), nn.GLU(1), *depthwise, nn.Conv1d(c, c, 1))
    body = (ffn(), plus(nn.LayerNorm(c), Attention(c)), plus(nn.LayerNorm(c), module), ffn(), nn.LayerNorm(c))
    return chain(nn.Linear(12, c), *body, nn.Linear(c, 5))


@family(
    (5, 5),
    "Convolution, ReLU, norm: in each of two blocks one affine before the split makes T = 0 for the padded "
    "convolutions (the first slice alone, the others after their sum) with the S of what is added, and one makes T = "
    "0 for the gate with the S of the sum. The attention's norm between ReLU and tanh is the fifth. Signs add "
    "nothing.",
    shape=(1, 20, 30),
    bench_shape=(1, 20, 200),
)
def ecapa(w: int) -> nn.Module:
    """Desplanques et al. 2020, ECAPA-TDNN."""
    return Speaker(w)


@family((0, 0), OWN, shape=(1, 3, 4, 16, 16), bench_shape=(1, 3, 8, 56, 56), bench_width=4)
def r2plus1d(w: int) -> nn.Module:
    """Tran et al. 2018: space and time apart, a norm and ReLU between, in residual blocks."""

    def factored(i: int, o: int, s: int = 1) -> tuple[nn.Module, ...]:
        space = nn.Conv3d(i, o, (1, 3, 3), (1, s, s), (0, 1, 1), bias=False)
        time = nn.Conv3d(o, o, (3, 1, 1), (s, 1, 1), (1, 0, 0), bias=False)
        return space, nn.BatchNorm3d(o), nn.ReLU(), time, nn.BatchNorm3d(o)

    def block(i: int, o: int, s: int) -> nn.Module:
        short = nn.Identity() if i == o else chain(nn.Conv3d(i, o, 1, s, bias=False), nn.BatchNorm3d(o))
        return chain(Sum(chain(*factored(i, o, s), nn.ReLU(), *factored(o, o)), short), nn.ReLU())

    body = stages(block, w, (8, 8, 1), (8, 16, 2))
    end = (nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(16 * w, 10))
    return chain(*factored(3, 8 * w, 2), nn.ReLU(), body, *end)
