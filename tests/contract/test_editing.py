"""After an edit, on every model type, the method's equation holds and nothing else has changed."""

import dataclasses

import pytest
import torch

import kedit
from kedit.errors import KEditWarning
from kedit.keys import read
from kedit.models import ModelArch
from kedit.prompts.tokenize import encode, rewrite_texts
from tiny_models import CONTEXTS, MODEL_TYPES, tiny_model, tokenizer

from .common import ADA, EDITS, FRENCH, LAYER, RIVER, bare_output, changed, make, state


@pytest.mark.parametrize("regularizer", [None, kedit.SADR(gamma=0.5)], ids=["plain", "sadr"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_rome_gives_the_value_at_the_bare_prompt(model_type, regularizer, values):
    model, tok = tiny_model(model_type), tokenizer("bos")
    before = bare_output(model, FRENCH, tok)
    result = make("rome", model, tok).apply(FRENCH, regularizer)
    [found] = values
    assert found.delta.norm() > 0.1
    torch.testing.assert_close(found.initial[0, 0], before, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(bare_output(model, FRENCH, tok), found.value[0, 0], atol=2e-4, rtol=1e-3)
    [delta] = result.patch.deltas.values()
    assert delta.rank == 1


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_rrome_gives_the_value_at_the_mean_key(model_type, values):
    model, tok = tiny_model(model_type), tokenizer()
    arch = ModelArch(model)
    keys = read.keys(arch, encode(tok, rewrite_texts(FRENCH, CONTEXTS)), LAYER).double()
    original = arch.weight(LAYER).matrix.double().clone()
    make("rrome", model, tok).apply(FRENCH)
    edited = arch.weight(LAYER).matrix.double()
    wanted = original @ keys[0] + values[0].delta[0, 0].double()  # v* without the bias
    torch.testing.assert_close(edited @ keys.mean(0), wanted, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(edited @ keys[0], wanted, atol=1e-2)


@pytest.mark.parametrize("name", ["rome", "rrome"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_only_the_edited_weight_changes_and_revert_is_exact(model_type, name):
    model = tiny_model(model_type)
    model.train()
    model.get_input_embeddings().eval()
    model.get_input_embeddings().weight.requires_grad_(False)
    before = state(model)
    weight = ModelArch(model).weight(LAYER).name
    result = make(name, model).apply(FRENCH, kedit.SADR(gamma=0.1))
    after = state(model)
    assert changed(before, after) == {weight}
    assert {k: v for k, v in after.items() if k != "weights"} == {k: v for k, v in before.items() if k != "weights"}
    result.revert()
    assert state(model) == before


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_propose_writes_nothing_and_equals_apply(model_type, attention):
    model = tiny_model(model_type, attention=attention)
    editor = make("rome", model)
    before = state(model)
    proposals = editor.propose(EDITS, kedit.SADR(gamma=0.1))
    assert state(model) == before
    assert len(proposals) == 3
    for edit, proposal in zip(EDITS, proposals, strict=True):
        result = editor.apply(edit, kedit.SADR(gamma=0.1))
        [(name, one)], [(other, two)] = proposal.deltas.items(), result.patch.deltas.items()
        assert name == other
        torch.testing.assert_close(one.dense, two.dense, atol=2e-4, rtol=5e-3)
        assert proposal.provenance["edits"] == [edit.to_dict()]
        result.revert()
    assert state(model) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_results_revert_in_any_order_bit_for_bit(dtype, order):
    model = tiny_model("gpt2", dtype=dtype)
    editor = make("rome", model, steps=2)
    before = state(model)
    seen = [before]
    results = []
    for edit in EDITS:
        results.append(editor.apply(edit))
        seen.append(state(model))
    assert len({s["weights"]["transformer.h.2.mlp.c_proj.weight"] for s in seen}) == 4
    for number in order:
        results[number].revert()
    assert state(model) == before
    with pytest.raises(kedit.KEditError, match="not applied"):
        results[0].revert()


def test_everything_is_taken_back_at_once_whoever_wrote_it():
    model = tiny_model("gpt2")
    before = state(model)
    rome, memit = make("rome", model), make("memit", model)
    results = [rome.apply(FRENCH), memit.apply([ADA]), rome.apply(ADA)]
    rome.revert_all()
    assert state(model) == before
    for result in results:
        with pytest.raises(kedit.KEditError, match="not applied"):
            result.revert()
    again = rome.apply(FRENCH)
    assert torch.equal(
        next(iter(again.patch.deltas.values())).dense, next(iter(results[0].patch.deltas.values())).dense
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_saved_and_loaded_it_gives_the_same_weights(model_type, dtype, tmp_path):
    model = tiny_model(model_type, dtype=dtype)
    before = state(model)
    result = make("rome", model).apply([FRENCH, ADA])
    edited = state(model)
    assert len(changed(before, edited)) == 1
    path = result.patch.save(tmp_path / "edit.safetensors")
    loaded = kedit.EditPatch.load(path)
    twin = tiny_model(model_type, dtype=dtype)
    loaded.apply(twin)
    assert state(twin) == edited
    loaded.revert(twin)
    assert state(twin) == before
    result.revert()
    loaded.apply(model)
    assert state(model) == edited
    assert loaded.provenance == result.patch.provenance


def test_a_list_is_written_one_after_the_other():
    """The second edit is optimised on the model that the first has changed."""
    listed, single = tiny_model("llama"), tiny_model("llama")
    together = make("rome", listed).apply([FRENCH, ADA])
    editor = make("rome", single)
    first = editor.apply(FRENCH)
    second = editor.apply(ADA)
    for i, result in enumerate((first, second)):
        for a, b in zip(together.log[i], result.log[0], strict=True):
            assert a == pytest.approx(b, rel=1e-3, abs=1e-4)
    name = ModelArch(listed).weight(LAYER).name
    one, two = (ModelArch(model).weight(LAYER).matrix for model in (listed, single))
    torch.testing.assert_close(one, two, atol=1e-4, rtol=1e-3)
    alone = make("rome", tiny_model("llama")).apply(ADA)
    assert together.log[1][0]["nll"] != pytest.approx(alone.log[0][0]["nll"], rel=1e-3)
    assert together.patch.deltas[name].shape == (48, 80)
    assert together.patch.provenance["edits"] == [FRENCH.to_dict(), ADA.to_dict()]


def test_order_matters_for_a_list_and_not_for_proposals():
    first = make("rome", tiny_model("gpt2")).propose([FRENCH, ADA])
    second = make("rome", tiny_model("gpt2")).propose([ADA, FRENCH])
    for one, two in zip(first, reversed(second), strict=True):
        [a], [b] = one.deltas.values(), two.deltas.values()
        torch.testing.assert_close(a.dense, b.dense, atol=1e-5, rtol=1e-3)


def test_the_same_call_gives_the_same_bits():
    states = []
    for _ in range(2):
        model = tiny_model("qwen2")
        make("rome", model).apply([FRENCH, ADA], kedit.SADR(gamma=0.1))
        states.append(state(model))
    assert states[0] == states[1]


def test_generated_contexts_are_the_same_each_time_and_on_record():
    patches = []
    for _ in range(2):
        torch.manual_seed(len(patches))
        model = tiny_model("gpt2")
        patches.append(make("rome", model, contexts=None, steps=2).propose(FRENCH)[0])
    one, two = (patch.provenance["contexts"] for patch in patches)
    assert one == two
    assert one[0] == "{}"
    assert len(one) > 15
    [a], [b] = (patch.deltas.values() for patch in patches)
    assert torch.equal(a.left, b.left)


@pytest.mark.parametrize("kind", ["plain", "bos", "left", "nopad"])
def test_padding_side_and_pad_token_do_not_matter(kind):
    reference = make("rome", tiny_model("gpt2"), tokenizer("plain")).propose([FRENCH, RIVER])
    found = make("rome", tiny_model("gpt2"), tokenizer(kind)).propose([FRENCH, RIVER])
    for one, two in zip(reference, found, strict=True):
        [a], [b] = one.deltas.values(), two.deltas.values()
        assert torch.equal(a.dense, b.dense) == (kind != "bos")


def test_log_has_every_step_and_column():
    result = make("rome", tiny_model("gpt2"), steps=5).apply(FRENCH, kedit.SADR(gamma=0.3))
    [steps] = result.log
    assert [step["step"] for step in steps] == [0, 1, 2, 3, 4]
    assert steps[-1].pop("written") == pytest.approx(1, abs=1e-4), "ROME writes all of the wanted change"
    for step in steps:
        assert list(step) == ["step", "total", "nll", "kl", "weight_decay", "sadr"]
        assert step["total"] == pytest.approx(sum(step[c] for c in ("nll", "kl", "weight_decay", "sadr")), rel=1e-4)
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert steps[0]["sadr"] == pytest.approx(0, abs=1e-6)
    assert steps[-1]["nll"] < steps[0]["nll"]


def test_stop_loss_ends_early_and_clamp_bounds_the_value(values):
    with pytest.warns(KEditWarning, match="update is 0, so nothing was written. Either the loss was below stop_loss"):
        easy = make("rome", tiny_model("gpt2"), steps=20, stop_loss=1e9).apply(FRENCH)
    assert len(easy.log[0]) == 1
    assert values[0].delta.norm() == 0, "the last step does not update"
    make("rome", tiny_model("gpt2"), steps=6, clamp=0.01).apply(FRENCH)
    torch.testing.assert_close(values[1].delta.norm(), 0.01 * values[1].initial.norm(), rtol=1e-4, atol=0)


def test_report_is_readable():
    result = make("rome", tiny_model("gpt2")).apply([FRENCH, ADA], kedit.SADR(gamma=0.3))
    text = result.report()
    for words in (
        "rome with sadr: 2 edit(s)",
        "The mother tongue of Danielle Darrieux is → English",
        "4 steps",
        "rank 2",
    ):
        assert words in text
    assert all(f"{column} " in text for column in ("total", "nll", "kl", "weight_decay", "sadr"))
    assert repr(result) == "EditResult(2 edits, transformer.h.2.mlp.c_proj.weight)"


def test_gamma_zero_is_no_regularizer():
    plain = make("rome", tiny_model("gpt2")).propose(FRENCH)[0]
    zero = make("rome", tiny_model("gpt2")).propose(FRENCH, kedit.SADR(gamma=0.0))[0]
    strong = make("rome", tiny_model("gpt2")).propose(FRENCH, kedit.SADR(gamma=5.0, select="all"))[0]
    [a], [b], [c] = (patch.deltas.values() for patch in (plain, zero, strong))
    torch.testing.assert_close(a.dense, b.dense, atol=1e-6, rtol=1e-4)
    assert (a.dense - c.dense).norm() > 0.05 * a.dense.norm()


def test_config_object_and_overrides():
    model = tiny_model("gpt2")
    config = kedit.ROME.Config(layers=(LAYER,), steps=3, lr=0.1)
    editor = kedit.ROME(model, tokenizer(), config, lr=0.2)
    assert editor.config == dataclasses.replace(config, lr=0.2)
    assert kedit.ROME(model, tokenizer()).config == kedit.ROME.preset(model)
