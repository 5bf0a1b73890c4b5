"""Record mode: rows of many passes in buffers, also during generation."""

from __future__ import annotations

import pytest
import torch
from capture_zoo import eager_twin, inputs, make

from kedit.capture import record_attention
from kedit.errors import CaptureError


@pytest.mark.parametrize("name", ["llama", "gpt2", "gptj", "gemma2-softcap", "bloom", "falcon"])
def test_generation_is_recorded(name: str) -> None:
    model = make(name, sliding_window=64) if name.startswith("gemma2") else make(name)
    given, _ = inputs("left")
    plain = model.generate(**given, max_new_tokens=4, do_sample=False, eos_token_id=None)
    with record_attention(model, batch=3, keys=20, queries=5, steps=6, layers=range(1, 99)) as record:
        addresses = {layer: buffer.data_ptr() for layer, buffer in record.buffers.items()}
        text = model.generate(**given, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert torch.equal(text, plain)
    assert record.num_keys == [12, 13, 14, 15]
    assert {layer: buffer.data_ptr() for layer, buffer in record.buffers.items()} == addresses
    mask = torch.cat([given["attention_mask"], torch.ones(3, 3, dtype=torch.int64)], 1)
    where = {} if name == "bloom" else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    full = eager_twin(model)(input_ids=text[:, :-1], attention_mask=mask, output_attentions=True, **where).attentions
    for layer, buffer in record.buffers.items():
        assert not buffer.requires_grad
        assert (buffer[0, ..., :12] - full[layer][:, :, 7:12, :12]).abs().max() <= 2e-6
        for step in (1, 2, 3):
            assert (buffer[step, :, :, :4] == 0).all()
            assert (buffer[step, :, :, 4, : 12 + step] - full[layer][:, :, 11 + step, : 12 + step]).abs().max() <= 2e-6
        assert (buffer[4:] == 0).all()


def test_every_query_of_one_pass() -> None:
    model = make("llama")
    given, _ = inputs()
    with record_attention(model, batch=3, keys=12, queries=12) as record:
        model(**given)
    want = eager_twin(model)(**given, output_attentions=True).attentions
    assert record.num_steps == 1
    assert all((record.buffers[i][0] - want[i]).abs().max() <= 2e-6 for i in range(3))


def test_what_does_not_fit_is_refused() -> None:
    model = make("llama")
    given, _ = inputs()
    with record_attention(model, batch=3, keys=12) as record:
        model(**given)
        with pytest.raises(CaptureError, match="record is full"):
            model(**given)
    assert record.num_steps == 1
    with record_attention(model, batch=3, keys=5), pytest.raises(CaptureError, match="do not fit"):
        model(**given)
    with record_attention(model, batch=2, keys=12), pytest.raises(CaptureError, match="batch of 3"):
        model(**given)
    assert model.config._attn_implementation == "sdpa"
