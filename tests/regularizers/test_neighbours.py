"""Keeping the target away from other subjects: the penalty by hand, what it is fed, and what it does to an edit."""

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch

import kedit
from kedit.embedded import load_world
from kedit.embedded.cases import world_cases
from kedit.errors import ConfigError
from kedit.models import ModelArch
from kedit.prompts.encode import SPARE
from kedit.regularizers import Activations, ForwardRecord, Needs, Neighbours, Relations
from tiny_models import CONTEXTS, EDITS, moments, tiny_model, tokenizer

EDIT = kedit.Edit(*EDITS["middle"])
OTHERS = ("Paris", "the city of Ada")


def record(nll, edit, edits):
    none = torch.empty(0, dtype=torch.int64)
    extra = Activations(
        edit=torch.tensor(edit), context=torch.arange(len(edit)), subject=none, target_nll=torch.tensor(nll)
    )
    rewrite = Activations(edit=none, context=none, subject=none)
    delta = torch.zeros(edits, 1, 2)
    return ForwardRecord(step=0, delta=delta, initial=delta, rewrite=rewrite, extra=extra)


def test_the_penalty_by_hand():
    before = record([4.0, 3.0, 2.0], [0, 1, 1], 3)
    now = record([1.0, 3.5, 0.5], [0, 1, 1], 3)  # likelier by 3; by less than nothing and 1.5; no prompts
    assert Neighbours(gamma=2.0).penalty(now, before).tolist() == [6.0, 3.0, 0.0]


@dataclass
class Noting:
    """Keeps the first record that it sees."""

    asked: Needs
    name: ClassVar[str] = "noting"
    seen: list[ForwardRecord] = field(default_factory=list)

    def needs(self, site):
        return self.asked

    def penalty(self, now, before):
        self.seen.append(before)
        return torch.zeros(now.num_edits, dtype=now.delta.dtype)


def rome(model, **options):
    width = ModelArch(model).weight(0).matrix.shape[1]
    defaults = {"layers": 1, "steps": 2, "moments": {1: moments(width, 1)}, "contexts": CONTEXTS}
    return kedit.ROME(model, tokenizer(), **{**defaults, **options})


def nll(model, prompt, target, words=None):
    """Mean NLL of a target's tokens, the plain way."""
    words = words or tokenizer()
    start = words(prompt, return_tensors="pt").input_ids
    whole = words(f"{prompt} {target}", return_tensors="pt").input_ids
    with torch.no_grad():
        logs = model(whole).logits[0].log_softmax(-1)
    first = start.shape[1]
    return -logs[first - 1 : -1].gather(1, whole[0, first:, None]).mean()


@pytest.mark.parametrize("others", [OTHERS, ("Paris", EDIT.subject.upper())])
def test_the_target_follows_the_prompts_about_other_subjects(others):
    model = tiny_model("llama")
    noting = Noting(Needs(prompts=("{} belongs to", "we ask {} and"), neighbours=others))
    rome(model).propose(EDIT, noting)
    head = f"{EDIT.prompt.format(EDIT.subject)} {EDIT.target_new}. "
    named = [SPARE if other == EDIT.subject.upper() else other for other in others]  # another one than the edit's own
    expected = [nll(model, head + EDIT.prompt.format(other), EDIT.target_new) for other in named]
    expected = torch.stack([torch.tensor(0.0), torch.tensor(0.0), *expected])
    torch.testing.assert_close(noting.seen[0].extra.target_nll, expected, rtol=1e-5, atol=1e-5)


def test_each_of_several_facts_has_its_own_target():
    model = tiny_model("llama")
    facts = [EDIT, kedit.Edit("{} speaks", EDIT.subject, "Berlin")]
    noting = Noting(Needs(prompts=("{} is",), neighbours=OTHERS[:1]))
    arch = ModelArch(model)
    layers = (0, 1)
    kept = {layer: moments(arch.weight(layer).matrix.shape[1], layer) for layer in layers}
    memit = kedit.MEMIT(model, tokenizer(), layers=layers, steps=2, moments=kept, contexts=CONTEXTS, clamp=1.0)
    memit.apply(facts, noting).revert()
    extra = noting.seen[0].extra
    prompts = [f"{fact.prompt.format(EDIT.subject)} {fact.target_new}. {fact.prompt.format('Paris')}" for fact in facts]
    expected = torch.stack([nll(model, p, fact.target_new) for p, fact in zip(prompts, facts, strict=True)])
    order = extra.context.argsort(stable=True)
    assert extra.edit.tolist() == [0] * 3
    assert extra.context[order].tolist() == [0, 1, 1]
    torch.testing.assert_close(extra.target_nll[order][1:], expected, rtol=1e-5, atol=1e-5)


def test_beside_another_regularizer_each_sees_its_own_prompts():
    seen = {}
    for others in ([], [Relations(gamma=0.0), kedit.SADR(gamma=0.0)]):
        noting = Noting(Needs(neighbours=OTHERS))
        rome(tiny_model("llama")).propose(EDIT, [*others, noting])
        seen[len(others)] = noting.seen[0].extra
    assert seen[2].context.tolist() == [0, 1]
    torch.testing.assert_close(seen[2].target_nll, seen[0].target_nll, rtol=1e-5, atol=1e-5)


def test_a_subject_that_is_not_held_keeps_its_answer_too():
    model, words = kedit.load()
    edit, *others = [case.edit for case in world_cases(load_world(), "dev", 4)]
    held = tuple(other.subject for other in others[:2])
    prompt = f"{edit.prompt.format(edit.subject)} {edit.target_new}. {edit.prompt.format(others[2].subject)}"
    rises = {}
    for gamma in (0.0, 0.5):
        before = nll(model, prompt, edit.target_new, words)
        result = kedit.ROME(model, words).apply(edit, regularizer=Neighbours(gamma=gamma, subjects=held))
        rises[gamma] = float(before - nll(model, prompt, edit.target_new, words))
        assert result.all_said
        result.revert()
    assert rises[0.0] > 1.0
    assert rises[0.5] < 0.5 * rises[0.0]


@pytest.mark.parametrize("subjects", ["Paris", ("",), ("{} of",)])
def test_other_subjects_are_texts(subjects):
    with pytest.raises(ConfigError, match="other subjects"):
        Needs(neighbours=subjects)


@pytest.mark.parametrize("subjects", ["Paris", ()])
def test_subjects_are_a_tuple(subjects):
    with pytest.raises(ConfigError, match="tuple of texts"):
        Neighbours(subjects=subjects)
