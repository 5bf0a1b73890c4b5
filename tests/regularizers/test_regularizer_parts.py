"""The needs and inputs of regularizers, and regularizers given by name and as objects."""

from dataclasses import dataclass

import pytest
import torch

from kedit.errors import ConfigError, UnknownNameError
from kedit.models import Site
from kedit.regularizers import REGULARIZERS, RESERVED, Needs, blocks_from, make, resolve, takes_gamma
from kedit.regularizers.base import Activations, ForwardRecord, needs_of, score
from kedit.regularizers.sadr import SADR


class Mine:
    """The least that a regularizer is."""

    def __init__(self, name="mine", needs=None, penalty=None):
        self.name = name
        self._needs = needs or Needs()
        self._penalty = penalty or (lambda now, before: now.delta.sum((1, 2)))

    def needs(self, site):
        return self._needs

    def penalty(self, now, before):
        return self._penalty(now, before)


def rows(edits, contexts, *, blocks=(2, 3), logits=True):
    """Rows whose numbers say where they come from."""
    count = edits * contexts
    at = torch.arange(count).float()
    return Activations(
        edit=torch.arange(edits).repeat_interleave(contexts),
        context=torch.arange(contexts).repeat(edits),
        subject=torch.arange(count),
        attention={block: at[:, None, None] + 100 * block + torch.zeros(count, 2, 3) for block in blocks},
        hidden={block: at[:, None] + 1000 * block + torch.zeros(count, 4) for block in blocks},
        logits=at[:, None] + torch.zeros(count, 5) if logits else None,
    )


def captured(edits=3, contexts=2, extra=2):
    delta = torch.arange(float(edits)).reshape(edits, 1, 1)
    return ForwardRecord(step=1, delta=delta, initial=-delta, rewrite=rows(edits, contexts), extra=rows(edits, extra))


def test_mean_per_edit_over_uneven_prompts():
    found = Activations(edit=torch.tensor([0, 0, 0, 2]), context=torch.arange(4), subject=torch.arange(4))
    values = torch.tensor([1.0, 2.0, 6.0, 5.0], requires_grad=True)
    mean = found.mean_per_edit(values, 3)
    assert mean.tolist() == [3.0, 0.0, 5.0]
    mean.sum().backward()
    torch.testing.assert_close(values.grad, torch.tensor([1 / 3, 1 / 3, 1 / 3, 1.0]))


@pytest.mark.parametrize("keep", [[0], [2], [1, 2], [0, 2], [0, 1, 2]])
def test_keep_edits_renumbers_everything(keep):
    whole = captured()
    part = whole.keep_edits(torch.tensor(keep))
    assert part.num_edits == len(keep)
    assert part.delta.flatten().tolist() == keep
    for kept, all_rows in ((part.rewrite, whole.rewrite), (part.extra, whole.extra)):
        chosen = [i for i, edit in enumerate(all_rows.edit.tolist()) if edit in keep]
        assert kept.edit.tolist() == [keep.index(int(all_rows.edit[i])) for i in chosen]
        assert kept.subject.tolist() == chosen
        assert torch.equal(kept.attention[3], all_rows.attention[3][chosen])
        assert torch.equal(kept.hidden[2], all_rows.hidden[2][chosen])
        assert torch.equal(kept.logits, all_rows.logits[chosen])


def test_keep_edits_without_extra_prompts():
    part = captured(extra=0).keep_edits(torch.tensor([1, 2]))
    assert len(part.extra.edit) == 0
    assert part.rewrite.edit.tolist() == [0, 0, 1, 1]


def test_needs_join_to_what_satisfies_both():
    joint = Needs(attention=range(2, 4), prompts=("{} a", "{} b")) | Needs(
        attention=blocks_from(6, 7), hidden=range(1, 2), logits=True, prompts=("{} b", "{} c")
    )
    assert {2, 3, 6, 7} <= set(joint.attention)
    assert joint.hidden == range(1, 2)
    assert joint.logits
    assert joint.prompts == ("{} a", "{} b", "{} c")
    assert Needs() | Needs(attention=range(3, 5)) == Needs(attention=range(3, 5))
    assert 10**6 in blocks_from(3)
    assert 2 not in blocks_from(3)
    assert list(blocks_from(3, 4)) == [3, 4]


@pytest.mark.parametrize("prompts", [("no slot",), ("{} {}",), ("{} fine", ""), "{} is"])
def test_needs_with_bad_prompts(prompts):
    with pytest.raises(ConfigError, match="one '{}' each"):
        Needs(prompts=prompts)


def test_each_regularizer_sees_only_what_it_asked_for():
    seen = {}

    def look(name):
        def penalty(now, before):
            seen[name] = now, before
            return now.delta.sum((1, 2))

        return penalty

    first = Mine("first", Needs(attention=range(2, 3), prompts=("{} a", "{} b")), look("first"))
    second = Mine("second", Needs(hidden=range(3, 4), logits=True, prompts=("{} c", "{} b")), look("second"))
    sites = [Site(1)]
    asked = needs_of([first, second], sites)
    assert asked.prompts == ("{} a", "{} b", "{} c")
    now = captured(extra=3)
    for regularizer in (first, second):
        score(regularizer, now, now, sites, asked)
    for one in seen["first"]:
        assert set(one.rewrite.attention) == {2}
        assert not one.rewrite.hidden
        assert one.rewrite.logits is None
        assert one.extra.context.tolist() == [0, 1] * 3
        assert one.extra.subject.tolist() == [0, 1, 3, 4, 6, 7]
    for one in seen["second"]:
        assert not one.rewrite.attention
        assert set(one.rewrite.hidden) == {3}
        assert one.rewrite.logits is not None
        assert one.extra.context.tolist() == [0, 1] * 3, "numbered as this one asked: c, b"
        assert one.extra.subject.tolist() == [2, 1, 5, 4, 8, 7]
        assert one.extra.edit.tolist() == [0, 0, 1, 1, 2, 2]


def test_alone_it_sees_the_very_object():
    seen = []
    needs = Needs(attention=range(2, 4), hidden=range(2, 4), logits=True, prompts=("{} a", "{} b"))
    now = captured()
    score(Mine(needs=needs, penalty=lambda a, b: seen.append(a) or torch.zeros(3)), now, now, [Site(1)], needs)
    assert seen[0] is now


@pytest.mark.parametrize("value", [torch.zeros(()), torch.zeros(2), torch.zeros(3, 1), 0.0, None])
def test_penalty_of_a_wrong_shape_is_named(value):
    now = captured()
    with pytest.raises(ConfigError, match=r"penalty of 'mine' must be one number per edit, shape \(3,\); found"):
        score(Mine(penalty=lambda *_: value), now, now, [Site(1)], Needs())


def test_resolve_takes_names_objects_and_lists():
    assert resolve(None) == []
    assert resolve([]) == []
    for choice in ("sadr", "SADR", ["sadr"], ("sadr",)):
        [made] = resolve(choice)
        assert type(made) is SADR
    mine = Mine()
    assert resolve(mine) == [mine]
    assert resolve(iter([mine, "sadr"]))[0] is mine


def test_unknown_name():
    with pytest.raises(UnknownNameError, match="no regularizer called 'sard'. Did you mean 'sadr'"):
        resolve("sard")
    with pytest.raises(UnknownNameError, match="Did you mean 'sadr'"):
        resolve([Mine(), "sadrr"])


@pytest.mark.parametrize("wrong", [5, object(), [None], [["sadr"]], 0.1])
def test_what_is_no_regularizer(wrong):
    with pytest.raises(ConfigError, match="is no regularizer"):
        resolve(wrong)


def test_a_class_is_no_object():
    for wrong in (Mine, [Mine]):
        with pytest.raises(ConfigError, match=r"Mine is a class. Pass an object of it: Mine\(\.\.\.\)"):
            resolve(wrong)


@dataclass
class Needy:
    """A regularizer whose γ has no default."""

    gamma: float
    name: str = "needy"

    def needs(self, site):
        return Needs()

    def penalty(self, now, before):
        return self.gamma * now.delta.new_ones(now.num_edits)


def made_by_hand():
    return Needy(3.0)


def test_name_of_a_regularizer_whose_fields_have_no_defaults(monkeypatch):
    monkeypatch.setitem(REGULARIZERS._objects, "needy", Needy)
    monkeypatch.setitem(REGULARIZERS._objects, "function", made_by_hand)
    monkeypatch.setitem(REGULARIZERS._objects, "object", Needy(1.0))
    with pytest.raises(ConfigError, match=r"'needy' does not say what Needy\(gamma=\.\.\.\) shall be"):
        resolve("needy")
    assert make("needy", 3.0) == Needy(3.0)
    assert resolve("function") == [Needy(3.0)]
    assert [takes_gamma(name) for name in ("needy", "function", "sadr", "key_norm")] == [True, False, True, True]
    with pytest.raises(ConfigError, match="'object' is registered as an object of Needy"):
        resolve("object")


def test_needs_that_return_something_else():
    for wrong in (None, ("attention",), Needs):
        term = Mine()
        term.needs = lambda site, wrong=wrong: wrong
        with pytest.raises(ConfigError, match=r"needs\(site\) of the regularizer 'mine' must return"):
            needs_of([term], [Site(1, "mlp")])


def test_names_are_unique_and_not_those_of_the_log():
    with pytest.raises(ConfigError, match="Two regularizers are called 'mine'"):
        resolve([Mine(), Mine()])
    for name in [*RESERVED, "", None]:
        with pytest.raises(ConfigError, match="cannot be called"):
            resolve(Mine(name))
