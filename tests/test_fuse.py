"""Norms that compute the ReLU, or the addition and the ReLU, after them: where, where not, and the same numbers."""

from __future__ import annotations

import copy
import io
import pickle
from collections import Counter

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from fused_networks import FUSABLE, REFUSED, BasicBlock, Pair, ResNet, conv
from networks import NETWORKS
from torch import nn
from torch.utils.checkpoint import set_checkpoint_early_stop

from lowprec.calibration import calibrate, recompute_batch_stats
from lowprec.errors import UnsupportedError
from lowprec.export import fold
from lowprec.methods import convert
from lowprec.models import small_resnet
from lowprec.norm import L1BatchNorm2d, ScaleBatchNorm
from lowprec.norm.activation import AddReLU, PendingSum
from lowprec.precision import Precision
from lowprec.train import Trainer, parse_config

EVERY = {name: (make, images) for name, (make, *_) in FUSABLE.items() for images in [lambda: torch.randn(6, 1, 12, 12)]}
EVERY |= {f"network: {name}": (network.make, network.batch) for name, network in NETWORKS.items()}
over_everything = pytest.mark.parametrize("name", EVERY)
over_fusable = pytest.mark.parametrize("name", FUSABLE)
# Checkpoints without an input that needs gradients warn; that is about the test's input.
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
# The fused norm computes the same sums in another order: a few roundings of float64 (1e-16) each, carried through some
# ten layers and three steps, each of which can multiply an error by about 10; 1e-10 is far below what any wrong term
# would leave, 1e-12 what one pass leaves.
ONE_PASS, THREE_STEPS = 1e-12, 1e-10


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def both(model, method="l1", **options):
    """The network converted with and without fusing."""
    return convert(model, method, **options)[0], convert(model, method, fuse=False, **options)[0]


def fused_norms(model):
    return [module for module in model.modules() if isinstance(module, ScaleBatchNorm) and module.act is not None]


def sentences(report):
    return {row.name: row.reason for row in report.changed}


def assert_same(found, wanted, relative):
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        scale = max(float(value.detach().abs().max()), 1e-3)
        assert float((found[key] - value).detach().abs().max()) <= relative * scale, key


def train(model, batch, steps=3):
    """State and outputs after some steps.

    Checkpoints recompute whole: stopped early, the last norm of a region would or would not move its statistics again.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    outputs = {}
    for step in range(steps):
        optimizer.zero_grad()
        with set_checkpoint_early_stop(False):
            outputs[f"output {step}"] = result = model(batch)
        result.square().mean().backward()
        optimizer.step()
    return {key: value.detach().double() for key, value in {**outputs, **model.state_dict()}.items()}


def batch_of(name):
    batch = EVERY[name][1]()
    return batch.double() if batch.is_floating_point() else batch


@over_everything
@pytest.mark.parametrize("method", ["l1", "topk"])
def test_a_fused_network_trains_and_evaluates_like_one_that_is_not(name, method):
    fused, plain = both(EVERY[name][0]().double(), method)
    batch = batch_of(name)
    assert list(fused.state_dict()) == list(plain.state_dict())
    assert_same(train(fused, batch, 1), train(plain, batch, 1), ONE_PASS)
    assert_same(train(fused, batch), train(plain, batch), THREE_STEPS)
    plain.load_state_dict(fused.state_dict())
    assert_same({"y": fused.eval()(batch)}, {"y": plain.eval()(batch)}, ONE_PASS)
    fused.load_state_dict(convert(EVERY[name][0]().double(), method, fuse=False)[0].state_dict())


@over_fusable
def test_what_is_fused(name):
    make, norms, alone, summed = FUSABLE[name]
    fused, report = convert(make(), "l1")
    counts = Counter((norm.act is not None, norm.awaits_residual) for norm in fused.modules() if is_norm(norm))
    assert counts[True, False] == alone
    assert counts[True, True] == summed
    assert len(report.changed) == norms
    said = [reason for reason in sentences(report).values() if "it computes" in reason]
    assert len(said) == alone + summed
    assert sum("the addition and the ReLU" in reason for reason in said) == summed


def is_norm(module):
    return isinstance(module, ScaleBatchNorm)


def test_the_report_names_the_relu_and_the_relu_leaves_its_place_to_an_identity():
    fused, report = convert(ResNet(BasicBlock), "l1")
    said = sentences(report)
    assert said["bn1"].endswith("starts at 1; it computes the ReLU 'relu' after it")
    assert said["layer2.0.bn2"].endswith("; it computes the addition and the ReLU 'layer2.0.relu' after it")
    assert said["layer2.0.downsample.1"].endswith("the other side of the sum is a norm too, and that one computes it")
    assert not any(isinstance(module, nn.ReLU) for module in fused.modules())
    assert type(fused.layer1[0].relu) is nn.Identity
    assert type(fused.layer1[0].bn2.act) is AddReLU
    assert not report.refused


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_structure_forbids_stays_as_it_is_with_a_reason(name):
    make, reason = REFUSED[name]
    model = make().double()
    converted, report = convert(model, "l1")
    assert any(reason in text for path, text in sentences(report).items() if "bn1" in path)
    assert all(norm.awaits_residual for norm in fused_norms(converted))  # the other norm of a block may be fused
    assert converted.bn1.act is None
    plain, _ = convert(model, "l1", fuse=False)
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        for mode in (True, False):
            torch.testing.assert_close(converted.train(mode)(x), plain.train(mode)(x), rtol=0, atol=ONE_PASS)


def test_hooks_and_patches_are_left_alone():
    for change, where in (
        (lambda model: model.bn1.register_forward_hook(lambda *_: None), "bn1"),
        (lambda model: model.bn1.register_full_backward_hook(lambda *_: None), "bn1"),
        (lambda model: model.relu.register_forward_pre_hook(lambda *_: None), "bn1"),
        (lambda model: setattr(model.relu, "forward", torch.sigmoid), "bn1"),
    ):
        model = BasicBlock(3, 3, 1)
        change(model)
        converted, report = convert(model, "l1")
        assert "hook" in sentences(report)[where]
        assert converted.bn1.act is None
        assert type(converted.relu) is nn.ReLU


def test_a_forward_replaced_on_the_object_is_not_read():
    model = BasicBlock(3, 3, 1)
    model.forward = torch.sigmoid
    converted, report = convert(model, "l1")
    assert not fused_norms(converted)
    assert "its forward was replaced on the object" in sentences(report)["bn1"]


def test_a_hooked_block_is_fused_inside_and_its_hook_does_not_run():
    model, calls = ResNet(BasicBlock), []
    model.layer1[0].register_forward_hook(lambda *_: calls.append(1))
    converted, _ = convert(model, "l1")
    assert converted.layer1[0].bn2.awaits_residual
    assert not calls


def test_reading_the_network_leaves_nothing_behind():
    class Counting(BasicBlock):
        def __init__(self):
            super().__init__(3, 3, 1)
            self.register_buffer("calls", torch.zeros(()))
            self.last = None

        def forward(self, x):
            self.calls += 1
            self.last = super().forward(x)
            return self.last + torch.rand(()).item()

    model = Counting()
    model.bn1.eval()
    state = torch.get_rng_state()
    converted, _ = convert(model, "l1")
    assert converted.bn2.awaits_residual
    assert converted.calls == 0
    assert converted.last is None
    assert torch.equal(torch.get_rng_state(), state)
    assert [converted.bn1.training, converted.bn1.act.training, converted.bn2.act.training] == [False, False, True]


class Sketchy(nn.Module):
    """A forward that no tracer follows, around a Sequential that holds another."""

    def __init__(self, relu):
        super().__init__()
        self.layers = nn.Sequential(conv(1, 3), nn.BatchNorm2d(3), relu, Odd(), nn.BatchNorm2d(3), nn.ReLU())
        self.relu = relu

    def forward(self, x):
        return self.relu(self.layers(x) - 0.1)


class Odd(nn.Module):
    def forward(self, x):
        return x if float(x.detach().sum()) > 0 else -x


def test_a_sequential_is_fused_also_where_nothing_can_be_traced_and_slot_by_slot():
    model = Sketchy(nn.ReLU(inplace=True)).double()
    fused, plain = both(model)
    assert [type(layer).__name__ for layer in fused.layers] == [
        "Conv2d", "L1BatchNorm2d", "Identity", "Odd", "L1BatchNorm2d", "Identity"
    ]  # fmt: skip
    assert type(fused.relu) is nn.ReLU
    x = torch.randn(4, 1, 6, 6, dtype=torch.float64)
    assert_same(train(fused, x), train(plain, x), THREE_STEPS)


def test_an_empty_sequential_that_is_not_called_is_passed_over():
    block = BasicBlock(3, 3, 1)
    block.branch1 = nn.Sequential()  # as torchvision's ShuffleNetV2 has it
    fused, _ = convert(block, "l1")
    assert not any(isinstance(module, nn.ReLU) for module in fused.modules())


def test_a_sequential_whose_children_are_tapped_is_not_fused():
    class Tapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(conv(1, 3), nn.BatchNorm2d(3), nn.ReLU())

        def forward(self, x):
            taps = []
            for layer in self.layers:
                x = layer(x)
                taps.append(x)
            return taps[1] + taps[2]

    converted, report = convert(Tapped(), "l1")
    assert not fused_norms(converted)
    assert "used 2 times" in sentences(report)["layers.1"]


def test_no_kernel_no_fusing():
    model = nn.Sequential(conv(1, 3), nn.SyncBatchNorm(3), nn.ReLU())
    converted, report = convert(model, "l1")
    assert "joined statistics have no kernel" in sentences(report)["1"]
    narrow, _ = convert(ResNet(BasicBlock), "l1", stats_dtype="float16")
    half, _ = convert(ResNet(BasicBlock), "l2_half")
    assert not any(map(fused_norms, (converted, narrow, half)))


WAYS = {
    "x + y": lambda x, y: x + y,
    "y + x": lambda x, y: y + x,
    "x.add(y)": lambda x, y: x.add(y),
    "y.add(x)": lambda x, y: y.add(x),
    "y.add_(x)": lambda x, y: y.add_(x),
    "torch.add(x, y)": lambda x, y: torch.add(x, y),
}


@pytest.mark.parametrize("write", WAYS.values(), ids=WAYS)
def test_every_way_to_write_the_sum(write):
    class Sum(Pair):
        def forward(self, x):
            y = self.bn1(self.a(x))
            return self.relu(write(x, y))

    fused, plain = both(Sum().double())
    assert fused.bn1.awaits_residual
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    assert_same(train(fused, x), train(plain, x), THREE_STEPS)
    assert_same({"y": fused.eval()(x)}, {"y": plain.eval()(x)}, THREE_STEPS)


def test_a_residual_of_another_type_or_shape_is_added_as_torch_does():
    norm = L1BatchNorm2d(3, relu=True)
    x = torch.randn(4, 3, 5, 5)
    with torch.no_grad():
        for residual in (torch.randn(4, 3, 5, 5, dtype=torch.float64), torch.randn(3, 1, 1)):
            plain = L1BatchNorm2d(3)(x)
            # A handful of float32 roundings (6e-8) of values up to 5, in another order.
            torch.testing.assert_close(norm(x, residual), (plain + residual).relu(), rtol=0, atol=3e-6)


def test_a_pending_sum_can_only_be_added_to():
    norm = L1BatchNorm2d(3, relu=True)
    norm.awaits_residual = True
    pending = norm(torch.randn(4, 3, 5, 5))
    assert isinstance(pending, PendingSum)
    for misuse in (torch.sigmoid, lambda y: y.shape, lambda y: y + 1, lambda y: y.relu()):
        with pytest.raises(UnsupportedError, match=r"output of L1BatchNorm2d was .*; convert with fuse=False"):
            misuse(pending)


def test_copies_and_pickles_are_fused_too():
    model, _ = convert(ResNet(BasicBlock).double(), "l1")
    x = torch.randn(4, 1, 12, 12, dtype=torch.float64)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    twins = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stored, weights_only=False))
    wanted = model(x), model.eval()(x)
    for twin in twins:
        assert len(fused_norms(twin)) == 9
        assert torch.equal(twin(x), wanted[0])
        assert torch.equal(twin.eval()(x), wanted[1])


@pytest.mark.parametrize("training", [True, False])
def test_compiled_in_one_graph(training):
    model = convert(ResNet(BasicBlock).double(), "l1")[0].train(training)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 1, 12, 12, dtype=torch.float64)
    results = [network(x) for network in (model, compiled)]
    for result in results:
        result.square().mean().backward()
    gradients = [{name: param.grad for name, param in net.named_parameters()} for net in (model, compiled._orig_mod)]
    assert_same({"y": results[1], **gradients[1]}, {"y": results[0], **gradients[0]}, ONE_PASS)
    torch._dynamo.reset()


@pytest.mark.parametrize("strict", [True, False])
def test_exported_and_folded_as_before(strict):
    model = ResNet(BasicBlock).double()
    x = torch.randn(4, 1, 12, 12, dtype=torch.float64)
    fused, plain = both(model)
    folded = {}
    for network in (fused, plain):
        train(network, x, 1)
        exported = torch.export.export(network.eval(), (x,), strict=strict)
        torch.testing.assert_close(exported.module()(x), network(x))
        folded[network] = fold(network, (x,))
    (fused_net, fused_report), (plain_net, plain_report) = folded[fused], folded[plain]
    assert sentences(fused_report) == sentences(plain_report)
    assert fused_report.facts["norms_folded"] == 10
    assert_same({"y": fused_net(x)}, {"y": plain_net(x)}, ONE_PASS)


def test_a_norm_that_uses_each_batch_stays_foldable_and_its_relu_with_it():
    """Without running statistics a norm runs the fused operator also in evaluation, which no exporter knows."""
    model = nn.Sequential(conv(1, 3), nn.BatchNorm2d(3, track_running_stats=False), nn.ReLU(), conv(3, 2)).double()
    x = torch.randn(4, 1, 6, 6, dtype=torch.float64)
    fused, plain = (fold(network.eval(), (x,)) for network in both(model))
    assert [row.name for row in fused[1].refused] == [row.name for row in plain[1].refused] == ["1"]
    assert fused[1].facts["norms_left"] == 1
    assert_same({"y": fused[0](x)}, {"y": plain[0](x)}, ONE_PASS)


def test_calibration_and_exact_statistics():
    fused, plain = both(ResNet(BasicBlock).double())
    batches = [torch.randn(4, 1, 12, 12, dtype=torch.float64) for _ in range(2)]
    (fused, report), (plain, other) = (recompute_batch_stats(model, batches) for model in (fused, plain))
    assert {row.name for row in report.changed} == {row.name for row in other.changed}
    assert_same(fused.state_dict(), plain.state_dict(), ONE_PASS)
    outputs, wanted = calibrate(fused, batches).outputs, calibrate(plain, batches).outputs
    assert outputs["layer1.0.relu"].keys() == wanted["layer1.0.relu"].keys()
    for path in ("(model)", "layer1.0.conv2", "layer1.0", "layer2.1"):
        assert outputs[path]["max"] == pytest.approx(wanted[path]["max"], rel=ONE_PASS), path
    assert outputs["layer1.0.bn2.act"]["max"] == outputs["layer1.0"]["max"]


def test_mimic_norm_reads_a_fused_network_like_any_other():
    fused, plain = both(small_resnet(width=8).double())
    networks, reports = zip(*(convert(model, "mimic_norm", init=False) for model in (fused, plain)), strict=True)
    kept = [[(row.name, row.reason) for row in report.changed if "became" not in row.reason] for report in reports]
    assert kept[0] == kept[1]
    assert [row.name for row in reports[0].changed] == [row.name for row in reports[1].changed]
    x = torch.randn(6, 1, 8, 8, dtype=torch.float64)
    assert_same(train(networks[0], x), train(networks[1], x), THREE_STEPS)


def test_mimic_norm_does_not_look_through_the_relu_of_a_norm():
    class LateSum(Pair):
        def setup(self):
            self.head = nn.Linear(3, 2)

        def forward(self, x):
            return self.head((self.relu(self.bn1(self.a(x))) + x).mean((2, 3)))

    fused, plain = both(LateSum())
    assert fused.bn1.act is not None
    rows = [[row.name for row in convert(model, "mimic_norm")[1].refused] for model in (fused, plain)]
    assert rows[0] == rows[1]


def test_mimic_norm_does_not_take_a_fused_norm_for_one_on_the_logits():
    model = nn.Sequential(conv(1, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 3), nn.BatchNorm1d(3), nn.ReLU())
    for network in both(model):
        with pytest.raises(UnsupportedError, match="the network ends in"):
            convert(network, "mimic_norm")


# torch loads its own decompositions through a function that it has deprecated.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_forward_mode_differentiation_through_the_residual_alone():
    norm = L1BatchNorm2d(3, relu=True).double()
    x, residual, tangent = torch.randn(3, 4, 3, 5, 5, dtype=torch.float64)
    with fwAD.dual_level():
        found = fwAD.unpack_dual(norm(x, fwAD.make_dual(residual, tangent)))
    # The derivative of relu(norm(x) + residual) is the tangent where the sum is positive.
    assert torch.equal(found.tangent, tangent * (found.primal > 0))


MODES = ["fp32", "fp16-autocast", "fp16-master"]


@pytest.mark.parametrize("mode", MODES)
def test_under_precision(mode):
    """Held statistics move once; values are at least as near the truth as without fusing, which rounds once more."""
    model = ResNet(BasicBlock)
    x = torch.randn(8, 1, 12, 12)
    truth = convert(model, "l1", fuse=False)[0].double()(x.double())
    errors = []
    for network in both(model):
        precision = Precision(mode)
        network, _ = precision.prepare(network, torch.optim.SGD(network.parameters(), lr=0.1))
        before = copy.deepcopy(network.state_dict())
        with precision.forward():
            y = network(x)
        assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items() if "running" in key)
        assert precision.step(y.square().mean())
        assert {int(norm.num_batches_tracked) for norm in network.modules() if is_norm(norm)} == {1}
        assert not torch.equal(network.layer1[0].bn2.running_scale, before["layer1.0.bn2.running_scale"])
        errors.append(float((y.detach().double() - truth.detach()).square().mean().sqrt()))
    # The output is 24 numbers of a random error each: the two differ by chance, by less than a factor of 2.
    assert errors[0] <= 2 * errors[1]


def test_an_overflow_leaves_statistics_and_is_traced_to_its_layer():
    network, _ = convert(ResNet(BasicBlock), "l1")
    precision = Precision("fp16-master")
    network, _ = precision.prepare(network, torch.optim.SGD(network.parameters(), lr=0.1))
    before = copy.deepcopy(network.state_dict())
    for _ in range(2):  # forward outputs are watched in the step after an overflow
        with precision.forward():
            loss = network(torch.full((4, 1, 12, 12), float("inf"))).square().mean()
        assert not precision.step(loss)
    assert "input" in precision.last_overflow
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_the_trainer_trains_a_fused_network():
    small = ["model.args.width=4", "model.args.blocks=2", "data.batch_size=128", "run.device=cpu", "run.epochs=1"]
    results = [
        Trainer(parse_config("", [*small, "method.name=l1", f"method.args.fuse={fuse}", "optim.lr=0.1"])).fit()
        for fuse in ("true", "false")
    ]
    assert [len(fused_norms(result.model)) for result in results] == [5, 0]
    assert [result.skipped for result in results] == [0, 0]
    # The same run but for roundings to half (5e-4) of the sums, which a few steps carry into the third digit.
    assert results[0].losses[0] == pytest.approx(results[1].losses[0], rel=1e-2)
