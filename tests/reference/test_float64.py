import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tiny_models import MODEL_TYPES, tiny_model, tokenizer

from .float64 import TrueFloat64

PROMPTS = ["Ada Lovelace lived in London and wrote about the engine", "The river", "The capital of France is Paris"]


class _Float32Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operations = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, torch.Tensor) and leaf.dtype is torch.float32 for leaf in tree_leaves(out)):
            self.operations.add(str(func))
        return out


def _batched(model, side: str):
    tok = tokenizer("left" if side == "left" else "plain")
    batch = tok(PROMPTS, return_tensors="pt", padding=True)
    positions = (batch.attention_mask.cumsum(-1) - 1).clamp(min=0)
    output = model(**batch, position_ids=positions, output_attentions=True)
    return output.logits, torch.stack(output.attentions, 1), batch.attention_mask.bool()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_no_float32_is_left(model_type):
    model = tiny_model(model_type, dtype=torch.float64, attention="eager")
    ids = torch.tensor([tokenizer()(PROMPTS[0]).input_ids])
    with torch.no_grad(), TrueFloat64(), _Float32Seen() as seen:
        model(ids, output_attentions=True)
    assert not seen.operations


def test_float32_is_found_without_the_mode():
    model = tiny_model("llama", dtype=torch.float64, attention="eager")
    ids = torch.tensor([tokenizer()(PROMPTS[0]).input_ids])
    with torch.no_grad(), _Float32Seen() as seen:
        model(ids)
    assert seen.operations


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_batched_equals_one_by_one(model_type, side):
    model = tiny_model(model_type, dtype=torch.float64, attention="eager")
    with torch.no_grad(), TrueFloat64():
        logits, attentions, real = _batched(model, side)
        for i, prompt in enumerate(PROMPTS):
            alone = model(torch.tensor([tokenizer()(prompt).input_ids]), output_attentions=True)
            rows = attentions[i][:, :, real[i]][..., real[i]]
            torch.testing.assert_close(logits[i][real[i]], alone.logits[0], rtol=0, atol=2e-14)
            torch.testing.assert_close(rows, torch.cat(alone.attentions), rtol=0, atol=1e-14)


def test_only_transformers_casts_are_lifted():
    with TrueFloat64():
        assert torch.ones(1, dtype=torch.float64).float().dtype is torch.float32
        assert torch.ones(1, dtype=torch.float64).to(torch.float32).dtype is torch.float32
        assert torch.softmax(torch.ones(2, dtype=torch.float64), -1, dtype=torch.float32).dtype is torch.float32
