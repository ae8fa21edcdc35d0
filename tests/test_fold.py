"""Folding as a whole: every rule and every refusal through the same properties, and the module that comes out."""

import copy
import io
import math
import pathlib
import re
import subprocess
import sys

import fold_cases
import numpy as np
import pytest
import reference_fold as reference
import torch
import torch.nn.functional as F
from fold_cases import FOLD_CASES, Case, Lambda, make, randomise
from mutations import MUTATIONS
from torch import nn

from lowprec.affine import ChannelAffine
from lowprec.errors import FoldError, UnsupportedError
from lowprec.export.folding import RULES, FoldedModule, fold, fold_traced, trace
from lowprec.export.folding.graph import Affine
from lowprec.export.folding.rules.affine_after_linear import AFFINE_AFTER_LINEAR
from lowprec.export.folding.rules.rule import LocalRule
from lowprec.export.folding.traced.apply import fold_with_rules
from lowprec.norm import NORMS, inference_affine

EVERY_CASE = [
    pytest.param(rule, case, id=f"{rule}:{name}") for rule, cases in FOLD_CASES.items() for name, case in cases.items()
]
# Networks of at most 200 products per output element and 5 layers: n * u * condition, with a wide margin for the
# condition of random weights, and still seven orders below any mistake in a fold.
FLOAT64 = 200 * 5 * 2.0**-53 * 10
FLOAT32 = FLOAT64 * 2.0**29


def outputs_of(result):
    return list(result) if isinstance(result, tuple) else [result]


def worst(expected, found):
    """Largest relative difference, against each output's own rms; non-finite values must be in the same places."""
    errors = []
    for a, b in zip(outputs_of(expected), outputs_of(found), strict=True):
        a, b = a.detach().double(), b.double()
        finite = a.isfinite()
        assert torch.equal(finite, b.isfinite())
        if finite.any():
            errors.append(float((a - b)[finite].abs().max() / a[finite].square().mean().sqrt()))
    return max(errors, default=0.0)


def has_row(rows, name, words):
    return any(row.name == name and re.search(words, row.reason) for row in rows)


def test_every_rule_has_cases():
    assert list(FOLD_CASES) == list(RULES)
    assert all(cases for cases in FOLD_CASES.values())


def test_every_planted_defect_has_its_place():
    """`python -m tests.benchmarks.mutate_folding` plants them; text that has moved would be planted nowhere."""
    folder = pathlib.Path(__file__).parents[1] / "export" / "folding"
    for mutation in MUTATIONS:
        assert (folder / mutation.file).read_text().count(mutation.old) == 1, mutation
        assert mutation.new != mutation.old


@pytest.mark.parametrize(("rule", "case"), EVERY_CASE)
def test_contract_of_rules(rule: str, case: Case):
    network = make(case)
    before = copy.deepcopy(network.state_dict())
    flags = {name: module.training for name, module in network.named_modules()}
    random_state = torch.get_rng_state()

    traced = trace(network, (torch.randn(case.shape, generator=torch.Generator().manual_seed(1)),))
    folded, report = fold_traced(traced)

    # The rows are there, and the rule named is the one that makes them: what a local rule folds, gauges fold too.
    others = [other for name, other in RULES.items() if name not in (rule, "channel-gauges")]
    _, without = fold_with_rules(traced, others)
    for name, words in case.changed:
        assert has_row(report.changed, name, words), report
        assert not has_row(without.changed, name, words)
    for name, words in case.refused:
        assert has_row(report.refused, name, words), report
    assert len(report.refused) == len(case.refused), report
    assert len({(row.name, row.reason) for row in report.changed}) == len(report.changed), report
    assert report.facts["norms_left"] == case.norms_left
    assert report.facts["norms_found"] == report.facts["norms_folded"] + case.norms_left
    assert report.facts["float64_error"] <= FLOAT64

    # The argument is as it was.
    assert {name: module.training for name, module in network.named_modules()} == flags
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)

    # The same function: the truth in float64, the folded one in float32, at a batch size that was not traced. The
    # network itself goes last, since calling it moves the statistics of norms in training mode.
    x = torch.randn(5, *case.shape[1:], generator=torch.Generator().manual_seed(2))
    found, truth = folded(x), traced.module(x)
    assert all(value.dtype == torch.float32 for value in outputs_of(found))
    expected = copy.deepcopy(network).double()(x.double())
    assert worst(expected, truth) <= FLOAT64
    assert worst(expected, found) <= FLOAT32


# These keep an activation or a pad beside the convolution.
MORE_THAN_ONE = ("subclass", "in-place-after", "conv2d-circular")
ONE_LAYER = [
    name
    for name, case in FOLD_CASES["affine-after-linear"].items()
    if case.changed == fold_cases.INTO_0 and name not in MORE_THAN_ONE
]


@pytest.mark.parametrize("name", ONE_LAYER)
def test_layer_and_norm_become_one_operation(name):
    case = FOLD_CASES["affine-after-linear"][name]
    folded, _ = fold(make(case), (torch.randn(case.shape),))
    assert len([node for node in folded.network.graph.nodes if node.op == "call_function"]) == 1


@pytest.mark.parametrize("family", NORMS)
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_every_norm_folds_to_what_its_inference_affine_says(family, axes):
    norm = NORMS[family].classes[axes]
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[axes]
    torch.manual_seed(0)
    network = randomise(nn.Sequential(conv(2, 3, 1, bias=False), norm(3)).eval())
    folded, report = fold(network, (torch.randn(1, 2, *[3] * axes),))

    affine = inference_affine(network[1])
    assert affine is not None
    assert report.facts["norms_folded"] == 1
    weight = network[0].weight.detach().double().numpy().reshape(3, 2) * affine.scale[:, None]
    # One rounding to float32 of constants computed in float64.
    state = folded.network.state_dict()
    np.testing.assert_array_equal(state["0.weight"].numpy().reshape(3, 2), weight.astype(np.float32))
    np.testing.assert_array_equal(state["0.bias"].numpy(), affine.shift.astype(np.float32))


def test_batch_norm_is_read_as_it_is_defined():
    torch.manual_seed(0)
    network = randomise(nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3, eps=0.1)).eval().double())
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    folded, _ = fold(network, (x,))
    conv, norm = ({name: value.detach().numpy() for name, value in layer.state_dict().items()} for layer in network)
    y = reference.conv(x.numpy(), conv["weight"], conv["bias"], stride=1, padding=1, dilation=1, groups=1)
    expected = reference.batch_norm(y, norm["running_mean"], norm["running_var"], norm["weight"], norm["bias"], eps=0.1)
    assert folded(x).dtype == torch.float64
    assert worst(torch.from_numpy(expected), folded(x)) <= FLOAT64


def test_shared_weights_get_constants_of_their_own():
    folded, _ = fold(make(FOLD_CASES["affine-after-linear"]["shared-conv"]), (torch.randn(1, 4, 7, 6),))
    names = set(folded.network.state_dict())
    assert names == {f"c.{leaf}{suffix}" for leaf in ("weight", "bias") for suffix in ("", "_1", "_2")}


def test_parametrisations_are_baked():
    class Centred(nn.Module):
        def forward(self, weight):
            return weight - weight.mean((1, 2, 3), keepdim=True)

    network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))
    nn.utils.parametrize.register_parametrization(network[0], "weight", Centred())
    nn.utils.parametrizations.weight_norm(network[3])
    randomise(network.eval())
    x = torch.randn(3, 2, 4, 4)
    folded, report = fold(network, (x,))
    assert sorted(folded.network.state_dict()) == ["0.bias", "0.weight", "3.bias", "3.weight"]
    assert has_row(report.changed, "0", r"computed once in float64 \(mean, sub\)")
    assert has_row(report.changed, "3", "computed once in float64")
    assert worst(network.double()(x.double()), folded(x)) <= FLOAT32


def test_a_wrong_rule_is_caught_by_the_float64_check():
    def wrong(graph, match):
        match.node.op = Affine(-match.affine.scale, match.affine.shift)
        return AFFINE_AFTER_LINEAR.apply(graph, match)

    rule = LocalRule("wrong", "", AFFINE_AFTER_LINEAR.find, AFFINE_AFTER_LINEAR.check, wrong)
    traced = trace(make(FOLD_CASES["affine-after-linear"]["conv2d-padded"]), (torch.randn(1, 4, 7, 6),))
    with pytest.raises(FoldError, match="internal: the folded network differs"):
        fold_with_rules(traced, [rule])


@torch.library.custom_op("lowprec_tests::squash", mutates_args=())
def squash(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + x.abs())


@squash.register_fake
def _(x):
    return torch.empty_like(x)


def test_custom_operators_stay_in_their_place():
    layers = {
        "c": nn.Conv2d(4, 3, 3),
        "b": nn.BatchNorm2d(3),
        "n": nn.BatchNorm2d(3),
        "d": nn.Conv2d(3, 2, 3, padding=1),
    }
    network = randomise(Lambda(lambda m, x: m.d(m.n(squash(m.b(m.c(x))))), **layers).eval())
    folded, report = fold(network, (torch.randn(2, 4, 7, 6),))
    assert has_row(report.changed, "b", "folded into 'c'")
    assert has_row(report.refused, "n", "its shift would have to pass 'd'")
    assert torch.ops.lowprec_tests.squash.default in {node.target for node in folded.network.graph.nodes}
    x = torch.randn(3, 4, 7, 6)
    assert worst(network.double()(x.double()), folded(x)) <= FLOAT32


def test_an_output_of_nothing_but_rounding_is_no_defect():
    """All samples are equal, so what is left of them is noise, and folding gives other noise."""

    def forward(m, x):
        y = m.n(F.avg_pool2d(m.c(F.gelu(x) * 0 + 1), 2))
        return y - y.mean(0)

    network = randomise(Lambda(forward, c=nn.Conv2d(4, 3, 3), n=nn.BatchNorm2d(3)).eval())
    _, report = fold(network, (torch.randn(3, 4, 7, 6),))
    assert report.facts["norms_left"] == 0


def test_report_has_its_figures():
    network = make(FOLD_CASES["affine-after-linear"]["conv2d-padded"])
    with torch.no_grad():
        network[1].weight[:] = torch.tensor([1e7, 1e-7, 1.0])
        network[1].bias[:] = torch.tensor([0.0, 1e-6, 0.0])
    _, report = fold(network, (torch.randn(1, 4, 7, 6),))
    assert math.isfinite(report.facts["float32_error_ratio"])
    losses = report.facts["fp16_range"]
    assert losses["0.weight"]["overflow"] > 0
    assert losses["0.weight"]["subnormal"] + losses["0.weight"]["vanished"] > 0
    assert losses["0.bias"]["overflow"] == 1
    report.to_dict()


class TestFoldedModule:
    @pytest.fixture
    def network(self):
        torch.manual_seed(0)
        return randomise(nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten()).eval())

    @pytest.fixture
    def folded(self, network):
        return fold(network, (torch.randn(1, 1, 5, 5),))[0]

    @pytest.mark.parametrize("batch", [1, 2, 7])
    def test_takes_any_batch_size(self, network, folded, batch):
        x = torch.randn(batch, 1, 5, 5)
        assert worst(network(x), folded(x)) <= FLOAT32

    def test_eval_changes_nothing_and_train_raises(self, folded):
        assert folded.eval() is folded
        assert folded.train(False) is folded
        assert not any(module.training for module in folded.modules())
        with pytest.raises(UnsupportedError, match="cannot be put in training mode"):
            folded.train()

    def test_copies_and_saves(self, folded):
        x = torch.randn(4, 1, 5, 5)
        buffer = io.BytesIO()
        torch.save(folded, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        assert isinstance(loaded, FoldedModule)
        for other in (copy.deepcopy(folded), loaded):
            assert torch.equal(other(x), folded(x))
            assert other.state_dict().keys() == folded.state_dict().keys()
            assert other.input_names == folded.input_names

    def test_weights_are_its_own_and_need_no_gradient(self, network, folded):
        x = torch.randn(2, 1, 5, 5)
        before = folded(x)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.zero_()
        assert torch.equal(folded(x), before)
        assert not any(parameter.requires_grad for parameter in folded.parameters())
        assert list(folded.network.state_dict()) == ["0.weight", "0.bias"]

    def test_casts_floating_inputs(self, folded):
        x = torch.randn(2, 1, 5, 5).half()
        assert torch.equal(folded(x), folded(x.double()))

    def test_refuses_another_structure(self, folded):
        with pytest.raises(UnsupportedError, match="called as it was traced"):
            folded(torch.zeros(1, 1, 5, 5), torch.zeros(1))


def test_structured_inputs_and_outputs():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.linear, self.norm = nn.Embedding(9, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, ids, extra, normalise=True):
            h = self.linear(self.embed(ids).mean(1) * extra["scale"])
            return {"out": self.norm(h) if normalise else h, "ids": (ids + 1,)}

    network = randomise(Network().eval())
    folded, report = fold(network, (torch.zeros(1, 3, dtype=torch.long), {"scale": torch.ones(1, 4)}, True))
    assert report.facts["norms_left"] == 0
    ids, extra = torch.randint(0, 9, (5, 3)), {"scale": torch.randn(5, 4)}
    expected, found = network(ids, extra, True), folded(ids, extra, True)
    assert worst(expected["out"], found["out"]) <= FLOAT32
    assert torch.equal(expected["ids"][0], found["ids"][0])
    assert folded.output_names == ("output_0", "output_1")
    with pytest.raises(UnsupportedError, match="was True when the network was traced"):
        folded(ids, extra, False)


def test_names_of_inputs_and_free_axes():
    class Two(nn.Module):
        def forward(self, input, other):
            return input.mean((2, 3)) + other

    traced = trace(
        Two().eval(),
        (torch.randn(1, 3, 4, 4), torch.randn(1, 3)),
        {"input": {0: torch.export.Dim("n"), 2: torch.export.Dim.AUTO}, "other": {0: torch.export.Dim("n")}},
    )
    assert traced.input_names == ("input", "other")
    assert traced.dynamic_shapes == ({0: "n", 2: "input_2"}, {0: "n"})
    assert traced.module(torch.randn(5, 3, 7, 4), torch.randn(5, 3)).shape == (5, 3)
    default = trace(Two().eval(), (torch.randn(1, 3, 4, 4), torch.randn(1, 3)))
    assert default.dynamic_shapes == ({0: "batch"}, {0: "batch"})
    assert [len(value) for value in default.example_inputs] == [2, 2]
    many = trace(Two().eval(), (torch.randn(100, 3, 4, 4), torch.randn(100, 3)))
    assert [len(value) for value in many.example_inputs] == [8, 8]


def test_values_of_half_and_double_networks_are_kept():
    torch.manual_seed(0)
    network = randomise(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).eval())
    x = torch.randn(2, 2, 5, 5)
    half, double = copy.deepcopy(network).half(), copy.deepcopy(network).double()
    double[0].weight.data += 1e-12
    assert worst(copy.deepcopy(half).double()(x.double()), trace(half, (x,)).module(x)) <= FLOAT64
    assert fold(half, (x,))[0].dtype == torch.float32
    assert worst(double(x.double()), trace(double, (x,)).module(x)) <= FLOAT64
    assert half[0].weight.dtype == torch.float16


def test_casts_in_the_network_become_float64():
    network = Lambda(lambda m, x: m.c(x.half().float()).to(torch.float16) * 0.1, c=nn.Conv2d(2, 3, 3)).eval()
    x = torch.randn(2, 2, 5, 5)
    truth = trace(network, (x,)).module
    weights = copy.deepcopy(network.c).double()
    assert worst(weights(x.double()) * 0.1, truth(x)) <= FLOAT64


def test_values_made_in_forward_are_float64():
    def forward(m, x):
        counts = torch.arange(4, device=x.device).float() / 3
        return x * torch.full((x.shape[0], 1), 0.1) * torch.linspace(0, 1, 4) + counts

    x = torch.randn(3, 4, dtype=torch.float64)
    expected = x * 0.1 * torch.linspace(0, 1, 4, dtype=torch.float64) + torch.arange(4, dtype=torch.float64) / 3
    network = Lambda(forward).eval()
    assert worst(expected, trace(network, (x.float(),)).module(x)) <= FLOAT64
    assert worst(expected, fold(network, (x.float(),))[0](x)) <= FLOAT32


class TestInPlace:
    def test_later_readers_see_the_new_value(self):
        def forward(m, x):
            h = x * 2
            before = h
            h += 1
            other_name = h.view(h.shape)
            other_name.mul_(x)
            product = h.view(h.shape[0], -1) * 3
            return before, h.relu_(), product

        network = Lambda(forward).eval()
        x = torch.randn(3, 4)
        assert worst(network(x.double()), trace(network, (x,)).module(x)) <= FLOAT64

    @pytest.mark.parametrize("write", [lambda h: h[:, 0].add_(1), lambda h: h[:, 0].fill_(3.0)])
    def test_part_of_a_tensor_that_is_read_again_is_refused(self, write):
        def forward(m, x):
            h = x * 2
            write(h)
            return h

        with pytest.raises(FoldError, match="overwrites part of a tensor in place"):
            trace(Lambda(forward).eval(), (torch.randn(3, 4),))

    def test_a_buffer_that_changes_the_result_is_refused(self):
        class Counter(nn.Module):
            def __init__(self):
                super().__init__()
                self.register_buffer("count", torch.zeros(()))

            def forward(self, x):
                self.count += 1
                return x * self.count

        with pytest.raises(FoldError, match=r"'inner' changes the buffer 'inner.count' as the network runs"):
            trace(Lambda(lambda m, x: m.inner(x), inner=Counter()).eval(), (torch.randn(3, 4),))


class DataDependent(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Random(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


class Autocast(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.linear(x)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (DataDependent(), r"'inner' \(DataDependent\) cannot be traced: its control flow depends on the values"),
        (Random(), r"'inner' draws random numbers \(randn_like\)"),
        (Autocast(), "'inner.linear' runs under torch.autocast"),
        (nn.Linear(3, 3), r"'inner' \(Linear\) cannot be traced: .*[34]"),
        (Lambda(lambda m, x: x.view(2, -1)), r"fixes the axis 'batch' to 2"),
        (nn.Dropout(0.5).train(), "'inner' applies a dropout in training mode"),
    ],
)
def test_networks_that_cannot_be_traced_are_refused_in_one_line(module, words, capfd):
    network = Lambda(lambda m, x: m.inner(x))
    network.inner = module
    network.training = False
    with pytest.raises(FoldError, match=words) as error:
        fold(network, (torch.randn(2, 4),))
    assert "\n" not in str(error.value)
    assert capfd.readouterr() == ("", "")


QUIET = """
import torch
from lowprec.export.emit import emit_onnx
from lowprec.export.folding import fold
class DataDependent(torch.nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x
try:
    fold(DataDependent().eval(), (torch.ones(1, 2),))
except Exception:
    emit_onnx(fold(torch.nn.ReLU().eval(), (torch.ones(1, 2),))[0])
"""


def test_exporters_write_nothing_to_the_terminal():
    """In a process of its own: torch's log handlers keep the stderr of their first import."""
    root = pathlib.Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", QUIET], cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_random_state_stays_when_forward_seeds_it():
    def forward(m, x):
        torch.manual_seed(3)
        return x * 2

    before = torch.get_rng_state()
    trace(Lambda(forward).eval(), (torch.randn(3, 4, generator=torch.Generator()),))
    assert torch.equal(torch.get_rng_state(), before)


def test_training_mode_is_refused():
    network = Lambda(lambda m, x: m.stem(x), stem=nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)))
    sentence = r"'stem.1' is in training mode, so its statistics still change; call model.eval\(\) before fold\(model\)"
    with pytest.raises(FoldError, match=sentence):
        fold(network, (torch.randn(1, 1, 4, 4),))
    with pytest.raises(FoldError, match="the network is in training mode"):
        fold(nn.Sequential(nn.Linear(2, 2), nn.Dropout()), (torch.randn(1, 2),))


def test_example_inputs_are_a_tuple_with_a_tensor():
    with pytest.raises(UnsupportedError, match="write \\(x,\\) for one input"):
        fold(nn.ReLU().eval(), torch.randn(1, 2))
    with pytest.raises(UnsupportedError, match="holds no tensor"):
        fold(nn.ReLU().eval(), (3,))
    with pytest.raises(UnsupportedError, match="2 entries for 1 example inputs"):
        fold(nn.ReLU().eval(), (torch.randn(1, 2),), (None, None))
    with pytest.raises(UnsupportedError, match="dynamic_shapes names y"):
        fold(nn.ReLU().eval(), (torch.randn(1, 2),), {"y": None})


def test_free_axes_with_limits_say_which():
    network = nn.Sequential(nn.Conv2d(1, 2, 3)).eval()
    with pytest.raises(FoldError, match=r"give dynamic_shapes with h = Dim\('h', min=3\)"):
        fold(network, (torch.randn(1, 1, 8, 8),), ({2: torch.export.Dim("h")},))
    with pytest.raises(FoldError, match=r"every length of the axis 'h': it needs \(\(-2\) \+ h\) != 1; give"):
        fold(network, (torch.randn(1, 1, 8, 8),), ({2: torch.export.Dim("h", min=3)},))


def test_functional_norms_and_activations_between():
    network = make(FOLD_CASES["affine-after-linear"]["subclass"])
    folded, report = fold(network, (torch.randn(1, 4, 7, 6),))
    assert report.facts["norms_left"] == 0
    assert [node.name for node in folded.network.graph.nodes if node.op == "call_function"] == ["conv2d", "leaky_relu"]


def test_norm_layer_called_twice_folds_at_both_places():
    network = randomise(
        Lambda(
            lambda m, x: m.norm(m.a(x)) + F.relu(m.norm(m.b(x))),
            a=nn.Conv2d(2, 3, 1),
            b=nn.Conv2d(2, 3, 1),
            norm=nn.BatchNorm2d(3),
        ).eval()
    )
    folded, report = fold(network, (torch.randn(1, 2, 3, 3),))
    assert (report.facts["norms_found"], report.facts["norms_left"]) == (2, 0)
    assert has_row(report.changed, "norm", "folded into 'a'")
    assert has_row(report.changed, "norm", "folded into 'b'")
    x = torch.randn(3, 2, 3, 3)
    assert worst(network.double()(x.double()), folded(x)) <= FLOAT32


def test_reading_the_shape_of_a_layer_does_not_hinder_its_fold():
    def forward(m, x):
        h = m.c(x)
        return F.interpolate(m.b(h), size=(h.shape[2] * 2, h.shape[3]))

    network = randomise(Lambda(forward, c=nn.Conv2d(2, 3, 3, stride=2), b=nn.BatchNorm2d(3)).eval())
    traced = trace(network, (torch.randn(1, 2, 9, 9),), ({0: torch.export.Dim("n"), 2: torch.export.Dim.AUTO},))
    folded, report = fold_traced(traced)
    assert report.facts["norms_left"] == 0
    x = torch.randn(3, 2, 15, 9)
    assert worst(network.double()(x.double()), folded(x)) <= FLOAT32


def test_a_norm_in_training_mode_keeps_no_statistics_in_the_result():
    case = FOLD_CASES["affine-after-linear"]["one-norm-in-training"]
    folded, _ = fold(make(case), (torch.randn(case.shape),))
    assert sorted(folded.network.state_dict()) == ["0.bias", "0.weight", "1.bias", "1.weight"]


def test_views_do_not_depend_on_strides():
    network = Lambda(lambda m, x: x.transpose(1, 2).contiguous().view(x.shape[0], -1) * 2).eval()
    x = torch.randn(3, 4, 5)
    assert worst(network(x.double()), trace(network, (x,)).module(x)) <= FLOAT64


class Mixing(nn.Module):
    """A per-channel affine written as an einsum, which no rule reads as one."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([0.5, -2.0, 3.0]))

    def forward(self, x):
        return torch.einsum("nchw,cd->ndhw", x, torch.diag(self.gain)) + 1


class Stated(Mixing):
    factor = 1.0

    def inference_affine(self):
        return ChannelAffine.of(self.factor * self.gain.detach().double().numpy(), 1.0)


class Lying(Stated):
    factor = 1.01


@pytest.mark.parametrize(("layer", "left"), [(Mixing, True), (Stated, False)])
def test_a_layer_folds_by_its_own_word(layer, left):
    network = nn.Sequential(nn.Conv2d(2, 3, 3), layer(), nn.ReLU()).eval()
    folded, report = fold(network, (torch.rand(2, 2, 5, 5),))
    operations = {node.target for node in folded.network.graph.nodes if node.op == "call_function"}
    assert (torch.ops.aten.einsum.default in operations) == left
    assert any(row.reason == "folded into '0'" for row in report.changed) != left
    assert report.facts["float64_error"] <= 1e-15  # a fold is a handful of float64 roundings, 2^-53 each


def test_a_layer_whose_word_is_wrong_is_named():
    with pytest.raises(FoldError, match=r"what '1' say in inference_affine differs from the original by 0\.0"):
        fold(nn.Sequential(nn.Conv2d(2, 3, 3), Lying()).eval(), (torch.rand(2, 2, 5, 5),))


class RegionsThatChangeNothing(nn.Module):
    """Gradients off, autocast off, one in the other: torch.export keeps each as a graph of its own."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        with torch.no_grad():
            y = self.conv(x)
            with torch.autocast("cpu", enabled=False):
                y = self.norm(y).float().relu()
        with torch.autocast("cpu", enabled=False):
            return self.last(y)


def test_regions_that_change_nothing_are_opened():
    network = fold_cases.randomise(RegionsThatChangeNothing().eval())
    x = torch.randn(3, 3, 8, 8)
    folded, report = fold(network, (x,))
    assert report.facts["norms_left"] == 0
    with torch.no_grad():
        assert worst(network(x).double(), folded(x)) <= 2 * FLOAT32  # both round
