"""Attention keys for regularizers: the captured ones against the model's own cache, and the term that holds their norm."""

import pytest
import torch
from transformers import DynamicCache

import kedit
from kedit.errors import CaptureError, ConfigError
from kedit.models.compat import cache_argument
from kedit.regularizers import KeyNorm, Needs, blocks_from
from tiny_models import CONTEXTS, MODEL_TYPES, tiny_model, tokenizer

from .test_own_regularizer import EDITS, Watch, lookup_of, rome


@pytest.mark.parametrize("mode", ["cached", "full"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_keys_are_those_of_the_models_own_cache(model_type, mode):
    model, tok = tiny_model(model_type), tokenizer()
    watch = Watch(Needs(keys=blocks_from(2)))
    editor = rome(model, tok, layer=1, steps=1)
    editor.engine.mode = mode
    editor.propose(EDITS, regularizer=watch)
    rows = watch.shown[0][0].rewrite
    assert set(rows.keys) == {2, 3, 4}
    assert not rows.attention
    for i, (edit, context) in enumerate(zip(rows.edit.tolist(), rows.context.tolist(), strict=True)):
        one = EDITS[edit]
        template = CONTEXTS[context].replace("{}", one.prompt)
        ids = torch.tensor([tok(template.replace("{}", one.subject))["input_ids"]])
        with torch.no_grad():
            cache = DynamicCache()  # one that forgets nothing
            model(ids, **cache_argument(model, cache))
        for block, keys in rows.keys.items():
            expected = cache.layers[block].keys[0, :, lookup_of(tok, template, one.subject)]
            torch.testing.assert_close(keys[i], expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("model_type", ["gpt2", "gptj", "qwen2"])
def test_the_penalty_is_the_squared_relative_growth(model_type):
    """Recomputed from the keys that a watching regularizer sees in the same run."""
    watch = Watch(Needs(keys=blocks_from(2)))
    result = rome(tiny_model(model_type), steps=5).apply(EDITS[:1], regularizer=[KeyNorm(gamma=0.7), watch])
    for step, (now, before) in enumerate(watch.shown):
        expected = 0.0
        for block, keys in now.rewrite.keys.items():
            for key, old in zip(keys, before.rewrite.keys[block], strict=True):
                for head in range(len(key)):
                    expected += (float(key[head].norm() / old[head].norm()) - 1) ** 2 / len(CONTEXTS)
        assert result.log[0][step]["key_norm"] == pytest.approx(0.7 * expected, rel=1e-4, abs=1e-7)
    assert result.log[0][0]["key_norm"] == pytest.approx(0.0, abs=1e-7)
    assert result.log[0][-1]["key_norm"] > 0


@pytest.mark.parametrize("model_type", ["gpt2", "gptj", "llama"])
def test_it_holds_the_norm_and_both_ways_of_running_agree(model_type):
    deltas, growth = {}, {}
    for gamma, mode in ((1e-6, "cached"), (20.0, "cached"), (20.0, "full")):
        editor = rome(tiny_model(model_type), steps=10, weight_decay=0.0)
        editor.engine.mode = mode
        result = editor.apply(EDITS[:1], regularizer=KeyNorm(gamma=gamma))
        deltas[gamma, mode] = next(iter(result.patch.deltas.values())).dense
        growth[gamma, mode] = result.log[0][-1]["key_norm"] / gamma
    assert growth[20.0, "cached"] < 0.5 * growth[1e-6, "cached"]
    one, other = deltas[20.0, "cached"], deltas[20.0, "full"]
    assert (one - other).norm() < 1e-3 * other.norm()


def test_bad_gammas_are_refused():
    for gamma in (-1.0, float("nan"), float("inf"), "1", True):
        with pytest.raises(ConfigError, match="gamma"):
            KeyNorm(gamma=gamma)


def test_a_model_whose_keys_cannot_be_read_says_so(monkeypatch):
    """As types whose attention computes its scores by itself: only its softmax is overheard."""
    from kedit.capture.attention_capture import AttentionCapture

    monkeypatch.setattr(AttentionCapture, "_keep_key", lambda *_: None)
    model = tiny_model("gpt2")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CaptureError, match="cannot be read"):
        rome(model).apply(EDITS[:1], regularizer=KeyNorm(gamma=1.0))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_it_is_known_by_name():
    assert kedit.regularizers.REGULARIZERS["key_norm"] is KeyNorm
