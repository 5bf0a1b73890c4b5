"""Everything that looks at a model works where nothing is known of it: no names, no cache, no ``logits_to_keep``."""

import numpy as np
import pytest
import torch
from torch.nn import functional

import kedit
from analysis_common import FACTS, TOKENIZER, tiny_case, tiny_patch
from kedit.analysis.activation_patching import patch_activations
from kedit.analysis.results.patching import EDITED, RESTORE
from kedit.capture import capture_attention
from kedit.errors import CaptureError, ConfigError
from kedit.models import ModelArch
from kedit.prompts.decode import continue_rows
from kedit.prompts.likelihood import prompts_per_pass
from made import made
from tiny_models import CONTEXTS, moments

EDIT = kedit.Edit("{} works in", "Ada Lovelace", "Berlin")


@pytest.fixture(scope="module")
def model():
    return made()


def rome(model):
    return kedit.ROME(
        model, TOKENIZER, layers=1, contexts=CONTEXTS, steps=2, lr=0.5, clamp=4.0, moments={1: moments(64, 1)}
    )


def test_it_is_no_model_that_knows_these_things(model):
    arch = ModelArch(model)
    assert not arch.keeps_logits
    assert not hasattr(arch.config, "num_attention_heads")
    assert prompts_per_pass(arch, 10, 1, 10**9) == (1 << 27) // arch.config.vocab_size // 10


@torch.no_grad()
def test_its_attention_is_found_and_read(model):
    seen = {}
    looker = model.stages[1].looker
    handle = looker.look.register_forward_hook(lambda _m, _a, out: seen.update(out=out))
    ids = torch.tensor([[5, 9, 2, 7]])
    with capture_attention(model, torch.tensor([[3]]), detach=True) as capture:
        model(ids)
    handle.remove()
    assert sorted(capture.rows) == [0, 1, 2]
    q, k, _ = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in seen["out"].chunk(3, -1))
    rows = functional.softmax(q[:, :, 3:] @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1)
    torch.testing.assert_close(capture.rows[1], rows)


def test_heads_that_cannot_be_told_apart_are_an_error():
    odd = made()

    def folded(looker):
        def forward(x, seen):
            q, k, v = (
                part.unflatten(-1, (4, -1)).transpose(1, 2).flatten(0, 1) for part in looker.look(x).chunk(3, -1)
            )
            rows = (q @ k.mT).masked_fill(~seen[:, 0], -torch.inf).softmax(-1)
            return looker.tell((rows @ v).unflatten(0, (len(x), -1)).transpose(1, 2).flatten(2))

        return forward

    for stage in odd.stages:
        stage.looker.forward = folded(stage.looker)
    with pytest.raises(CaptureError, match="Looker has prompts and heads in one axis and no num_heads"):
        with capture_attention(odd, torch.tensor([[3]])):
            odd(torch.tensor([[5, 9, 2, 7]]))


def test_edits_are_evaluated_guarded_and_restrained_by_sadr(model):
    case = tiny_case()
    report = kedit.evaluate(model, TOKENIZER, [case], rome(model), generate=4, attention=True, texts=("Ada is here.",))
    record = report.records[0]
    assert record.failure is None
    [rewrite] = [probe for probe in record.before.probes if probe.kind == "rewrite"]
    assert rewrite.text is not None
    assert rewrite.attention
    limits = dict.fromkeys(kedit.Guard.limits()) | {"kl": 1e3}
    result = rome(model).apply(EDIT, kedit.SADR(gamma=0.1), guard=kedit.Guard(**limits))
    assert result.log[0][-1]["sadr"] > 0
    assert result.patch.provenance["scores"]["kl"] > 0
    result.revert()


@torch.no_grad()
def test_what_it_writes_is_what_it_would_write_alone(model):
    """Prompts of several lengths are continued together, without a cache and without positions."""
    prompts = [tuple(TOKENIZER(text)["input_ids"]) for text in ("Ada works in", "The mother of the king is")]
    found = continue_rows(ModelArch(model), TOKENIZER, prompts, 4)
    for ids, (text, _) in zip(prompts, found, strict=True):
        row = list(ids)
        for _ in range(4):
            row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
        assert text == TOKENIZER.decode(row[len(ids) :], skip_special_tokens=True)


def test_it_is_traced(model):
    found = kedit.trace(model, TOKENIZER, FACTS[0], known_only=False, samples=1)
    fact = found.facts[0]
    assert fact.effects["hidden"][-1, -1] == pytest.approx(fact.clean - fact.corrupted, abs=1e-6)


def test_its_heads_are_counted_and_patched(model):
    heads = {"one": [(1, 3)], "all": [(layer, head) for layer in range(3) for head in range(4)]}
    found = patch_activations(model, TOKENIZER, tiny_case(), tiny_patch(model), activations=["weights"], heads=heads)
    every, whole = found.find(RESTORE, name="all"), found.find(RESTORE, "weights")
    np.testing.assert_allclose(found.probabilities[every], found.probabilities[whole], rtol=1e-5)
    assert np.abs(found.probabilities[whole] / found.probabilities[EDITED] - 1).max() > 1e-3
    with pytest.raises(ConfigError, match="name head 4 of block 1, which has 4 heads"):
        patch_activations(model, TOKENIZER, tiny_case(), tiny_patch(model), heads={"mine": [(1, 4)]})


def test_drift_of_its_attention(model):
    found = kedit.drift(model, TOKENIZER, tiny_case(), tiny_patch(model))
    assert found.probes[0].kl.shape == (3, 4)
    assert found.probes[0].kl.max() > 1e-3
