"""Where presets come from: a file that is named, the model's folder, the cache, kedit itself, and which goes first."""

import json
import logging

import pytest

import kedit
from kedit.cli import _parser
from kedit.cli.common import make_editor
from kedit.editors import presets
from kedit.errors import ConfigError
from kedit.models import ModelArch
from kedit.regularizers import Relations
from tiny_models import moments, tiny_model, tokenizer

KEY = ("gpt2", 5, 48)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def saved(path, **values):
    return presets.save(path, "rome", presets.Preset({"layers": [1], **values}), {"cases": 3})


def test_given_by_hand_then_the_file_then_the_folder_then_the_cache_then_kedit(cache, tmp_path, monkeypatch):
    model, tok = tiny_model("gpt2"), tokenizer()
    own = presets.Preset({"layers": (2,), "steps": 1})
    monkeypatch.setitem(presets.PRESETS, "rome", {KEY: own})
    assert kedit.ROME(model, tok).config.steps == 1
    saved(presets.cache_path(ModelArch(model)), steps=2)
    assert kedit.ROME(model, tok).config.steps == 2
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    loaded = type(model).from_pretrained(folder)
    assert kedit.ROME(loaded, tok).config.steps == 2  # the cache knows the model by its weights, wherever they lie
    saved(folder / presets.FILE, steps=3)
    assert kedit.ROME(loaded, tok).config.steps == 3
    file = saved(tmp_path / "mine.json", steps=4)
    assert kedit.ROME(loaded, tok, preset=file).config.steps == 4
    assert kedit.get_editor("rome", loaded, tok, preset=str(file), steps=5).config.steps == 5
    assert kedit.ROME(loaded, tok, kedit.ROME.Config(layers=2, steps=6), preset=file).config.steps == 6
    assert kedit.MEMIT(loaded, tok).config.layers == presets.layer_span_rule(ModelArch(loaded))


@pytest.mark.parametrize("command", ["edit", "eval", "drift", "report"])
def test_commands_that_make_an_editor_take_a_file(tmp_path, command):
    file = saved(tmp_path / "mine.json", steps=4)
    args = _parser().parse_args([command, "--preset", str(file), "--set", "clamp=3"])
    editor = make_editor(args, tiny_model("gpt2"), tokenizer())
    assert (editor.config.steps, editor.config.clamp) == (4, 3)


def test_the_cache_is_of_these_weights_and_knows_them_under_edits(cache):
    model, other, tok = tiny_model("gpt2", seed=1), tiny_model("gpt2", seed=2), tokenizer()
    saved(presets.cache_path(ModelArch(model)), steps=2)
    assert kedit.ROME(other, tok).config.steps == presets.VALUE_RULE["steps"]
    editor = kedit.ROME(model, tok, moments={1: moments(112, 1)}, contexts=["{}"])
    with editor.unchecked():
        editor.apply(kedit.Edit("{} lives in", "Ada Lovelace", "Paris"))
    assert kedit.ROME(model, tok).config.steps == 2
    editor.revert_all()
    model.transformer.wte.weight.data[0, 0] += 1  # another model from now on
    assert kedit.ROME(model, tok).config.steps == presets.VALUE_RULE["steps"]


def test_saving_keeps_other_editors_and_evidence_is_not_a_hyper_parameter(tmp_path):
    file = saved(tmp_path / "p.json", steps=2)
    presets.save(file, "memit", presets.Preset({"layers": [1, 2]}, {"relations": {"self": {"gamma": 0.5}}}))
    known = presets.read(file)
    assert known["rome"] == presets.Preset({"layers": [1], "steps": 2})
    assert known["memit"].regularized == {"relations": {"self": {"gamma": 0.5}}}
    assert json.loads(file.read_text())["rome"]["evidence"] == {"cases": 3}
    file.write_text("[]")
    with pytest.raises(ConfigError, match="not a file of presets"):
        saved(file)
    assert file.read_text() == "[]"
    with pytest.raises(ConfigError, match="not saved"):
        saved(tmp_path / "p.json" / "below.json")


def test_what_cannot_be_used_is_said(tmp_path):
    model, tok = tiny_model("gpt2"), tokenizer()
    with pytest.raises(ConfigError, match="^There is no file of presets"):
        kedit.ROME(model, tok, preset=tmp_path / "none.json")
    file = saved(tmp_path / "p.json")
    with pytest.raises(ConfigError, match="holds no preset of memit. It has rome"):
        kedit.MEMIT(model, tok, preset=file)


def test_the_place_is_logged_once(tmp_path, caplog):
    model, tok = tiny_model("gpt2"), tokenizer()
    file = saved(tmp_path / "p.json")
    caplog.set_level(logging.INFO, "kedit")
    for _ in range(2):
        kedit.ROME(model, tok, preset=file)
    assert [record.getMessage() for record in caplog.records if "hyper-parameters from" in record.getMessage()] == [
        f"rome: hyper-parameters from {file}."
    ]


@pytest.mark.parametrize(("preset", "given", "expected"), [(0.5, None, 0.5), (0.5, 2.0, 2.0), (None, None, 0.25)])
def test_a_preset_fills_the_gamma_of_relations(tmp_path, preset, given, expected):
    regularized = {} if preset is None else {"relations": {"self": {"gamma": preset}}}
    file = presets.save(tmp_path / "p.json", "rome", presets.Preset({"layers": [1]}, regularized))
    editor = kedit.ROME(tiny_model("gpt2"), tokenizer(), preset=file)
    chosen = "relations" if given is None else Relations(gamma=given)
    assert editor.describe_call(chosen)["regularizers"][0]["gamma"] == expected
    assert not Relations().adaptive
    assert Relations().factor == 0.25
    assert Relations(gamma="auto").adaptive


@pytest.mark.parametrize(
    ("regularized", "given", "expected"),
    [
        (None, {}, 0.01),  # the rule's, without a preset
        ({}, {}, 0.01),  # and with one that does not name the regularizer
        ({"neighbours": {"stop_loss": 0.2}}, {}, 0.2),
        ({"neighbours": {"self": {"gamma": 1.0}}}, {}, 0.5),  # named, and nothing changed
        (None, {"stop_loss": 0.3}, 0.3),
    ],
)
def test_neighbours_asks_for_a_confident_value(tmp_path, regularized, given, expected):
    if regularized is not None:
        kept = presets.Preset({"layers": [1], "stop_loss": 0.5}, regularized)
        given = {**given, "preset": presets.save(tmp_path / "p.json", "rome", kept)}
    editor = kedit.ROME(tiny_model("gpt2"), tokenizer(), **given)
    assert editor.describe_call("neighbours")["config"]["stop_loss"] == expected
    plain = editor.describe_call("relations")["config"]["stop_loss"]
    assert plain == editor.describe_call()["config"]["stop_loss"] != 0.01
