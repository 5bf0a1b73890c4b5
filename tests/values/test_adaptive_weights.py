"""Regularizers without γ: the least penalty among the values that say the target."""

from dataclasses import dataclass

import pytest
import torch

import kedit
from kedit.errors import ConfigError
from kedit.models import ModelArch
from kedit.regularizers import KeyNorm
from kedit.values.adaptive_weights import LEAST, PATIENCE, SHARE, START, AdaptiveWeights
from reference.float64 import TrueFloat64
from tiny_models import CONTEXTS, EDITS, moments, tiny_model, tokenizer

SAID = 5.6  # of a random model that begins at 6.1
ALL = [kedit.Edit(*EDITS[name]) for name in ("start", "middle", "end")]


def editor(name="rome", dtype=torch.float64, **config):
    model = tiny_model("llama", dtype=dtype)
    width = ModelArch(model).weight(0).matrix.shape[1]
    given = {"layers": (1,), "steps": 40, "lr": 0.5, "clamp": 20.0, "stop_loss": SAID, **config}
    return kedit.get_editor(
        name, model, tokenizer("plain"), moments={i: moments(width, i) for i in range(4)}, contexts=CONTEXTS, **given
    )


@dataclass(frozen=True, kw_only=True)
class Scaled(kedit.SADR):
    """The drift in another unit."""

    unit: float = 1.0

    def penalty(self, now, before):
        return self.unit * super().penalty(now, before)


@dataclass(frozen=True, kw_only=True)
class HeadsTwice(kedit.SADR):
    """As of a model that has every head twice."""

    def penalty(self, now, before):
        return super().penalty(now, before) + super().penalty(now, before)


def optimised(regularizer, **config):
    made = editor(**config)
    with TrueFloat64():
        result = made.apply(ALL[1], regularizer=regularizer)
    result.revert()
    [delta] = result.patch.deltas.values()
    return delta.dense, result.log[0]


@pytest.mark.parametrize("other", [Scaled(unit=1024.0), Scaled(unit=2.0**-20), HeadsTwice()])
def test_the_unit_of_the_penalty_has_no_influence(other):
    own, log = optimised("sadr")
    assert any(row["weight"] > 0 for row in log), "the penalty never counted"
    scaled, _ = optimised(other)
    assert torch.equal(own, scaled)


def test_the_value_says_the_target_and_drifts_least_of_those_that_do():
    _, log = optimised("sadr")
    said = [row["sadr_raw"] for row in log if row["nll"] <= SAID]
    first = next(row for row in log if row["nll"] <= SAID)
    assert first["sadr"] == pytest.approx(START)  # the drift counts relative to this step's
    assert min(said) < 0.8 * first["sadr_raw"]
    assert all(row["sadr"] == 0 for row in log[: log.index(first)])


def test_together_is_one_by_one():
    made = editor()
    with TrueFloat64():
        together = made.propose(ALL, ["sadr", KeyNorm()])
        alone = [made.propose(edit, ["sadr", KeyNorm()])[0] for edit in ALL]
    for one, other in zip(together, alone, strict=True):
        for name, delta in one.deltas.items():
            assert float((delta.dense - other.deltas[name].dense).norm() / delta.dense.norm()) < 1e-8


def test_an_edit_that_never_says_its_target_is_a_plain_one():
    own, log = optimised("sadr", stop_loss=0.0, steps=4)
    assert len(log) == 4
    assert all(row["weight"] == 0 for row in log)
    assert torch.equal(own, optimised(None, stop_loss=0.0, steps=4)[0])


def test_gamma_by_number_is_the_published_form():
    _, log = optimised(kedit.SADR(gamma=0.1))
    assert "weight" not in log[0]


def test_other_texts_are_no_gamma():
    with pytest.raises(ConfigError, match="SADR.gamma is a number, 'auto' or None, not 'car'"):
        kedit.SADR(gamma="car")


def weigh(weights, nll, penalty, delta):
    terms = {"nll": torch.tensor(nll), "one": torch.tensor(penalty)}
    columns, finished, _ = weights.weigh(terms, delta, torch.arange(len(nll)))
    return terms["one"], columns["weight"], finished


def test_the_weight_rises_while_the_target_is_said_and_falls_while_it_is_not():
    delta = torch.zeros(1, 1, 2)
    weights = AdaptiveWeights(["one"], 0.1, delta)
    seen = [weigh(weights, [nll], [4.0], delta)[1].item() for nll in (3.0, 0.05, 0.05, 0.5, 0.05)]
    assert seen == pytest.approx([0, START, START * 1.4, START * 1.96, START * 0.98])


def test_an_edit_ends_when_its_penalty_falls_no_further():
    delta = torch.zeros(1, 1, 2)
    weights = AdaptiveWeights(["one"], 0.1, delta)
    ends = [bool(weigh(weights, [0.05], [4.0], delta)[2]) for _ in range(PATIENCE + 1)]
    assert ends == [False] * PATIENCE + [True]


@pytest.mark.parametrize("before", [3, 30])
def test_an_edit_makes_a_third_more_steps_at_most(before):
    delta = torch.zeros(1, 1, 2)
    weights = AdaptiveWeights(["one"], 0.1, delta)
    for _ in range(before):
        assert not bool(weigh(weights, [3.0], [1.0], delta)[2])
    most = max(LEAST, round(SHARE * before))
    ends = [bool(weigh(weights, [0.05], [0.5**step], delta)[2]) for step in range(most + 1)]
    assert ends == [False] * most + [True]


def test_attention_is_read_only_where_it_counts(monkeypatch):
    """It changes no value, and costs nothing until the target is said."""
    seen = []

    class Counting(kedit.SADR):
        def penalty(self, now, before):
            seen.append(now.step)
            return super().penalty(now, before)

    lazy, log = optimised(Counting())
    first = next(i for i, row in enumerate(log) if row["nll"] <= SAID)
    assert seen == [0, *range(first, len(log))]
    assert ["sadr_raw" in row for row in log] == [step in seen for step in range(len(log))]
    monkeypatch.setattr(AdaptiveWeights, "any_reached", lambda *_: True)
    assert torch.equal(optimised("sadr")[0], lazy)


def test_the_best_value_is_kept_per_edit():
    weights = AdaptiveWeights(["one"], 0.1, torch.zeros(2, 1, 1))
    for nll, penalty, value in (
        ([0.05, 3.0], [4.0, 4.0], 1.0),
        ([0.05, 3.0], [2.0, 1.0], 2.0),
        ([3.0, 3.0], [1.0, 0.5], 3.0),
    ):
        weigh(weights, nll, penalty, torch.full((2, 1, 1), value))
    assert weights.best(torch.full((2, 1, 1), 9.0)).flatten().tolist() == [2.0, 9.0]


def test_a_penalty_of_zero_needs_no_further_steps():
    delta = torch.zeros(1, 1, 2)
    weights = AdaptiveWeights(["one"], 0.1, delta)
    penalty, _, finished = weigh(weights, [0.05], [0.0], delta)
    assert penalty.item() == 0
    assert bool(finished)


def test_there_are_more_steps_unless_the_user_gives_them():
    rome = kedit.ROME(tiny_model("llama"), tokenizer())
    assert rome.describe_call("sadr")["config"]["steps"] == 1.25 * rome.describe_call()["config"]["steps"]
    assert kedit.ROME(tiny_model("llama"), tokenizer(), steps=7).describe_call("sadr")["config"]["steps"] == 7
