"""Patches on checkpoints that need not fit into memory: tensor by tensor, and whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from kedit.errors import ArchitectureError, PatchError, PatchMismatchError
from kedit.models.fingerprint import has_fingerprint
from kedit.patch.checkpoint.manifest import RECORD, Entry, appended, entries, ways_of_running
from kedit.patch.checkpoint.read import Checkpoint, weight_in
from kedit.patch.checkpoint.rewrite import DiskReport, Stage, quiet, write_folder
from kedit.patch.checkpoint.undo import Step, take_away
from kedit.patch.content import PatchContent
from kedit.patch.delta import add_delta, sum_dtype
from kedit.patch.ledger import cast_checked
from kedit.utils.terminal import printable


def apply_to_checkpoint(
    base: str | Path,
    patches: Sequence[PatchContent],
    out: str | Path,
    *,
    force: bool = False,
    link: bool = False,
    on_stage: Stage | None = None,
) -> DiskReport:
    """Write the checkpoint in ``base`` with patches applied, in order, to ``out``.

    The edited weights have the same bits as after ``patch.apply`` in memory on a model loaded in the checkpoint's
    dtype. One weight is in memory at a time. ``out`` appears only when it is complete; ``base`` is only read.

    Args:
        base: a folder with config.json and safetensors weights.
        patches: at least one.
        out: the new folder; must not exist, or be empty.
        force: do not compare the weights with those that the patches were made for.
        link: hard-link what does not change instead of copying it. Then the two folders share those files: a program
            that overwrites one of them in place changes both.
        on_stage: is called with a word on each thing that was done.

    Raises:
        PatchError: a damaged checkpoint, a taken target, or no space.
        PatchMismatchError: a patch was made for other weights.
    """
    if not patches:
        raise PatchError("There is no patch to apply. Name at least one.")
    source = Checkpoint.open(base)
    keys = _keys(source, patches)
    changes = {keys[name]: partial(_edited, source, name, patches, force=force) for name in keys}
    record = appended(source.folder, patches)
    return write_folder(source, changes, Path(out), link=link, record=record, stage=on_stage or quiet)


def revert_checkpoint(
    edited: str | Path,
    base: str | Path,
    patches: Sequence[PatchContent],
    out: str | Path,
    *,
    force: bool = False,
    drop_others: bool = False,
    link: bool = False,
    on_stage: Stage | None = None,
) -> DiskReport:
    """Write the checkpoint in ``edited`` without ``patches``: any of those that it carries, in any order.

    The weights that ``patches`` changed are made anew: those of ``base`` with the patches that stay, which the folder keeps,
    in the order and the runs in which they were applied. They have the same bits as if the others had never been applied.

    Args:
        edited: a checkpoint that carries ``patches``.
        base: the checkpoint that its patches were applied to, in the same dtype.
        patches: those to take away; parts of a merged patch, or several merged since, are found too.
        out: the new folder; must not exist, or be empty.
        force: do not compare the weights of ``base`` with those that ``patches`` were made for, where the folder does not
            keep them.
        drop_others: go on where a weight holds other changes, which are lost: patches whose files are not kept, or changes
            that no record names. The report's ``dropped`` names them.
        link: as for :func:`apply_to_checkpoint`.
        on_stage: is called with a word on each thing that was done.

    Raises:
        PatchError: a damaged checkpoint, a taken target, or no space.
        PatchMismatchError: ``edited`` does not carry the patches, holds other changes that would be lost, or stores a weight
            in another dtype or shape.
    """
    if not patches:
        raise PatchError("There is no patch to take away. Name at least one.")
    source = Checkpoint.open(edited)
    origin = Checkpoint.open(base, described_by=source)
    keys = _keys(source, patches)
    before = [item.record for item in entries(origin.folder)]
    known = entries(source.folder)
    history = [item for item in known if item.record not in before]
    steps = take_away(history, patches)
    dropped: list[str] = []

    def renewed(name: str) -> Tensor:
        there, here = weight_in(source, name)[0], weight_in(origin, name)[0]
        if source.like(there) != origin.like(here):  # else its bytes would not fit their place
            raise PatchMismatchError(
                f"{there} is {source.like(there)[0]} in {edited} and {origin.like(here)[0]} in {base}. Give the folder "
                "that the patches were applied to, in the dtype that it had."
            )
        refusal = _other_changes(source, origin, name, patches, history, steps, force=force)
        if refusal is not None and not drop_others:
            raise refusal
        if refusal is not None:
            dropped.append(there)
        left = [(step.left, step.entry.run) for step in steps or [] if step.left is not None]
        return _edited(origin, name, [patch for patch, _ in left], force=True, runs=[run for _, run in left])

    changes = {keys[name]: partial(renewed, name) for name in keys}
    record = _record_after(source, origin, steps, set(changes))
    report = write_folder(source, changes, Path(out), link=link, record=record, stage=on_stage or quiet)
    if dropped:
        named = [] if steps is not None else _others(history, patches)
        report.dropped.extend(named or [f"changes of {there} that {RECORD} does not name" for there in dropped])
    return report


def _other_changes(
    source: Checkpoint,
    origin: Checkpoint,
    name: str,
    patches: Sequence[PatchContent],
    history: Sequence[Entry],
    steps: Sequence[Step] | None,
    *,
    force: bool,
) -> PatchMismatchError | None:
    """Explain why a weight cannot be made anew: its present value is not what the patches made of the base's."""
    there = weight_in(source, name)[0]
    present = source.read(there)
    if steps is not None:
        whole, runs = [step.patch for step in steps], [step.entry.run for step in steps]
        if torch.equal(present, _edited(origin, name, whole, force=True, runs=runs)):
            return None
        return PatchMismatchError(
            f"{there} in {source.folder} is not what {origin.folder} with the patches on record gives: it carries other "
            "changes too, which would be lost. Give the folder that the patches were applied to, or add --drop-others "
            "(drop_others=True) to lose them."
        )
    refusal: PatchMismatchError | None = None
    for way in ways_of_running(history, patches):
        try:
            if torch.equal(present, _edited(origin, name, patches, force=force, runs=way)):
                return None
        except PatchMismatchError as error:  # a patch was made for what another way gives
            refusal = refusal or error
    others = _others(history, patches)
    if not others and refusal is not None and not force:
        return refusal
    carried = f" On record there: {'; '.join(map(printable, others))}." if others else ""
    return PatchMismatchError(
        f"{there} in {source.folder} is not what the base with the given patches holds: it carries other changes too, or was "
        f"rounded to its dtype between other patches than {RECORD} says.{carried} Name all of its patches in their order, or add "
        "--drop-others (drop_others=True) to give it the base's weights and lose the other changes."
    )


def _others(history: Sequence[Entry], patches: Sequence[PatchContent]) -> list[str]:
    """The patches on record that are not among the given ones, and change one of their weights."""
    given = [patch.fingerprints for patch in patches]
    names = {name for patch in patches for name in patch.deltas}
    return [item.describe() for item in history if item.fingerprints not in given and names & item.fingerprints.keys()]


def _record_after(
    source: Checkpoint, origin: Checkpoint, steps: Sequence[Step] | None, renewed: set[str]
) -> list[Entry]:
    """The patches that a checkpoint carries once the tensors ``renewed`` are made anew.

    Where the weights become those of the base alone, a patch stays on record with the weights that still carry it.
    """
    known, base = entries(source.folder), entries(origin.folder)
    shared = [item.record for item in known]
    before = [item.record for item in base]
    kept = [
        item.restricted(name for name in item.fingerprints if _key(origin, name) in renewed)
        for item in base
        if item.record not in shared
    ]
    left = iter(steps or [])
    for item in known:
        if item.record in before:
            kept.append(item)
        elif steps is not None:
            stays = next(left).kept
            kept += [] if stays is None else [stays]
        else:
            kept.append(item.restricted(name for name in item.fingerprints if _key(source, name) not in renewed))
    return [item for item in kept if item.fingerprints]


def _key(checkpoint: Checkpoint, name: str) -> str:
    """Return the name under which a parameter is stored; its own where it is not."""
    try:
        return checkpoint.key_of(name)
    except (PatchMismatchError, ArchitectureError):
        return name


def _keys(source: Checkpoint, patches: Sequence[PatchContent]) -> dict[str, str]:
    """The stored tensor of every parameter that the patches change.

    Raises:
        PatchMismatchError: a parameter is not there, or two names stand for one tensor.
    """
    keys: dict[str, str] = {}
    owners: dict[str, str] = {}
    for name in dict.fromkeys(name for patch in patches for name in patch.deltas):
        keys[name] = key = source.key_of(name)
        if owners.setdefault(key, name) != name:
            raise PatchMismatchError(
                f"{owners[key]} and {name} are both stored as {key} in {source.folder}, so one update would be lost. "
                "The patches name one weight in two ways; apply them one after another."
            )
    return keys


def _edited(
    source: Checkpoint,
    name: str,
    patches: Sequence[PatchContent],
    *,
    force: bool = False,
    runs: Sequence[int] | None = None,
) -> Tensor:
    """``cast(W₀ + Σ deltas)`` of one weight, checking before each patch that it was made for what is there.

    Args:
        source: where W₀ is.
        name: the parameter.
        patches: in order.
        force: leave the checks out.
        runs: by patch, the run that applies it; between two runs the sum is rounded to the stored dtype. Missing: one run.
    """
    key, weight = weight_in(source, name)
    stored = source.read(key)
    dtype, total = stored.dtype, stored.to(sum_dtype(stored.dtype), copy=True)
    last: int | None = None
    for patch, run in zip(patches, runs or [0] * len(patches), strict=True):
        if name not in patch.deltas:
            continue
        patch.check_shape(name, tuple(weight.matrix.shape))
        if not force and not has_fingerprint(stored, patch.fingerprints.get(name)):
            raise patch.mismatch(f"{key} in {source.folder}")
        if last not in (None, run):
            total = stored.to(total.dtype, copy=True)
        last = run
        del stored
        add_delta(total, patch.deltas[name], transposed=weight.transposed)
        stored = cast_checked(name, total, dtype)
    return stored
