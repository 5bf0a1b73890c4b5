"""Mixtures with shared experts (DeepSeek, GLM, ...) and hybrids (Qwen3-Next, Qwen3.5), against their own forward passes."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

import kedit
import zoo
from kedit.models import ModelArch, Site
from kedit.patch.checkpoint.apply import apply_to_checkpoint
from kedit.prompts.decode import continue_rows
from kedit.prompts.encode import encode_edits
from kedit.regularizers.base import needs_of
from kedit.values.forward import Runner, Wave
from tiny_models import CONTEXTS, tokenizer

TOKENIZER = tokenizer("bos")
EDIT = kedit.Edit("The mother tongue of {} is", "Danielle Darrieux", "English")
MIXTURES = [name for name in zoo.NEWER if not name.startswith(("qwen3_5", "qwen3_next"))]
HYBRIDS = [name for name in zoo.NEWER if name not in MIXTURES]


def made(name, **changes):
    try:
        return zoo.make(name, vocab_size=400, **changes)
    except (KeyError, ValueError) as error:
        pytest.skip(f"This version of transformers has no {name}: {error}")


def moments(arch, *layers):
    """C = 1, also expert by expert."""
    eyes = {layer: torch.eye(arch.shape(layer)[1], dtype=torch.float64) for layer in layers}
    return {
        layer: eye if arch.experts(layer) is None else eye.repeat(arch.experts(layer).count, 1, 1)
        for layer, eye in eyes.items()
    }


def editor(name, model, *layers, **given):
    options = {"steps": 3, "contexts": ["{}"], "moments": moments(ModelArch(model), *layers), **given}
    return kedit.get_editor(name, model, TOKENIZER, layers=layers if len(layers) > 1 else layers[0], **options)


@torch.no_grad()
def own_nll(model):
    """The target's NLL, mean over its tokens, in the model's own forward."""
    ids, prompt = (TOKENIZER(text)["input_ids"] for text in (f"{EDIT.text} {EDIT.target_new}", EDIT.text))
    assert ids[: len(prompt)] == prompt
    chances = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return -float(torch.stack([chances[i - 1, ids[i]] for i in range(len(prompt), len(ids))]).mean())


@torch.no_grad()
def at_subject(model, layer):
    """The MLP's output at the subject's last token in the model's own forward, and what ΔW meets there: keys with weights."""
    arch = ModelArch(model)
    ids, prefix = (TOKENIZER(text)["input_ids"] for text in (EDIT.text, EDIT.text.partition(" is")[0]))
    assert ids[: len(prefix)] == prefix
    seen, experts = {}, arch.experts(layer)
    inner = arch.down(layer) if experts is None else experts.module
    handles = [
        arch.mlp(layer).register_forward_hook(lambda _m, _a, out: seen.update(out=out.detach().clone())),
        inner.register_forward_hook(lambda _m, args, _o: seen.update(args=args)),
    ]
    model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    place = len(prefix) - 1
    rows = [value.reshape(len(ids), -1)[place] for value in (seen["out"], *seen["args"])]
    if experts is None:
        return rows[0], {arch.weight(layer).name: rows[1]}
    hidden, chosen, weights = rows[1:]
    keys = {int(e): w * experts.expert_keys(hidden[None], int(e))[0] for e, w in zip(chosen, weights, strict=True)}
    return rows[0], {experts.weight(expert).name: key for expert, key in keys.items()}


@pytest.mark.parametrize("layer", [pytest.param(0, marks=pytest.mark.slow), 1])
@pytest.mark.parametrize("name", zoo.NEWER)
def test_an_edit_arrives_in_the_models_own_forward(name, layer):
    """Dense and mixed blocks, with and without attention: the MLP's output moves by ΔW k alone, which is the whole δ."""
    model = made(name)
    arch, before = ModelArch(model), {key: tensor.clone() for key, tensor in model.state_dict().items()}
    unedited, (old, keys) = own_nll(model), at_subject(model, layer)
    result = editor("rome", model, layer, stop_loss=0.0).apply(EDIT)
    assert result.log[0][0]["nll"] == pytest.approx(unedited, abs=1e-4)
    assert result.log[0][-1]["written"] == pytest.approx(1, abs=1e-4)
    moved = at_subject(model, layer)[0] - old
    assert result.patch.deltas.keys() == keys.keys()
    torch.testing.assert_close(moved, sum(delta.dense @ keys[name] for name, delta in result.patch.deltas.items()))
    assert moved.norm() > 0.01 * old.norm()
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed == {f"model.layers.{layer}.mlp.{'experts.down_proj' if arch.experts(layer) else 'down_proj.weight'}"}
    result.revert()
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", MIXTURES)
def test_cached_passes_give_the_edit_of_full_ones(name):
    """A dense block and a mixed one, with a regularizer that reads the attention of the blocks above."""
    model, updates = made(name), []
    for mode in ("full", "cached"):
        one = editor("memit", model, 0, 1, stop_loss=0.0, contexts=CONTEXTS[:2])
        one.engine.mode = mode
        result = one.apply(EDIT, kedit.SADR(gamma=0.5))
        updates.append({key: delta.dense for key, delta in result.patch.deltas.items()})
        result.revert()
    full, cached = updates
    assert full.keys() == cached.keys()
    for key, update in full.items():
        assert (update - cached[key]).norm() < 1e-4 * update.norm()


@pytest.mark.parametrize("name", ["qwen3_5_text", "qwen3_next"])
@pytest.mark.parametrize("method", ["memit", "pmet", "alphaedit", "ft"])
def test_hybrids_are_edited_by_every_method(name, method):
    model = made(name)
    unedited = own_nll(model)
    layers = (0, 1) if method in ("memit", "pmet", "alphaedit") else (1,)
    if method == "ft":
        one = kedit.FT(model, TOKENIZER, layers=1, steps=3, contexts=["{}"])
    else:
        one = editor(method, model, *layers, stop_loss=0.0)
    result = one.apply(EDIT, None if method == "ft" else kedit.SADR(gamma=0.5))
    touched = {int(key.split(".")[2]) for key in result.patch.deltas}
    assert touched == set(layers)
    if method != "ft":
        assert result.log[0][0]["nll"] == pytest.approx(unedited, abs=1e-4)
        assert min(step["nll"] for step in result.log[0]) < unedited


@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrids_capture_attention_where_there_is_some(name):
    model = made(name)
    arch = ModelArch(model)
    assert [arch.has_attention(layer) for layer in range(4)] == [False, False, True, False]
    assert type(arch.site(Site(0, "attention"))) is torch.nn.Linear
    sadr = kedit.SADR(gamma=0.5)
    needs = needs_of([sadr], [Site(0)])
    [request] = encode_edits(arch, TOKENIZER, [EDIT], CONTEXTS, needs)
    runner = Runner(arch, [Site(0)], Wave(tuple(request.prompts(0)), 1), needs)
    with runner.installed():
        reading = runner.run(torch.zeros(1, 1, arch.hidden))
    assert set(reading.rewrite.attention) == {2}


@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrids_decode_as_their_own_forward_does(name):
    model = made(name)
    prompts = [tuple(TOKENIZER(text)["input_ids"]) for text in (EDIT.text, "Ada", "It was a cold morning")]
    said = continue_rows(ModelArch(model), TOKENIZER, prompts, 5)
    for prompt, (text, _) in zip(prompts, said, strict=True):
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(5):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert text == TOKENIZER.decode(ids[len(prompt) :], skip_special_tokens=True)


def test_a_vision_language_hybrid_is_edited_in_its_text_model():
    sizes = zoo.config_of("qwen3_5_text", vocab_size=400).to_dict()
    try:
        config = AutoConfig.for_model(
            "qwen3_5",
            text_config=sizes,
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "num_heads": 2,
                "intermediate_size": 16,
                "out_hidden_size": 32,
            },
        )
    except ValueError as error:
        pytest.skip(f"This version of transformers has no qwen3_5: {error}")
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    result = editor("rome", model, 1, stop_loss=0.0).apply(EDIT)
    assert list(result.patch.deltas) == ["model.language_model.layers.1.mlp.down_proj.weight"]
    assert min(step["nll"] for step in result.log[0]) < result.log[0][0]["nll"]


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen2_moe", "qwen3_next"])
def test_a_patch_is_applied_to_a_checkpoint(name, tmp_path):
    model = made(name)
    model.save_pretrained(tmp_path / "base")
    loaded = type(model).from_pretrained(tmp_path / "base").eval()
    result = editor("rome", loaded, 1).apply(EDIT)
    apply_to_checkpoint(tmp_path / "base", [result.patch], tmp_path / "edited")
    edited = type(model).from_pretrained(tmp_path / "edited")
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, edited.state_dict()[key]), key
