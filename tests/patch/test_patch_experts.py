"""Experts of a mixture on disk: however a type stores them, the same bits as in memory."""

import json
from unittest import mock

import accelerate
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import zoo
from kedit.errors import KEditError, PatchError, PatchMismatchError
from kedit.models import ModelArch
from kedit.patch import EditPatch, fingerprints
from kedit.patch.checkpoint.apply import apply_to_checkpoint, revert_checkpoint
from kedit.patch.checkpoint.manifest import RECORD
from kedit.patch.checkpoint.read import Checkpoint, stored_experts
from patch_common import bytes_of, random_delta

MIXTURES = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss-sinks")
APART = {"mixtral": "model.layers.1.block_sparse_moe.experts.3.w2.weight", "gpt_oss-sinks": None}
APART |= dict.fromkeys(("qwen3_moe", "olmoe"), "model.layers.1.mlp.experts.3.down_proj.weight")


def saved(folder, name, dtype=torch.bfloat16):
    subject = zoo.make(name, dtype)
    subject.save_pretrained(folder, max_shard_size="40KB")
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def patch_of(subject, ranks, seed=0):
    """A random update of some experts: ``{(layer, expert): rank}``."""
    arch = ModelArch(subject)
    deltas = {}
    for (layer, expert), rank in ranks.items():
        weight = arch.weights(layer)[expert]
        deltas[weight.name] = random_delta(tuple(weight.matrix.shape), rank, seed + 10 * layer + expert)
    return EditPatch(deltas, fingerprints(arch, deltas), {"editor": "memit"})


def stored(folder):
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MIXTURES)
def test_on_disk_and_in_memory_give_the_same_bits_and_back(tmp_path, name, dtype):
    subject = saved(tmp_path / "base", name, dtype)
    first = patch_of(subject, {(1, 3): 2, (1, 0): 1, (0, 2): 1})
    first.apply(subject)
    second = patch_of(subject, {(1, 3): 1}, seed=4)  # made for the model with the first
    second.apply(subject)
    key = Checkpoint.open(tmp_path / "base").key_of("model.layers.1.mlp.experts.down_proj[3]")
    assert key == (APART[name] or "model.layers.1.mlp.experts.down_proj[3]")
    apply_to_checkpoint(tmp_path / "base", [first, second], tmp_path / "both")
    assert bytes_of(AutoModelForCausalLM.from_pretrained(tmp_path / "both", dtype="auto")) == bytes_of(subject)
    with pytest.raises(PatchMismatchError, match=r"experts.*is not the weight"):
        apply_to_checkpoint(tmp_path / "base", [second], tmp_path / "three")

    apply_to_checkpoint(tmp_path / "base", [first], tmp_path / "one")  # a 16-bit weight is rounded in each run
    apply_to_checkpoint(tmp_path / "one", [second], tmp_path / "two")
    for edited in ("both", "two"):
        revert_checkpoint(tmp_path / edited, tmp_path / "base", [first, second], tmp_path / f"{edited} back")
        assert stored(tmp_path / f"{edited} back") == stored(tmp_path / "base")
        assert not (tmp_path / f"{edited} back" / RECORD).exists()
    revert_checkpoint(tmp_path / "two", tmp_path / "one", [second], tmp_path / "half")
    assert stored(tmp_path / "half") == stored(tmp_path / "one")
    record = json.loads((tmp_path / "half" / RECORD).read_text())
    assert [set(item["fingerprints"]) for item in record["patches"]] == [set(first.deltas)]


@pytest.mark.parametrize("name", MIXTURES)
def test_diff_names_the_experts_that_differ(tmp_path, name):
    subject = saved(tmp_path / "base", name, torch.float32)
    patch = patch_of(subject, {(1, 3): 2, (0, 1): 1})
    patch.apply(subject)
    subject.save_pretrained(tmp_path / "edited", max_shard_size="40KB")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="auto")
    for found in (EditPatch.diff(base, subject), EditPatch.diff(tmp_path / "base", tmp_path / "edited")):
        assert found.deltas.keys() == patch.deltas.keys()
        assert found.fingerprints == patch.fingerprints
        for key, delta in patch.deltas.items():
            assert found.deltas[key].rank == delta.rank
            torch.testing.assert_close(found.deltas[key].dense, delta.dense, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss-sinks"])
def test_what_is_not_there_is_refused(tmp_path, name):
    subject = saved(tmp_path / "base", name)
    [(known, delta)] = patch_of(subject, {(1, 3): 1}).deltas.items()
    for other, message in (
        (known.replace("[3]", "[4]"), "expert 4 of .* holds 4 experts there"),
        (known.replace("down_proj", "up_proj"), "no experts of that name, together or apart"),
        (known.replace("layers.1", "layers.7"), "no experts of that name, together or apart"),
        ("model.norm.weight[3]", "expert 3 of model.norm.weight"),
    ):
        with pytest.raises(PatchMismatchError, match=message):
            apply_to_checkpoint(tmp_path / "base", [EditPatch({other: delta}, {})], tmp_path / "out", force=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rank", [2, None])
@pytest.mark.parametrize("name", MIXTURES)
def test_an_attached_patch_does_what_an_applied_one_does_with_gradient_and_leaves_no_trace(name, rank):
    beside, inside = zoo.make(name), zoo.make(name)
    patch = patch_of(beside, {(1, 3): rank, (1, 0): rank, (0, 2): rank})
    ids = torch.randint(3, 60, (3, 11), generator=torch.Generator().manual_seed(1))

    def run(subject):
        embedded = subject.get_input_embeddings()(ids).detach().requires_grad_()
        logits = subject(inputs_embeds=embedded).logits
        return logits.detach(), torch.autograd.grad(logits.square().sum(), embedded)[0]

    before, plain = bytes_of(beside), run(beside)
    patch.apply(inside)
    wanted = run(inside)
    with patch.attach(beside):
        found = run(beside)
        assert bytes_of(beside) == before
        for got, known in zip(found, wanted, strict=True):
            torch.testing.assert_close(got, known, atol=1e-4 * float(known.abs().max()), rtol=1e-4)
        assert not torch.allclose(found[0], plain[0], atol=1e-2)
        for do in (patch.attach, patch.apply):
            with pytest.raises(PatchMismatchError, match="attached to the model already"):
                do(beside)
    assert torch.equal(run(beside)[0], plain[0])
    assert all(not module._forward_hooks for module in beside.modules())


def test_attaching_to_experts_that_are_others_or_not_there_is_refused():
    patch = patch_of(zoo.make("mixtral"), {(1, 3): 1})
    [(known, delta)] = patch.deltas.items()
    with pytest.raises(PatchMismatchError, match="not the weight"):
        EditPatch({known.replace("[3]", "[2]"): delta}, {}).attach(zoo.make("mixtral"))
    for other, message in (
        (known.replace("[3]", "[4]"), "no number 4"),
        (known.replace("experts", "router"), "no layer"),
        ("model.norm.weight[3]", "no down-projection"),
        ("model.norm.down_proj[3]", "edits experts"),
        (known.replace("down_proj", "gate_up_proj"), "no down-projection"),
    ):
        subject = zoo.make("mixtral")
        with pytest.raises(KEditError, match=message):
            EditPatch({other: delta}, {}).attach(subject, force=True)
        assert all(not module._forward_hooks for module in subject.modules())


def test_experts_in_a_form_that_is_not_known_are_refused(tmp_path):
    subject = saved(tmp_path / "base", "mixtral")
    patch = patch_of(subject, {(1, 3): 1})

    def turned(model, tensors):  # square matrices would have the same shape
        return {f"{name}.{i}": part.T for name, whole in tensors.items() for i, part in enumerate(whole)}

    with mock.patch("transformers.core_model_loading.revert_weight_conversion", turned):
        assert stored_experts(subject, "model.layers.1.mlp.experts.down_proj") == []
        with pytest.raises(PatchMismatchError, match="stores its layers otherwise"):
            apply_to_checkpoint(tmp_path / "base", [patch], tmp_path / "out")
    with mock.patch("transformers.core_model_loading.revert_weight_conversion", side_effect=ValueError("no")):
        assert stored_experts(subject, "model.layers.1.mlp.experts.down_proj") == []
    assert stored_experts(subject, "model.layers.1.mlp.experts.nothing") == []


def test_a_damaged_expert_is_told(tmp_path):
    subject = saved(tmp_path / "base", "mixtral")
    patch = patch_of(subject, {(1, 3): 1})
    checkpoint = Checkpoint.open(tmp_path / "base")
    key = APART["mixtral"]
    file = tmp_path / "base" / checkpoint.files[key]
    tensors = load_file(file)
    tensors[key] = tensors[key][:, :5].contiguous()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(PatchError, match=r"has shape .* its config.json describes"):
        apply_to_checkpoint(tmp_path / "base", [patch], tmp_path / "out", force=True)


@pytest.mark.parametrize("way", ["fused", "without prefix"])
def test_other_forms_of_a_mixtures_checkpoint(tmp_path, way):
    subject, base = zoo.make("mixtral"), tmp_path / "base"

    def save(folder):
        if way == "fused":
            subject.save_pretrained(folder, save_original_format=False)
        else:
            subject.model.save_pretrained(folder)

    save(base)
    patch = patch_of(subject, {(1, 3): 2})
    patch.apply(subject)
    save(tmp_path / "wanted")
    apply_to_checkpoint(base, [patch], tmp_path / "out")
    assert stored(tmp_path / "out") == stored(tmp_path / "wanted")
    found = EditPatch.diff(base, tmp_path / "out")
    assert (found.deltas.keys(), found.fingerprints) == (patch.deltas.keys(), patch.fingerprints)


def test_reverting_needs_the_configuration_of_the_edited_folder_alone(tmp_path):
    subject = saved(tmp_path / "base", "mixtral")
    patch = patch_of(subject, {(1, 3): 1})
    apply_to_checkpoint(tmp_path / "base", [patch], tmp_path / "out")
    (tmp_path / "base" / "config.json").unlink()
    revert_checkpoint(tmp_path / "out", tmp_path / "base", [patch], tmp_path / "back")
    assert stored(tmp_path / "back") == stored(tmp_path / "base")


def test_each_expert_is_one_weight_with_one_branch(tmp_path):
    subject = zoo.make("mixtral")
    patch = patch_of(subject, {(1, 3): 1})
    [(known, delta)] = patch.deltas.items()
    other = EditPatch({known.replace("[3]", "[2]"): delta}, fingerprints(ModelArch(subject), [known[:-3] + "[2]"]))
    with patch.attach(subject), other.attach(subject):  # the same update of another expert
        assert len(subject.model.layers[1].mlp.experts._forward_hooks) == 2
    names = dict.fromkeys((known, known.replace("[3]", "[03]")))
    twice = EditPatch(dict.fromkeys(names, delta), dict.fromkeys(names, patch.fingerprints[known]), {"editor": "hand"})
    with pytest.raises(PatchError, match=r"\[03\]"):
        twice.save(tmp_path / "twice")


def test_diff_of_experts_gate_and_of_what_is_no_mixture():
    base, edited = zoo.make("mixtral"), zoo.make("mixtral")
    with torch.no_grad():
        edited.model.layers[1].mlp.experts.gate_up_proj[2] += random_delta((128, 32), 1).dense
    found = EditPatch.diff(base, edited)
    assert list(found.deltas) == ["model.layers.1.mlp.experts.gate_up_proj[2]"]
    found.apply(base)
    torch.testing.assert_close(base.state_dict(), edited.state_dict(), atol=1e-5, rtol=1e-5)
    base, edited = zoo.make("mixtral"), zoo.make("mixtral")
    for subject in (base, edited):
        subject.model.norm.cube = torch.nn.Parameter(torch.zeros(2, 3, 4))
    with torch.no_grad():
        edited.model.norm.cube += 1
    with pytest.raises(PatchError, match="norm.cube differs, and a patch cannot hold that"):
        EditPatch.diff(base, edited)


def test_diff_of_offloaded_models(tmp_path):
    base, edited = zoo.make("mixtral"), zoo.make("mixtral")
    patch = patch_of(edited, {(1, 3): 1})
    patch.apply(edited)
    away = [accelerate.disk_offload(model, tmp_path / name) for name, model in (("a", base), ("b", edited))]
    found = EditPatch.diff(*away)
    assert (found.deltas.keys(), found.fingerprints) == (patch.deltas.keys(), patch.fingerprints)
