"""The choice among candidates, from metrics alone, and the candidates themselves."""

import math

import pytest

import kedit
from kedit.calibration.candidates import (
    Candidate,
    clamp_candidates,
    gamma_candidates,
    layer_candidates,
    stages_of,
    threshold_candidates,
    weight_candidates,
    with_changes,
)
from kedit.calibration.choice import difference, kept, measured, ranked
from kedit.evaluation import EvalReport, Kind
from kedit.evaluation.records import CaseRecord, CaseScore, ProbeScore
from kedit.prompts.likelihood import Answer

PROBES = {
    "es": Kind.REWRITE,
    "ps": Kind.PARAPHRASE,
    "ns": Kind.NEIGHBOUR,
    "dns": Kind.DISTRACTED,
    "rs": Kind.RELATION,
}


def answer(nll):
    return Answer(nll, (1,), (1,))


def report(cases=10, good=0.0, **shares):
    """A run in which these shares (in per cent) of the probes succeed, one probe of each kind per case."""
    records = []
    for number in range(cases):
        probes = tuple(
            ProbeScore(
                kind=PROBES[name], right=answer(good if number < share * cases / 100 else 2.0), wrong=answer(1.0)
            )
            for name, share in shares.items()
        )
        score = CaseScore(probes=probes)
        records.append(CaseRecord(id=str(number), prompt="", asked=(), before=score, after=score, seconds={}))
    return EvalReport(records, {})


def test_least_harm_among_edits_that_hold():
    runs = {
        "start": report(es=100, ps=90, ns=80, dns=30, rs=10),
        "misses": report(es=90, ps=90, ns=80, dns=80, rs=80),
        "narrow": report(es=100, ps=80, ns=80, dns=80, rs=80),
        "good": report(es=100, ps=90, ns=80, dns=50, rs=20),
    }
    assert ranked(runs) == ["good", "start", "narrow", "misses"]
    assert kept(measured(runs["good"])) == 50
    gained = difference(runs["good"], runs["start"])
    assert gained.value == pytest.approx(10)
    assert gained.low <= 10 <= gained.high
    assert gained.n == 30


def test_where_none_reaches_99_the_highest_counts():
    runs = {"a": report(es=80, ps=50, ns=90), "b": report(es=90, ps=50, ns=80), "c": report(es=90, ps=50, ns=70)}
    assert ranked(runs)[0] == "b"


def test_a_tie_goes_to_the_first_in_order():
    runs = {
        "rule": report(100, es=100, ps=90, ns=80),
        "near": report(100, es=100, ps=90, ns=81),
        "far": report(100, es=100, ps=90, ns=82),
    }
    assert ranked(runs) == ["near", "far", "rule"]
    assert ranked({name: runs[name] for name in ("rule", "near")})[0] == "rule"


def test_a_reference_sets_the_bar_and_is_not_chosen():
    runs = {"a": report(es=100, ps=70, ns=90), "b": report(es=100, ps=90, ns=50)}
    assert ranked(runs)[0] == "b"
    weak = {"a": report(es=100, ps=70, ns=90), "c": report(es=100, ps=60, ns=95)}
    assert ranked(weak, report(es=100, ps=90, ns=20)) == ["a", "c"]  # none qualifies: by PS
    assert ranked(weak)[0] == "a"


def test_slack_is_one_prompt():
    runs = {"start": report(6, es=100, ps=100, ns=50), "one less": report(6, es=83, ps=83, ns=100)}
    assert ranked(runs)[0] == "start"
    assert ranked(runs, slack=True)[0] == "one less"


def test_equals_of_a_first_look_are_ordered_by_their_margins():
    runs = {"start": report(es=100, ns=50), "weak": report(good=0.9, es=100, ns=50), "strong": report(es=100, ns=50)}
    assert ranked(runs) == ["start", "weak", "strong"]
    assert ranked(runs, slack=True) == ["start", "strong", "weak"]


def test_metrics_that_the_cases_lack_do_not_count():
    assert kept(measured(report(es=100, rs=40))) == 40
    assert ranked({"a": report(es=100, rs=40), "b": report(es=100, rs=60)})[0] == "b"
    assert math.isnan(kept(measured(report(es=100, ps=90))))
    assert ranked({"a": report(es=100, ps=90), "b": report(es=90, ps=90)}, slack=True) == ["a", "b"]


def test_layers_from_the_nearest_on_with_those_that_tracing_speaks_for():
    start = Candidate(kedit.ROME.Config(layers=5))
    found = layer_candidates(start, 30, traced=[13, 29])
    assert [each.value for each in found[:3]] == [[5], [4], [6]]
    assert sorted(each.value[0] for each in found) == [0, 2, 4, 5, 6, 8, 10, 12, 13, 14, 16, 18]
    assert len(layer_candidates(start, 30, quick=True)) < 7
    assert [each.value for each in layer_candidates(Candidate(kedit.ROME.Config(layers=0)), 1)] == [[0]]
    spans = layer_candidates(Candidate(kedit.MEMIT.Config(layers=(3, 4, 5))), 12)
    assert spans[0].value == [3, 4, 5]
    assert all(len(each.value) == 3 and each.value[0] >= 0 for each in spans)


def test_weights_are_multiples_and_no_longer_lowered():
    start = Candidate(kedit.MEMIT.Config(layers=(1,), moment_weight=100.0, min_share=0.9))
    first, *others = weight_candidates(start, "moment_weight")
    assert first.config == start.config
    assert [(each.config.moment_weight, each.config.min_share) for each in others] == [
        (10.0, 0.0),
        (30.0, 0.0),
        (300.0, 0.0),
        (1000.0, 0.0),
    ]
    assert [each.config.clamp for each in clamp_candidates(start, quick=True)] == [4.0, 2.0, 8.0]


def test_thresholds_by_their_rule():
    config = kedit.AlphaEdit.Config(layers=(1,))
    assert [each.value for each in threshold_candidates(Candidate(config))] == [0.5, 0.1, 0.3, 0.7, 0.9]
    published = config.replace(threshold=0.02, threshold_rule="absolute")
    assert threshold_candidates(Candidate(published))[1].value == pytest.approx(0.0002)


def test_gammas_from_the_usual_one_on():
    start = Candidate(kedit.ROME.Config(layers=1))
    assert [each.gamma for each in gamma_candidates(start, 0.25)] == [0.25, 0.025, 0.075, 0.5, 1.0]
    first, second, *_ = gamma_candidates(start, "auto")
    assert (first.gamma, first.config) == ("auto", start.config)
    assert second.config.stop_loss == 0.2
    assert second.changed == {"stop_loss": 0.2}
    first, second, *_ = gamma_candidates(with_changes(start, {"steps": 7, "stop_loss": 0.7}), "auto")
    assert (first.config.stop_loss, second.config.stop_loss, second.config.steps) == (0.7, 0.2, 7)
    assert (first.changed, second.changed) == ({"steps": 7, "stop_loss": 0.7}, {"steps": 7, "stop_loss": 0.2})


def test_stages_follow_the_hyper_parameters():
    assert stages_of(kedit.ROME.Config(layers=1), False) == ("layers", "clamp")
    assert stages_of(kedit.MEMIT.Config(layers=1), True) == ("layers", "clamp", "moment_weight", "gamma")
    assert stages_of(kedit.AlphaEdit.Config(layers=1), False) == ("layers", "clamp", "threshold", "l2")
