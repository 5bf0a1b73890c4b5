"""Several facts of one subject, in one call and in several, on the embedded model."""

import warnings

import pytest
import torch

import kedit
from kedit.embedded import load_world
from kedit.errors import EditError, KEditWarning
from kedit.patch.ledger import Ledger

SLOW = (pytest.param(name, marks=pytest.mark.slow) for name in ("rome", "rrome", "pmet", "emmet"))
VALUE_EDITORS = ("memit", "alphaedit", *SLOW)


@pytest.fixture(scope="module")
def loaded():
    return kedit.load()


@pytest.fixture
def embedded(loaded):
    yield loaded
    Ledger.of(loaded[0]).revert_all()


def _edits(count, relations=("profession", "birthplace")):
    """Facts of ``count`` people of the embedded model: for each, one edit per relation, to another object."""
    world = load_world()
    edits = []
    for number, person in enumerate(world.people[:count]):
        for name in relations:
            relation = world.relation(name)
            others = [item for item in relation.objects if item != world.object(person.name, name)]
            edits.append(kedit.Edit(relation.templates[0], person.name, others[(5 * number + 3) % len(others)]))
    return edits


@pytest.mark.filterwarnings("ignore::kedit.errors.IneffectiveEditWarning")
@pytest.mark.parametrize("name", VALUE_EDITORS)
def test_all_are_said(embedded, name):
    editor = kedit.get_editor(name, *embedded)
    result = editor.apply(_edits(7))
    assert sum(check.after.said for check in result.checks) == 14
    assert len(result.log) == 14
    result.revert()


@pytest.mark.filterwarnings("ignore::kedit.errors.IneffectiveEditWarning")
def test_what_the_closed_form_misses_is_written_again(embedded, monkeypatch):
    """PMET optimises an attention's δ too, which is not written: this person's facts rely on it."""
    edits = _edits(7)[6:8]
    editor = kedit.PMET(*embedded)
    monkeypatch.setattr(kedit.PMET, "rounds", 0)
    once = editor.apply(edits)
    once.revert()
    monkeypatch.undo()
    again = editor.apply(edits)
    again.revert()
    assert not once.all_said
    assert again.all_said
    [steps, others] = again.log
    assert steps is others
    assert [row["step"] for row in steps] == list(range(len(steps)))
    assert len(steps) > len(once.log[0])


@pytest.mark.filterwarnings("ignore::kedit.errors.IneffectiveEditWarning")
def test_rrome_moves_the_mean_key_of_joined_facts_by_delta(embedded):
    """The published value, W k + δ at the mean key, moves the bare prompt by more than δ: with these contexts it says neither."""
    edits = _edits(7)[-2:]
    editor = kedit.RROME(*embedded, contexts=["{}", "Well. {}", "They say: {}"])
    result = editor.apply(edits)
    result.revert()
    assert result.all_said
    assert len(result.log[0]) == 2 * editor.config.steps  # at the first time


def test_ft_says_both_facts(embedded):
    result = kedit.FT(*embedded).apply(_edits(1))
    assert result.all_said
    result.revert()


@pytest.mark.filterwarnings("ignore::kedit.errors.KEditWarning")
def test_published_form_forgets_the_first(embedded):
    """Without the joint value, what is written last prevails: the reason why it is the default."""
    editor = kedit.MEMIT(*embedded, join_subjects=False)
    result = editor.apply(_edits(3))
    assert sum(check.after.said for check in result.checks) < 6
    result.revert()


def test_one_value_sums_the_losses(embedded):
    """The loss of a joint value is the sum of the facts' losses, each as it is alone, before anything has moved."""
    edits = _edits(1)
    editor = kedit.ROME(*embedded, steps=1, stop_loss=0.0, contexts=["{}", "Well. {}"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = []
        for edit in edits:
            alone.append(editor.apply(edit))
            alone[-1].revert()
        joint = editor.apply(edits)
    joint.revert()
    assert joint.log[0] is joint.log[1]
    total = sum(result.log[0][0]["nll"] for result in alone)
    assert joint.log[0][0]["nll"] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("name", ["rome", "memit", "alphaedit", "ft"])
def test_earlier_facts_of_the_subject_are_kept(embedded, name):
    editor = kedit.get_editor(name, *embedded)
    first, second = _edits(1)
    results = [editor.apply(first), editor.apply(second)]
    assert [check.after.said for check in editor.check([first, second])] == [True, True]
    for result in results:
        result.revert()
    third = kedit.Edit(first.prompt, first.subject, _edits(2)[2].target_new)
    results = [editor.apply(first), editor.apply(third)]  # replaces the first
    assert editor.check(third)[0].after.said
    for result in results:
        result.revert()


def test_reapplied_and_reverted_bit_for_bit(embedded):
    editor = kedit.AlphaEdit(*embedded)
    weights = [tensor.clone() for tensor in embedded[0].parameters()]
    edits = _edits(2)
    result = editor.apply(edits)
    after = [tensor.clone() for tensor in embedded[0].parameters()]
    result.revert()
    editor.reapply(result.patch, edits)
    assert all(map(torch.equal, embedded[0].parameters(), after))
    result.revert()
    assert all(map(torch.equal, embedded[0].parameters(), weights))


@pytest.mark.parametrize("name", ["rome", "memit"])
def test_contradiction_names_both(embedded, name):
    edits = _edits(2)
    edits.append(kedit.Edit(edits[1].prompt, edits[1].subject, edits[3].target_new))
    with pytest.raises(EditError, match="Edits 1 and 4 contradict each other"):
        kedit.get_editor(name, *embedded).apply(edits)


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        ("{} works as a ", "Hulqui Gossam"),
        ("{}  works as a", "Hulqui Gossam"),
        ("{} works as a", "Hulqui\u00a0Gossam"),
        ("{} works as a", "Hulqui\u200b Gossam"),
        ("{} Gossam works as a", "Hulqui"),
    ],
    ids=["space at the end", "two spaces", "no-break space", "zero width", "shorter subject"],
)
def test_contradiction_in_another_spelling(embedded, prompt, subject):
    edits = [kedit.Edit("{} works as a", "Hulqui Gossam", "pilot"), kedit.Edit(prompt, subject, "painter")]
    with pytest.raises(EditError, match="Edits 0 and 1 contradict each other"):
        kedit.ROME(*embedded).apply(edits)


def test_an_earlier_fact_in_another_spelling_is_replaced(embedded):
    editor = kedit.ROME(*embedded, contexts=["{}"])
    results = [editor.apply(kedit.Edit("{} works as a", "Hulqui Gossam", "pilot"))]
    again = kedit.Edit("{}  works as a", "Hulqui Gossam", "baker")
    results.append(editor.apply(again))
    assert editor.check(again)[0].after.said
    for result in results:
        result.revert()


def test_duplicates_count_once(embedded):
    edits = _edits(2, ["profession"])
    editor = kedit.MEMIT(*embedded)
    once = editor.apply(edits)
    once.revert()
    with pytest.warns(KEditWarning, match="1 of 3 edits are given more than once"):
        twice = editor.apply([*edits, edits[0]])
    twice.revert()
    assert len(twice.log) == len(twice.checks) == 3
    for name, delta in once.patch.deltas.items():
        assert torch.equal(delta.dense, twice.patch.deltas[name].dense)


def test_a_paraphrase_with_another_target_is_noticed(embedded):
    world = load_world()
    person, relation = world.people[0], world.relation("profession")
    known = world.object(person.name, "profession")
    new = [item for item in relation.objects if item != known]
    edits = [
        kedit.Edit(template, person.name, target)
        for template, target in zip(relation.templates[:2], new[:2], strict=True)
    ]
    with pytest.warns(KEditWarning) as caught:
        kedit.ROME(*embedded).apply(edits).revert()
    assert any("may contradict each other" in str(warning.message) for warning in caught)


def test_a_foreign_patch_may_say_anything(embedded):
    edit = _edits(1)[0]
    editor = kedit.ROME(*embedded)
    first = editor.apply(_edits(1)[1])
    first.patch.provenance["edits"] = ["nonsense", {"subject": edit.subject}, {"subject": edit.subject, "prompt": 5}]
    result = editor.apply(edit)
    assert result.checks[0].after.said
    first.patch.provenance["edits"] = "nonsense"
    result.revert()
    editor.apply(edit).revert()
