"""Keeping what the model says about the subject otherwise: the penalty by hand, and what it does to an edit."""

import pytest
import torch

import kedit
from kedit.errors import ConfigError
from kedit.models import ModelArch
from kedit.regularizers import Activations, ForwardRecord, Relations
from tiny_models import CONTEXTS, EDITS, moments, tiny_model, tokenizer

EDIT = kedit.Edit(*EDITS["middle"])


def activations(logits, edit, context):
    whole = torch.tensor
    return Activations(
        edit=whole(edit), context=whole(context), subject=whole([0] * len(edit)), logits=whole(logits).log()
    )


def record(rewrite, extra, edits=1):
    return ForwardRecord(
        step=0, delta=torch.zeros(edits, 1, 2), initial=torch.ones(edits, 1, 2), rewrite=rewrite, extra=extra
    )


def test_the_penalty_by_hand():
    bare = activations([[1.0, 0.0], [0.5, 0.5]], [0, 0], [0, 1])  # the second one stands in another context
    before = record(bare, activations([[0.36, 0.64], [0.5, 0.5]], [0, 0], [0, 1]))
    now = record(bare, activations([[0.5, 0.5], [0.5, 0.5]], [0, 0], [0, 1]))
    divergence = 0.36 * torch.log(torch.tensor(0.36 / 0.5)) + 0.64 * torch.log(torch.tensor(0.64 / 0.5))
    expected = 2.0 * (1 - 0.6) * divergence  # the overlap is √(0.36 · 1)
    torch.testing.assert_close(Relations(gamma=2.0).penalty(now, before), expected[None])


def test_a_prompt_that_asks_for_the_fact_itself_does_not_count():
    bare = activations([[0.3, 0.7]], [0], [0])
    before = record(bare, activations([[0.3, 0.7]], [0], [0]))
    now = record(bare, activations([[0.9, 0.1]], [0], [0]))
    assert Relations().penalty(now, before).item() == pytest.approx(0, abs=1e-6)


def test_every_edit_and_every_fact_has_its_own_overlap():
    bare = activations([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]], [0, 0, 1], [0, 0, 0])  # two facts of edit 0
    before = record(bare, activations([[0.01, 0.99], [0.01, 0.99]], [0, 1], [0, 0]), edits=2)
    now = record(bare, activations([[0.5, 0.5], [0.5, 0.5]], [0, 1], [0, 0]), edits=2)
    first, second = Relations(gamma=1.0).penalty(now, before).tolist()
    assert first < 0.01 < 0.5 < second


def test_an_edit_changes_less_of_what_is_said_otherwise():
    changes = {}
    for regularizer in (None, Relations(gamma=1.0)):
        model = tiny_model("llama", dtype=torch.float32)
        width = ModelArch(model).weight(0).matrix.shape[1]
        rome = kedit.ROME(
            model, tokenizer(), layers=1, steps=25, lr=0.5, clamp=20.0, stop_loss=0.0,
            moments={1: moments(width, 1)}, contexts=CONTEXTS,
        )  # fmt: skip
        before = said(model)
        result = rome.apply(EDIT, regularizer=regularizer)
        changes[regularizer is None] = float((before.exp() * (before - said(model))).sum())
        result.revert()
    assert changes[False] < 0.9 * changes[True]


def said(model):
    """The next token's log-probabilities after a prompt that is none of the regularizer's."""
    ids = tokenizer()(f"We ask about {EDIT.subject} what", return_tensors="pt").input_ids
    with torch.no_grad():
        return model(ids).logits[0, -1].log_softmax(-1)


def test_prompts_need_a_place_for_the_subject():
    with pytest.raises(ConfigError, match=r"one '\{\}' each"):
        Relations(prompts=("nobody is",)).needs(None)
