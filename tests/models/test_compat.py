"""What differs between versions of transformers is read from the model at hand."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import DynamicCache

import zoo
from kedit.models import ModelArch, compat
from tiny_models import tiny_model

IDS = torch.tensor([[5, 9, 2, 7, 3], [8, 4, 6, 1, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
KEEP = torch.tensor([[0, 1, 0, 1, 1], [0, 0, 1, 0, 0]]).bool()


class Old(nn.Module):
    def forward(self, input_ids, past_key_values=None):
        return SimpleNamespace(past_key_values=past_key_values)


class New(nn.Module):
    def forward(self, input_ids, cache=None, **kwargs):
        return SimpleNamespace(cache=cache)


class Neither(nn.Module):
    def forward(self, input_ids):
        return SimpleNamespace()


@pytest.mark.parametrize(("kind", "name"), [(Old, "past_key_values"), (New, "cache")])
def test_the_cache_goes_in_and_comes_out_under_the_models_own_name(kind, name):
    model, cache = kind(), object()
    assert compat.cache_name(model) == name
    assert compat.cache_argument(model, cache) == {name: cache}
    assert compat.cache_of(model(IDS, **compat.cache_argument(model, cache))) is cache


def test_a_model_without_a_cache_has_no_name_for_it():
    assert compat.cache_name(Neither()) is None


@torch.no_grad()
def test_a_real_models_cache():
    model = tiny_model("llama")
    cache = DynamicCache()
    output = model(IDS, **compat.cache_argument(model, cache), use_cache=True)
    assert compat.cache_of(output) is cache
    assert cache.get_seq_length() == 5


@torch.no_grad()
@pytest.mark.parametrize("name", zoo.EDITABLE)
def test_the_head_is_read_at_chosen_places_only(name):
    """Also of types that scale or cap their logits after the head."""
    arch = ModelArch(zoo.make(name))
    inputs = {"input_ids": IDS, "attention_mask": MASK, "use_cache": False}
    whole = arch.model(**inputs).logits[KEEP]
    rows = []
    handle = arch.head.register_forward_hook(lambda _m, _a, out: rows.append(out[..., 0].numel()))
    found = arch.logits(KEEP, **inputs)
    handle.remove()
    assert rows == [int(KEEP.sum())]
    torch.testing.assert_close(found, whole, atol=1e-6, rtol=1e-5)
    assert not arch.head._forward_pre_hooks


@torch.no_grad()
@pytest.mark.parametrize("part", ["model", "head"])
def test_a_model_compiled_in_place_is_given_no_hook(part, monkeypatch):
    arch = ModelArch(tiny_model("llama"))
    inputs = {"input_ids": IDS, "attention_mask": MASK, "use_cache": False}
    whole = arch.model(**inputs).logits[KEEP]
    seen = []
    module = arch.model if part == "model" else arch.head
    own = module._call_impl

    def compiled(*args, **kwargs):
        seen.append(len(arch.head._forward_pre_hooks))
        return own(*args, **kwargs)

    monkeypatch.setattr(module, "_compiled_call_impl", compiled)
    torch.testing.assert_close(arch.logits(KEEP, **inputs), whole, atol=1e-6, rtol=1e-5)
    assert seen == [0]


def test_gpt2s_eager_attention_may_scale_by_itself():
    module = SimpleNamespace(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=True, layer_idx=1)
    assert compat.attention_scaling(module, 16, eager=True) == pytest.approx(1 / 8)
    assert compat.attention_scaling(module, 16, eager=False) == pytest.approx(1 / 4)
    module.scale_attn_weights = False
    assert compat.attention_scaling(module, 16, eager=True) == pytest.approx(1 / 2)


def test_sdpa_knows_no_softcap():
    assert compat.attention_softcap(5.0, eager=True) == 5.0
    assert compat.attention_softcap(5.0, eager=False) is None
