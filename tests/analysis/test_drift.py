"""Attention drift against eager attention, and what it says about the embedded model."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import kedit
from analysis_common import TOKENIZER, cases, embedded, few, patches, rome, tiny_case, tiny_patch
from kedit.analysis.bootstrap import correlation, mean_map, pearson, ranks, spearman
from kedit.analysis.edited_models import Patches
from kedit.errors import ConfigError, EditError
from tiny_models import MODEL_TYPES, tiny_model


def eager_state(model, text, answer):
    """The last token's rows in every block, and the answer's probability, by plain forward passes."""
    prompt, whole = (TOKENIZER(found)["input_ids"] for found in (text, f"{text} {answer}"))
    count = len(whole) - len(prompt)
    assert whole[: len(prompt)] == prompt
    out = model(torch.tensor([whole]), output_attentions=True)
    rows = torch.stack([weights[0, :, len(prompt) - 1, : len(prompt)] for weights in out.attentions]).double()
    logs = out.logits[0].double().log_softmax(-1)
    picked = [float(logs[len(prompt) - 1 + i, whole[len(prompt) + i]]) for i in range(count)]
    return rows, math.exp(sum(picked) / count)


@torch.no_grad()
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_drift_equals_eager_attention_before_and_after(model_type):
    model, case = tiny_model(model_type, layers=3), tiny_case()
    patch = tiny_patch(model)
    found = kedit.drift(model, TOKENIZER, case, patch, kinds=("distracted_neighbour",))
    twin = tiny_model(model_type, layers=3, attention="eager")
    probe = found.probes[0]
    asked = next(item for item in case.probes if item.kind == "distracted_neighbour")
    assert (probe.prompt, probe.right) == (asked.prompt, asked.right)
    before, right_before = eager_state(twin, asked.prompt, asked.right)
    patch.apply(twin)
    after, right_after = eager_state(twin, asked.prompt, asked.right)
    kl = (before * (before.clamp(min=1e-300) / after.clamp(min=1e-300)).log()).sum(-1)
    np.testing.assert_allclose(probe.kl, kl.numpy(), atol=2e-5)
    column = probe.column
    assert "Lovelace".endswith(probe.tokens[column].strip())
    assert column == max(
        i for i, token in enumerate(probe.tokens) if token.strip() and "Lovelace".endswith(token.strip())
    )
    np.testing.assert_allclose(probe.weight_before, before[:, :, column].numpy(), atol=2e-6)
    np.testing.assert_allclose(probe.weight_after, after[:, :, column].numpy(), atol=2e-6)
    np.testing.assert_array_equal(probe.over, (after > before.amax(1, keepdim=True))[:, :, column].numpy())
    np.testing.assert_allclose(probe.map_after, after.amax(1).numpy(), atol=2e-6)
    assert probe.right_before == pytest.approx(right_before, rel=1e-4)
    assert probe.right_after == pytest.approx(right_after, rel=1e-4)
    assert probe.kl.max() > 1e-3  # the edit moved something
    assert probe.measure("drift") == pytest.approx(float(kl.sum()), abs=1e-3)
    assert probe.measure("subject") == pytest.approx(float((after - before)[:, :, column].mean()), abs=1e-5)


def test_the_model_is_unedited_afterwards_and_when_something_fails(monkeypatch):
    model, case = tiny_model("gpt2", layers=3), tiny_case()
    patch = tiny_patch(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kedit.drift(model, TOKENIZER, case, patch)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    calls = []

    def fails_edited(*arguments):
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("power cut")
        return real(*arguments)

    import kedit.analysis.attention_drift as module

    real = module.attention_to_subject
    monkeypatch.setattr(module, "attention_to_subject", fails_edited)
    with pytest.raises(RuntimeError, match="power cut"):
        kedit.drift(model, TOKENIZER, case, patch)
    assert len(calls) == 2
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.fixture(scope="module")
def plain_and_sadr():
    """Drift of a few cases under ROME and under ROME with SADR."""
    return [kedit.drift(*embedded(), few(), patches(regularizer)) for regularizer in (None, "sadr")]


def test_rome_moves_attention_to_the_subject_and_sadr_less_in_the_heads_it_restrains(plain_and_sadr):
    plain, sadr = plain_and_sadr
    assert (plain.label, sadr.label) == ("ROME", "ROME + SADR")
    found = plain.against(sadr)
    assert found["other"].value < found["here"].value / 2
    assert found["difference"].value == pytest.approx(found["other"].value - found["here"].value)
    assert plain.heads()[0].excess == max(one.excess for one in plain.heads()) > 0.05
    assert plain.map("gain").shape == (6, 8)
    assert {probe.kind for probe in plain.probes} == {"rewrite", "relation", "distracted_neighbour"}
    text = plain.summary()
    assert "ROME: 24 probes (distracted_neighbour) of 6 edits" in text
    assert text.count("Pearson") == 4
    assert "the right answer's probability changes by -" in text


def test_results_are_saved_as_json(plain_and_sadr, tmp_path):
    import json

    found = json.loads(plain_and_sadr[0].save(tmp_path / "drift.json").read_text())
    assert len(found["probes"]) == len(plain_and_sadr[0].probes)
    assert np.array(found["probes"][0]["kl"]).shape == (6, 8)


def test_only_probes_that_both_asked_are_compared(plain_and_sadr):
    plain, sadr = plain_and_sadr
    ids = [case.id for case in few()]
    some = replace(sadr, probes=tuple(probe for probe in sadr.probes if probe.case in ids[:4]))
    assert plain.against(some)["here"].cases <= 4 < plain.against(sadr)["here"].cases
    first = replace(plain, probes=tuple(probe for probe in plain.probes if probe.case in ids[4:]))
    with pytest.raises(EditError, match="different probes"):
        first.against(some)
    calm = replace(plain, probes=tuple(replace(probe, over=probe.over & False) for probe in plain.probes))
    with pytest.raises(EditError, match="no head attends"):
        calm.against(sadr)
    with pytest.raises(EditError, match="No probe of kind paraphrase"):
        plain.of("paraphrase")


def test_cases_without_fitting_probes_and_options_that_clash_are_refused():
    model, case = tiny_model("gpt2", layers=3), tiny_case()
    patch = tiny_patch(model)
    with pytest.raises(EditError, match="None of the 1 cases has a probe of kind relation"):
        kedit.drift(model, TOKENIZER, case, patch, kinds=("relation",))
    with pytest.raises(ConfigError, match="nothing to regularize"):
        kedit.drift(model, TOKENIZER, case, patch, "sadr")
    with pytest.raises(ConfigError, match="belongs to an editor given by name"):
        kedit.drift(model, TOKENIZER, case, patch, config={"steps": 3})
    with pytest.raises(EditError, match="There is no patch for 1 of 1 cases: 'tiny'"):
        kedit.drift(model, TOKENIZER, case, {"other": patch})
    with pytest.raises(ConfigError, match="another model object"):
        kedit.drift(model, TOKENIZER, case, rome())


def test_a_case_that_cannot_be_edited_is_named_and_the_others_go_on():
    model, tokenizer = embedded()
    good, bad = cases(2)
    broken = kedit.Edit("The story of Al " * 60 + "{} is", "Bo", "red")  # longer than the context window
    bad = kedit.EditCase(id=bad.id, edit=broken, probes=bad.probes)
    made = Patches(model, tokenizer, [good, bad], kedit.ROME(model, tokenizer, contexts=["{}"], steps=3))
    assert list(made.all()) == [good.id]
    assert list(made.failures) == [bad.id]
    assert "context window" in made.failures[bad.id]


def test_rank_and_linear_correlations():
    x = np.array([1.0, 2.0, 3.0, 4.0, 4.0])
    y = np.array([1.0, 8.0, 27.0, 64.0, 64.0])
    assert spearman(x, y) == pytest.approx(1.0)
    assert pearson(x, y) == pytest.approx(float(np.corrcoef(x, y)[0, 1]))
    assert ranks(np.array([3.0, 1.0, 3.0, 2.0])).tolist() == [2.5, 0.0, 2.5, 1.0]
    assert math.isnan(pearson(x, np.zeros(5)))


def test_intervals_come_from_drawing_whole_groups():
    rng = np.random.default_rng(0)
    x = rng.normal(size=60)
    y = x + rng.normal(size=60)
    apart = correlation(pearson, x, y, range(60), resamples=500)
    assert apart.low < apart.value < apart.high
    assert (apart.n, apart.cases) == (60, 60)
    # Three copies of every value in a group of their own say no more than one copy.
    thrice = correlation(pearson, np.tile(x, 3), np.tile(y, 3), list(range(60)) * 3, resamples=500)
    assert thrice.high - thrice.low == pytest.approx(apart.high - apart.low, rel=0.2)
    assert correlation(pearson, x, y, ["one"] * 60).low is None


def test_mean_maps_have_the_interval_of_the_mean():
    values = np.random.default_rng(1).normal(size=(200, 2, 3))
    found = mean_map(values)
    np.testing.assert_allclose(found[0], values.mean(0))
    np.testing.assert_allclose(found[2] - found[1], 2 * 1.96 * values.std(0) / math.sqrt(200), rtol=0.15)
