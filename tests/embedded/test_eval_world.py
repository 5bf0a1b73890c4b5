"""The embedded world's own cases."""

from kedit.embedded import load_world
from kedit.embedded.cases import world_cases
from kedit.evaluation.cases import Kind, drop_edited


def test_the_embedded_world_asks_in_every_way_that_it_has():
    world = load_world()
    cases = world_cases(world, "test", 60, seed=1)
    assert cases == world_cases(world, "test", 60, seed=1)
    assert cases != world_cases(world, "test", 60, seed=2)
    kinds = {probe.kind for case in cases for probe in case.probes}
    assert kinds == set(Kind) - {Kind.COMMONSENSE}
    edited = {(case.edit.subject, fact[1]) for case in cases for fact in [case.probes[0].fact]}
    assert len(edited) == 60
    for case in cases:
        assert case.edit.target_new != case.edit.target_true
        for probe in case.probes:
            if probe.kind in (Kind.NEIGHBOUR, Kind.DISTRACTED, Kind.RELATION):
                assert probe.fact not in edited
                assert case.edit.target_new == probe.wrong != probe.right
            if probe.kind is Kind.DISTRACTED:
                assert probe.prompt.startswith(f"{case.edit.text} {case.edit.target_new}. ")
        assert all(case.edit.target_new in reference for reference in case.references)
        assert case.references
    assert drop_edited(cases) == (cases, 0)  # no case probes what another one edits
