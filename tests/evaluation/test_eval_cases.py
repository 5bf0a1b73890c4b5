"""Cases: what is derived from an edit, what is refused, what a joint run must not ask."""

import json

import pytest

from kedit.edit import Edit
from kedit.errors import EditError
from kedit.evaluation.cases import EditCase, Kind, Probe, check_cases, drop_edited

EDIT = Edit("The mother tongue of {} is", "Danielle Darrieux", "English", "French")


def neighbour(prompt: str = "Michel Rocard is a native speaker of", **fields) -> Probe:
    return Probe(kind=Kind.NEIGHBOUR, prompt=prompt, right="French", wrong="English", **fields)


def test_the_rewrite_and_the_distracted_neighbours_follow_from_the_edit():
    case = EditCase.of("a", EDIT, [neighbour()])
    assert [str(probe.kind) for probe in case.probes] == ["rewrite", "neighbour", "distracted_neighbour"]
    rewrite, _, distracted = case.probes
    assert (rewrite.prompt, rewrite.right, rewrite.wrong) == (
        "The mother tongue of Danielle Darrieux is",
        "English",
        "French",
    )
    assert distracted.prompt == (
        "The mother tongue of Danielle Darrieux is English. Michel Rocard is a native speaker of"
    )
    assert (distracted.right, distracted.wrong) == ("French", "English")


def test_a_case_survives_json_without_doubling_what_is_derived():
    case = EditCase.of(
        "a",
        EDIT,
        [
            neighbour(fact=("Michel Rocard", "language")),
            Probe(kind=Kind.GENERATION, prompt="Danielle Darrieux was born in"),
            Probe(kind=Kind.ALIAS, prompt="D. D. speaks", right="English", accept=("english",)),
        ],
        more=(Edit("{} lives in", "X Y", "Rome"),),
        references=("English is a language.",),
    )
    assert EditCase.from_dict(json.loads(json.dumps(case.to_dict()))) == case


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kind": "neighbor", "prompt": "x", "right": "y"}, "no kind of probe"),
        ({"kind": Kind.ALIAS, "prompt": " ", "right": "y"}, "needs a prompt"),
        ({"kind": Kind.ALIAS, "prompt": "x"}, "needs a right answer"),
        ({"kind": Kind.ALIAS, "prompt": "x", "right": ""}, "right answer"),
        ({"kind": Kind.ALIAS, "prompt": "x", "right": "y", "wrong": "y"}, "as right and as wrong"),
        ({"kind": Kind.ALIAS, "prompt": "x", "right": "y", "accept": ("z", 3)}, "accepts 3, which is no text"),
        ({"kind": Kind.ALIAS, "prompt": "x\ud800", "right": "y"}, "half of a surrogate pair"),
        ({"kind": Kind.ALIAS, "prompt": "x", "right": "y", "accept": ("\udfff",)}, "half of a surrogate pair"),
    ],
)
def test_malformed_probes_say_what_is_wrong(fields, message):
    with pytest.raises(EditError, match=message):
        Probe(**fields)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "object"),
        ({"id": "a"}, "A case has"),
        ({"id": "a", "edit": EDIT.to_dict(), "probe": []}, "A case has"),
        ({"id": "a", "edit": EDIT.to_dict(), "probes": [{"kind": "alias", "promt": "x"}]}, "promt"),
    ],
)
def test_malformed_cases_say_what_is_wrong(record, message):
    with pytest.raises(EditError, match=message):
        EditCase.from_dict(record)


def test_a_joint_run_does_not_ask_for_facts_that_it_changes():
    other = Edit("{} is a native speaker of", "Michel Rocard", "German", "French")
    stays = neighbour("The mother tongue of Camille Flammarion is")
    cases = [EditCase.of("a", EDIT, [neighbour(), stays]), EditCase.of("b", other)]
    kept, dropped = drop_edited(cases)
    assert dropped == 2  # the neighbour and its distracted form
    assert [p.prompt for p in kept[0].probes if p.kind is Kind.NEIGHBOUR] == [stays.prompt]
    assert kept[1] == cases[1]


def test_a_joint_run_knows_facts_by_name_where_the_source_tells():
    fact = ("Michel Rocard", "language")
    rewrite = Probe(kind=Kind.REWRITE, prompt="Michel Rocard speaks", right="German", fact=fact)
    cases = [
        EditCase.of("a", EDIT, [neighbour("In other words, Rocard says it in", fact=fact)]),
        EditCase.of("b", Edit("{} speaks", "Michel Rocard", "German"), [rewrite]),
    ]
    kept, dropped = drop_edited(cases)
    assert dropped == 2
    assert [probe.kind for probe in kept[0].probes] == [Kind.REWRITE]


def test_case_lists_are_checked():
    case = EditCase.of("a", EDIT)
    with pytest.raises(EditError, match="empty"):
        check_cases([])
    with pytest.raises(EditError, match="Two cases"):
        check_cases([case, case])
    with pytest.raises(EditError, match="EditCase"):
        check_cases([EDIT])
