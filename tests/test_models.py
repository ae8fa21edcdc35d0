"""The networks that configs name: what they are, and that everything else here works on them."""

from __future__ import annotations

import copy
import hashlib
import math
import tomllib
from collections import Counter

import numpy as np
import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from lowprec import Trainer, models
from lowprec.errors import ConfigError
from lowprec.export import export
from lowprec.methods import convert
from lowprec.models import mlp, small_resnet, transformer
from lowprec.norm import NORMS, L1BatchNorm1d, L1BatchNorm2d
from lowprec.precision import MODES, Precision
from lowprec.train import build_model, parse_config

IMAGE = {"classes": 3, "in_channels": 2}
# Arguments for images of 8x8, by what the name begins with.
TINY = {
    "cifar_resnet": {**IMAGE, "width": 0.25},
    "resnet": {**IMAGE, "width": 1 / 16, "small": True},
    "vgg": {**IMAGE, "width": 1 / 16, "small": True, "pools": 3},
    "mobilenet": {**IMAGE, "width": 0.1, "small": True},
    "shufflenet": {**IMAGE, "width": 1 / 16, "small": True},
    "small_resnet": {**IMAGE, "width": 4},
    "mlp": {"classes": 3, "inputs": 128, "hidden": [8, 8]},
    "transformer": {**IMAGE, "channels": 8, "heads": 2, "blocks": 1},
    "lstm": {**IMAGE, "hidden": 8},
}
NORMED = [name for name in models.__all__ if name not in ("transformer", "lstm")]
# One of each kind of block, and what torch's own batch norm is not in.
KINDS = ["resnet18", "resnet50", "cifar_resnet20", "vgg11", "mobilenet_v2", "shufflenet_v2", "transformer", "lstm"]
CONVOLUTIONAL = KINDS[:-2]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def tiny(name, **options):
    kind = next(kind for kind in TINY if name.startswith(kind))
    return getattr(models, name)(**TINY[kind], **options)


def images(batch=6):
    return torch.randn(batch, 2, 8, 8)


def on_meta(name, **options):
    with torch.device("meta"):
        return getattr(models, name)(**options)


def count(model):
    return sum(param.numel() for param in model.parameters())


# Parameters, and the first half of the SHA-256 of "key shape" lines of the state_dict, of torchvision 0.29.1's network.
TORCHVISION = {
    ("resnet18",): (11_689_512, "84fb10d9c6905a1c"),
    ("resnet34",): (21_797_672, "28f9096d51307499"),
    ("resnet50",): (25_557_032, "d7e4f8bb0a536344"),
    ("resnet101",): (44_549_160, "02c0f34f4842751f"),
    ("mobilenet_v2",): (3_504_872, "37bbbce8932fd0c4"),
    ("shufflenet_v2", 0.5): (1_366_792, "f0a5936e646f1bd4"),
    ("shufflenet_v2",): (2_278_604, "81b349bc1cbbbc7a"),
    ("shufflenet_v2", 1.5): (3_503_624, "506b4de341bf52b3"),
    ("shufflenet_v2", 2.0): (7_393_996, "0c033bd0cd72af37"),
    ("vgg11",): (132_868_840, "8b6717e727c0ecf9"),
    ("vgg13",): (133_053_736, "f6b0597d18a7e4d2"),
    ("vgg16",): (138_365_992, "347371586a8ea365"),
    ("vgg19",): (143_678_248, "fc3ff6fab2b5cc09"),
}


def fingerprint(model):
    lines = [f"{key} {tuple(value.shape)}" for key, value in model.state_dict().items()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


@pytest.mark.parametrize(("name", "width"), [(*key, 1.0)[:2] for key in TORCHVISION])
def test_torchvisions_checkpoints_fit(name, width):
    model = on_meta(name, width=width)
    known = TORCHVISION[(name,) if width == 1 else (name, width)]
    assert (count(model), fingerprint(model)) == known


def test_without_norms_the_layers_before_them_have_biases():
    model = on_meta("vgg16", norm=None)
    assert (count(model), fingerprint(model)) == (138_357_544, "35c4623e0cd4a39d")  # torchvision's vgg16
    for name in NORMED:
        layers = [module for module in tiny(name, norm="none").modules() if isinstance(module, nn.Conv2d | nn.Linear)]
        assert all(layer.bias is not None for layer in layers)


def waves(*shape):
    return torch.arange(math.prod(shape), dtype=torch.float64).sin().reshape(shape)


def filled(model):
    """In evaluation mode and float64, with numbers that any library can make; those of a signal of size one."""
    for key, value in model.double().state_dict().items():
        if value.dim() > 1:
            value.copy_(waves(*value.shape) * (4 / value[0].numel()) ** 0.5)
        elif value.is_floating_point():
            value.copy_(waves(*value.shape) / 4 + (not key.endswith(("bias", "running_mean"))))
    return model.eval()


# The first logits of torchvision 0.29.1's network, filled so, for an image of 64x64 waves.
LOGITS = {
    "resnet18": [1.6241659800288577, -1.407372486759268, 1.828393340546192],
    "resnet50": [8.31816641313234, 8.114033366321735, 6.921923164360106],
    "mobilenet_v2": [0.018059340340699948, 0.20620149957631917, 0.21091231176708627],
    "shufflenet_v2": [0.06174285162649287, 0.2690334045884334, 0.281429005226168],
}


@pytest.mark.parametrize("name", LOGITS)
def test_it_computes_what_torchvisions_does(name):
    with torch.no_grad():
        found = filled(getattr(models, name)())(waves(1, 3, 64, 64))[0, :3]
    # Sums of at most 4608 products may come in another order: 4608 * 1.1e-16 in each of at most 54 layers is 3e-11 of
    # what they add up, which is of size one to ten, as the logits are.
    torch.testing.assert_close(found, torch.tensor(LOGITS[name], dtype=torch.float64), rtol=0, atol=3e-10)


def test_vgg_halves_the_image_after_each_stage():
    sizes = [layer.kernel_size for layer in on_meta("vgg13").features if isinstance(layer, nn.MaxPool2d)]
    assert sizes == [2] * 5
    model = on_meta("vgg13", width=1 / 16)
    last = [nn.Linear, nn.ReLU, nn.Dropout, nn.Linear, nn.ReLU, nn.Dropout, nn.Linear]
    assert [*map(type, model.classifier)] == last
    assert model.features(torch.empty(1, 3, 64, 64, device="meta")).shape == (1, 32, 2, 2)
    assert model(torch.empty(1, 3, 64, 64, device="meta")).shape == (1, 1000)


@pytest.mark.parametrize(("depth", "millions"), [(20, "0.27"), (32, "0.46"), (44, "0.66"), (56, "0.85"), (110, "1.7")])
def test_cifar_resnets_are_as_large_as_table_6_says(depth, millions):
    padded, projected = (on_meta(f"cifar_resnet{depth}", shortcut=shortcut) for shortcut in "AB")
    assert f"{count(padded) / 1e6:.2g}" == millions
    layers = [module for module in padded.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(layers) == depth
    # Two 1x1 convolutions, from 16 to 32 and from 32 to 64 channels, with norms.
    assert count(projected) - count(padded) == 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64


def test_a_padded_shortcut_takes_every_other_pixel_and_adds_zeros_on_both_sides():
    block = tiny("cifar_resnet20", shortcut="A").layer2[0]
    x = torch.randn(1, 4, 5, 5)
    y = block.downsample(x)
    assert y.shape == (1, 8, 3, 3)
    assert torch.equal(y[:, 2:6, 1, 2], x[:, :, 2, 4])
    assert not y[:, :2].any()
    assert not y[:, 6:].any()


CHOICES = [
    ("batch", "relu", {nn.BatchNorm1d, nn.BatchNorm2d}, nn.ReLU),
    ("l1", "silu", {L1BatchNorm1d, L1BatchNorm2d}, nn.SiLU),
    (lambda channels: nn.GroupNorm(1, channels), nn.Tanh, {nn.GroupNorm}, nn.Tanh),
    (None, "gelu", {nn.Identity}, nn.GELU),
]


@pytest.mark.parametrize("choice", CHOICES, ids=["batch", "l1", "group", "none"])
@pytest.mark.parametrize("name", NORMED)
def test_every_network_takes_norms_and_activations(name, choice):
    norm, act, norm_classes, act_class = choice
    usual = Counter(map(type, tiny(name, act="mish").modules()))
    model = tiny(name, norm=norm, act=act)
    found = Counter(map(type, model.modules()))
    norms, acts = usual[nn.BatchNorm1d] + usual[nn.BatchNorm2d], usual[nn.Mish]
    identities = usual[nn.Identity]
    wanted = identities + norms if norm is None else norms
    if name.startswith("vgg") and norm is None:  # torchvision's has nothing where the norms would be
        wanted = identities
    assert min(norms, acts) > 0
    assert sum(found[kind] for kind in norm_classes) == wanted
    assert found[act_class] == acts
    trains(model)


@pytest.mark.parametrize("name", ["transformer", "lstm"])
def test_those_without_batch_norm_train(name):
    trains(tiny(name))
    assert tiny("transformer", norm="none", act=nn.Tanh)(images()).isfinite().all()


def trains(model):
    """Logits, and a gradient for every parameter."""
    logits = model(images())
    assert logits.shape == (6, 3)
    F.cross_entropy(logits, torch.arange(6) % 3).backward()
    for name, param in model.named_parameters():
        assert param.grad is not None, name
        assert param.grad.isfinite().all(), name


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, *NORMS])
def test_small_resnet_takes_a_class_or_a_name(norm):
    model = small_resnet(norm=norm, width=4, blocks=2, classes=3, in_channels=2)
    assert model(images()).shape == (6, 3)
    wanted = norm if isinstance(norm, type) else NORMS[norm].classes[2]
    assert sum(type(module) is wanted for module in model.modules()) == 6
    assert not [name for name, _ in model.named_parameters() if name.endswith("conv1.bias")]


def test_the_first_networks_keep_their_keys_and_weights():
    small, perceptron = small_resnet(width=2, blocks=2), mlp(hidden=[3])
    assert [key for key, _ in small.named_parameters()] == [
        "stem.weight", "norm.weight", "norm.bias",
        *(f"blocks.0.{key}" for key in ("conv1.weight", "norm1.weight", "norm1.bias")),
        *(f"blocks.0.{key}" for key in ("conv2.weight", "norm2.weight", "norm2.bias")),
        *(f"blocks.1.{key}" for key in ("conv1.weight", "norm1.weight", "norm1.bias")),
        *(f"blocks.1.{key}" for key in ("conv2.weight", "norm2.weight", "norm2.bias")),
        *(f"blocks.1.shortcut.{key}" for key in ("0.weight", "1.weight", "1.bias")),
        "classifier.weight", "classifier.bias",
    ]  # fmt: skip
    assert [key for key, _ in perceptron.named_parameters()] == ["1.weight", "2.weight", "2.bias", "4.weight", "4.bias"]
    torch.manual_seed(5)
    stem = small_resnet(width=2, blocks=2).stem.weight
    torch.manual_seed(5)
    assert torch.equal(stem, nn.Conv2d(1, 2, 3, bias=False).weight)  # as torch draws it, and nothing drawn before


def assert_drawn(layer, deviation):
    """Within four standard errors, each 1 / sqrt(2 n) of the deviation of n normal numbers; biases zero."""
    found = float(layer.weight.detach().square().mean().sqrt())
    assert abs(found / deviation - 1) <= 4 / (2 * layer.weight.numel()) ** 0.5
    assert not layer.bias.any()


@pytest.mark.parametrize("name", ["resnet18", "cifar_resnet20", "vgg11", "mobilenet_v2"])
def test_first_weights_are_torchvisions(name):
    model = tiny(name, norm="none")
    for layer in (module for module in model.modules() if isinstance(module, nn.Conv2d)):
        assert_drawn(layer, (2 / (layer.out_channels * math.prod(layer.kernel_size))) ** 0.5)
    if name in ("vgg11", "mobilenet_v2"):
        assert_drawn([module for module in model.modules() if isinstance(module, nn.Linear)][-1], 0.01)


def test_a_transformer_starts_with_xaviers_weights():
    for layer in (module for module in transformer().modules() if isinstance(module, nn.Linear)):
        bound = (6 / (layer.in_features + layer.out_features)) ** 0.5
        assert 0.95 * bound < float(layer.weight.detach().abs().max()) <= bound
        assert not layer.bias.any()


def test_a_transformers_block_is_torchs_encoder_layer():
    reference = nn.TransformerEncoderLayer(8, 2, 32, 0.0, "gelu", batch_first=True, norm_first=True).double()
    block = transformer(channels=8, heads=2, blocks=1).blocks[0].double()
    for param in reference.parameters():
        nn.init.normal_(param, 0, 0.5)
    names = {"self_attn.in_proj_": "attention.qkv.", "self_attn.out_proj": "attention.proj"}
    names |= {"linear1": "mlp.0", "linear2": "mlp.2"}
    state = {}
    for key, value in reference.state_dict().items():
        theirs = next((name for name in names if key.startswith(name)), "")
        state[names.get(theirs, "") + key.removeprefix(theirs)] = value
    block.load_state_dict(state)
    x = torch.randn(3, 5, 8).double()
    # Two formulas in float64 whose longest sum has 32 products of numbers of at most ten: 100 * 32 * 1.1e-16 a layer,
    # and the norms pass on what is before them times their reciprocal deviation, which is about one.
    torch.testing.assert_close(block(x), reference(x), rtol=0, atol=4 * 100 * 32 * 2**-53)


def test_a_transformer_knows_where_a_patch_is_and_an_lstm_ends_with_the_last_row():
    given = images().double()
    model = tiny("transformer").double()
    nn.init.normal_(model.position)
    assert not torch.allclose(model(given), model(given.flip(2)))
    reader = tiny("lstm").double()
    rows = torch.cat([given[:, 0], given[:, 1]], 2)
    _, (last, _) = reader.lstm(rows)
    assert torch.equal(reader(given), reader.classifier(last[0]))


def test_small_forms_keep_the_pixels_of_small_images_and_width_scales_every_layer():
    for name in ("resnet18", "mobilenet_v2", "shufflenet_v2", "vgg11"):
        model = tiny(name)
        first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
        assert first(images()).shape[2:] == (8, 8)
        assert model[: [*dict(model.named_children())].index("avgpool")](images()).shape[2:] == (1, 1)
        assert first.out_channels == {"resnet18": 4, "mobilenet_v2": 8, "shufflenet_v2": 2, "vgg11": 4}[name]
    convs = {
        width: [m for m in on_meta("resnet50", width=width).modules() if isinstance(m, nn.Conv2d)] for width in (1, 0.5)
    }
    assert [conv.out_channels for conv in convs[1]] == [2 * conv.out_channels for conv in convs[0.5]]
    # 90 % of 9.6 is more than 8, the multiple of 8 below; the last layer's 1280 never shrink.
    assert [layer[0].out_channels for layer in (tiny("mobilenet_v2").features[i] for i in (0, 18))] == [8, 1280]
    assert tiny("mobilenet_v2").features[11].conv[1][0].out_channels == 48
    assert tiny("mobilenet_v2").features[11].conv[2].out_channels == 16


@pytest.mark.parametrize("name", models.__all__)
def test_all_are_traceable(name):
    model, x = tiny(name).eval(), images(3)
    with torch.no_grad():
        assert torch.equal(fx.symbolic_trace(model)(x), model(x))


@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_methods_for_batch_norm_reach_every_norm(name):
    model = tiny(name)
    norms = [path for path, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    layers = [path for path, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    for method in ("l1", "kalman"):
        converted, report = convert(model, method)
        assert [row.name for row in report.changed] == norms
        assert not report.refused
        trains(converted)
    converted, report = convert(model, "bnp")
    assert not report.refused
    assert {row.name for row in report.changed} == {*norms, *layers}
    trains(converted)


@pytest.mark.parametrize(("name", "residual"), [*zip(CONVOLUTIONAL, (8, 16, 9, 0, 12, 0), strict=True)])
def test_mimic_norm_scales_every_branch_and_normalises_the_logits(name, residual):
    # Of MobileNetV2's 17 blocks, 10 add their input; at this width two more have as many channels before as after.
    model = tiny(name)
    converted, report = convert(model, "mimic_norm")
    (left,) = (module for module in converted.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm))
    assert left.num_features == 3
    assert sum("residual branch" in row.reason for row in report.changed) == residual
    assert all("is not centred" in row.reason for row in report.refused)
    trains(converted)


@pytest.mark.parametrize(("name", "refused"), [("transformer", ["(model)"]), ("lstm", [])])
def test_bounded_weight_norm_takes_the_place_of_batch_norm(name, refused):
    model = tiny(name)
    converted, report = convert(model, "bounded_weight_norm", skip=["classifier"])
    matrices = [path for path, param in model.named_parameters() if param.dim() > 1 and "classifier" not in path]
    assert len(report.changed) + len(refused) == len(matrices)  # the learned positions are no layer's rows
    assert [row.name for row in report.refused] == [*refused, "classifier"]
    trains(converted)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", KINDS)
def test_they_train_in_every_mode(name, mode):
    model = tiny(name)
    precision = Precision(mode, init_scale=1.0)
    precision.prepare(model, torch.optim.SGD(model.parameters(), lr=0.01))
    with precision.forward():
        loss = F.cross_entropy(model(images()).float(), torch.arange(6) % 3)
    before = copy.deepcopy(model.state_dict())
    assert precision.step(loss)
    assert any(not torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", KINDS[2:])  # cifar_resnet20 stands for the ResNets: seconds each
def test_they_are_exported_in_both_precisions_and_hold(name, tmp_path):
    model = tiny(name)
    if name in ("transformer", "lstm"):
        model, _ = convert(model, "bounded_weight_norm")
    with torch.no_grad():
        for _ in range(3):
            model(images(16))  # running statistics of their own
    bundle = export(model.eval(), (images(4),), tmp_path / "bundle", precision=("fp32", "fp16"))
    assert bundle.parity.verdict == "pass", [stage.name for stage in bundle.parity.stages if stage.verdict == "fail"]


CONFIG = """
[model]
factory = "lowprec.models:{}"
args = {{ {} }}
[precision]
init_scale = 1.0
[data]
source = "d.npz"
batch_size = 16
[run]
epochs = 1
device = "cpu"
"""


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("mobilenet_v2", 'width = 0.1, classes = 3, in_channels = 2, small = true, norm = "l1", act = "relu"'),
        ("vgg11", "width = 0.05, classes = 3, in_channels = 2, small = true, pools = 3"),
        ("transformer", "channels = 8, heads = 2, classes = 3, in_channels = 2, norm = 'layer'"),
        ("lstm", "hidden = 8, classes = 3, in_channels = 2"),
    ],
)
def test_a_config_names_them(name, args, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("d.npz", x=images(40).numpy(), labels=np.arange(40) % 3)
    text = CONFIG.format(name, args)
    assert tomllib.loads(text)["model"]["args"]["classes"] == 3
    assert np.isfinite(Trainer(parse_config(text)).fit().losses).all()


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match=r"no norm is called 'L1'; choose one of batch, l1, .*none"):
        small_resnet("L1")
    with pytest.raises(ConfigError, match=r"no activation is called 'leaky_relu'.*did you mean 'leakyrelu'\?"):
        tiny("resnet18", act="leaky_relu")
    with pytest.raises(ConfigError, match=r"no norm is called 'l1'; choose one of layer, none"):
        transformer("l1")
    with pytest.raises(ConfigError, match="no shortcut is called 'C'"):
        tiny("cifar_resnet20", shortcut="C")
    with pytest.raises(ConfigError, match="size 8 is not a multiple of patch 3"):
        transformer(patch=3)
    with pytest.raises(ConfigError, match="channels 64 is not a multiple of heads 5"):
        transformer(heads=5)
    with pytest.raises(ConfigError, match=r"resnet18.*'wide'"):
        build_model("lowprec.models:resnet18", {"wide": 2})
