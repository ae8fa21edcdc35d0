"""Keep-lists: what they match, their file, and every way to get them wrong."""

import json

import onnx
import pytest
from onnx import TensorProto, helper

from lowprec.errors import ArtifactError, ConfigError
from lowprec.export.emit.keep import Entry, KeepList, keep_list, read_keep_list
from lowprec.export.onnx_files import MODULE_PATH


def node(kind, name, path=""):
    made = helper.make_node(kind, ["x"], ["y"], name=name)
    if path:
        made.metadata_props.add(key=MODULE_PATH, value=path)
    return made


CONV = node("Conv", "node_conv2d_3", "layer4.0.conv1")


@pytest.mark.parametrize(
    ("match", "holds"),
    [
        ("op:Conv", True), ("op:Con?", True), ("op:conv", False), ("op:Co", False),
        ("node:node_conv2d_3", True), ("node:*_3", True), ("node:conv2d", False),
        ("module:layer4", True), ("module:layer4.*", True), ("module:layer4.0.conv1", True), ("module:layer[34]", True),
        ("module:layer4.0.conv", False), ("module:layer", False), ("module:Layer4", False),
    ],
)  # fmt: skip
def test_what_an_entry_matches(match, holds):
    assert Entry(match).matches(CONV) is holds


def test_a_node_of_no_module_is_matched_by_no_module():
    assert not Entry("module:*").matches(node("Softmax", "s"))


@pytest.mark.parametrize("match", ["Softmax", "op:", "type:Softmax", "", "op"])
def test_an_entry_that_says_nothing_is_refused(match):
    with pytest.raises(ConfigError, match="op:PATTERN, node:PATTERN or module:PATTERN"):
        Entry(match)


def test_the_first_entry_that_matches_gives_the_reason():
    keep = KeepList((Entry("op:Gemm", "a"), Entry("module:layer4", "b"), Entry("op:Conv", "c")))
    assert keep.reason(CONV) == "b"
    assert keep.reason(node("Relu", "r")) is None


def test_a_file_holds_entries_with_reasons_and_fields_of_its_writer(tmp_path):
    path = tmp_path / "keep.json"
    entries = [{"match": "op:Softmax", "reason": "headroom -1.2 bits", "headroom": -1.2}, {"match": "module:head"}]
    path.write_text(json.dumps({"kind": "lowprec-keep", "schema": 1, "by": "calibrate", "keep": entries}))
    keep = read_keep_list(path)
    assert keep.entries == (Entry("op:Softmax", "headroom -1.2 bits"), Entry("module:head"))
    assert keep_list(path) == keep_list([str(path)]) == keep
    assert keep_list([str(path), "op:Exp"]).entries == (*keep.entries, Entry("op:Exp"))
    path.write_text(json.dumps(keep.to_dict()))
    assert read_keep_list(path) == keep


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "keep-list"),
        ("[]", "is no keep-list; it holds"),
        ('{"kind": "lowprec-bundle", "schema": 1, "keep": []}', "is no keep-list"),
        ('{"kind": "lowprec-keep", "schema": 1}', "is no keep-list"),
        ('{"kind": "lowprec-keep", "schema": 2, "keep": []}', "has schema 2"),
        ('{"kind": "lowprec-keep", "schema": 1, "keep": ["op:Exp"]}', 'entry 0 needs a "match"'),
        ('{"kind": "lowprec-keep", "schema": 1, "keep": [{"match": 3}]}', 'entry 0 needs a "match"'),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path, text, words):
    (tmp_path / "keep.json").write_text(text)
    with pytest.raises(ArtifactError, match=words) as caught:
        keep_list([str(tmp_path / "keep.json")])
    assert "\n" not in str(caught.value)


def test_what_is_neither_an_entry_nor_a_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"or a \.json file; found 'Softmax'"):
        keep_list(["Softmax"])
    with pytest.raises(ArtifactError, match="keep-list"):
        keep_list(tmp_path / "none.json")


def test_an_entry_that_matches_nothing_names_the_nearest():
    value = helper.make_tensor_value_info
    graph = helper.make_graph([CONV], "g", [value("x", TensorProto.FLOAT, None)], [value("y", TensorProto.FLOAT, None)])
    model = helper.make_model(graph)
    KeepList((Entry("op:Conv"),)).check(model)
    with pytest.raises(ConfigError, match=r"no node of the network matches it; the nearest are layer4\.0\.conv1"):
        KeepList((Entry("module:layer4.0.conv2"),)).check(model)
    with pytest.raises(ConfigError, match="it has none with a module"):
        KeepList((Entry("module:a"),)).check(onnx.ModelProto())
