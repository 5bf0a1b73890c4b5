"""Hyper-parameters: checked when made, and user > preset with regularizer > preset > rule."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

import kedit
from kedit.editors import EDITORS, presets
from kedit.editors.config import EditorConfig
from kedit.errors import ConfigError
from kedit.models import ModelArch
from tiny_models import MODEL_TYPES, tiny_model, tokenizer


def test_layers_are_normalised():
    assert EditorConfig(layers=3).layers == EditorConfig(layers=[3]).layers == (3,)
    assert EditorConfig(layers=range(2, 5)).layers == (2, 3, 4)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"layers": ()}, "ascending"),
        ({"layers": (3, 2)}, "ascending"),
        ({"layers": (2, 2)}, "ascending"),
        ({"layers": -1}, "whole number from 0"),
        ({"layers": True}, "whole number"),
        ({"layers": 1.0}, "whole number"),
        ({"layers": "12"}, "whole number"),
        ({"layers": None}, "whole number"),
        ({"layers": (1, "2")}, "whole number"),
        ({"layers": (1, None)}, "whole number"),
        ({"steps": 0}, "steps must be a whole number of at least 1"),
        ({"steps": 2.0}, "steps"),
        ({"steps": True}, "steps"),
        ({"lr": 0}, "lr must be a finite number above 0"),
        ({"lr": "0.1"}, "lr"),
        ({"lr": float("nan")}, "lr"),
        ({"lr": float("inf")}, "lr"),
        ({"clamp": 0.0}, "clamp must be a finite number above 0"),
        ({"clamp": None}, "clamp"),
        ({"weight_decay": -0.1}, "weight_decay must be a finite number of at least 0"),
        ({"kl_factor": -1}, "kl_factor"),
        ({"stop_loss": float("nan")}, "stop_loss"),
        ({"kl_factor": True}, "kl_factor"),
        ({"dtype": "float16"}, "dtype is 'float32', 'float64' or None"),
        ({"dtype": torch.float32}, "dtype"),
    ],
)
def test_bad_fields_are_refused(fields, words):
    with pytest.raises(ConfigError, match=words):
        EditorConfig(**({"layers": 1} | fields))


def test_zero_where_zero_makes_sense():
    config = EditorConfig(layers=0, weight_decay=0, kl_factor=0.0, stop_loss=0)
    assert config.objective.weight_decay == 0
    assert config.objective.dtype is None
    assert EditorConfig(layers=0, dtype="float64").objective.dtype is torch.float64


def test_frozen_keyword_only_and_json():
    config = kedit.ROME.Config(layers=[1])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.steps = 3
    with pytest.raises(TypeError):
        EditorConfig((1,))
    assert json.loads(json.dumps(config.to_dict()))["layers"] == [1]
    assert config.replace(steps=3).steps == 3
    with pytest.raises(ConfigError):
        config.replace(steps=-3)


def test_shared_fields_have_the_same_names_everywhere():
    shared = {"layers", "steps", "lr", "weight_decay", "kl_factor", "clamp", "stop_loss", "dtype"}
    for name in EDITORS:
        assert shared <= EDITORS[name].Config.field_names()


class Sized:
    """A model that is only its type and size; enough for the presets."""

    def __init__(self, model_type, blocks, width, **marks):
        self.model_type, self.num_layers, self.hidden = model_type, blocks, width
        self.model = SimpleNamespace(config=SimpleNamespace(**marks))


FIELDS = ("steps", "lr", "weight_decay", "clamp")
ROME = {
    "GPT2_XL": (17, (20, 0.5, 0.5, 4.0)),
    "GPT_J_6B": (5, (20, 0.5, 0.5, 4.0)),
    "NEOX_20B": (15, (20, 0.5, 0.5, 4.0)),
    "LLAMA_7B": (5, (25, 0.5, 1e-3, 4.0)),
    "LLAMA_13B": (6, (20, 0.5, 1e-3, 4.0)),
    "TINYLLAMA": (4, (20, 0.5, 0.5, 2.0)),
    "MISTRAL_7B": (5, (25, 0.5, 1e-3, 4.0)),
    "QWEN2_7B": (5, (25, 0.5, 1e-3, 4.0)),
}
MEMIT = {  # with λ
    "GPT2_XL": (range(13, 18), (20, 0.5, 0.5, 0.75), 20_000),
    "GPT_J_6B": (range(3, 9), (25, 0.5, 0.5, 0.75), 15_000),
    "NEOX_20B": (range(6, 11), (20, 0.5, 0.5, 0.8), 6_000),
    "LLAMA_7B": (range(4, 9), (25, 0.5, 1e-3, 4.0), 15_000),
    "LLAMA_13B": (range(5, 10), (20, 0.5, 1e-3, 4.0), 15_000),
    "TINYLLAMA": (range(3, 6), (20, 0.5, 0.5, 8.0), 20_000),
    "MISTRAL_7B": (range(4, 9), (25, 0.5, 1e-3, 4.0), 15_000),
    "QWEN2_7B": (range(4, 9), (25, 0.5, 1e-3, 4.0), 15_000),
}
PMET = {  # with λ and kl_factor
    "GPT_J_6B": (range(3, 9), (30, 0.2, 0.5, 0.75), 6_000, 1.0),
    "NEOX_20B": (range(6, 11), (30, 0.5, 0.5, 0.8), 15_000, 0.8),
    "LLAMA_7B": (range(4, 9), (20, 0.5, 0.5, 1.0), 15_000, 0.0625),
    "LLAMA_13B": (range(7, 10), (20, 0.5, 0.5, 4.0), 15_000, 0.0625),
    "TINYLLAMA": (range(3, 6), (20, 0.5, 0.5, 4.0), 20_000, 0.0625),
}
EMMET = {  # with α
    "GPT2_XL": (17, (20, 0.5, 0.5, 0.75), 1_000),
    "GPT_J_6B": (5, (25, 0.5, 0.5, 0.75), 1),
    "LLAMA_7B": (5, (25, 0.5, 1e-3, 4.0), 1),
}
ALPHAEDIT = {
    "GPT2_XL": (range(13, 18), (20, 0.5, 0.5, 0.75)),
    "GPT_J_6B": (range(3, 9), (25, 0.5, 0.5, 0.75)),
    "LLAMA_7B": (range(4, 9), (25, 0.1, 0.5, 0.75)),
    "QWEN2_7B": (range(7, 12), (25, 0.1, 0.5, 0.75)),
}
SMOLLM2 = {
    "layers": 5, "steps": 60, "lr": 0.12, "lr_relative": True, "weight_decay": 1e-3, "clamp": 2.0, "patience": 5,
    "kl_factor": 0.0625, "stop_loss": 0.05
}  # fmt: skip
PUBLISHED_NULL_SPACE = {"l2": 10.0, "threshold": 0.02, "threshold_rule": "absolute", "l2_relative": False}
FT = {"GPT2_XL": (0, 5e-4), "GPT_J_6B": (0, 5e-5), "MISTRAL_7B": (21, 5e-5)}


def published():
    """(editor, model, Config fields) of every row of the published tables; what they do not name has one value for all."""
    usual = {"kl_factor": 0.0625, "stop_loss": 0.05}
    yield "rome", "SMOLLM2_135M", SMOLLM2
    yield "rrome", "SMOLLM2_135M", SMOLLM2
    for name, table in (("rome", ROME), ("rrome", ROME), ("alphaedit", ALPHAEDIT)):
        own = PUBLISHED_NULL_SPACE if name == "alphaedit" else {}
        for model, (layers, values) in table.items():
            yield name, model, {"layers": layers, **dict(zip(FIELDS, values, strict=True)), **usual, **own}
    for model, (layers, values, weight) in MEMIT.items():
        fields = {"layers": layers, **dict(zip(FIELDS, values, strict=True)), **usual}
        yield "memit", model, {**fields, "moment_weight": weight}
    for model, (layers, values, weight, kl) in PMET.items():
        fields = {"layers": layers, **dict(zip(FIELDS, values, strict=True)), **usual, "kl_factor": kl}
        yield "pmet", model, {**fields, "moment_weight": weight, "settle": True}
    for model, (layers, values, alpha) in EMMET.items():
        fields = {"layers": layers, **dict(zip(FIELDS, values, strict=True)), **usual}
        yield "emmet", model, {**fields, "alpha": alpha, "ridge": 0.1}
    for model, (layer, clamp) in FT.items():
        yield "ft", model, {"layers": layer, "clamp": clamp, "lr": 5e-4, "steps": 25, "stop_loss": 1e-2}


@pytest.mark.parametrize(("name", "model", "fields"), list(published()))
def test_published_numbers(name, model, fields):
    config = EDITORS[name]._preset_config(Sized(*getattr(presets, model)), {})
    assert config == EDITORS[name].Config(**fields)


def test_every_preset_has_published_numbers():
    known = {(name, getattr(presets, model)) for name, model, _ in published()}
    assert known == {(name, model) for name, table in presets.PRESETS.items() for model in table}
    assert len(known) == len(list(published()))


def test_published_changes_with_sadr_on_gptj():
    changes = {name: presets.PRESETS[name][presets.GPT_J_6B].regularized["sadr"] for name in ("rome", "memit", "pmet")}
    assert {name: found["steps"] for name, found in changes.items()} == {"rome": 80, "memit": 20, "pmet": 40}
    assert {name: found.get("moment_weight") for name, found in changes.items()} == {
        "rome": None, "memit": None, "pmet": 15_000.0
    }  # fmt: skip


def test_every_preset_is_a_valid_config_within_its_model():
    for editor, table in presets.PRESETS.items():
        for (kind, blocks, width), preset in table.items():
            arch = Sized(kind, blocks, width)
            for changes in ({}, *preset.regularized.values()):
                own = {key: value for key, value in changes.items() if key != "self"}
                config = EDITORS[editor]._preset_config(arch, own)
                assert config.layers[-1] < blocks
            for regularizer, changes in preset.regularized.items():
                assert kedit.regularizers.REGULARIZERS[regularizer](**changes.get("self", {}))


def test_gamma_is_published_for_gptj_only():
    gammas = {
        (editor, model): preset.regularized["sadr"]["self"]["gamma"]
        for editor, table in presets.PRESETS.items()
        for model, preset in table.items()
        if preset.regularized.get("sadr", {}).get("self")
    }
    assert {model for _, model in gammas} == {presets.GPT_J_6B}
    assert gammas[("rome", presets.GPT_J_6B)] == 1e-2
    assert gammas[("memit", presets.GPT_J_6B)] == 5e-3
    assert gammas[("pmet", presets.GPT_J_6B)] == 8e-2


@pytest.mark.parametrize("blocks", [1, 2, 3, 5, 6, 12, 28, 48, 80])
@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_the_rule_gives_blocks_that_exist(kind, blocks):
    assert 0 <= presets.layer_rule(Sized(kind, blocks, 7)) < blocks
    span = presets.layer_span_rule(Sized(kind, blocks, 7))
    assert span
    assert list(span) == sorted(set(span))
    assert all(0 <= layer < blocks for layer in span)


@pytest.fixture
def preset(monkeypatch):
    """A preset for the tiny gpt2, with and without SADR."""
    key = ("gpt2", 5, 48)
    own = presets.Preset({"layers": (3,), "steps": 7, "lr": 0.25}, {"sadr": {"steps": 9, "self": {"gamma": 0.125}}})
    monkeypatch.setitem(presets.PRESETS, "rome", {key: own})
    return tiny_model("gpt2")


def test_user_before_preset_before_rule(preset):
    tok = tokenizer()
    assert kedit.ROME.preset(preset).steps == 7
    assert kedit.ROME(preset, tok).config.layers == (3,)
    assert kedit.ROME(preset, tok, steps=2).config.lr == 0.25
    assert kedit.ROME(preset, tok, steps=2).config.steps == 2
    other = tiny_model("llama")
    assert kedit.ROME(other, tok).config.layers == (presets.layer_rule(ModelArch(other)),)


def test_regularizer_changes_the_preset_but_never_the_user(preset):
    tok = tokenizer()
    editor = kedit.ROME(preset, tok)
    with editor._call("sadr") as call:
        assert (editor.config.steps, editor.config.lr) == (9, 0.25)
        assert call.regularizers == [kedit.SADR(gamma=0.125)]
    assert editor.config.steps == 7
    with pytest.raises(KeyError), editor._call("sadr"):
        raise KeyError
    assert editor.config.steps == 7
    assert kedit.ROME(preset, tok, steps=4).describe_call("sadr")["config"]["steps"] == 4
    own = kedit.SADR(gamma=3.0, select="all")
    with editor._call(own) as call:
        assert call.regularizers == [own]
    with editor._call(kedit.SADR(gamma=0.0)) as call:
        assert call.regularizers[0].gamma == 0.0
    assert editor.describe_call()["config"]["steps"] == 7


def test_a_filled_regularizer_is_a_copy(preset):
    mine = kedit.SADR()
    kedit.ROME(preset, tokenizer()).describe_call(mine)
    assert mine.gamma is None


def test_a_file_beside_the_model_holds_presets(preset, tmp_path):
    preset.save_pretrained(tmp_path)
    entry = {"values": {"layers": [1], "steps": 5}, "regularized": {"sadr": {"steps": 6, "self": {"gamma": 0.25}}}}
    file = tmp_path / presets.FILE
    file.write_text(json.dumps({"rome": entry}), "utf-8")
    model = type(preset).from_pretrained(tmp_path)
    editor = kedit.ROME(model, tokenizer())
    assert editor.config == kedit.ROME.Config(layers=1, steps=5)
    assert kedit.ROME(model, tokenizer(), steps=2).config.steps == 2
    used = editor.describe_call("sadr")
    assert (used["config"]["steps"], used["regularizers"][0]["gamma"]) == (6, 0.25)
    assert kedit.MEMIT.preset(model).layers == presets.layer_span_rule(ModelArch(model))
    for wrong, words in (
        ("{", "not a file of presets"),
        ("[1]", "not a file of presets"),
        ('{"rome": {"layers": [1]}}', "not a file of presets"),
        ('{"rome": 3}', "not a file of presets"),
        ('{"rome": {"values": {"layers": [1], "strength": 2}}}', "no hyper-parameter 'strength'"),
        ('{"rome": {"values": {"layers": [77]}}}', "Layer 77 is out of range"),
    ):
        file.write_text(wrong, "utf-8")
        with pytest.raises(ConfigError, match=words):
            kedit.ROME(model, tokenizer())


def test_layers_beyond_the_model_are_refused_also_from_a_preset(monkeypatch):
    monkeypatch.setitem(presets.PRESETS, "rome", {("gpt2", 5, 48): presets.Preset({"layers": (9,)})})
    with pytest.raises(ConfigError, match="Layer 9 is out of range"):
        kedit.ROME(tiny_model("gpt2"), tokenizer())
