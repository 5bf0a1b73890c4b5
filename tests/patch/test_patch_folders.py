"""Checkpoint folders that are odd: of unknown types, with code, with links, with two sets of weights, with impossible names."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from kedit.cli import main
from kedit.errors import ArchitectureError, ConfigError, KEditError, NonFiniteError, PatchError, PatchMismatchError
from kedit.models import ARCHITECTURES
from kedit.patch import EditPatch
from kedit.patch.checkpoint.apply import apply_to_checkpoint
from kedit.patch.checkpoint.read import INDEX, SINGLE
from kedit.patch.delta import LowRankDelta
from patch_common import bytes_of, patch_for, random_delta, save_checkpoint
from tiny_models import tiny_model as model

_SIZES = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96}
_KEYS = {"num_key_value_heads": 4}
UNKNOWN = {
    "biogpt": _SIZES,
    "ernie4_5": _SIZES | _KEYS,
    "nemotron": _SIZES | _KEYS,
    "seed_oss": _SIZES | _KEYS,
    "xglm": {"d_model": 48, "num_layers": 3, "attention_heads": 4, "ffn_dim": 96},
}


def loaded(folder):
    """The model in a folder, in the dtype it is stored in."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


@pytest.fixture
def base(tmp_path):
    """A sharded checkpoint and a patch for it."""
    subject = save_checkpoint(tmp_path / "base", dtype=torch.float32, shard="200KB")
    return tmp_path / "base", patch_for(subject, {1: 2})


@pytest.mark.parametrize("kind", UNKNOWN)
def test_types_that_are_found_by_structure_work_on_disk_too(tmp_path, kind, capsys):
    assert kind not in ARCHITECTURES
    config = AutoConfig.for_model(kind, vocab_size=100, max_position_embeddings=64, **UNKNOWN[kind])
    subject = AutoModelForCausalLM.from_config(config).eval()
    subject.save_pretrained(tmp_path / "base")
    patch = patch_for(subject, {1: 2})
    patch.apply(subject)
    apply_to_checkpoint(tmp_path / "base", [patch], tmp_path / "edited")
    assert bytes_of(loaded(tmp_path / "edited")) == bytes_of(subject)
    found = EditPatch.diff(tmp_path / "base", tmp_path / "edited")
    assert found.fingerprints == patch.fingerprints
    assert (found.provenance["model"]["num_layers"], found.provenance["model"]["hidden"]) == (3, 48)
    patch.save(tmp_path / "p")
    words = ["export", str(tmp_path / "p"), "--model", str(tmp_path / "base"), "--out", str(tmp_path / "adapter")]
    assert main(["patch", *words]) == 0
    (a,) = (
        value for key, value in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items() if "_A" in key
    )
    assert torch.equal(a, next(iter(patch.deltas.values())).right.T)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gptj"])
def test_a_diff_says_of_its_model_what_an_edit_says(kind):
    one, other = model(kind), model(kind)
    patch_for(one, {1: 1}).apply(other)
    found = EditPatch.diff(one, other).provenance["model"]
    assert (found["type"], found["num_layers"], found["hidden"]) == (kind, 5, 48)


def test_code_that_comes_with_a_checkpoint_is_never_run(tmp_path, base, monkeypatch):
    folder, patch = base
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    code = "from transformers import LlamaConfig as C, LlamaForCausalLM as M\nopen({!r}, 'w')\n"
    (folder / "mine.py").write_text(code.format(str(tmp_path / "ran")))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # whoever is asked says yes
    for do in (
        lambda: apply_to_checkpoint(folder, [patch], tmp_path / "out"),
        lambda: EditPatch.diff(folder, folder),
    ):
        with pytest.raises(ArchitectureError, match="runs no such code"):
            do()
    assert sorted(os.listdir(tmp_path)) == ["base"]


def test_two_sets_of_weights_are_refused(tmp_path, base):
    folder, patch = base
    model("llama", seed=3).save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other" / SINGLE, folder / SINGLE)
    with pytest.raises(PatchError, match=f"both {SINGLE} and {INDEX}"):
        apply_to_checkpoint(folder, [patch], tmp_path / "out")


def test_two_names_of_one_stored_weight_are_refused(tmp_path):
    subject = model("gpt2")
    subject.save_pretrained(tmp_path / "base")
    patch = patch_for(subject, {1: 1})
    ((name, delta),) = patch.deltas.items()
    short = name.removeprefix("transformer.")
    twice = {short: random_delta(delta.shape, 2, 7), name: delta}
    both = EditPatch(twice, dict.fromkeys(twice, patch.fingerprints[name]))
    with pytest.raises(PatchMismatchError, match="both stored as"):
        apply_to_checkpoint(tmp_path / "base", [both], tmp_path / "out", force=True)
    assert os.listdir(tmp_path) == ["base"]


def test_links_that_do_not_travel_are_named(tmp_path, base, capsys):
    folder, patch = base
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "chat.jinja").write_text("x")
    (tmp_path / "note").write_text("x")
    (folder / "templates").symlink_to(tmp_path / "templates")
    (folder / "sub").mkdir()
    (folder / "sub" / "gone\033[2J").symlink_to(tmp_path / "nowhere")
    (folder / "note").symlink_to(tmp_path / "note")
    report = apply_to_checkpoint(folder, [patch], tmp_path / "out")
    assert sorted(report.passed_over) == ["sub/gone\033[2J", "templates"]
    assert (tmp_path / "out" / "note").read_text() == "x"
    assert not (tmp_path / "out" / "templates").exists()
    patch.save(tmp_path / "p")
    assert main(["patch", "apply", str(folder), "--patch", str(tmp_path / "p"), "--out", str(tmp_path / "again")]) == 0
    said = capsys.readouterr().out
    assert "passed over" in said
    assert "templates" in said
    assert "\033" not in said


def impossible(folder):
    """Names under which nothing can be written."""
    (folder / "loop").symlink_to(folder / "loop")
    return [
        folder / "loop",
        folder / "loop" / "x",
        folder / ("x" * 300),
        f"{folder}/a\0b",
        folder / "base" / "config.json",
    ]


def test_impossible_targets_are_refused_in_words(tmp_path, base, capsys):
    folder, patch = base
    patch.save(tmp_path / "p")
    apply_to_checkpoint(folder, [patch], tmp_path / "edited")
    targets = impossible(tmp_path)
    before = sorted(os.listdir(tmp_path))
    for out in targets:
        with pytest.raises(PatchError):
            apply_to_checkpoint(folder, [patch], out)
        with pytest.raises(PatchError):
            patch.to_peft(out, model("llama"))
        if out in targets[1:4]:  # a file may be written in place of a link or of a file
            with pytest.raises(PatchError):
                patch.save(out)
            for words in (["diff", folder, tmp_path / "edited"], ["merge", tmp_path / "p", tmp_path / "p"]):
                assert main(["patch", *map(str, words), "--out", str(out)]) == 1
    assert sorted(os.listdir(tmp_path)) == before


def test_impossible_sources_are_refused_in_words(tmp_path, base):
    folder, patch = base
    for source in [*impossible(tmp_path), "", tmp_path / "none"]:
        for do, *given in (
            (apply_to_checkpoint, source, [patch], tmp_path / "out"),
            (EditPatch.diff, source, folder),
            (EditPatch.diff, folder, source),
        ):
            with pytest.raises(KEditError, match=r"\w+ \w+"):
                do(*given)
    with pytest.raises(ConfigError, match="not one of each"):
        EditPatch.diff(folder, model("llama"))


def test_the_sign_of_zero_is_no_difference(tmp_path):
    subject = model("llama")
    weight = subject.model.layers[1].mlp.down_proj.weight
    for name, value in (("a", 0.0), ("b", -0.0)):
        weight.data[0, 0] = value
        subject.save_pretrained(tmp_path / name)
    with pytest.raises(PatchError, match="same weights"):
        EditPatch.diff(tmp_path / "a", tmp_path / "b")
    weight.data[3, 5] += 1
    subject.save_pretrained(tmp_path / "c")
    assert [delta.rank for delta in EditPatch.diff(tmp_path / "a", tmp_path / "c").deltas.values()] == [1]


@pytest.mark.parametrize("size", [1e200, 1e-200])
def test_numbers_beyond_what_a_norm_can_hold_are_refused(tmp_path, size):
    one, other = model("llama", dtype=torch.float64), model("llama", dtype=torch.float64)
    for subject, sign in ((one, 1.0), (other, 2.0)):
        torch.nn.init.constant_(subject.model.layers[1].mlp.down_proj.weight, sign * size)
    with pytest.raises(NonFiniteError, match="float64 cannot hold"):
        EditPatch.diff(one, other)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
def test_a_difference_that_is_hardly_more_than_rounding_is_refused(share):
    """Weights moved to the next bfloat16, as by one step of training: no columns hold that, few or many."""
    base, trained = model("llama", dtype=torch.bfloat16), model("llama", dtype=torch.bfloat16)
    weight = trained.model.layers[1].mlp.down_proj.weight
    moved = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < share
    weight.data.view(torch.int16)[moved] += 1
    with pytest.raises(PatchError, match=r"down_proj\.weight is too small to be told from rounding"):
        EditPatch.diff(base, trained)
    found = EditPatch.diff(base, trained, tolerance=0.99)  # who asks for it gets it, and is told
    ((name, error),) = found.provenance["config"]["errors"].items()
    assert 0.25 < error <= 0.99
    assert f"{name} 48x80: rank {found.deltas[name].rank}, relative error {error:.2g}" in found.show()


def filled(rows, columns, value):
    """A float64 matrix of one number."""
    return torch.full((rows, columns), value, dtype=torch.float64)


@pytest.mark.parametrize("dense", [True, False])
def test_updates_too_large_for_their_norm_are_refused(tmp_path, dense):
    subject = model("llama")
    patch = patch_for(subject, {1: None if dense else 1})
    (name,) = patch.deltas
    factors = (filled(48, 80, 1e200),) if dense else (filled(48, 1, 1e200), filled(80, 1, 1e200))
    patch.deltas[name] = type(patch.deltas[name])(*factors)
    with pytest.raises(NonFiniteError):
        EditPatch.merge([patch, patch], tolerance=0.1)
    with pytest.raises(NonFiniteError):
        patch.to_peft(tmp_path / "adapter", subject)
    with pytest.raises(NonFiniteError):
        patch.apply(subject)
    wide = LowRankDelta(filled(48, 1, 1e39), filled(80, 1, 1e-39))
    with pytest.raises(NonFiniteError, match="infinite"):  # the product is 1, a factor is too large for float32
        EditPatch({name: wide}, patch.fingerprints).to_peft(tmp_path / "adapter", subject)
    assert not (tmp_path / "adapter").exists()
    assert "norm inf" in patch.show()
