"""Which cases an experiment takes: known facts, and the same side for the same subject everywhere."""

import pytest

from kedit.edit import Edit
from kedit.embedded import load_world
from kedit.embedded.cases import world_cases
from kedit.errors import ConfigError, EditError
from kedit.evaluation import EditCase, Kind, Probe, evaluate, known_cases, split_by_subject
from kedit.loading import load

PROBE = Probe(kind=Kind.NEIGHBOUR, prompt="The capital of Italy is", right="Rome", wrong="Berlin")


@pytest.fixture(scope="module")
def embedded():
    return load()


@pytest.fixture(scope="module")
def cases():
    return world_cases(load_world(), "dev", 24)


def swapped(case):
    """The same fact with the true object as the new one: the model does not prefer what is now called true."""
    edit = Edit(case.edit.prompt, case.edit.subject, case.edit.target_true, case.edit.target_new)
    return EditCase.of(f"{case.id}-swapped", edit, [probe for probe in case.probes if probe.kind is Kind.NEIGHBOUR])


def test_only_facts_that_the_model_knows(embedded, cases):
    mixed = [swapped(case) if number % 3 == 0 else case for number, case in enumerate(cases)]
    found = known_cases(*embedded, mixed)
    assert {case.id for case in found.cases} < {case.id for case in mixed}
    assert not any(case.id.endswith("swapped") for case in found.cases)
    beside = {Kind.PARAPHRASE, Kind.NEIGHBOUR, Kind.RELATION}
    assert found.asked == sum(any(probe.kind in beside for probe in case.probes) for case in mixed)
    assert found.asked > found.known == len(found.cases) > 0
    assert f"knows {found.known}" in str(found)
    report = evaluate(*embedded, found.cases, None, exact=False)
    assert report["es"].value == 0  # on none of them the new object is likelier


def test_fewer_cases_are_the_first_of_more(embedded, cases):
    few, more = (known_cases(*embedded, cases, number).cases for number in (3, 9))
    assert [case.id for case in few] == [case.id for case in more[:3]]


def test_a_subject_is_taken_once_and_excluded_in_any_spelling(embedded, cases):
    first = known_cases(*embedded, cases, 1).cases[0]
    again = EditCase.of("again", first.edit, first.probes)
    assert len(known_cases(*embedded, [first, again]).cases) == 1
    kept = known_cases(*embedded, cases, exclude={f" {first.edit.subject.upper()} "}).cases
    assert first.edit.subject not in {case.edit.subject for case in kept}


def test_probes_are_limited_by_kind(embedded, cases):
    for case in known_cases(*embedded, cases, 4, kinds=(Kind.NEIGHBOUR, Kind.DISTRACTED), probes=1).cases:
        assert sorted(str(probe.kind) for probe in case.probes) == ["distracted_neighbour", "neighbour", "rewrite"]


def test_what_cannot_be_judged_is_refused(embedded, cases):
    edit = Edit("{} is a citizen of", "Ada", "Berlin")
    with pytest.raises(EditError, match="target_true"):
        known_cases(*embedded, [EditCase.of("a", edit, [PROBE])])
    with pytest.raises(EditError, match="knows none of the"):
        known_cases(*embedded, [swapped(case) for case in cases])
    with pytest.raises(ConfigError, match="number"):
        known_cases(*embedded, cases, 0)


def test_a_subject_is_on_the_same_side_in_every_file():
    def case(name, subject):
        return EditCase.of(name, Edit("{} is in", subject, "Rome", "Paris"), [PROBE])

    people = [f"Person {number}" for number in range(600)]
    one = [case(f"one-{name}", name) for name in people]
    other = [case(f"other-{name}", f"  {name.upper()}") for name in reversed(people[:100])]
    development, held_out = split_by_subject(one)
    assert 160 < len(development) < 240
    assert len(development) + len(held_out) == 600
    sides = [{case.edit.subject.strip().casefold() for case in side} for side in split_by_subject(other)]
    for mine, theirs in zip((development, held_out), sides, strict=True):
        assert theirs <= {case.edit.subject.casefold() for case in mine}
    assert split_by_subject(one, 0)[0] == split_by_subject(one, 1)[1] == []
