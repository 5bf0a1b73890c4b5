"""Unknown architectures: found by structure and verified, or refused with the reason."""

import dataclasses

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import kedit
import zoo
from kedit.editors import value_editor
from kedit.errors import ArchitectureError
from kedit.keys import read
from kedit.models import ARCHITECTURES, ModelArch
from kedit.models.detect import detect
from kedit.prompts.tokenize import encode, rewrite_texts
from made import made
from tiny_models import CONTEXTS, moments, tokenizer

DENSE = [name for name in zoo.EDITABLE if not ARCHITECTURES[zoo.ZOO[name][0]].experts]
MIXED = [name for name in zoo.EDITABLE if name not in DENSE]
FRENCH = kedit.Edit("The mother tongue of {} is", "Danielle Darrieux", "English")


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", DENSE)
def test_the_structure_of_a_known_type_is_what_its_entry_says(name, dtype):
    """Two descriptions made in different ways agree; so the entries are verified too."""
    model = zoo.make(name, dtype)
    model.train()
    arch, found = ModelArch(model), detect(model)
    assert all(module.training for module in model.modules())
    same = ("blocks", "down", "attention", "attention_out", "head")
    assert {key: getattr(found, key) for key in same} == {key: getattr(arch.spec, key) for key in same}
    if not found.normalised:
        assert found.final_norm == arch.spec.final_norm
    guessed = ModelArch(model, found)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    for layer in range(arch.num_layers):
        gain = arch.gain(layer)
        assert guessed.gain(layer) == (None if gain is None else pytest.approx(gain, rel=tolerance))
    assert guessed.hidden == arch.hidden == 32


@pytest.mark.parametrize("name", MIXED)
def test_experts_are_not_guessed(name):
    with pytest.raises(ArchitectureError, match="experts need an entry"):
        detect(zoo.make(name))


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize(("factor", "norm_after", "gain"), [(1.0, False, 1.0), (0.3, False, 0.3), (1.0, True, None)])
def test_a_made_architecture_is_found(parallel, factor, norm_after, gain):
    arch = ModelArch(made(parallel=parallel, factor=factor, norm_after=norm_after))
    assert arch.model_type == "made"
    assert arch.gain(1) == (None if gain is None else pytest.approx(gain, rel=1e-4))
    expected = {
        "blocks": "stages",
        "mlp": "thinker.close",
        "down": "thinker.close",
        "attention": "looker",
        "attention_out": "looker.tell",
        "final_norm": "closing",
        "head": "speak",
    }
    assert {key: value for key, value in dataclasses.asdict(arch.spec).items() if key in expected} == expected


@pytest.mark.parametrize("config", [{}, {"factor": 0.3, "parallel": False}, {"norm_after": True}])
@pytest.mark.parametrize("name", ["rome", "memit"])
def test_a_made_architecture_is_edited(name, config, monkeypatch):
    model = made(**config)
    arch = ModelArch(model)
    given = {"layers": 1} if name == "rome" else {"layers": (0, 1), "moment_weight": 0.0}
    given |= {
        "contexts": CONTEXTS if name == "rome" else ["{}"],
        "steps": 10,
        "stop_loss": 0.0,
        "lr": 2.0,
        "clamp": 40.0,
    }
    editor = kedit.get_editor(name, model, tokenizer(), moments={i: moments(64, i) for i in (0, 1)}, **given)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    site = editor.sites()[0]
    rows = encode(tokenizer(), rewrite_texts(FRENCH, ["{}"]))
    old = read.outputs(arch, rows, site)
    values, spread = [], value_editor.solve_layers
    monkeypatch.setattr(value_editor, "solve_layers", lambda *args: (values.append(args[3]), spread(*args))[1])
    result = editor.apply(FRENCH)
    assert set(result.patch.deltas) == {f"stages.{i}.thinker.close.weight" for i in editor.config.layers}
    assert (read.outputs(arch, rows, site) - old).norm() > 0.1
    assert result.log[0][-1]["nll"] < result.log[0][0]["nll"] - 0.05
    torch.testing.assert_close(read.outputs(arch, rows, site), values[0].value[:, 0], atol=1e-3, rtol=1e-3)
    result.revert()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


REFUSED = [
    ({"mlp": "none"}, "no down-projection"),
    ({"mlp": "pair"}, r"several down-projections \(thinker.each.0.close, thinker.each.1.close\)"),
    ({"mlp": "late"}, "also arrives at other tokens"),
]


@pytest.mark.parametrize(("config", "reason"), REFUSED)
def test_what_is_no_mlp_is_refused(config, reason):
    with pytest.raises(ArchitectureError, match=f"model type 'made'.*{reason}"):
        ModelArch(made(**config))


MIXTURES = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 64,
    "num_experts_per_tok": 2,
}
SHARED = {
    "glm4_moe": ({"n_routed_experts": 4, "moe_intermediate_size": 16, "first_k_dense_replace": 0}, "mlp.experts"),
    "granitemoeshared": ({"num_local_experts": 4, "shared_intermediate_size": 16}, "block_sparse_moe.experts"),
    "llama4_text": ({"num_local_experts": 4, "interleave_moe_layer_step": 1}, "feed_forward.experts"),
}


def mixture(kind, **own):
    config = AutoConfig.for_model(kind, **SMALL, **MIXTURES, **own, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", SHARED)
def test_an_expert_that_is_shared_is_not_taken_for_the_mlp(kind, monkeypatch):
    """The only linear layer that ends an MLP there is the shared expert's; the others are in fused tensors beside it."""
    monkeypatch.delitem(ARCHITECTURES, kind, raising=False)
    own, experts = SHARED[kind]
    with pytest.raises(ArchitectureError, match=f"'{kind}'.*several parts of block 0.*{experts}.*shared expert"):
        ModelArch(mixture(kind, **own))


@pytest.mark.parametrize("kind", ["phimoe", "llama4_text"])
def test_routers_that_are_linear_layers_and_return_several_tensors(kind):
    with pytest.raises(ArchitectureError, match=f"'{kind}', and cannot edit what it finds"):
        detect(mixture(kind, num_local_experts=4))


def test_a_block_that_fails_on_its_own_is_refused_in_words(monkeypatch):
    model = made()
    real = type(model.stages[0]).forward

    def once(self, x, seen):
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls > 1:
            raise KeyError("state")
        return real(self, x, seen)

    monkeypatch.setattr(type(model.stages[0]), "forward", once)
    with pytest.raises(ArchitectureError, match="do not run one by one .*KeyError"):
        ModelArch(model)


def test_blocks_that_differ_are_refused():
    model = made()
    model.stages[2].thinker.close = torch.nn.Sequential(model.stages[2].thinker.close)
    with pytest.raises(ArchitectureError, match="block 2 has no linear layer 'thinker.close'"):
        ModelArch(model)


SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2}
RECURRENT = {
    "mamba": {"state_size": 4},
    "rwkv": {"attention_hidden_size": 16},
    "xlstm": {"num_heads": 2, "embedding_dim": 16},
    "recurrent_gemma": {"num_attention_heads": 2, "intermediate_size": 32, "lru_width": 16},
}


@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrent_models_are_refused(kind):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL, **RECURRENT[kind]))
    with pytest.raises(ArchitectureError, match=f"'{kind}'.*recurrent state"):
        ModelArch(model)


_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 32, "moe_intermediate_size": 16}
_ROUTED = {
    **_HEADS,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 1,
}
_LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
_LINEAR = {"linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
REASONS = {
    "qwen3_next": (
        {**_HEADS, **_LINEAR, "head_dim": 8, "num_experts": 4, "num_hidden_layers": 4},
        "it is a hybrid: 3 of its 4 blocks keep a recurrent state",
    ),
    "glm4_moe": (
        {**_ROUTED, "topk_group": 1},
        "block 1 is a mixture of experts, with shared experts .* block 0 is dense",
    ),
    "deepseek_v3": (
        {**_ROUTED, **_LATENT, "topk_group": 1},
        "block 1 is a mixture of experts, with shared experts .* block 0 is dense",
    ),
    "llama4_text": (
        {**_HEADS, "num_local_experts": 4, "interleave_moe_layer_step": 1, "intermediate_size_mlp": 32, "head_dim": 8},
        "several parts of block 0 .*feed_forward.experts.* as in mixtures with a shared expert",
    ),
}


@pytest.mark.parametrize("kind", REASONS)
def test_newer_families_without_an_entry_are_refused_with_their_own_reason(kind, monkeypatch):
    monkeypatch.delitem(ARCHITECTURES, kind, raising=False)
    sizes, reason = REASONS[kind]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SMALL, **sizes}))
    with pytest.raises(ArchitectureError, match=f"'{kind}'.*{reason}"):
        ModelArch(model)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_encoder_decoders_are_refused(kind):
    sizes = {"t5": {"d_model": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2, "d_kv": 8}}
    sizes["bart"] = {
        f"{part}_{what}": n for part in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 32))
    }
    sizes["bart"] |= {"d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(kind, vocab_size=50, **sizes[kind]))
    with pytest.raises(ArchitectureError, match=f"'{kind}'.*encoder-decoder"):
        kedit.ROME(model, tokenizer())


def test_the_probe_runs_once_per_model(monkeypatch):
    from kedit.models import detect as module

    model, calls = made(), []
    monkeypatch.setattr(module, "chain", lambda *args, was=module.chain: (calls.append(1), was(*args))[1])
    assert ModelArch(model).spec is ModelArch(model).spec
    assert len(calls) == 1


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra"])
def test_models_whose_tokens_see_those_behind_them_are_refused(kind):
    sizes = {
        "vocab_size": 97,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    for causal in (False, True):
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **sizes, is_decoder=causal)
        model = AutoModelForCausalLM.from_config(config).eval()
        if causal:
            assert ModelArch(model).num_layers == 3
        else:
            with pytest.raises(ArchitectureError, match="its tokens see those behind them.*is_decoder=True"):
                ModelArch(model)
