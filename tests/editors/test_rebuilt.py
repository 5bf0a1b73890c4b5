"""An editor made again from a patch's provenance proposes the same update."""

import json

import pytest
import torch

import kedit
from kedit.editors import from_provenance, presets
from kedit.errors import ConfigError, UnknownNameError
from kedit.models import ModelArch
from kedit.regularizers import describe, from_description
from tiny_models import CONTEXTS, EDITS, moments, tiny_model, tokenizer

EDIT = kedit.Edit(*EDITS["start"])


@pytest.mark.parametrize("name", ["rome", "memit", "alphaedit", "ft"])
def test_the_same_update(name, monkeypatch):
    own = presets.Preset({"layers": (2,), "steps": 4, "stop_loss": 0.0}, {"sadr": {"steps": 3, "self": {"gamma": 0.5}}})
    monkeypatch.setitem(presets.PRESETS, name, {("gpt2", 5, 48): own})
    model = tiny_model("gpt2")
    options = {} if name == "ft" else {"moments": {2: moments(ModelArch(model).shape(2)[1], 2)}}
    editor = kedit.get_editor(name, model, tokenizer(), contexts=CONTEXTS, **options)
    editor.engine.budget = 1_000
    result = editor.apply(EDIT, None if name == "ft" else "sadr")
    provenance = json.loads(json.dumps(result.patch.provenance))
    result.revert()
    monkeypatch.setitem(presets.PRESETS, name, {})  # what the preset said is in the provenance
    rebuilt = from_provenance(model, tokenizer(), provenance, **options)
    assert type(rebuilt) is type(editor)
    assert rebuilt.contexts == tuple(CONTEXTS)
    assert rebuilt.engine.budget == (1_000 if name != "ft" else rebuilt.engine.used)  # FT runs no waves
    [patch] = rebuilt.propose(EDIT, [from_description(item) for item in provenance["regularizers"]])
    for name, delta in result.patch.deltas.items():
        assert delta.norm > 0
        for key, tensor in delta.tensors().items():
            assert torch.equal(tensor, patch.deltas[name].tensors()[key])
    assert patch.provenance["config"] == provenance["config"]


def test_what_cannot_be_made_again_is_said():
    model = tiny_model("gpt2")
    known = {"editor": "rome", "config": {"layers": [1]}, "contexts": ["{}"]}
    assert kedit.ROME.from_provenance(model, tokenizer(), known).config == kedit.ROME.Config(layers=1)
    with pytest.raises(ConfigError, match="made by the editor 'rome', not by 'memit'"):
        kedit.MEMIT.from_provenance(model, tokenizer(), known)
    with pytest.raises(ConfigError, match="no config"):
        from_provenance(model, tokenizer(), {"editor": "rome", "contexts": ["{}"]})
    with pytest.raises(ConfigError, match="no hyper-parameter 'sleeps'"):
        from_provenance(model, tokenizer(), known | {"config": {"layers": [1], "sleeps": 2}})
    with pytest.raises(UnknownNameError):
        from_provenance(model, tokenizer(), {})


def test_regularizers_are_made_again():
    for made in (kedit.SADR(gamma=0.5, layers=(3, 4), select="all"), kedit.regularizers.KeyNorm(gamma=2.0)):
        assert from_description(json.loads(json.dumps(describe(made)))) == made
    with pytest.raises(ConfigError, match="of elsewhere.SADR"):
        from_description(describe(kedit.SADR(gamma=1.0)) | {"class": "elsewhere.SADR"})
