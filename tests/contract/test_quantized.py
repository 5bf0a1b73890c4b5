"""Weights whose change does not arrive: refused before anything is optimised, with the way out."""

import pytest
import torch
from torch import nn

import kedit
from kedit.errors import UnsupportedError
from kedit.models import ModelArch
from kedit.models.validate import check_takes_effect
from tiny_models import tiny_model, tokenizer

EDIT = kedit.Edit("{} works as a", "Hulqui Gossam", "pilot")


class WithCopy(nn.Linear):
    """A layer that computes with a copy of its weight, as a quantized one does."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = linear.weight
        self.register_buffer("copy", linear.weight.detach().clone())

    def forward(self, hidden):
        return nn.functional.linear(hidden, self.copy)


def test_a_copy_is_found_and_the_weight_is_as_before():
    arch = ModelArch(tiny_model("llama"))
    mlp = arch.block(1).mlp
    mlp.down_proj = WithCopy(mlp.down_proj)
    arch = ModelArch(arch.model)
    before = mlp.down_proj.weight.detach().clone()
    check_takes_effect(arch, [0, 2])
    with pytest.raises(UnsupportedError, match=r"layers\.1\.mlp\.down_proj\.weight does not reach the forward pass"):
        check_takes_effect(arch, [0, 1])
    assert torch.equal(mlp.down_proj.weight, before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_layers_that_torch_quantizes_are_refused():
    model = torch.ao.quantization.quantize_dynamic(tiny_model("llama"), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(UnsupportedError, match="that torch has quantized: no gradient passes it"):
        kedit.ROME(model, tokenizer())


def test_no_gradient_is_said(monkeypatch):
    model, tok = kedit.load()
    block, own = model.transformer.h[-1], model.transformer.h[-1].forward
    monkeypatch.setattr(block, "forward", lambda hidden, *args, **kwargs: own(hidden.detach(), *args, **kwargs))
    with pytest.raises(UnsupportedError, match="No gradient of the loss reaches the value"):
        kedit.ROME(model, tok, kl_factor=0.0, weight_decay=0.0).apply(EDIT)
