"""An editor written by its user: what it may leave out, and what it is told where it goes wrong."""

import pytest
import torch

import kedit
from kedit.editors import EDITORS
from kedit.editors.closed_forms import mixed_keys
from kedit.errors import ConfigError
from kedit.models import Site
from kedit.patch.delta import LowRankDelta
from tiny_models import CONTEXTS, tiny_model, tokenizer

from .common import FRENCH, state


class Plain(kedit.ValueEditor):
    """One association, as the smallest change that writes it; needs no second moments."""

    name = "plain"
    moment_layers = ()

    def solve(self, problem):
        key = mixed_keys(problem.keys)[0]
        return LowRankDelta(problem.residual.T, (key / (key @ key))[:, None])


def build(kind, model):
    return kind(model, tokenizer(), layers=2, steps=3, contexts=CONTEXTS, stop_loss=0.0)


def test_it_needs_no_second_moments(monkeypatch):
    monkeypatch.setattr("kedit.editors.value_editor.estimate_moments", lambda *args, **given: pytest.fail("estimated"))
    model = tiny_model("gpt2")
    before = state(model)
    result = build(Plain, model).apply(FRENCH, kedit.SADR(gamma=0.1))
    assert all(float(delta.norm) > 0 for delta in result.patch.deltas.values())
    result.revert()
    assert state(model) == before


def test_one_that_wants_moments_after_all_is_told(monkeypatch):
    class Greedy(Plain):
        name = "greedy"

        def solve(self, problem):
            problem.whiten(problem.keys[0])

    with pytest.raises(ConfigError, match="moment_layers"):
        build(Greedy, tiny_model("gpt2")).apply(FRENCH)


@pytest.mark.parametrize(
    ("member", "value", "words"),
    [
        ("solve", lambda self, problem: torch.zeros(2, 2), r"solve\(\) must return .* not Tensor"),
        ("solve", lambda self, problem: None, "not NoneType"),
        ("sites", lambda self: (), r"sites\(\) must return a tuple"),
        ("sites", lambda self: None, "returned None"),
        ("sites", lambda self: Site(2, "mlp"), "must return a tuple"),
        ("name", None, "has no name"),
    ],
)
def test_what_is_wrong_with_it_is_said_and_nothing_is_written(member, value, words):
    kind = type("Odd", (Plain,), {member: value})
    model = tiny_model("gpt2")
    before = state(model)
    with pytest.raises(ConfigError, match=words):
        build(kind, model).apply(FRENCH)
    assert state(model) == before


def test_a_name_that_stands_for_no_editor(monkeypatch):
    monkeypatch.setitem(EDITORS._objects, "odd", dict)
    with pytest.raises(ConfigError, match="no class that derives from kedit.Editor"):
        kedit.get_editor("odd", tiny_model("gpt2"), tokenizer())


def test_a_guard_that_is_none():
    with pytest.raises(ConfigError, match="kedit.Guard, not 'strict'"):
        build(Plain, tiny_model("gpt2")).apply(FRENCH, guard="strict")


def test_layers_by_a_mapping_are_refused():
    with pytest.raises(ConfigError, match="layer"):
        kedit.ROME.Config(layers={1: 2})
