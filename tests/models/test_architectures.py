"""Typed access to models: the parts are the ones the model computes with, whatever the stored layout."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BertConfig, BertModel, MambaConfig

from kedit.errors import ArchitectureError, ConfigError
from kedit.models import ARCHITECTURES, ModelArch, Site
from kedit.models.hooks import on_input, on_output
from tiny_models import MODEL_TYPES, tiny_model

IDS = torch.tensor([[5, 17, 90, 3, 44]])


def test_the_six_types_have_entries():
    assert set(MODEL_TYPES) <= set(ARCHITECTURES)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_weight_is_the_matrix_the_module_multiplies_with(model_type):
    model = tiny_model(model_type)
    arch = ModelArch(model)
    seen = {}
    module = arch.down(2)
    with on_input(module, lambda x: seen.update(key=x)), on_output(module, lambda y: seen.update(value=y)):
        model(IDS)
    weight = arch.weight(2)
    bias = getattr(module, "bias", None)
    expected = seen["value"] - (0 if bias is None else bias)
    torch.testing.assert_close(seen["key"] @ weight.matrix.T, expected, atol=2e-6, rtol=1e-5)
    assert weight.matrix.shape == (arch.hidden, seen["key"].shape[-1])
    assert weight.transposed == (model_type == "gpt2")
    assert dict(model.named_parameters())[weight.name] is weight.parameter
    assert weight.matrix.data_ptr() == weight.parameter.data_ptr(), "a view, not a copy"
    assert not weight.matrix.requires_grad


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_blocks_add_the_outputs_of_their_sites(model_type):
    """A change at the MLP's output is the same change of the block's output; so the table's paths are right."""
    model = tiny_model(model_type)
    arch = ModelArch(model)
    change = torch.linspace(-1, 1, arch.hidden)
    outputs = []
    with on_output(arch.block(3), lambda y: outputs.append(y)):
        model(IDS)
        with on_output(arch.mlp(3), lambda y: y + change):
            model(IDS)
        with on_output(arch.site(Site(3, "attention")), lambda y: y + change):
            model(IDS)
    torch.testing.assert_close(outputs[1] - outputs[0], change.expand_as(outputs[0]), atol=1e-5, rtol=1e-5)
    assert not torch.equal(outputs[2], outputs[0])
    assert arch.site(Site(3, "mlp")) is arch.mlp(3)
    assert arch.site(Site(3, "block")) is arch.block(3)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_head_and_final_norm_make_the_logits(model_type):
    model = tiny_model(model_type)
    arch = ModelArch(model)
    last = []
    with on_output(arch.block(arch.num_layers - 1), lambda y: last.append(y)):
        logits = model(IDS).logits
    torch.testing.assert_close(arch.head(arch.final_norm(last[0])), logits, atol=1e-5, rtol=1e-5)


def test_figures():
    arch = ModelArch(tiny_model("qwen2", dtype=torch.bfloat16))
    assert (arch.model_type, arch.num_layers, arch.hidden) == ("qwen2", 5, 48)
    assert (arch.dtype, arch.work_dtype) == (torch.bfloat16, torch.float32)
    assert ModelArch(tiny_model("gpt2", dtype=torch.float64)).work_dtype == torch.float64
    assert arch.input_device == arch.device(1) == torch.device("cpu")


@pytest.mark.parametrize("layer", [-1, 5, 10**9])
def test_layer_out_of_range(layer):
    arch = ModelArch(tiny_model("gpt2"))
    with pytest.raises(ConfigError, match=rf"Layer {layer} is out of range: this gpt2 has 5 blocks \(0-4\)"):
        arch.weight(layer)
    with pytest.raises(ConfigError, match="out of range"):
        arch.block(layer)


@pytest.mark.parametrize("layer", [True, 1.0, "1", None])
def test_layer_that_is_no_number(layer):
    with pytest.raises(ConfigError, match="whole number"):
        ModelArch(tiny_model("gpt2")).block(layer)


def test_unknown_type_lists_the_known_ones():
    config = MambaConfig(vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=1)
    with pytest.raises(ArchitectureError, match="'mamba'.*gpt2.*qwen2"):
        ModelArch(AutoModelForCausalLM.from_config(config))
    with pytest.raises(ArchitectureError, match="'Linear'"):
        ModelArch(nn.Linear(2, 2))
    small = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=9)
    with pytest.raises(ArchitectureError, match="'bert'"):
        ModelArch(BertModel(small))


def test_part_of_a_model_is_refused():
    with pytest.raises(
        ArchitectureError, match="GPT2Model has no module 'transformer.h'.*causal language model itself"
    ):
        ModelArch(tiny_model("gpt2").transformer)


def test_wrapped_layer_is_refused():
    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            self.weight = inner.weight

        def forward(self, x):
            return self.inner(x)

    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj = Wrapped(model.model.layers[1].mlp.down_proj)
    arch = ModelArch(model)
    assert arch.weight(0).matrix.shape == (48, 80)
    with pytest.raises(ArchitectureError, match="belongs to a Wrapped"):
        arch.weight(1)


def test_weight_of_what_is_no_matrix():
    arch = ModelArch(tiny_model("gpt2"))
    for name in ("transformer.h.0.mlp.c_proj.weigth", "transformer.h.9.mlp.c_proj.weight", "weight", ""):
        with pytest.raises(ArchitectureError):
            arch.weight_of(name)
    with pytest.raises(ArchitectureError, match="LayerNorm"):
        arch.weight_of("transformer.ln_f.weight")
