"""Subjects whose last token is an attention sink in the prompt: the key there is of another length than anywhere else."""

import warnings

import pytest

import kedit
from kedit.errors import KEditWarning
from kedit.keys import read
from tiny_models import CONTEXTS, EDITS, moments, tiny_model, tokenizer

FIRST, LATER = kedit.Edit(*EDITS["one_token"]), kedit.Edit(*EDITS["middle"])
WIDTH = tiny_model("gpt2").config.n_inner
request_keys = read.request_keys


def said(edits, name="rome"):
    """The warnings of a call, but for those about its effect."""
    model, given = tiny_model("gpt2"), {0: moments(WIDTH)}
    editor = kedit.get_editor(name, model, tokenizer(), layers=0, moments=given, contexts=CONTEXTS, steps=2)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        editor.apply(edits)
    return [str(one.message) for one in seen if one.category is KEditWarning]


def with_sink(monkeypatch, factor):
    """Let the key of the first edit's subject be so many times as long in its prompt."""

    def longer(arch, requests, layer):
        keys = request_keys(arch, requests, layer)
        for number, request in enumerate(requests):
            if request.edit == FIRST:
                others = keys[number, 1:].norm(dim=-1).mean()
                keys[number, 0] *= factor * others / keys[number, 0].norm()
        return keys

    monkeypatch.setattr(read, "request_keys", longer)


@pytest.mark.parametrize("name", ["rome", "memit", "alphaedit"])
def test_the_subject_is_named(monkeypatch, name):
    with_sink(monkeypatch, 3.2)
    [words] = said([LATER, FIRST], name)
    assert "The key of 'The' is 3.2 times as long" in words
    assert "attention sink" in words
    assert "Put a few words before the subject" in words


def test_a_short_key_too(monkeypatch):
    with_sink(monkeypatch, 0.19)
    [words] = said(FIRST)
    assert "0.19 times as long" in words


@pytest.mark.parametrize("factor", [0.6, 1.6])
def test_nothing_is_said_of_usual_keys(monkeypatch, factor):
    with_sink(monkeypatch, factor)
    assert not said([FIRST, LATER])


def test_one_context_tells_nothing():
    model = tiny_model("gpt2")
    editor = kedit.ROME(model, tokenizer(), layers=0, moments={0: moments(WIDTH)}, contexts=["{}"], steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", KEditWarning)
        warnings.simplefilter("ignore", kedit.IneffectiveEditWarning)
        editor.apply(FIRST)
