"""Taking patches away on disk: from what several runs made, with the record kept, and never across dtypes."""

import json
import os

import pytest
import torch
from transformers import AutoModelForCausalLM

from kedit.errors import PatchError, PatchMismatchError
from kedit.patch import EditPatch
from kedit.patch.checkpoint.apply import apply_to_checkpoint, revert_checkpoint
from kedit.patch.checkpoint.manifest import FOLDER, RECORD
from kedit.patch.checkpoint.read import Checkpoint
from kedit.patch.checkpoint.rewrite import quiet, write_folder
from patch_common import bytes_of, patch_for, save_checkpoint


def loaded(folder):
    """The model in a folder, in the dtype it is stored in."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def recorded(folder):
    """Editor and number of weights of every patch on record; None where there is no record."""
    if not (folder / RECORD).exists():
        return None
    known = json.loads((folder / RECORD).read_text())["patches"]
    return [(item["provenance"]["editor"], len(item["fingerprints"])) for item in known]


def named(subject, ranks, editor, seed=0):
    return patch_for(subject, ranks, seed=seed, provenance={"editor": editor})


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_base_in_another_dtype_is_refused_even_when_forced(tmp_path, dtype, force):
    subject = save_checkpoint(tmp_path / "base", shard="200KB")
    patch = patch_for(subject, {1: 2})
    apply_to_checkpoint(tmp_path / "base", [patch], tmp_path / "edited")
    subject.to(dtype).save_pretrained(tmp_path / "other", max_shard_size="30KB")
    with pytest.raises(PatchMismatchError, match=r"BF16 in .*edited and F(32|16) in .*other"):
        revert_checkpoint(tmp_path / "edited", tmp_path / "other", [patch], tmp_path / "back", force=force)
    assert sorted(os.listdir(tmp_path)) == ["base", "edited", "other"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_bytes_that_do_not_fit_their_place_are_never_written(tmp_path, dtype):
    save_checkpoint(tmp_path / "base", dtype=torch.float32, shard="200KB")
    source = Checkpoint.open(tmp_path / "base")
    key = "model.layers.1.mlp.down_proj.weight"
    wrong = {key: lambda: source.read(key).to(dtype)}
    with pytest.raises(PatchError, match=r"takes 15360 bytes.*its new value has (7680|30720)"):
        write_folder(source, wrong, tmp_path / "out", link=False, record=[], stage=quiet)
    assert os.listdir(tmp_path) == ["base"]


def in_runs(folder, runs):
    """Apply patches run after run, each made for what is there then; return the patches and the last folder."""
    patches, last = [], folder / "base"
    for number, count in enumerate(runs):
        subject, new = loaded(last), []
        for _ in range(count):
            new.append(patch_for(subject, {1: 2}, seed=10 * len([*patches, *new])))
            new[-1].apply(subject)
        apply_to_checkpoint(last, new, folder / f"run{number}")
        patches, last = [*patches, *new], folder / f"run{number}"
    return patches, last


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("runs", [(1, 1), (2, 1), (1, 2, 1)], ids=str)
def test_patches_of_several_runs_on_a_16_bit_checkpoint_are_taken_away(tmp_path, runs, recorded):
    before = bytes_of(save_checkpoint(tmp_path / "base", shard="200KB"))
    patches, last = in_runs(tmp_path, runs)
    apply_to_checkpoint(tmp_path / "base", patches, tmp_path / "once", force=True)
    assert bytes_of(loaded(tmp_path / "once")) != bytes_of(loaded(last))  # rounded once, and once per run
    if not recorded:
        (last / RECORD).unlink()
    if recorded or runs == (1, 1):
        revert_checkpoint(last, tmp_path / "base", patches, tmp_path / "back")
        assert bytes_of(loaded(tmp_path / "back")) == before
    else:  # nothing says which patches were rounded together
        with pytest.raises(PatchMismatchError):
            revert_checkpoint(last, tmp_path / "base", patches, tmp_path / "back")


def test_other_changes_are_told_from_rounding(tmp_path):
    save_checkpoint(tmp_path / "base", shard="200KB")
    patches, last = in_runs(tmp_path, (1, 1, 1))
    (last / RECORD).unlink()
    with pytest.raises(PatchMismatchError, match="carries other changes too"):
        revert_checkpoint(last, tmp_path / "base", patches[:2], tmp_path / "back")
    with pytest.raises(PatchMismatchError, match="not the weight that this patch was made for"):
        revert_checkpoint(last, tmp_path / "run0", patches, tmp_path / "back")


def test_the_record_of_patches_that_stay_stays(tmp_path):
    subject = save_checkpoint(tmp_path / "base", dtype=torch.float32, shard="200KB")
    one, two = named(subject, {1: 2}, "one"), named(subject, {2: 1, 3: 1}, "two", 5)
    apply_to_checkpoint(tmp_path / "base", [one, two], tmp_path / "both")
    revert_checkpoint(tmp_path / "both", tmp_path / "base", [one], tmp_path / "second")
    assert recorded(tmp_path / "second") == [("two", 2)]
    apply_to_checkpoint(tmp_path / "base", [two], tmp_path / "expected")
    assert bytes_of(loaded(tmp_path / "second")) == bytes_of(loaded(tmp_path / "expected"))
    revert_checkpoint(tmp_path / "second", tmp_path / "base", [two], tmp_path / "none")
    assert recorded(tmp_path / "none") is None
    (name, other) = two.deltas  # by force, one of its two weights alone
    part = EditPatch({name: two.deltas[name]}, {name: two.fingerprints[name]})
    revert_checkpoint(tmp_path / "second", tmp_path / "base", [part], tmp_path / "part")
    (item,) = json.loads((tmp_path / "part" / RECORD).read_text())["patches"]
    assert set(item["fingerprints"]) == {other}


def test_the_record_of_the_base_stays_too(tmp_path):
    subject = save_checkpoint(tmp_path / "base", dtype=torch.float32, shard="200KB")
    one = named(subject, {1: 2, 2: 1}, "one")
    apply_to_checkpoint(tmp_path / "base", [one], tmp_path / "first")
    two = named(loaded(tmp_path / "first"), {1: 1}, "two", 7)
    apply_to_checkpoint(tmp_path / "first", [two], tmp_path / "second")
    assert recorded(tmp_path / "second") == [("one", 2), ("two", 1)]
    revert_checkpoint(tmp_path / "second", tmp_path / "first", [two], tmp_path / "back")
    assert (tmp_path / "back" / RECORD).read_bytes() == (tmp_path / "first" / RECORD).read_bytes()
    revert_checkpoint(tmp_path / "second", tmp_path / "base", [one, two], tmp_path / "all")
    assert recorded(tmp_path / "all") is None


@pytest.mark.parametrize("content", ["[", "[]", "{}", '{"patches": {}}', '{"patches": [1]}', '{"patches": [{}]}'])
def test_records_that_are_none_are_refused(tmp_path, content):
    subject = save_checkpoint(tmp_path / "base", dtype=torch.float32, shard="200KB")
    (tmp_path / "base" / RECORD).write_text(content)
    with pytest.raises(PatchError, match=RECORD):
        apply_to_checkpoint(tmp_path / "base", [patch_for(subject, {1: 1})], tmp_path / "out")
    (tmp_path / "base" / RECORD).write_text(
        '{"patches": [' + '{"fingerprints": {}, "a": ' + "[" * 500 + "]" * 500 + "}]}"
    )
    with pytest.raises(PatchError, match="nested"):
        apply_to_checkpoint(tmp_path / "base", [patch_for(subject, {1: 1})], tmp_path / "out")
    assert os.listdir(tmp_path) == ["base"]


# One of several


def journal(folder, dtype, *, merged=False, runs=(4,)):
    """Four patches, each made for the model with those before, applied in runs; the last folder."""
    subject = save_checkpoint(folder / "base", dtype=dtype, shard="200KB")
    patches = []
    for number in range(4):
        edit = {"prompt": "{} is", "subject": f"S{number}", "target_new": "x"}
        layers = {1: 1} if number < 3 else {1: 2, 2: 1}
        patches.append(patch_for(subject, layers, seed=10 * number, provenance={"editor": "rome", "edits": [edit]}))
        patches[-1].apply(subject)
    last, left = folder / "base", list(patches)
    for number, count in enumerate(runs):
        part, left = left[:count], left[count:]
        apply_to_checkpoint(
            last, [EditPatch.merge(part)] if merged else part, folder / f"run{number}", force=number > 0
        )
        last = folder / f"run{number}"
    return patches, last


def fresh(folder, patches, chosen, runs=(4,)):
    """What applying the chosen patches to the base gives, in the runs that they belong to."""
    last, start = folder / "base", 0
    for number, count in enumerate(runs):
        part = [patches[i] for i in range(start, start + count) if i in chosen]
        start += count
        if part:
            apply_to_checkpoint(last, part, folder / f"fresh{number}", force=True)
            last = folder / f"fresh{number}"
    return bytes_of(loaded(last))


@pytest.mark.parametrize("gone", [(3,), (1,), (0,), (0, 2), (2, 0), (3, 1, 0)], ids=str)
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "merged", "two runs"])
def test_any_subset_is_taken_away_in_any_order(tmp_path, gone, kind):
    dtype = torch.float32 if kind == "float32" else torch.bfloat16
    runs = (2, 2) if kind == "two runs" else (4,)
    patches, last = journal(tmp_path, dtype, merged=kind == "merged", runs=runs)
    for number in gone:  # from files, as a user has them
        path = patches[number].save(tmp_path / f"{number}.safetensors")
        new = tmp_path / f"without{number}"
        revert_checkpoint(last, tmp_path / "base", [EditPatch.load(path)], new)
        last = new
    expected = fresh(tmp_path, patches, set(range(4)) - set(gone), runs)
    assert bytes_of(loaded(last)) == expected
    once = tmp_path / "once"
    revert_checkpoint(tmp_path / f"run{len(runs) - 1}", tmp_path / "base", [patches[i] for i in gone], once)
    assert bytes_of(loaded(once)) == expected
    left = [item["provenance"]["edits"] for item in json.loads((last / RECORD).read_text())["patches"]]
    assert sum(left, []) == [patches[i].provenance["edits"][0] for i in range(4) if i not in gone]
    revert_checkpoint(last, tmp_path / "base", [patches[i] for i in range(4) if i not in gone], tmp_path / "none")
    assert bytes_of(loaded(tmp_path / "none")) == bytes_of(loaded(tmp_path / "base"))
    assert not (tmp_path / "none" / RECORD).exists()
    assert not (tmp_path / "none" / FOLDER).exists()


def test_patches_made_independently_are_taken_away_one_by_one(tmp_path):
    subject = save_checkpoint(tmp_path / "base", dtype=torch.float32, shard="200KB")
    one, two = (named(subject, {1: 2}, name, seed) for name, seed in (("one", 1), ("two", 2)))
    apply_to_checkpoint(tmp_path / "base", [one], tmp_path / "first")
    apply_to_checkpoint(tmp_path / "first", [two], tmp_path / "both", force=True)
    for gone, left in ((one, two), (two, one)):
        name = left.provenance["editor"]
        revert_checkpoint(tmp_path / "both", tmp_path / "base", [gone], tmp_path / f"only {name}")
        apply_to_checkpoint(tmp_path / "base", [left], tmp_path / f"fresh {name}")
        assert bytes_of(loaded(tmp_path / f"only {name}")) == bytes_of(loaded(tmp_path / f"fresh {name}"))
        assert recorded(tmp_path / f"only {name}") == [(name, 1)]


def test_patches_that_were_merged_since_are_taken_away_together(tmp_path):
    patches, last = journal(tmp_path, torch.bfloat16)
    revert_checkpoint(last, tmp_path / "base", [EditPatch.merge(patches[1:3])], tmp_path / "back")
    assert bytes_of(loaded(tmp_path / "back")) == fresh(tmp_path, patches, {0, 3})


@pytest.mark.parametrize("kept", ["no record", "no files", "trained on"])
def test_force_drops_no_other_edit(tmp_path, kept):
    patches, last = journal(tmp_path, torch.float32)
    if kept == "no record":
        (last / RECORD).unlink()
    if kept == "no files":
        for path in (last / FOLDER).iterdir():
            path.unlink()
    if kept == "trained on":
        subject = loaded(last)
        with torch.no_grad():
            subject.model.layers[1].mlp.down_proj.weight[0, 0] += 1
        subject.save_pretrained(last, max_shard_size="200KB")
    where = (last, tmp_path / "base", [patches[1]], tmp_path / "back")
    for force in (False, True):
        words = "--drop-others" if force or kept != "no record" else "not the weight that this patch was made for"
        with pytest.raises(PatchMismatchError, match=words) as refused:
            revert_checkpoint(*where, force=force)
        assert ("S0 is → x" in str(refused.value)) == (kept == "no files")
        assert not (tmp_path / "back").exists()
    report = revert_checkpoint(*where, drop_others=True)
    if kept == "trained on":  # the patches that are kept stay
        assert bytes_of(loaded(tmp_path / "back")) == fresh(tmp_path, patches, {0, 2, 3})
        assert report.dropped == ["changes of model.layers.1.mlp.down_proj.weight that kedit.json does not name"]
    elif kept == "no files":
        assert [what[:13] for what in report.dropped] == ["rome (S0 is →", "rome (S2 is →", "rome (S3 is →"]


def test_kept_files_are_checked(tmp_path):
    patches, last = journal(tmp_path, torch.float32)
    one, other = sorted((last / FOLDER).iterdir())[:2]
    one.write_bytes(other.read_bytes())
    with pytest.raises(PatchError, match="is not the patch that kedit.json names"):
        revert_checkpoint(last, tmp_path / "base", [patches[0]], tmp_path / "back")
    record = json.loads((last / RECORD).read_text())
    record["patches"][0]["file"] = "../1.safetensors"
    (last / RECORD).write_text(json.dumps(record))
    with pytest.raises(PatchError, match="not a record that kedit wrote"):
        revert_checkpoint(last, tmp_path / "base", [patches[0]], tmp_path / "back")
