"""Keys and outputs at the subject's last token are those of a plain full forward pass."""

import pytest
import torch

from kedit.keys import read
from kedit.models import ModelArch, Site
from kedit.models.hooks import on_input, on_output
from kedit.prompts.tokenize import Text, encode
from tiny_models import CONTEXTS, EDITS, MODEL_TYPES, tiny_model, tokenizer

TEXTS = [
    Text.fill(context.replace("{}", prompt), subject, target)
    for context in CONTEXTS
    for prompt, subject, target in EDITS.values()
]


def full_forward(model, rows, module, *, before):
    """One whole prompt at a time through the whole model, no padding."""
    found = []
    for row in rows:
        seen = []
        place = on_input if before else on_output
        with place(module, lambda x, seen=seen: seen.append(x.clone())), torch.no_grad():
            model(torch.tensor([row.ids]))
        found.append(seen[0][0, row.subject_last])
    return torch.stack(found)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("tokens", [16_384, 60])
def test_same_values_as_a_full_forward(model_type, tokens, monkeypatch):
    monkeypatch.setattr(read, "TOKENS_PER_PASS", tokens)
    model = tiny_model(model_type)
    arch = ModelArch(model)
    rows = encode(tokenizer("bos"), TEXTS)
    keys = read.keys(arch, rows, 2)
    torch.testing.assert_close(keys, full_forward(model, rows, arch.down(2), before=True), atol=2e-5, rtol=1e-4)
    for kind in ("mlp", "block", "attention"):
        site = Site(3, kind)
        outputs = read.outputs(arch, rows, site)
        expected = full_forward(model, rows, arch.site(site), before=False)
        torch.testing.assert_close(outputs, expected, atol=5e-5, rtol=1e-4)


def test_work_dtype_and_no_gradient():
    rows = encode(tokenizer(), TEXTS[:2])
    for dtype, work in [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)]:
        keys = read.keys(ModelArch(tiny_model("llama", dtype=dtype)), rows, 1)
        assert keys.dtype == work
        assert not keys.requires_grad


def test_what_lies_above_does_not_run_and_nothing_stays_behind():
    model = tiny_model("gpt2")
    arch = ModelArch(model)
    model.train()
    ran = []
    handles = [
        arch.block(i).register_forward_pre_hook(lambda *_, i=i: ran.append((i, arch.block(i).training)))
        for i in range(5)
    ]
    read.keys(arch, encode(tokenizer(), TEXTS), 2)
    assert {number for number, _ in ran} == {0, 1, 2}
    assert not any(training for _, training in ran), "dropout is off meanwhile"
    assert model.training
    for handle in handles:
        handle.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_packing_keeps_order_and_budget():
    rows = encode(tokenizer(), TEXTS)
    for budget in (1, 30, 100, 10_000):
        parts = read.packed(rows, budget)
        assert [row for part in parts for row in part] == rows
        for part in parts:
            assert len(part) == 1 or len(part) * max(row.subject_last + 1 for row in part) <= budget
    assert len(read.packed(rows, 10_000)) == 1
    assert len(read.packed(rows, 1)) == len(rows)
