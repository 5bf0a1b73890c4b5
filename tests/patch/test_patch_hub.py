"""Patches on the hub, by a stand-in for its client; model cards beside patches, adapters and models."""

import os
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from kedit.cli import main
from kedit.errors import PatchError
from kedit.patch import EditPatch, hub
from kedit.patch.card import BESIDE, CARD, EARLIER, model_card
from kedit.patch.checkpoint.apply import apply_to_checkpoint, revert_checkpoint
from patch_common import patch_for, save_checkpoint
from tiny_models import tiny_model as model

KNOWN = {
    "editor": "rome",
    "regularizers": [{"name": "sadr", "gamma": 0.004}],
    "model": {"name": "someone/base", "type": "llama", "num_layers": 5},
    "edits": [{"prompt": "{} is in", "subject": "The <b>Tower</b> | x", "target_new": "Rome"}],
    "before": [{"probability": 0.01, "nll": 4.6, "said": False, "first_choice": "Paris", "text": "Paris. It"}],
    "after": [{"probability": 0.93, "nll": 0.1, "said": True, "first_choice": "Rome", "text": "Rome. It"}],
    "scores": {"kl": 0.012},
}


@pytest.fixture
def patch():
    return patch_for(model("llama"), {1: 2}, provenance=KNOWN)


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """A hub in a folder: what its client would upload lies there, what it would download comes from there."""
    state = SimpleNamespace(folder=tmp_path / "hub", calls=[], fails=None, reachable=True)

    class Api:
        def __init__(self, token=None):
            state.calls.append(("api", token))

        def create_repo(self, repo_id, **options):
            if state.fails:
                raise state.fails
            state.calls.append(("create", repo_id, options))
            (state.folder / repo_id).mkdir(parents=True, exist_ok=True)

        def upload_folder(self, *, repo_id, folder_path, **options):
            state.calls.append(("upload", options))
            shutil.copytree(folder_path, state.folder / repo_id, dirs_exist_ok=True)
            return SimpleNamespace(commit_url=f"hub/{repo_id}/commit/1", pr_url=None)

    def download(repo_id, filename, **options):
        state.calls.append(("download", options))
        if options["local_files_only"]:
            raise LocalEntryNotFoundError("nothing cached")
        if not (state.folder / repo_id / filename).is_file():
            raise OSError(f"404: {repo_id} has no {filename}")
        return str(state.folder / repo_id / filename)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(hub, "hub_is_reachable", lambda: state.reachable)
    return state


def test_a_pushed_patch_comes_back_with_its_card(patch, stub):
    assert patch.push_to_hub("me/edit", private=True, token="t") == "hub/me/edit/commit/1"
    assert stub.calls[:2] == [("api", "t"), ("create", "me/edit", {"private": True, "exist_ok": True})]
    assert sorted(os.listdir(stub.folder / "me/edit")) == ["README.md", "edit.safetensors"]
    again = EditPatch.from_pretrained("me/edit", revision="main")
    assert again.provenance == patch.provenance
    assert all(torch.equal(again.deltas[name].left, delta.left) for name, delta in patch.deltas.items())
    card = (stub.folder / "me/edit/README.md").read_text()
    assert "kedit.EditPatch.from_pretrained('me/edit')" in card
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["base_model"] == "someone/base"
    assert metadata["tags"][0] == "kedit"


def test_the_command_line_pushes(patch, stub, tmp_path, capsys):
    file = patch.save(tmp_path / "edit.safetensors")
    assert main(["patch", "push", str(file), "--repo", "me/edit", "--private"]) == 0
    assert "pushed: hub/me/edit/commit/1" in capsys.readouterr().out
    assert ("create", "me/edit", {"private": True, "exist_ok": True}) in stub.calls


def test_a_folder_gives_its_patch(patch, tmp_path, stub):
    patch.save(tmp_path / "p/other.safetensors")
    assert EditPatch.from_pretrained(tmp_path / "p").provenance == KNOWN
    assert EditPatch.from_pretrained(str(tmp_path / "p/other.safetensors")).provenance == KNOWN
    patch.save(tmp_path / "p/more.safetensors")
    with pytest.raises(
        PatchError, match=r"2 safetensors files \(more.safetensors, other.safetensors\). Name the patch"
    ):
        EditPatch.from_pretrained(tmp_path / "p")
    assert EditPatch.from_pretrained(tmp_path / "p", filename="more.safetensors").provenance == KNOWN
    (tmp_path / "empty").mkdir()
    with pytest.raises(PatchError, match="holds no patch"):
        EditPatch.from_pretrained(tmp_path / "empty")
    with pytest.raises(PatchError):
        EditPatch.from_pretrained("./me/edit")
    assert not stub.calls


def test_refusals_of_the_hub_are_sentences(patch, stub, tmp_path):
    with pytest.raises(PatchError, match="There is no folder 'me/none' here, and no patch edit.safetensors"):
        EditPatch.from_pretrained("me/none")
    stub.fails = HfHubHTTPError("403: not yours", response=SimpleNamespace(headers={}, request=None))
    with pytest.raises(PatchError, match="The hub refuses 'me/edit': 403: not yours. Check the name"):
        patch.push_to_hub("me/edit")
    stub.reachable = False
    with pytest.raises(PatchError, match="cannot be reached"):
        patch.push_to_hub("me/edit")
    with pytest.raises(PatchError, match="cannot be reached"):
        EditPatch.from_pretrained("me/edit")
    assert stub.calls[-1][1]["local_files_only"] is True


def test_a_card_tells_the_edit_its_figures_and_the_way_back(patch):
    card = patch.model_card()
    text = r"The &lt;b&gt;Tower&lt;/b&gt; \| x"
    assert f"| {text} is in | {text} | Rome | Paris. It (1.0%) | Rome. It (93.0%) |" in card
    assert "says 1 of 1 new targets; the base model says 0" in card
    assert "sadr (gamma=0.004)" in card
    assert "measured by the guard: kl 0.012" in card
    assert f"`{next(iter(patch.deltas))}`" in card
    assert "kedit patch revert EDITED_DIR --base BASE_DIR --patch edit.safetensors" in card


def test_cards_of_odd_provenance():
    many = {"edits": [KNOWN["edits"][0]] * 60, "model": {"name": "folder"}}
    card = model_card([{"editor": "merge", "merged": [KNOWN, many]}], ["a.weight"] * 51)
    assert "And 11 more." in card
    assert "and 1 more" in card
    assert "base_model:" not in card
    strange = {"editor": 3, "edits": ["x", {"prompt": 7}], "after": 5, "model": [], "scores": {}, "merged": [{}]}
    assert "| 7 | ? | ? | – | – |" in model_card([strange], [])
    assert "name no edits" in model_card([{}], [], "model")


def test_an_adapter_has_a_card(patch, tmp_path):
    patch.to_peft(tmp_path / "adapter", model("llama"))
    card = (tmp_path / "adapter" / CARD).read_text()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "peft"
    assert "Use the base model without the adapter" in card


def test_an_edited_checkpoint_has_a_card_and_the_bases_comes_back(tmp_path):
    subject = save_checkpoint(tmp_path / "base", shard="60KB")
    (tmp_path / "base" / CARD).write_text("about the base")
    patch = patch_for(subject, {1: 2}, provenance=KNOWN)
    apply_to_checkpoint(tmp_path / "base", [patch], tmp_path / "out")
    card = (tmp_path / "out" / CARD).read_text()
    assert yaml.safe_load(card.split("---")[1])["base_model_relation"] == "finetune"
    [kept] = (tmp_path / "out/kedit-patches").iterdir()
    assert f"--patch THIS_DIR/kedit-patches/{kept.name} " in card
    assert (tmp_path / "out" / EARLIER).read_text() == "about the base"
    other = patch_for(subject, {3: 1}, provenance={**KNOWN, "editor": "memit"})
    apply_to_checkpoint(tmp_path / "out", [other], tmp_path / "both")
    assert "editor: memit" in (tmp_path / "both" / CARD).read_text()
    assert (tmp_path / "both" / EARLIER).read_text() == "about the base"
    revert_checkpoint(tmp_path / "both", tmp_path / "base", [patch, other], tmp_path / "back")
    assert (tmp_path / "back" / CARD).read_text() == "about the base"
    assert not (tmp_path / "back" / EARLIER).exists()
    assert not (tmp_path / "back" / BESIDE).exists()
