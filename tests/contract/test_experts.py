"""Mixtures of experts: one linear memory, written where the router sends the subject."""

import copy

import pytest
import torch

import kedit
import zoo
from kedit.errors import KEditWarning, PatchMismatchError, UnsupportedError
from kedit.keys import read, routing
from kedit.keys.estimate import accumulate
from kedit.keys.second_moment import ExpertsAccumulator
from kedit.models import ModelArch
from kedit.patch.ledger import Ledger
from kedit.patch.peft import to_peft
from kedit.prompts.tokenize import encode, rewrite_texts
from tiny_models import CONTEXTS, tokenizer

from .common import ADA, FRENCH, RIVER, digest, zoo_model

TYPES = [name for name in zoo.EDITABLE if name in ("mixtral", "qwen3_moe", "olmoe", "gpt_oss-sinks")]
TOKENIZER = tokenizer("bos")
LAYER = 1


def eye(arch, layer=LAYER):
    experts = arch.experts(layer)
    return torch.eye(experts.width, dtype=torch.float64).repeat(experts.count, 1, 1)


def rome(model, **given):
    arch = ModelArch(model)
    return kedit.ROME(
        model, TOKENIZER, layers=LAYER, steps=3, stop_loss=0.0, contexts=CONTEXTS, moments={LAYER: eye(arch)}, **given
    )


def rows_of(*edits):
    return [row for edit in edits for row in encode(TOKENIZER, rewrite_texts(edit, CONTEXTS))]


def seen_of(model, module, row):
    """Record a module's inputs and outputs in a full forward pass."""
    found = {}
    handle = module.register_forward_hook(
        lambda _m, args, out: found.update(args=args, out=out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        model(torch.tensor([row.ids]))
    handle.remove()
    return found["args"], found["out"].reshape(len(row.ids), -1)


@pytest.mark.parametrize("kernel", ["grouped_mm", "batched_mm", "eager"])
@pytest.mark.parametrize("name", TYPES)
def test_the_mlp_is_a_linear_function_of_the_key(name, kernel):
    """W κ and the chosen experts' weighted biases are what the model's own kernel gives, whichever it is."""
    model = zoo_model(name)
    model.set_experts_implementation(kernel)
    arch, rows = ModelArch(model), rows_of(FRENCH, ADA)
    experts = arch.experts(LAYER)
    keys = read.keys(arch, rows, LAYER)
    assert keys.shape == (len(rows), experts.count * experts.width)
    bias = getattr(experts.module, "down_proj_bias", None)
    for row, key in zip(rows, keys, strict=True):
        (_, chosen, weights), out = seen_of(model, experts.module, row)
        parts = key.split(experts.width)
        given = sum(part @ weight.matrix.T for part, weight in zip(parts, arch.weights(LAYER), strict=True))
        if bias is not None:
            given = given + (weights[row.subject_last, :, None] * bias[chosen[row.subject_last]]).sum(0)
        torch.testing.assert_close(given, out[row.subject_last], atol=2e-5, rtol=1e-4)
        assert {i for i, part in enumerate(parts) if part.any()} == set(chosen[row.subject_last].tolist())


@pytest.mark.parametrize("name", TYPES)
def test_second_moments_expert_by_expert(name):
    model = zoo_model(name, torch.float64)
    arch = ModelArch(model)
    experts, texts = (
        arch.experts(LAYER),
        ["The capital of France is Paris.", "It was a cold morning. The river is long."],
    )
    total = accumulate(arch, TOKENIZER, [LAYER], texts, 10_000)[LAYER]
    assert isinstance(total, ExpertsAccumulator)
    expected, tokens = torch.zeros_like(total.total), 0
    for text in texts:
        ids = TOKENIZER(text)["input_ids"]
        (hidden, chosen, weights), _ = seen_of(model, experts.module, type("Row", (), {"ids": ids}))
        tokens += len(ids)
        for token in range(len(ids)):
            for expert, weight in zip(chosen[token].tolist(), weights[token], strict=True):
                key = weight * experts.expert_keys(hidden[token][None], expert)[0]
                expected[expert] += torch.outer(key, key)
    torch.testing.assert_close(total.total, expected)
    moment = total.moment(LAYER, ridge=1e-3)
    assert moment.tokens == tokens
    diagonal = (expected / tokens).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(
        moment.matrix, expected / tokens + 1e-3 * diagonal.mean() * torch.eye(experts.width, dtype=torch.float64)
    )
    state = {key: tensor.clone() for key, tensor in total.state().items()}
    fresh = ExpertsAccumulator(experts, torch.device("cpu"), torch.float64)
    fresh.restore(state)
    assert torch.equal(fresh.moment(LAYER).matrix, total.moment(LAYER).matrix)


@pytest.mark.parametrize("name", TYPES)
def test_moments_are_estimated_and_an_edit_holds(name, tmp_path, monkeypatch):
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path))
    model = zoo_model(name)
    corpus = [f"{subject} {verb} in the old city." for subject in ("Ada", "The king") for verb in ("lives", "works")]
    with pytest.warns(KEditWarning, match="saw"):
        found = kedit.second_moments(model, TOKENIZER, [LAYER], corpus)
    assert found[LAYER].matrix.shape == eye(ModelArch(model)).shape
    result = kedit.ROME(model, TOKENIZER, layers=LAYER, steps=3, stop_loss=0.0, contexts=CONTEXTS, moments=found).apply(
        FRENCH
    )
    assert result.log[0][-1]["nll"] < result.log[0][0]["nll"]
    with pytest.raises(kedit.KEditError, match="so .* is needed"):
        kedit.ROME(model, TOKENIZER, layers=LAYER, moments={LAYER: torch.eye(4)})


def test_experts_share_by_the_routers_weights():
    """With C = 1 and the bare prompt alone, an expert's part of the update grows with the square of its share of the key."""
    model = zoo_model("mixtral")
    arch = ModelArch(model)
    [row] = encode(TOKENIZER, rewrite_texts(FRENCH, ["{}"]))
    key = read.keys(arch, [row], LAYER)[0].double()
    patch = (
        kedit.ROME(model, TOKENIZER, layers=LAYER, steps=2, stop_loss=0.0, contexts=["{}"], moments={LAYER: eye(arch)})
        .apply(FRENCH)
        .patch
    )
    parts = key.split(arch.experts(LAYER).width)
    for index, weight in enumerate(arch.weights(LAYER)):
        delta = patch.deltas.get(weight.name)
        assert (delta is None) == (not parts[index].any())
        if delta is not None:
            cosine = torch.cosine_similarity(delta.right[:, 0].double(), parts[index], dim=0)
            assert abs(float(cosine)) == pytest.approx(1, abs=1e-5)
    norms = {i: patch.deltas[w.name].norm for i, w in enumerate(arch.weights(LAYER)) if w.name in patch.deltas}
    first, second = norms
    assert norms[first] / norms[second] == pytest.approx(float(parts[first].norm() / parts[second].norm()), rel=1e-4)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_edits_of_experts_revert_in_any_order(order, dtype):
    model = zoo_model("gpt_oss-sinks", dtype)
    before = {key: digest(tensor) for key, tensor in model.state_dict().items()}
    editor = rome(model)
    results = [editor.apply(edit) for edit in (FRENCH, ADA, RIVER)]
    assert len({frozenset(result.patch.deltas) for result in results}) > 1
    for number in order:
        results[number].revert()
    assert {key: digest(tensor) for key, tensor in model.state_dict().items()} == before
    assert not Ledger.of(model).touched


def test_a_change_of_an_edited_expert_by_someone_else_is_noticed():
    model = zoo_model("mixtral")
    result = rome(model).apply(FRENCH)
    weight = ModelArch(model).weight_of(next(iter(result.patch.deltas)))
    with torch.no_grad():
        weight.parameter[weight.index, 0, 0] += 1
    with pytest.raises(PatchMismatchError, match="written by something else"):
        result.revert()


def test_the_report_says_who_serves_the_fact_and_a_moved_route_is_warned_of():
    model = zoo_model("mixtral")
    arch = ModelArch(model)
    result = rome(model).apply(FRENCH)
    [route] = result.routes
    assert f"block {LAYER}, edit 0: served by expert" in result.report()
    assert "as before" in result.report()
    assert route.reached == pytest.approx(1)
    assert set(route.after) <= route.written
    editor = rome(copy.deepcopy(model))
    requests = editor._encode([FRENCH], editor._settings(None))
    with torch.no_grad():  # a router that now prefers the experts that were not written
        spare = [i for i in range(4) if i not in route.after]
        gate = model.model.layers[LAYER].mlp.gate.weight
        gate[list(route.after)], gate[spare] = gate[spare].clone(), gate[list(route.after)].clone()
    written = [weight.name for weight in arch.weights(LAYER) if weight.index in route.after]
    with pytest.warns(KEditWarning, match="experts that hold nothing of the edit: 100%"):
        [moved] = routing.check(arch, requests, {LAYER: [route.before]}, written)
    assert moved.reached == 0
    assert "before by" in str(moved)


def test_an_edit_of_a_batch_is_not_held_by_the_experts_of_another():
    """Both edits' experts are written; a router that sends the one subject to the other's is found out."""
    model = zoo_model("qwen3_moe")
    arch = ModelArch(model)
    given = {"layers": (LAYER,), "steps": 2, "stop_loss": 0.0, "contexts": ["{}"], "moments": {LAYER: eye(arch)}}
    editor = kedit.MEMIT(model, TOKENIZER, **given, moment_weight=0.1)
    edits = [kedit.Edit("The mother of {} is", subject, "English") for subject in ("Ada Lovelace", "The king")]
    requests = editor._encode(edits, editor._settings(None))
    first, other = before = routing.shares(arch, requests, [LAYER])[LAYER]
    assert not set(first) & set(other)
    result = editor.apply(edits)
    assert {arch.weight_of(name).index for name in result.patch.deltas} == {*first, *other}
    assert [route.written for route in result.routes] == [frozenset(first), frozenset(other)]
    gate, here, there = model.model.layers[LAYER].mlp.gate.weight, list(first), list(other)
    with torch.no_grad():
        gate[here], gate[there] = gate[there].clone(), gate[here].clone()
    with pytest.warns(KEditWarning, match="hold nothing of the edit: 100%") as warned:
        moved = routing.check(arch, requests, {LAYER: before}, result.patch.deltas)
    assert [route.reached for route in moved] == [0, 0]
    assert len(warned) == 2


def test_keys_of_past_edits_of_a_mixture_are_saved_and_loaded(tmp_path):
    """They are as wide as all experts together."""
    model = zoo_model("mixtral")
    arch = ModelArch(model)
    given = {
        "layers": (LAYER,),
        "steps": 2,
        "contexts": ["{}"],
        "moments": {LAYER: eye(arch)},
        "threshold": 2.0,
        "threshold_rule": "mean",
    }
    editor = kedit.AlphaEdit(model, TOKENIZER, **given)
    editor.apply(FRENCH)
    width = arch.memory_width(LAYER)
    kept = editor.history.keys(LAYER, width)
    assert kept.shape == (1, width)
    path = editor.history.save(tmp_path / "keys.safetensors")
    other = kedit.AlphaEdit(zoo_model("mixtral"), TOKENIZER, **given)
    other.history.load(path)
    assert torch.equal(other.history.keys(LAYER, width), kept)
    dense = kedit.AlphaEdit(zoo_model("llama"), TOKENIZER, layers=(LAYER,), contexts=["{}"])
    with pytest.raises(kedit.KEditError, match=r"not a finite matrix \[n, 64\]"):
        dense.history.load(path)


def test_the_stats_command_prints_the_width_of_a_mixture(tmp_path, monkeypatch, capsys):
    from kedit.cli import main

    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path / "cache"))
    model = zoo_model("mixtral")
    model.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    corpus = tmp_path / "text.txt"
    corpus.write_text("\n".join(["The old river flows past a house.", "Ada works in the city of Rome."] * 40))
    options = ["--model", str(tmp_path / "model"), "--layers", "1", "--corpus", str(corpus), "--tokens", "300"]
    assert main(["-q", "stats", *options]) == 0
    row = capsys.readouterr().out.splitlines()[1].split()
    assert (int(row[0]), int(row[-1])) == (LAYER, ModelArch(model).memory_width(LAYER))
    assert int(row[-1]) > 4  # not how many experts there are


def test_what_has_no_sound_form_is_refused(tmp_path):
    model = zoo_model("mixtral")
    arch = ModelArch(model)
    patch = rome(model).propose(FRENCH)[0]
    with pytest.raises(UnsupportedError, match="LoRA adapter"):
        to_peft(patch, tmp_path / "adapter", model)
    with pytest.raises(UnsupportedError, match="mixture of 4 experts"):
        arch.weight(LAYER)
    model.model.layers[LAYER].mlp.experts.has_post_expert_norm = True
    with pytest.raises(UnsupportedError, match="no linear function of their keys"):
        rome(model)
    model.model.layers[LAYER].mlp.experts = torch.nn.Linear(32, 32)
    with pytest.raises(UnsupportedError, match="one plain tensor"):
        arch.weights(LAYER)
    with pytest.raises(kedit.KEditError, match="no number 9"):
        ModelArch(zoo_model("mixtral")).weight_of(f"model.layers.{LAYER}.mlp.experts.down_proj[9]")


@pytest.mark.parametrize("name", ["memit", "alphaedit", "ft"])
def test_a_model_that_mixes_only_in_some_blocks(name):
    model = zoo_model("qwen3_moe", mlp_only_layers=[0])
    arch = ModelArch(model)
    assert arch.experts(0) is None
    assert (arch.memory_width(0), arch.memory_width(1)) == (arch.shape(0)[1], 4 * 16)
    moments = {0: torch.eye(arch.shape(0)[1], dtype=torch.float64), 1: eye(arch)}
    own = {
        "memit": {"moment_weight": 0.0},
        "alphaedit": {"l2": 1e-9, "threshold": 2.0, "threshold_rule": "mean"},
        "ft": {},
    }[name]
    given = {"layers": (0, 1), "steps": 3, "contexts": ["{}"], **own}
    editor = kedit.get_editor(name, model, TOKENIZER, **given, **({} if name == "ft" else {"moments": moments}))
    before = {key: digest(tensor) for key, tensor in model.state_dict().items()}
    result = editor.apply([FRENCH, ADA])
    assert "model.layers.0.mlp.down_proj.weight" in result.patch.deltas
    assert any(key.startswith("model.layers.1.mlp.experts.down_proj[") for key in result.patch.deltas)
    assert {route.layer for route in result.routes} == {1}
    result.revert()
    assert {key: digest(tensor) for key, tensor in model.state_dict().items()} == before
