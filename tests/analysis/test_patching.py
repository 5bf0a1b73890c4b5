"""Patching against one exchange at a time, and what it says about the embedded model."""

import numpy as np
import pytest
import torch

from analysis_common import TOKENIZER, embedded, few, patches, tiny_case, tiny_patch
from kedit.analysis.activation_patching import patch_activations
from kedit.analysis.interventions import window_of
from kedit.analysis.probes import probe_tokens
from kedit.analysis.results.patching import CONTAMINATE, EDITED, ORIGINAL, RESTORE
from kedit.capture import capture_attention, substitute_attention
from kedit.errors import ConfigError, EditError, UnknownNameError
from kedit.models import ModelArch
from tiny_models import MODEL_TYPES, tiny_model


def module_of(arch, activation, layer):
    if activation == "hidden":
        return arch.block(layer)
    return arch.mlp(layer) if activation == "mlp" else arch.block(layer).get_submodule(arch.spec.attention_out)


def probability(model, row):
    logits = model(torch.tensor([row.ids])).logits[0].double().log_softmax(-1)
    picked = [logits[i, row.ids[i + 1]] for i in range(row.target - 1, len(row.ids) - 1)]
    return float((sum(picked) / len(picked)).exp())


def plain(model, arch, patch, row, activation, layers):
    """One answer with one activation exchanged, restore and contaminate: full forward passes of one prompt each."""
    places = torch.arange(row.target - 1, len(row.ids) - 1)

    def keep(store):
        handles = []
        for layer in layers:

            def hook(_m, _a, output, layer=layer):
                store[layer] = (output[0] if isinstance(output, tuple) else output)[0, places].clone()

            handles.append(module_of(arch, activation, layer).register_forward_hook(hook))
        return handles

    def put(store):
        handles = []
        for layer in layers:

            def hook(_m, _a, output, layer=layer):
                tensor = (output[0] if isinstance(output, tuple) else output).clone()
                tensor[0, places] = store[layer]
                return (tensor, *output[1:]) if isinstance(output, tuple) else tensor

            handles.append(module_of(arch, activation, layer).register_forward_hook(hook))
        return handles

    def read():
        if activation == "weights":
            with capture_attention(model, places[None], detach=True) as capture:
                probability(model, row)
            return {layer: capture.rows[layer] for layer in layers}
        store = {}
        handles = keep(store)
        probability(model, row)
        for handle in handles:
            handle.remove()
        return store

    def with_stored(store):
        if activation == "weights":
            with substitute_attention(model, places[None], store):
                return probability(model, row)
        handles = put(store)
        found = probability(model, row)
        for handle in handles:
            handle.remove()
        return found

    original = read()
    patch.apply(model)
    changed, restored = read(), with_stored(original)
    patch.revert(model)
    return restored, with_stored(changed)


@torch.no_grad()
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_batched_exchanges_equal_one_at_a_time(model_type):
    model, case = tiny_model(model_type, layers=3), tiny_case()
    arch, patch = ModelArch(model), tiny_patch(model)
    found = patch_activations(model, TOKENIZER, case, patch, window=2)
    asked = probe_tokens(arch, TOKENIZER, case, ["distracted_neighbour"])
    assert len(asked[0].right.labels) > 1  # several tokens are exchanged
    assert found.probabilities.shape == (2 + 2 * 4 * 4, len(asked), 2)
    for i, probe in enumerate(asked):
        for side, row in enumerate((probe.right, probe.wrong)):
            assert found.probabilities[ORIGINAL, i, side] == pytest.approx(probability(model, row), rel=1e-4)
            if side != i % 2:
                continue
            for activation in ("weights", "attention", "mlp", "hidden"):
                for centre, layers in ((1, list(window_of(1, 2, 3))), (None, [0, 1, 2])):
                    restored, contaminated = plain(model, arch, patch, row, activation, layers)
                    numbers = [found.find(way, activation, centre) for way in (RESTORE, CONTAMINATE)]
                    got = [found.probabilities[number, i, side] for number in numbers]
                    assert got == pytest.approx([restored, contaminated], rel=2e-4), (activation, centre)
    # Exchanging the last block's hidden state exchanges everything; the edit changed something.
    last = found.find(RESTORE, "hidden", 2)
    np.testing.assert_allclose(found.probabilities[last], found.probabilities[ORIGINAL], rtol=1e-4)
    all_dirty = found.find(CONTAMINATE, "hidden", None)
    np.testing.assert_allclose(found.probabilities[all_dirty], found.probabilities[EDITED], rtol=1e-4)
    change = found.probabilities[EDITED] / found.probabilities[ORIGINAL]
    assert np.abs(np.log(change)).max() > 1e-2


def test_chosen_heads_and_small_budgets():
    model, case = tiny_model("llama", layers=3), tiny_case()
    patch = tiny_patch(model)
    every = [(layer, head) for layer in range(3) for head in range(4)]
    heads = {"all": every, "none": [], "one": every[5:6]}
    found = patch_activations(model, TOKENIZER, case, patch, activations=["weights"], heads=heads)
    small = patch_activations(model, TOKENIZER, case, patch, activations=["weights"], heads=heads, tokens=1)
    np.testing.assert_allclose(found.probabilities, small.probabilities, rtol=1e-4)
    by_name = {name: found.probabilities[found.find(RESTORE, name=name)] for name in heads}
    np.testing.assert_allclose(by_name["all"], found.probabilities[found.find(RESTORE)], rtol=1e-5)
    np.testing.assert_allclose(by_name["none"], found.probabilities[EDITED], rtol=1e-4)
    assert np.abs(by_name["one"] / by_name["none"] - 1).max() > 1e-4


def test_the_attention_rows_carry_what_rome_breaks_in_the_embedded_model():
    found = patch_activations(*embedded(), few(), patches(), directions=["restore"])
    lost = found.score(ORIGINAL).value - found.score(EDITED).value
    assert lost > 10
    assert found.share(found.find(RESTORE, "weights")).value >= 0.5
    assert found.share(found.find(RESTORE, "hidden")).value == 1.0
    text = found.summary()
    assert f"{len(found.cases)} probes (distracted_neighbour) of 6 edits" in text
    assert "restore attention weights, all blocks" in text


def test_shares_are_of_the_damage(tmp_path):
    found = patch_activations(tiny_model("gpt2"), TOKENIZER, tiny_case(), tiny_patch(tiny_model("gpt2")))
    restored, dirty = found.find(RESTORE, "mlp"), found.find(CONTAMINATE, "mlp")
    found.probabilities[...] = [0.1, 0.5]
    found.probabilities[ORIGINAL] = [0.9, 0.1]
    found.probabilities[restored, 0] = [0.7, 0.1]
    found.probabilities[dirty, 0] = [0.8, 0.1]
    probes = found.probabilities.shape[1]
    assert found.share(restored).value == pytest.approx(1 / probes)
    assert found.share(restored, of="probability").value == pytest.approx(0.6 / (0.8 * probes))
    assert found.share(dirty).value == pytest.approx((probes - 1) / probes)
    assert found.share(dirty).low is None  # one case has no interval
    found.probabilities[ORIGINAL] = found.probabilities[EDITED]
    assert found.share(restored) is None
    assert "did no damage" in found.summary()
    assert found.save(tmp_path / "patching.json").stat().st_size > 100


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"activations": ["keys"]}, "activations are some of"),
        ({"directions": ["sideways"]}, "directions are 'restore' and 'contaminate'"),
        ({"window": 9}, "window must be a whole number of at least 1 and at most 3"),
        ({"heads": {"mine": [(0, 7)]}}, "name head 7 of block 0, which has 4 heads"),
        ({"heads": {"mine": [(5, 0)]}}, "Layer 5 is out of range"),
    ],
)
def test_options_out_of_range_are_refused(options, words):
    model = tiny_model("gpt2", layers=3)
    with pytest.raises(ConfigError, match=words):
        patch_activations(model, TOKENIZER, tiny_case(), tiny_patch(model), **options)


def test_cases_without_probes_and_conditions_that_were_not_run_are_named():
    model = tiny_model("gpt2", layers=3)
    with pytest.raises(EditError, match="No probe of kind relation"):
        patch_activations(model, TOKENIZER, tiny_case(), tiny_patch(model), kind="relation")
    found = patch_activations(model, TOKENIZER, tiny_case(), tiny_patch(model), activations=["mlp"])
    with pytest.raises(UnknownNameError, match="restore attention weights, all blocks was not run"):
        found.find(RESTORE, "weights")
