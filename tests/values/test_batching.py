"""Editing many facts together equals editing each alone; prefix-cached equal full forward passes; edits leave no trace."""

import dataclasses

import pytest
import torch

import kedit
from kedit.errors import ConfigError
from kedit.models import ModelArch, Site
from kedit.patch.ledger import Ledger
from kedit.prompts.encode import encode_edits
from kedit.regularizers.base import Needs
from kedit.values.scheduler import Engine
from reference.float64 import TrueFloat64
from tiny_models import CONTEXTS, EDITS, MODEL_TYPES, moments, tiny_model, tokenizer

ALL = [kedit.Edit(*EDITS[name]) for name in ("start", "middle", "end")]


def editor(name, model_type, kind="plain", **config):
    model = tiny_model(model_type, dtype=torch.float64)
    arch = ModelArch(model)
    given = {"layers": (1, 2) if name in ("memit", "pmet", "alphaedit") else (1,), "steps": 6, "stop_loss": 0.0}
    width = arch.weight(0).matrix.shape[1]
    return kedit.get_editor(
        name,
        model,
        tokenizer(kind),
        moments={i: moments(width, i) for i in range(4)},
        contexts=CONTEXTS,
        **{**given, **config},
    )


def relative(one, other):
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("gamma", [pytest.param(0.0, marks=pytest.mark.slow), 0.3])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_together_is_one_by_one(model_type, gamma):
    made = editor("rome", model_type)
    regularizer = kedit.SADR(gamma=gamma) if gamma else None
    with TrueFloat64():
        together = made.propose(ALL, regularizer)
        alone = [made.propose(edit, regularizer)[0] for edit in ALL]
    for one, other in zip(together, alone, strict=True):
        for name, delta in one.deltas.items():
            assert relative(delta.dense, other.deltas[name].dense) < 1e-10


@pytest.mark.parametrize("kind", ["bos", "left", "nopad"])
def test_together_is_one_by_one_with_other_tokenizers(kind):
    made = editor("rome", "llama", kind)
    with TrueFloat64():
        together = made.propose(ALL, kedit.SADR(gamma=0.3))
        alone = [made.propose(edit, kedit.SADR(gamma=0.3))[0] for edit in ALL]
    for one, other in zip(together, alone, strict=True):
        for name, delta in one.deltas.items():
            assert relative(delta.dense, other.deltas[name].dense) < 1e-10


@pytest.mark.parametrize("name", ["rome", "memit", "pmet"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_prefix_cached_passes_give_what_full_ones_do(model_type, name):
    made = editor(name, model_type)
    with TrueFloat64():
        results = []
        for mode in ("cached", "full"):
            made.engine.mode = mode
            results.append(made.apply(ALL, kedit.SADR(gamma=0.3)))
            results[-1].revert()
    cached, full = (result.patch.deltas for result in results)
    for weight, delta in cached.items():
        assert relative(delta.dense, full[weight].dense) < 1e-8


def test_an_unknown_mode_is_refused():
    made = editor("rome", "gpt2")
    made.engine.mode = "partial"
    with pytest.raises(ConfigError, match=r"engine\.mode is 'auto', 'cached' or 'full', not 'partial'"):
        made.propose(ALL[0])


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_model_type_passes_its_own_check(model_type, caplog):
    made = editor("rome", model_type)
    assert made.engine.mode == "auto"
    made.propose(ALL[0])
    assert list(made.engine._verdicts.values()) == [True]
    assert "full forward passes" not in caplog.text


def test_a_model_that_fails_the_check_runs_full_passes_and_says_so(caplog, monkeypatch):
    made = editor("rome", "gpt2")
    expected = made.propose(ALL[0])[0]
    again = editor("rome", "gpt2")
    monkeypatch.setattr(
        "kedit.values.cached_forward._right_aligned", lambda stored, lengths, prefix: stored[:, :, :prefix] * 2
    )
    found = again.propose(ALL[0])[0]
    assert "full forward passes" in caplog.text
    for weight, delta in found.deltas.items():
        assert relative(delta.dense, expected.deltas[weight].dense) < 1e-6


def test_the_budget_changes_nothing_but_rounding_and_one_budget_nothing_at_all():
    made = editor("memit", "llama", steps=4)
    patches = []
    for budget in (8_192, 40, 8_192):
        made.engine.budget = budget
        result = made.apply(ALL)
        patches.append(result.patch)
        result.revert()
    assert patches[0].provenance["budget"] == 8_192
    for weight, delta in patches[0].deltas.items():
        assert torch.equal(delta.dense, patches[2].deltas[weight].dense)
        assert relative(patches[1].deltas[weight].dense, delta.dense) < 1e-6


def test_the_order_of_a_batch_is_irrelevant():
    made = editor("memit", "qwen2", steps=4)
    one = made.apply(ALL)
    one.revert()
    other = made.apply(ALL[::-1])
    other.revert()
    for weight, delta in one.patch.deltas.items():
        assert relative(delta.dense, other.patch.deltas[weight].dense) < 1e-8


def test_lack_of_memory_halves_the_budget_and_goes_on(monkeypatch, caplog):
    made = editor("memit", "gpt2", steps=3)
    expected = made.apply(ALL)
    expected.revert()
    from kedit.values import scheduler

    original, calls = scheduler.optimize, []

    def scarce(runner, *args, **kwargs):
        calls.append(runner.wave.num_edits)
        if runner.wave.num_edits > 1:
            raise torch.OutOfMemoryError("out of memory")
        return original(runner, *args, **kwargs)

    monkeypatch.setattr(scheduler, "optimize", scarce)
    result = made.apply(ALL)
    assert made.engine.halved >= 1
    assert "Out of memory" in caplog.text
    assert result.patch.provenance["budget"] == made.engine.used == made.engine.budget < 8_192
    assert calls[0] == len(ALL)
    for weight, delta in expected.patch.deltas.items():
        assert relative(result.patch.deltas[weight].dense, delta.dense) < 1e-6


def test_an_edit_that_does_not_fit_alone_is_an_error_and_leaves_the_model(monkeypatch):
    made = editor("memit", "gpt2", steps=3)
    before = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}

    def none(*_args, **_kwargs):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("kedit.values.scheduler.optimize", none)
    with pytest.raises(kedit.KEditError, match="does not fit"):
        made.apply(ALL)
    assert all(torch.equal(tensor, before[name]) for name, tensor in made.model.state_dict().items())


def test_memit_without_ridge_inserts_z_exactly():
    """λ → 0, bare prompt only, one layer: the model gives z at each edit's subject."""
    model = tiny_model("gpt2", dtype=torch.float64)
    arch = ModelArch(model)
    width = arch.weight(0).matrix.shape[1]
    made = kedit.MEMIT(
        model,
        tokenizer(),
        layers=2,
        steps=6,
        stop_loss=0.0,
        moment_weight=1e-12,
        contexts=["{}"],
        moments={2: moments(width, 2)},
    )
    requests = encode_edits(arch, tokenizer(), ALL, ["{}"], Needs())
    with TrueFloat64():
        values = Engine(arch).optimize([Site(2, "block")], requests, made.config.objective, [], Needs())
        made.apply(ALL)
        from kedit.keys import read

        found = read.outputs(arch, [request.rewrite[0] for request in requests], Site(2, "block"))
    assert relative(found, values.value[:, 0]) < 1e-8


def test_an_early_stop_of_one_edit_leaves_the_others_alone():
    made = editor("rome", "gpt_neox", steps=12)
    with TrueFloat64():
        free = made.propose(ALL)
        losses = [editor("rome", "gpt_neox", steps=12).apply(edit).log[0][3]["total"] for edit in ALL]
        stopping = editor("rome", "gpt_neox", steps=12, stop_loss=sorted(losses)[0] + 1e-6)
        together = stopping.propose(ALL)
        alone = [stopping.propose(edit)[0] for edit in ALL]
    differs = []
    for one, other, unstopped in zip(together, alone, free, strict=True):
        ((_, delta),) = one.deltas.items()
        ((_, expected),) = other.deltas.items()
        assert relative(delta.dense, expected.dense) < 1e-10
        differs.append(relative(delta.dense, next(iter(unstopped.deltas.values())).dense) > 1e-3)
    assert any(differs)


def test_alphaedit_protects_the_keys_of_past_edits_and_forgets_those_it_reverts(tmp_path):
    made = editor("alphaedit", "gpt2", l2=1e-3, threshold=0.6, threshold_rule="mean")
    width = ModelArch(made.model).weight(1).matrix.shape[1]
    first = made.apply(ALL[0])
    remembered = made.history.keys(1, width)
    assert remembered.shape == (1, width)
    made.history.save(tmp_path / "history.safetensors")
    second = made.apply(ALL[1])
    assert made.history.keys(1, width).shape == (2, width)
    weight = ModelArch(made.model).weight(1).name
    protected = second.patch.deltas[weight].dense @ remembered[0].double()
    first.revert()
    second.revert()
    assert made.history.keys(1, width).shape == (0, width)
    unprotected_patch = made.apply(ALL[1]).patch
    unprotected = unprotected_patch.deltas[weight].dense @ remembered[0].double()
    assert float(protected.norm()) < 0.5 * float(unprotected.norm())
    other = editor("alphaedit", "gpt2", l2=1e-3, threshold=0.6, threshold_rule="mean")
    other.history.load(tmp_path / "history.safetensors")
    assert torch.equal(other.history.keys(1, width), remembered)


def test_alphaedit_computes_with_what_it_kept_of_past_keys_as_from_scratch():
    made = editor("alphaedit", "gpt2", l2=1e-3, threshold=0.6, threshold_rule="mean")
    results = [made.apply(edit) for edit in ALL]
    results[1].revert()
    after_a_revert = made.apply(ALL[1])
    kept = {name: delta.dense for name, delta in after_a_revert.patch.deltas.items()}
    after_a_revert.revert()
    made.null_space._past.clear()
    again = made.apply(ALL[1])
    for name, delta in again.patch.deltas.items():
        assert float(delta.norm) > 1e-3
        assert relative(kept[name], delta.dense) < 1e-9


def test_alphaedit_follows_its_second_moments():
    made = editor("alphaedit", "gpt2", l2=1e-3, threshold=0.6, threshold_rule="mean")
    other = {layer: moment.matrix.flip(0, 1) for layer, moment in made.moments.items()}
    made.propose(ALL[0])
    made.moments = other
    fresh = editor("alphaedit", "gpt2", l2=1e-3, threshold=0.6, threshold_rule="mean")
    fresh.moments = other
    [found], [expected] = made.propose(ALL[0]), fresh.propose(ALL[0])
    for name, delta in expected.deltas.items():
        assert relative(found.deltas[name].dense, delta.dense) < 1e-9


@pytest.mark.parametrize("name", ["rome", "alphaedit"])
def test_many_edits_one_after_another_revert_in_any_order_bit_for_bit(name):
    made = editor(name, "llama", steps=2)
    before = {key: tensor.clone() for key, tensor in made.model.state_dict().items()}
    edits = [dataclasses.replace(edit, target_new=target) for target in ("Rome", "London", "Paris") for edit in ALL]
    results = [made.apply(edit) for edit in edits]
    order = torch.randperm(len(results), generator=torch.Generator().manual_seed(0)).tolist()
    for i in order[:-2]:
        results[i].revert()
    assert not all(torch.equal(t, before[key]) for key, t in made.model.state_dict().items())
    Ledger.of(made.model).revert_all()
    assert all(torch.equal(t, before[key]) for key, t in made.model.state_dict().items())


@pytest.mark.parametrize("seed", range(6))
def test_waves_are_cut_where_padding_costs_more_than_a_wave(seed):
    """Against every way to cut the list."""
    from itertools import combinations
    from random import Random
    from types import SimpleNamespace

    from kedit.values.scheduler import _alike

    rng, fixed = Random(seed), 20
    spans = sorted(rng.choice([2, 3, 5, 9, 14]) for _ in range(10))
    counts = [rng.randint(1, 4) for _ in spans]
    requests = [SimpleNamespace(span=s, prompts=lambda _, c=c: [None] * c) for s, c in zip(spans, counts, strict=True)]

    def cost(parts):
        return sum(fixed + max(spans[i] for i in part) * sum(counts[i] for i in part) for part in parts)

    every = []
    for number in range(10):
        for cuts in combinations(range(1, 10), number):
            bounds = [0, *cuts, 10]
            every.append(cost([range(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]))
    found = _alike(requests, range(10), fixed)
    assert [number for part in found for number in part] == list(range(10))
    assert cost(found) == min(every)
