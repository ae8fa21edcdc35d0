"""Configs: reading, overriding, refusing, and writing back what was read."""

from __future__ import annotations

import math
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowprec.errors import ConfigError
from lowprec.train import Config, import_factory, load_config, parse_config
from lowprec.train.config import PrecisionConfig
from lowprec.train.factory import build_model
from lowprec.train.schedule import SCHEDULES, learning_rate_factor
from lowprec.train.toml import toml_text

TEXT = """
[model]
factory = "lowprec.models:mlp"
args = { widths = [8, 8], norm = "l1" }
[optim]
lr = 1
"""


def test_defaults_fill_what_is_not_said_and_integers_count_as_numbers() -> None:
    config = parse_config(TEXT)
    assert config.model.args == {"widths": [8, 8], "norm": "l1"}
    assert config.optim.lr == 1.0
    assert isinstance(config.optim.lr, float)
    assert config.run.epochs == Config().run.epochs


def test_the_precision_section_is_the_arguments_of_precision() -> None:
    import inspect

    from lowprec import Precision

    parameters = inspect.signature(Precision).parameters
    assert {field.name: field.default for field in fields(PrecisionConfig)} == {
        name: parameter.default
        for name, parameter in parameters.items()
        if name != "synchronise"  # not the config's
    }


def test_a_resolved_config_reads_back_equal(tmp_path: Path) -> None:
    config = parse_config(TEXT, ["method.name=l1", "model.args.nested={a={b=[1, 2.5, 'x']}}", "optim.lr=1e-7"])
    (tmp_path / "c.toml").write_text(config.to_toml())
    assert load_config(tmp_path / "c.toml") == config
    assert load_config(tmp_path / "c.toml").to_toml() == config.to_toml()


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("precision.mode=fp16-autocast", "precision", "mode", "fp16-autocast"),
        ("optim.lr = 0.5", "optim", "lr", 0.5),
        ("run.seed=7", "run", "seed", 7),
        ("data.source=folder/with=sign", "data", "source", "folder/with=sign"),
        ('data.source="quoted # text"', "data", "source", "quoted # text"),
        ("model.args={width=4}", "model", "args", {"width": 4}),
        ("model.args.width=4", "model", "args", {"width": 4}),
    ],
)
def test_overrides_are_toml_and_bare_words_are_strings(override: str, section: str, key: str, value: Any) -> None:
    assert getattr(getattr(parse_config("", [override]), section), key) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[modle]", r"unknown section \[modle\]; did you mean 'model'\?"),
        ("[zzz]", r"unknown section \[zzz\]; choose from model, method"),
        ("[optim]\nlearning_rate = 1", r"unknown key 'learning_rate' in \[optim\]"),
        ("[optim]\nmomentun = 1", "did you mean 'momentum'"),
        ("model = 3", r"\[model\] is a whole number \(3\); it must be a section"),
        ("[optim]\nlr = 'fast'", r"optim.lr is a string \('fast'\); it must be a number"),
        ("[run]\nepochs = 1.5", r"run.epochs is a number \(1.5\); it must be a whole number"),
        ("[run]\nepochs = true", r"run.epochs is true or false \(True\)"),
        ("[model]\nargs = []", "model.args is an array; it must be a table"),
        ("[run]\nepochs = 0", "run.epochs is 0; give at least 1"),
        ("[run]\ndevice = 'tpu'", "run.device is 'tpu'; "),
        ("[optim]\nname = 'sdg'", "optim.name is 'sdg'; did you mean 'sgd'"),
        ("[optim]\nschedule = 'cosin'", "did you mean 'cosine'"),
        ("[optim]\nlr = -1", "optim.lr is -1.0; give a positive number"),
        ("[optim]\nlr = nan", "optim.lr is nan"),
        ("[optim]\nmomentum = 1", "optim.momentum is 1.0"),
        ("[optim]\nclip_norm = nan", "optim.clip_norm is nan"),
        ("[optim]\ngamma = 0", "optim.gamma is 0.0"),
        ("[data]\ntest_fraction = 1", "data.test_fraction is 1.0"),
        ("[precision]\nmode = 'fp15'", "unknown precision 'fp15'"),
        ("[precision]\ninit_scale = 3", "init_scale is 3.0; give a power of two"),
        ("[model", "the config is not valid TOML"),
    ],
)
def test_a_wrong_config_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_config(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lr=1", "not of the form section.key=value"),
        ("optim.lr", "not of the form"),
        ("optim..lr=1", "not of the form"),
        ("optim.lr.x.y=1", "'lr' is not a table"),
        ("model.args=[1", "the value is not valid TOML"),
        ("run.seed=1\nmodel.x=2", "the value is not valid TOML"),
        ("run.seed=", "the value is not valid TOML"),
    ],
)
def test_a_wrong_override_is_refused_in_one_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config("[optim]\nlr = 1", [override])


def test_an_unreadable_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "c.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        load_config(tmp_path / "c.toml")


# --- the TOML writer -------------------------------------------------------------------------------------------------

_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
_VALUES = st.recursive(
    st.one_of(
        st.booleans(),
        st.integers(-(2**63), 2**63 - 1),
        st.floats(allow_nan=False),
        _TEXT,
        st.dates(),
        st.datetimes(),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner),
    max_leaves=8,
)


@given(st.dictionaries(_TEXT, _VALUES, max_size=4))
def test_toml_round_trips(document: dict[str, Any]) -> None:
    assert tomllib.loads(toml_text(document)) == document


def test_toml_keeps_nan_and_refuses_what_it_cannot_hold() -> None:
    assert math.isnan(tomllib.loads(toml_text({"a": math.nan}))["a"])
    with pytest.raises(ConfigError, match=r"a\.b is of type NoneType, which a TOML file cannot hold"):
        toml_text({"a": {"b": None}})


# --- schedules -------------------------------------------------------------------------------------------------------

SCHEDULE_CASES = {  # at landed steps 0, 5, 10 of 10, drops every 5 by 0.1
    "constant": (1.0, 1.0, 1.0),
    "cosine": (1.0, 0.5, 0.0),
    "step": (1.0, 0.1, 0.01),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_by_hand(name: str) -> None:
    found = [learning_rate_factor(name, landed, 10, 0, 5, 0.1) for landed in (0, 5, 10)]
    # three operations in float64, each rounded once, on values up to 1
    assert found == pytest.approx(SCHEDULE_CASES[name], rel=4 * 2.0**-53, abs=4 * 2.0**-53)
    assert all(learning_rate_factor(name, landed, 10, 3) == (landed + 1) / 4 for landed in range(3))
    assert learning_rate_factor(name, 3, 10, 3) == 1.0


def test_every_schedule_has_a_case() -> None:
    assert set(SCHEDULE_CASES) == set(SCHEDULES)


# --- factories -------------------------------------------------------------------------------------------------------


@pytest.fixture
def user_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "user_nets.py").write_text(
        "from torch import nn\nimport torch\n"
        "def net(width=2):\n    import user_helper\n    return nn.Linear(user_helper.N, width)\n"
        "def pair():\n    return nn.Linear(2, 2), torch.ones(1, 2)\n"
        "def wrong():\n    return 3\n"
        "def broken():\n    raise ValueError('first line\\nsecond line')\n"
        "class Holder:\n    make = staticmethod(net)\n"
        "constant = 3\n"
    )
    (tmp_path / "user_helper.py").write_text("N = 5\n")
    (tmp_path / "user_bad.py").write_text("import surely_not_installed\n")
    (tmp_path / "user_syntax.py").write_text("def (:\n")
    return tmp_path


def test_a_factory_is_imported_from_the_current_folder_which_then_leaves_the_path(user_code: Path) -> None:
    import sys

    before = list(sys.path)
    model, examples = build_model("user_nets:net", {"width": 3})
    assert examples is None
    assert str(model) == "Linear(in_features=5, out_features=3, bias=True)"
    assert sys.path == before
    _, examples = build_model("user_nets:pair")
    assert isinstance(examples, tuple)
    assert import_factory("user_nets:Holder.make") is import_factory("user_nets:net")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("user_nets", "is not of the form module:function"),
        (":net", "is not of the form"),
        ("user_nots:net", "there is no module 'user_nots' in"),
        ("user_bad:net", "user_bad imports 'surely_not_installed', which is not installed"),
        ("user_syntax:net", "importing user_syntax raised SyntaxError"),
        ("user_nets:nett", r"user_nets has no 'nett'; did you mean 'net'\?"),
        ("user_nets:constant", "is of type int; it must be a function"),
        ("user_nets:wrong", "returned int; it must return a torch.nn.Module"),
        ("user_nets:broken", r"called with \(\) raised ValueError: first line second line"),
        ("..:net", "importing .. raised TypeError"),
    ],
)
def test_a_factory_that_cannot_be_used_is_refused_in_one_line(user_code: Path, spec: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build_model(spec)
    assert "\n" not in str(caught.value)


def test_wrong_arguments_of_a_factory_are_named(user_code: Path) -> None:
    with pytest.raises(ConfigError, match=r"called with \(wdith=3\) raised TypeError: .*'wdith'"):
        build_model("user_nets:net", {"wdith": 3})
