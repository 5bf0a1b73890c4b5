"""Tracing against a plain loop, and what it says about the embedded model."""

import numpy as np
import pytest
import torch

import kedit
from analysis_common import FACTS, TOKENIZER, cases, embedded
from kedit.analysis.causal_tracing import draw_noise, embedding_deviation
from kedit.analysis.facts import as_facts
from kedit.analysis.interventions import window_of, window_width
from kedit.analysis.results.tracing import ROLES, FactTrace, TraceResult
from kedit.errors import ConfigError, EditError
from kedit.models import ModelArch
from tiny_models import MODEL_TYPES, tiny_model

MODULES = {"hidden": "block", "mlp": "mlp", "attention": "attention"}


def module_of(arch, kind, layer):
    if kind == "hidden":
        return arch.block(layer)
    return arch.mlp(layer) if kind == "mlp" else arch.block(layer).get_submodule(arch.spec.attention_out)


def probability(model, fact):
    """The answer's probability in one plain forward pass of one prompt."""
    logits = model(torch.tensor([fact.row.ids])).logits[0].double().log_softmax(-1)
    places = range(fact.row.target - 1, len(fact.row.ids) - 1)
    return float(sum(logits[i, fact.row.ids[i + 1]] for i in places).exp())


def clean_outputs(model, arch, fact):
    """Every site's output in the clean run, by kind and block."""
    found, handles = {}, []
    for kind in MODULES:
        for layer in range(arch.num_layers):

            def keep(_module, _args, output, key=(kind, layer)):
                found[key] = (output[0] if isinstance(output, tuple) else output).clone()

            handles.append(module_of(arch, kind, layer).register_forward_hook(keep))
    model(torch.tensor([fact.row.ids]))
    for handle in handles:
        handle.remove()
    return found


def one_restoration(model, arch, fact, noise, clean, kind=None, token=0, layers=()):
    """Noise on the subject, one activation restored at one token: one forward pass of one prompt."""

    def corrupt(_module, _args, output):
        output = output.clone()
        output[0, fact.row.first : fact.row.subject_last + 1] += noise.to(output.dtype)
        return output

    handles = [model.get_input_embeddings().register_forward_hook(corrupt)]
    for layer in layers:

        def restore(_module, _args, output, layer=layer):
            tensor = (output[0] if isinstance(output, tuple) else output).clone()
            tensor[0, token] = clean[kind, layer][0, token]
            return (tensor, *output[1:]) if isinstance(output, tuple) else tensor

        handles.append(module_of(arch, kind, layer).register_forward_hook(restore))
    found = probability(model, fact)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def plain_trace(model, fact, window, noises):
    """Effects by kind [T, L], clean and corrupted probability, by a loop over everything."""
    arch = ModelArch(model)
    clean = clean_outputs(model, arch, fact)
    corrupted = np.mean([one_restoration(model, arch, fact, noise, clean) for noise in noises])
    effects = {}
    for kind in MODULES:
        effects[kind] = np.zeros((fact.num_prompt, arch.num_layers))
        for token in range(fact.num_prompt):
            for layer in range(arch.num_layers):
                near = [layer] if kind == "hidden" else list(window_of(layer, window, arch.num_layers))
                runs = [one_restoration(model, arch, fact, noise, clean, kind, token, near) for noise in noises]
                effects[kind][token, layer] = np.mean(runs) - corrupted
    return effects, probability(model, fact), corrupted


def compare(model, tokenizer, fact, window):
    """Trace a fact both ways; the effects found."""
    found = kedit.trace(model, tokenizer, fact, window=window, samples=2, seed=5, known_only=False)
    arch = ModelArch(model)
    inside = as_facts(arch, tokenizer, fact)[0]
    noises = draw_noise(arch, inside, 2, 3.0 * embedding_deviation(arch, [inside]), 5)
    effects, clean, corrupted = plain_trace(model, inside, window, noises)
    traced = found.facts[0]
    assert traced.clean == pytest.approx(clean, abs=1e-6)
    assert traced.corrupted == pytest.approx(corrupted, abs=1e-6)
    for kind in MODULES:
        np.testing.assert_allclose(traced.effects[kind], effects[kind], atol=1e-6, rtol=0)
        assert np.abs(effects[kind]).max() > 1e-4  # far above the tolerance, so the comparison is worth something
    return inside, traced


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_batched_pass_equals_one_restoration_at_a_time(model_type, dtype):
    model = tiny_model(model_type, layers=3, dtype=dtype)
    fact = FACTS[MODEL_TYPES.index(model_type) % len(FACTS)]
    _, traced = compare(model, TOKENIZER, fact, window=2)
    assert traced.effects["hidden"][-1, -1] == pytest.approx(traced.clean - traced.corrupted, abs=1e-6)


def test_an_answer_of_several_tokens_is_traced_whole():
    model, tokenizer = kedit.load(dtype=torch.float64)
    edit = cases(1)[0].edit
    fact, traced = compare(
        model, tokenizer, kedit.Edit(edit.prompt, edit.subject, "x", edit.target_true + "."), window=1
    )
    assert len(fact.row.labels) == 2
    assert traced.clean > 0.5


def test_a_small_budget_changes_the_passes_and_not_the_effects():
    model = tiny_model("llama", layers=3)
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    one = kedit.trace(model, TOKENIZER, FACTS[0], samples=2, known_only=False)
    in_one = len(calls)
    many = kedit.trace(model, TOKENIZER, FACTS[0], samples=2, known_only=False, tokens=100)
    handle.remove()
    assert in_one < 30
    assert len(calls) - in_one > in_one
    for kind in MODULES:
        np.testing.assert_allclose(one.facts[0].effects[kind], many.facts[0].effects[kind], atol=1e-6, rtol=0)


def test_a_model_whose_weights_are_offloaded_is_traced_alike():
    from accelerate import cpu_offload

    model = tiny_model("llama", layers=3)
    plain = kedit.trace(model, TOKENIZER, FACTS[0], samples=1)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert next(model.parameters()).device.type == "meta"
    found = kedit.trace(model, TOKENIZER, FACTS[0], samples=1)
    assert found.settings == plain.settings
    for kind in MODULES:
        np.testing.assert_allclose(found.facts[0].effects[kind], plain.facts[0].effects[kind], atol=1e-6, rtol=0)


def test_tracing_leaves_no_hook_and_no_changed_weight():
    model = tiny_model("gpt2", layers=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    kedit.trace(model, TOKENIZER, FACTS[:2], samples=1, known_only=False)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_facts_that_the_model_does_not_know_are_left_out_and_named():
    model, tokenizer = embedded()
    known = cases(1)[0].edit
    wrong = kedit.Edit(known.prompt, known.subject, known.target_true, known.target_new)
    found = kedit.trace(model, tokenizer, [wrong, known], kinds=("mlp",), samples=1)
    assert [fact.answer for fact in found.facts] == [known.target_true]
    assert found.skipped == (wrong.text,)
    with pytest.raises(EditError, match="first choice is another answer in all 1 facts"):
        kedit.trace(model, tokenizer, wrong)


def test_without_a_true_target_the_models_own_answer_is_traced():
    model, tokenizer = embedded()
    edit = cases(1)[0].edit
    own = kedit.trace(model, tokenizer, kedit.Edit(edit.prompt, edit.subject, edit.target_new), samples=1)
    given = kedit.trace(model, tokenizer, edit, samples=1)
    assert own.facts[0].answer == edit.target_true
    np.testing.assert_allclose(own.facts[0].effects["mlp"], given.facts[0].effects["mlp"], atol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kinds": ("mlp", "keys")}, "kinds are some of"),
        ({"kinds": "mlp"}, "kinds are some of"),
        ({"window": 0}, "window must be a whole number of at least 1 and at most 6"),
        ({"noise": 0.0}, "noise must be a finite number above 0"),
        ({"samples": 0}, "samples must be a whole number of at least 1"),
    ],
)
def test_options_out_of_range_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        kedit.trace(*embedded(), cases(1), **options)


def test_other_things_than_facts_are_refused():
    with pytest.raises(EditError, match="found str"):
        kedit.trace(*embedded(), ["a fact"])
    with pytest.raises(EditError, match="list of facts is empty"):
        kedit.trace(*embedded(), [])


def test_the_embedded_model_hands_the_fact_over_after_its_first_blocks():
    found = kedit.trace(*embedded(), cases(12), samples=2)
    subject, last = ROLES.index("subject last"), ROLES.index("last")
    hidden = found.average("hidden")[0]
    assert hidden[subject, :3].min() > 0.4
    assert hidden[subject, 3:].max() < hidden[subject, :3].min() / 2
    assert hidden[last, :3].max() < 0.2
    assert hidden[last, -1] > 0.9
    proposal = found.suggest()
    assert proposal.layer in (0, 1)
    assert proposal.handover == 2
    assert "layers=0 for ROME" in str(proposal) or "layers=1 for ROME" in str(proposal)
    assert "12 facts traced" in found.summary()


def test_windows_are_romes():
    assert window_width(None, 48) == 10
    assert window_width(None, 6) == 1
    assert list(window_of(20, 10, 48)) == list(range(15, 25))
    assert list(window_of(0, 3, 6)) == [0, 1]
    assert list(window_of(5, 1, 6)) == [5]


def result_of(mlp, hidden=None):
    """A result with one fact whose subject is one token, with the given effects there."""
    effects = {"mlp": np.array([mlp, [0.0] * len(mlp)])}
    if hidden is not None:
        effects["hidden"] = np.array([hidden, [0.0] * len(hidden)])
    fact = FactTrace("a b", "a", "c", ("a", " b"), (0, 0), 1.0, 0.0, effects)
    return TraceResult((fact, fact), tuple(effects), len(mlp), {})


def test_a_proposal_takes_the_peak_and_its_strong_neighbours_below_the_handover():
    found = result_of([0.1, 0.3, 0.5, 0.3, 0.1, 0.9], [0.8, 0.8, 0.8, 0.7, 0.1, 0.0]).suggest()
    assert (found.layer, found.layers, found.handover) == (2, (1, 2, 3), 3)
    assert result_of([0.1, 0.3, 0.5, 0.3, 0.1, 0.9]).suggest().layer == 5
    assert result_of([1.0] * 9).suggest().layers == (0, 1, 2, 3, 4)


def test_no_layer_is_proposed_without_evidence():
    with pytest.raises(EditError, match="no evidence for any edit layer: up to block 2, .*facts traced: 2"):
        result_of([-0.05, -0.02, -0.1], [-0.1, -0.1, -0.1]).suggest()
    assert result_of([0.1, 0.2, 0.1], [-0.1, -0.2, -0.1]).suggest().handover is None
    # The mean is above 0 in block 1 alone, but a half of the facts says the contrary.
    facts = [result_of(effect).facts[0] for effect in ([-0.3, 0.9, -0.2], [-0.2, -0.4, -0.1])]
    unsure = TraceResult((*facts, *facts), ("mlp",), 3, {})
    assert unsure.average("mlp")[0, 2, 1] > 0
    with pytest.raises(EditError, match="no evidence"):
        unsure.suggest()
    # Of two blocks the one with the larger mean, unless only the other's interval lies above 0.
    facts = [result_of(effect).facts[0] for effect in ([0.2, 0.9], [0.2, -0.4])]
    assert TraceResult((*facts, *facts), ("mlp",), 2, {}).suggest().layer == 0


def test_tokens_get_the_role_they_play():
    tokens = tuple("abcdefg")
    fact = FactTrace("", "", "", tokens, (1, 3), 1.0, 0.0, {"mlp": np.arange(7.0)[:, None]})
    assert fact.roles() == [-1, 0, 1, 2, 3, 4, 5]
    assert fact.by_role("mlp")[:, 0].tolist() == [1, 2, 3, 4, 5, 6]
    assert FactTrace("", "", "", tokens[:2], (0, 1), 1.0, 0.0, {}).roles() == [0, 2]


def test_averages_ignore_facts_without_the_role_and_have_intervals(tmp_path):
    first = FactTrace("", "", "", ("a", "b"), (0, 0), 1.0, 0.0, {"mlp": np.array([[1.0], [0.0]])})
    second = FactTrace("", "", "", ("a", "b", "c"), (0, 1), 1.0, 0.0, {"mlp": np.array([[5.0], [3.0], [0.0]])})
    result = TraceResult((first, second), ("mlp",), 1, {})
    found = result.average("mlp")[:, :, 0]
    assert found[0, 2] == 2.0
    assert (found[1, 2], found[2, 2]) == (1.0, 3.0)
    assert found[0, 0] == 5.0
    assert np.isnan(found[1, 0])
    assert np.isnan(found[0, 1])
    assert "null" in result.save(tmp_path / "trace.json").read_text()


def test_a_single_fact_has_intervals_over_the_noise_and_gives_no_proposal(capsys):
    [case] = cases(1)
    found = kedit.trace(*embedded(), case, samples=6)
    mean, low, high = found.average("mlp")
    there = ~np.isnan(mean)
    assert (low[there] <= mean[there]).all()
    assert (low[there] < high[there]).any()
    # The interval is that of a mean over the samples: with precision the samples are the same ones, fewer of them.
    few = kedit.trace(*embedded(), case, samples=1)
    assert np.isnan(few.average("mlp")[1]).all()
    with pytest.raises(EditError, match=r"(?s)95% over the noise samples.*No layers are proposed from a single fact"):
        found.suggest()
    assert "[95% over the noise samples]" in found.summary()
    several = kedit.trace(*embedded(), cases(3), samples=2)
    assert "[95% over facts]" in several.summary()
    saved = found.to_dict()["facts"][0]
    assert np.shape(saved["margins"]["mlp"]) == np.shape(saved["effects"]["mlp"])


def one_fact(mlp, margin):
    """A result of a single fact whose subject is one token, with the given effects and margins there."""
    effects, margins = ({"mlp": np.array([values, [0.0] * len(values)])} for values in (mlp, margin))
    return TraceResult(
        (FactTrace("a b", "a", "c", ("a", " b"), (0, 0), 1.0, 0.0, effects, margins),), ("mlp",), len(mlp), {}
    )


def test_the_sweep_that_checks_a_proposal():
    found = result_of([0.0, 0.1, 0.5, 0.3, 0.1, 0.0]).suggest()
    assert (found.layer, found.to_try) == (2, (0, 1, 2, 3, 4))
    assert "kedit sweep --set layers=0,1,2,3,4" in str(found)
    with pytest.raises(
        EditError, match="block 1 has the largest effect, 50.0 .40.0, 60.0. points.*sweep --set layers=0,1,2,3$"
    ):
        one_fact([0.0, 0.5, 0.1, 0.0, 0.0], [0.1] * 5).suggest()
    with pytest.raises(EditError, match="does not clearly differ from 0") as error:
        one_fact([0.0, 0.5, 0.1], [0.6] * 3).suggest()
    assert "kedit sweep" not in str(error.value)


def test_the_margin_is_that_of_a_mean_over_the_samples_that_were_drawn():
    from kedit.analysis.causal_tracing import _margin

    gains = np.array([[0.0, 2.0, 4.0, np.nan], [1.0, np.nan, np.nan, np.nan], [3.0, 3.0, 3.0, 3.0]])
    assert _margin(gains) == pytest.approx([1.96 * 2 / 3**0.5, np.nan, 0.0], nan_ok=True)
