"""Merge, diff, show and attach."""

import re

import pytest
import torch

from kedit.errors import ConfigError, KEditWarning, NonFiniteError, PatchError, PatchMismatchError
from kedit.patch import EditPatch
from kedit.patch.delta import DenseDelta, LowRankDelta
from kedit.patch.ledger import Ledger
from kedit.patch.merge import choose_rank, recompress
from patch_common import TYPES, bytes_of, logits, patch_for, random_delta, save_checkpoint
from tiny_models import tiny_model as model

# Merge


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", TYPES)
def test_fifty_patches_merged_give_the_bits_of_fifty_one_after_another(kind, dtype):
    one_by_one, at_once = model(kind, dtype=dtype), model(kind, dtype=dtype)
    patches = []
    for number in range(50):  # each made for the model with the earlier ones, as a sequence of edits is
        patches.append(patch_for(one_by_one, {number % 3: 1 + number % 2}, seed=7 * number, scale=0.02))
        patches[-1].apply(one_by_one)
    merged = EditPatch.merge(patches)
    merged.apply(at_once)  # its fingerprints are those of the base
    assert bytes_of(at_once) == bytes_of(one_by_one)
    assert len(merged.provenance["merged"]) == 50


def test_merged_patches_survive_a_file(tmp_path):
    base = model("llama")
    patches = [patch_for(base, {1: 1}, seed=i) for i in range(3)]
    merged = EditPatch.merge(patches)
    merged.save(tmp_path / "m")
    found = EditPatch.load(tmp_path / "m")
    assert [item["fingerprints"] for item in found.provenance["merged"]] == [p.fingerprints for p in patches]
    found.apply(base)


def test_a_dense_part_makes_the_sum_dense_and_equal_up_to_rounding():
    base, other = model("llama"), model("llama")
    patches = [patch_for(base, {1: 2}), patch_for(base, {1: None}, seed=3)]
    merged = EditPatch.merge(patches)
    assert isinstance(next(iter(merged.deltas.values())), DenseDelta)
    merged.apply(base)
    for patch in patches:
        patch.apply(other, force=True)
    for one, two in zip(base.parameters(), other.parameters(), strict=True):
        assert torch.allclose(one, two, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tolerance", [0.0, 1e-6, 0.01, 0.2])
def test_recompression_keeps_its_word_and_says_its_error(tolerance):
    base = model("llama")
    strong, weak = patch_for(base, {1: 2}), patch_for(base, {1: 6}, seed=5, scale=0.005)
    exact = EditPatch.merge([strong, weak, strong])
    merged = EditPatch.merge([strong, weak, strong], tolerance=tolerance)
    (name,) = merged.deltas
    whole, small = exact.deltas[name].dense.double(), merged.deltas[name].dense.double()
    error = float((whole - small).norm() / whole.norm())
    assert error <= tolerance + 1e-6  # float32 factors
    assert merged.provenance["config"]["errors"][name] == pytest.approx(error, abs=1e-6)
    assert exact.deltas[name].rank == 10
    assert merged.deltas[name].rank <= 8 if tolerance < 0.2 else merged.deltas[name].rank == 2


def test_recompression_falls_back_to_dense_where_that_is_smaller():
    delta = random_delta((10, 12), 9)
    found, error = recompress("w", delta, 0.0)
    assert isinstance(found, DenseDelta)
    assert error == 0.0
    assert torch.allclose(found.matrix, delta.dense)


def test_the_rank_is_the_smallest_that_fits():
    singular = torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    assert choose_rank(singular, 0.0)[0] == 3
    assert choose_rank(singular, 0.3)[0] == 2
    assert choose_rank(singular, 0.3)[1] == pytest.approx(1 / 14**0.5)
    assert choose_rank(singular, 0.99)[0] == 1


def test_merge_refuses_nothing_and_patches_of_different_models():
    llama, gpt2 = patch_for(model("llama"), {1: 1}), patch_for(model("gpt2"), {1: 1})
    with pytest.raises(PatchError, match="nothing to merge"):
        EditPatch.merge([])
    with pytest.raises(PatchMismatchError, match="different models"):
        EditPatch.merge([llama, gpt2])
    (name,) = llama.deltas
    odd = EditPatch({name: random_delta((3, 4), 1)}, llama.fingerprints, {})
    with pytest.raises(PatchMismatchError, match="different models"):
        EditPatch.merge([llama, odd])
    for wrong in ({"type": []}, {"type": {"a": 1}}, {"num_layers": [1]}):
        other = EditPatch(
            llama.deltas, llama.fingerprints, {"model": {**llama.provenance["model"], "num_layers": 3, **wrong}}
        )
        same = EditPatch(llama.deltas, llama.fingerprints, {"model": {**llama.provenance["model"], "num_layers": 3}})
        with pytest.raises(PatchMismatchError, match="different models"):
            EditPatch.merge([same, other])
        assert EditPatch.merge([other, other]).provenance["model"] == other.provenance["model"]
    for tolerance in (-0.1, 1.0, float("nan"), "x"):
        with pytest.raises(ConfigError):
            EditPatch.merge([llama], tolerance=tolerance)


# Diff


@pytest.mark.parametrize("kind", TYPES)
def test_diff_recovers_a_known_patch(kind):
    base, edited = model(kind), model(kind)
    patch = patch_for(base, {1: 1, 3: 4})
    patch.apply(edited)
    found = EditPatch.diff(base, edited)
    assert found.fingerprints == patch.fingerprints
    for name, delta in patch.deltas.items():
        assert found.deltas[name].rank == delta.rank
        assert torch.allclose(found.deltas[name].dense, delta.dense, rtol=0, atol=2e-6)
    again = model(kind)
    found.apply(again)
    assert torch.allclose(logits(again), logits(edited), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_diff_tells_an_edit_from_the_rounding_of_the_stored_dtype(dtype):
    base, edited = model("llama", dtype=dtype), model("llama", dtype=dtype)
    patch = patch_for(base, {1: 2})
    patch.apply(edited)
    (name,) = patch.deltas
    delta = EditPatch.diff(base, edited).deltas[name]
    assert delta.rank == 2
    assert (delta.dense - patch.deltas[name].dense).norm() < 0.02 * patch.deltas[name].norm


def test_diff_of_large_matrices_needs_no_full_svd(monkeypatch):
    monkeypatch.setattr("kedit.patch.diff._SMALL", 8)
    base, edited = model("llama"), model("llama")
    patch = patch_for(base, {1: 3, 2: 20})
    patch.apply(edited)
    found = EditPatch.diff(base, edited)
    for name, delta in patch.deltas.items():
        assert found.deltas[name].rank == delta.rank
        assert torch.allclose(found.deltas[name].dense, delta.dense, rtol=0, atol=2e-6)
    with pytest.raises(PatchError, match=r"layers\.2.*not low-rank"):
        EditPatch.diff(base, edited, max_rank=19)
    patch_for(base, {3: None}).apply(edited)
    with pytest.raises(PatchError, match=r"layers\.3.*not low-rank"):
        EditPatch.diff(base, edited)


def test_diff_refuses_training_and_names_the_weight():
    base, edited = model("llama"), model("llama")
    patch_for(base, {2: None}).apply(edited)
    with pytest.raises(PatchError, match=re.escape("model.layers.2.mlp.down_proj.weight is not low-rank")):
        EditPatch.diff(base, edited)
    with pytest.raises(PatchError, match="not low-rank"):
        EditPatch.diff(base, edited, max_rank=5)


def test_diff_refuses_what_no_patch_holds():
    base, edited = model("gpt2"), model("gpt2")
    with torch.no_grad():
        edited.transformer.h[1].mlp.c_proj.bias[3] += 1
    with pytest.raises(PatchError, match=r"h\.1\.mlp\.c_proj\.bias"):
        EditPatch.diff(base, edited)
    edited = model("gpt2")
    with torch.no_grad():
        edited.transformer.wpe.weight[3] += 1
    with pytest.raises(PatchError, match=r"transformer\.wpe\.weight"):
        EditPatch.diff(base, edited)
    edited = model("gpt2")
    with torch.no_grad():
        edited.transformer.h[1].mlp.c_proj.weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="NaN"):
        EditPatch.diff(base, edited)


def test_diff_refuses_equal_and_unlike_models(tmp_path):
    base = model("llama")
    with pytest.raises(PatchError, match="same weights"):
        EditPatch.diff(base, model("llama"))
    with pytest.raises(PatchMismatchError, match="two states of one model"):
        EditPatch.diff(base, model("gpt2"))
    with pytest.raises(PatchMismatchError, match="dtype"):
        EditPatch.diff(base, model("llama", dtype=torch.bfloat16))
    with pytest.raises(ConfigError, match="two models or two folders"):
        EditPatch.diff(base, tmp_path)
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(ConfigError, match="max_rank"):
            EditPatch.diff(base, base, max_rank=wrong)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_diff_of_folders_is_the_diff_of_their_models(tmp_path, kind):
    base = save_checkpoint(tmp_path / "a", kind, torch.float32)
    edited = save_checkpoint(tmp_path / "b", kind, torch.float32)
    patch = patch_for(base, {1: 2, 2: 1})
    patch.apply(edited)
    edited.save_pretrained(tmp_path / "b", max_shard_size="100KB")
    found, expected = EditPatch.diff(tmp_path / "a", tmp_path / "b"), EditPatch.diff(base, edited)
    assert found.fingerprints == expected.fingerprints == patch.fingerprints
    for name, delta in expected.deltas.items():
        assert torch.equal(found.deltas[name].dense, delta.dense)


# Show


def test_show_says_who_what_where_and_how_much():
    known = {
        "editor": "memit",
        "regularizers": [{"name": "sadr"}],
        "config": {"layers": [1, 2], "lr": 0.5},
        "edits": [{"prompt": "{} lives in", "subject": "Ada", "target_new": "Rome"}] * 25,
        "model": {"name": "tiny-llama", "type": "llama", "dtype": "float32"},
        "scores": {"efficacy": 0.98765, "cases": 3},
    }
    patch = patch_for(model("llama"), {1: 2, 2: None}, provenance=known)
    text = patch.show()
    who = ["memit with sadr", "tiny-llama", "llama", "lr=0.5", "edits: 25", "'Ada lives in' -> 'Rome'", "and 5 more"]
    where = ["model.layers.1.mlp.down_proj.weight 48x80: rank 2", "dense", "sha256:"]
    for word in [*who, *where, "efficacy: 0.9877", "cases: 3"]:
        assert word in text
    assert f"norm {patch.deltas['model.layers.1.mlp.down_proj.weight'].norm:.4g}" in text


def test_show_of_a_patch_without_provenance():
    text = patch_for(model("llama"), {1: 1}, provenance={}).show()
    assert "editor: unknown" in text
    assert "base model: unnamed" in text


# Attach


@pytest.mark.parametrize("rank", [3, None])
@pytest.mark.parametrize("kind", TYPES)
def test_an_attached_patch_does_what_an_applied_one_does_and_leaves_no_trace(kind, rank):
    beside, inside = model(kind), model(kind)
    patch = patch_for(beside, {1: rank, 3: rank})
    before, plain = bytes_of(beside), logits(beside)
    patch.apply(inside)
    with patch.attach(beside) as attachment:
        assert bytes_of(beside) == before
        assert torch.allclose(logits(beside), logits(inside), rtol=0, atol=1e-5)
        assert not torch.allclose(logits(beside), plain, rtol=0, atol=1e-2)
        assert attachment.attached
    assert not attachment.attached
    assert torch.equal(logits(beside), plain)
    assert all(not module._forward_hooks for module in beside.modules())
    attachment.detach()


def test_attaching_several_adds_up_and_each_goes_alone():
    subject, other = model("llama"), model("llama")
    one, two = patch_for(subject, {1: 2}), patch_for(subject, {1: 1}, seed=9)
    first, second = one.attach(subject), two.attach(subject)
    one.apply(other)
    two.apply(other, force=True)
    assert torch.allclose(logits(subject), logits(other), rtol=0, atol=1e-5)
    first.detach()
    one.revert(other)
    assert torch.allclose(logits(subject), logits(other), rtol=0, atol=1e-5)
    second.detach()


def test_attaching_goes_away_with_an_exception():
    subject = model("llama")
    with pytest.raises(RuntimeError, match="inside"), patch_for(subject, {1: 1}).attach(subject):
        raise RuntimeError("inside")
    assert all(not module._forward_hooks for module in subject.modules())


def test_attaching_to_other_weights_is_refused_unless_forced():
    patch = patch_for(model("llama", seed=0), {1: 1, 2: 1})
    other = model("llama", seed=1)
    with pytest.raises(PatchMismatchError, match="not the weight"):
        patch.attach(other)
    assert all(not module._forward_hooks for module in other.modules())
    patch.attach(other, force=True).detach()
    for force in (False, True):
        with pytest.raises(PatchMismatchError, match="no layer"):
            patch.attach(model("gpt2"), force=force)


def test_attaching_what_the_weights_carry_is_refused():
    subject = model("llama")
    patch = patch_for(subject, {1: 1})
    patch.apply(subject)
    with pytest.raises(PatchMismatchError, match="already"):
        patch.attach(subject)
    assert Ledger.of(subject).carries(patch)


@pytest.mark.parametrize("rank", [2, None])
def test_what_is_attached_is_neither_attached_again_nor_applied(tmp_path, rank):
    subject = model("llama")
    patch = patch_for(subject, {1: rank, 2: rank})
    twin = EditPatch.load(patch.save(tmp_path / "p"))
    before = bytes_of(subject)
    with patch.attach(subject):
        with_patch = logits(subject)
        for one in (patch, twin):
            for do in (one.attach, one.apply):
                with pytest.raises(PatchMismatchError, match="attached to the model already"):
                    do(subject, force=True)
        assert torch.equal(logits(subject), with_patch)
        assert bytes_of(subject) == before
        with patch_for(subject, {1: rank}, seed=9).attach(subject):
            assert not torch.equal(logits(subject), with_patch)
    twin.apply(subject)
    twin.revert(subject)
    patch.attach(subject).detach()


class Int8Linear(torch.nn.Module):
    """A quantized linear layer as the quantizing libraries make them: integers and a scale."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.weight = torch.nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        return x @ (self.weight.to(x.dtype) * self.scale).T


def test_attaching_to_a_quantized_base_adds_the_branch_and_says_what_it_cannot_check():
    subject = model("llama")
    patch = patch_for(subject, {1: 2})
    mlp = subject.model.layers[1].mlp
    mlp.down_proj = Int8Linear(mlp.down_proj)
    plain = logits(subject)
    x = torch.randn(3, 80)
    (delta,) = patch.deltas.values()
    expected = mlp.down_proj(x) + x @ delta.dense.T
    with pytest.warns(KEditWarning, match="cannot check"), patch.attach(subject):
        assert torch.allclose(mlp.down_proj(x), expected, rtol=0, atol=1e-5)
    assert torch.equal(logits(subject), plain)
    wrong = EditPatch({name: random_delta((7, 80), 1) for name in patch.deltas}, patch.fingerprints)
    with pytest.raises(PatchMismatchError, match="shape"):
        wrong.attach(subject)


def test_branches_run_in_the_factors_dtype_on_half_precision_models():
    subject = model("llama", dtype=torch.bfloat16)
    patch = patch_for(subject, {1: 1})
    (delta,) = patch.deltas.values()
    layer = subject.model.layers[1].mlp.down_proj
    x = torch.randn(5, 80, dtype=torch.bfloat16)
    plain = layer(x)
    with patch.attach(subject):
        assert layer(x).dtype == torch.bfloat16
        branch = (x.float() @ delta.right) @ delta.left.T
        assert torch.equal(layer(x), (plain.float() + branch).bfloat16())


def test_a_low_rank_delta_needs_matching_factors():
    with pytest.raises(PatchError):
        LowRankDelta(torch.ones(3, 1), torch.ones(4, 2))
    with pytest.raises(PatchError):
        DenseDelta(torch.ones(3))
