"""Networks of several inputs and outputs, free sizes and chosen opsets, from the call to the verified bundle."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from fold_cases import randomise
from onnx_cases import model_of, some
from torch import nn

from lowprec.cli.free_axes import free_axes
from lowprec.errors import ConfigError, FoldError
from lowprec.export import export, verify
from lowprec.export.bundle import ONNX_BY_PRECISION
from lowprec.export.emit.opset import opset_of
from lowprec.export.pipeline import TARGETS

FREE = {"image": {0: "batch", 2: "2*height", 3: "2*width"}, "mask": {0: "batch", 2: "height", 3: "width"}}
WORDS = ["image:0=batch,2=2*height,3=2*width", "mask:0=batch, 2=height, 3=width"]


class Segmenter(nn.Module):
    """Two inputs of free sizes, one half of the other; a map, and a score per class."""

    def __init__(self):
        super().__init__()
        self.down, self.norm = nn.Conv2d(3, 4, 2, stride=2), nn.BatchNorm2d(4)
        self.up, self.score = nn.ConvTranspose2d(4, 2, 2, stride=2), nn.Linear(4, 5)

    def forward(self, image, mask):
        h = F.relu(self.norm(self.down(image))) * mask
        return {"map": self.up(h), "scores": self.score(h.mean((2, 3)))}


def made():
    torch.manual_seed(0)
    return randomise(Segmenter().eval()), (torch.randn(2, 3, 8, 6), torch.rand(2, 1, 4, 3))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    network, example = made()
    folder = tmp_path_factory.mktemp("interfaces") / "bundle"
    return export(network, example, folder, "fp16", dynamic_shapes=FREE, opset=21)


def shapes(values):
    return {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values
    }


@pytest.mark.parametrize("file", ["model.onnx", "model.fp16.onnx"])
def test_names_free_sizes_and_opset_are_in_the_files(bundle, file):
    model = onnx.load(bundle.folder / file)
    assert shapes(model.graph.input) == {
        "image": ["batch", 3, "2*height", "2*width"],
        "mask": ["batch", 1, "height", "width"],
    }
    assert shapes(model.graph.output) == {"output_0": ["batch", 2, "2*height", "2*width"], "output_1": ["batch", 5]}
    assert opset_of(model) == 21
    assert bundle.parity.passed
    assert verify(bundle.folder).passed


def test_other_sizes_give_what_the_network_gives(bundle):
    network, _ = made()
    image, mask = torch.randn(3, 3, 12, 10), torch.rand(3, 1, 6, 5)
    with torch.no_grad():
        expected = network(image, mask)
    session = onnxruntime.InferenceSession(bundle.folder / "model.onnx")
    found = session.run(None, {"image": image.numpy(), "mask": mask.numpy()})
    for a, b in zip(expected.values(), found, strict=True):
        # 3 layers; sums of at most 30 products of at most 10.
        assert np.abs(a.numpy() - b).max() <= 3 * 30 * 10 * 2.0**-24


def test_words_of_the_command_line():
    assert free_axes(None) is None
    assert free_axes(WORDS) == FREE
    assert free_axes(["x:1", "x:2", "y:"]) == {"x": {1: "x_1", 2: "x_2"}, "y": {}}


@pytest.mark.parametrize("word", ["image", ":0", "image:height", "image:0=", "image:-1=h", ""])
def test_words_that_say_nothing_are_refused(word):
    with pytest.raises(ConfigError, match=r"--dynamic takes NAME:AXIS"):
        free_axes([word])


def test_a_file_goes_into_the_opset_that_is_asked_for(tmp_path):
    model = model_of("c = Conv(x, w) y = Relu(c)", {"w": some(3, 2, 3)}, {"x": ["N", 2, 9]}, opset=13)
    folder = export(model, None, tmp_path / "newer", "fp32", opset=21).folder
    assert opset_of(onnx.load(folder / "model.onnx")) == 21
    assert opset_of(onnx.load(export(model, None, tmp_path / "own", "fp32").folder / "model.onnx")) == 13
    with pytest.raises(ConfigError, match="an ONNX model says itself which of its axes are free"):
        export(model, None, tmp_path / "free", "fp32", dynamic_shapes=({0: "n"},))


FACTORY = """
from test_interfaces import made as trained
"""


def test_sizes_and_opset_on_the_command_line(tmp_path, command):
    (tmp_path / "segmenter.py").write_text(FACTORY)
    done = command("export", "segmenter:trained", "-o", "b", "--opset", "22", "--dynamic", *WORDS, cwd=tmp_path)
    assert done.status == 0, done.stdout + done.stderr
    model = onnx.load(tmp_path / "b" / "model.onnx")
    assert opset_of(model) == 22
    assert shapes(model.graph.input)["mask"] == ["batch", 1, "height", "width"]


def test_an_axis_that_cannot_be_free_is_one_line(tmp_path):
    network, example = made()
    impossible = {"image": {2: "4*height + 1"}, "mask": {2: "height"}}
    with pytest.raises(FoldError, match=r"of the form 4\*height \+ 1"):
        export(network, example, tmp_path / "bundle", dynamic_shapes=impossible)
    assert not list(tmp_path.iterdir())


TINY = """
import torch
from torch import nn

def trained():
    torch.manual_seed(0)
    head = [nn.Flatten(), nn.Linear(8, 3), nn.Softmax(1)]
    layers = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), *head)
    return layers.eval(), (torch.randn(8, 1, 4, 4),)
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "tiny_net.py").write_text(TINY)
    return folder


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("precision", ONNX_BY_PRECISION)
def test_every_precision_and_target_of_the_help_works_or_says_what_is_missing(tiny, command, precision, target):
    words = ("export", "tiny_net:trained", "-o", f"{precision}-{target}", "--precision", precision, "--target", target)
    done = command(*words, "--compute-capability", "8.6", cwd=tiny) if "rtx" in target else command(*words, cwd=tiny)
    if done.status == 3:
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("lowprec: ")]
        assert "pip install lowprec[" in line or "no NVIDIA driver" in line
        assert target == "tensorrt"  # the rest is installed where tests run
        return
    assert done.status == 0, done.stdout + done.stderr
    held = {path.name for path in (tiny / f"{precision}-{target}").iterdir()}
    assert {"model.onnx", ONNX_BY_PRECISION[precision]} <= held
    assert "rtx" not in target or "model.rtx.engine" in held


def test_the_help_names_every_precision_and_target(tiny, command):
    text = " ".join(command("export", "--help", cwd=tiny).stdout.split())
    assert ", ".join(ONNX_BY_PRECISION) in text
    assert ", ".join(TARGETS) in text


def test_an_option_may_be_repeated(tiny, command):
    words = ("--precision", "fp16", "--precision", "mixed", "bf16")
    assert command("export", "tiny_net:trained", "-o", "repeated", *words, cwd=tiny).status == 0
    held = {path.name for path in (tiny / "repeated").iterdir()}
    assert {"model.fp16.onnx", "model.mixed.onnx", "model.bf16.onnx"} <= held
