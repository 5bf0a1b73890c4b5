"""Patches on checkpoints that need not fit into memory: tensor by tensor, and whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kedit.errors import PatchError, PatchMismatchError
from kedit.models.fingerprint import has_fingerprint
from kedit.patch.checkpoint.manifest import appended, ways_of_running, without
from kedit.patch.checkpoint.read import Checkpoint, weight_in
from kedit.patch.checkpoint.rewrite import DiskReport, Stage, quiet, write_folder
from kedit.patch.delta import add_delta, sum_dtype
from kedit.patch.ledger import cast_checked

if TYPE_CHECKING:
    from kedit.patch.patch import EditPatch


def apply_to_checkpoint(
    base: str | Path,
    patches: Sequence[EditPatch],
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
    patches: Sequence[EditPatch],
    out: str | Path,
    *,
    force: bool = False,
    link: bool = False,
    on_stage: Stage | None = None,
) -> DiskReport:
    """Write the checkpoint in ``edited`` with the weights that ``patches`` changed as they are in ``base``.

    Patches may have been applied in one run or in several: a 16-bit weight is rounded once in each.

    Args:
        edited: a checkpoint that carries ``patches``, and no others on the same weights.
        base: the checkpoint that they were applied to, in the same dtype.
        patches: all of them, in the order of application.
        out: the new folder; must not exist, or be empty.
        force: do not check that base plus patches is what ``edited`` holds.
        link: as for :func:`apply_to_checkpoint`.
        on_stage: is called with a word on each thing that was done.

    Raises:
        PatchError: a damaged checkpoint, a taken target, or no space.
        PatchMismatchError: ``edited`` is not ``base`` with the patches, or stores a weight in another dtype or shape.
    """
    if not patches:
        raise PatchError("There is no patch to take away. Name at least one.")
    source = Checkpoint.open(edited)
    origin = Checkpoint.open(base, described_by=source)
    keys = _keys(source, patches)
    runs = ways_of_running(source.folder, patches)

    def original(name: str) -> Tensor:
        there, here = weight_in(source, name)[0], weight_in(origin, name)[0]
        if source.like(there) != origin.like(here):  # else its bytes would not fit their place
            raise PatchMismatchError(
                f"{there} is {source.like(there)[0]} in {edited} and {origin.like(here)[0]} in {base}. Give the folder "
                "that the patches were applied to, in the dtype that it had."
            )
        if not force:
            found = source.read(there)
            _check_carried(found, (partial(_edited, origin, name, patches, runs=way) for way in runs), there)
        return origin.read(here)

    changes = {keys[name]: partial(original, name) for name in keys}
    record = without(source, origin, set(changes))
    return write_folder(source, changes, Path(out), link=link, record=record, stage=on_stage or quiet)


def _check_carried(found: Tensor, ways: Iterable[Callable[[], Tensor]], name: str) -> None:
    """Raise unless a weight is what the patches give in one of the ways in which they may have been applied."""
    refusal: PatchMismatchError | None = None
    for way in ways:
        try:
            if torch.equal(found, way()):
                return
        except PatchMismatchError as error:  # a patch was made for what another way gives
            refusal = refusal or error
    if refusal is not None:
        raise refusal
    raise PatchMismatchError(
        f"{name} in the edited folder is not what the base with the given patches holds: it carries other changes too, or was "
        "rounded to its dtype between other patches than kedit.json says. Name all of its patches in their order, or force "
        "it (--force) to give it the base's weights anyway."
    )


def _keys(source: Checkpoint, patches: Sequence[EditPatch]) -> dict[str, str]:
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
    patches: Sequence[EditPatch],
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
        patch.check_shape(name, patch.deltas[name], tuple(weight.matrix.shape))
        if not force and not has_fingerprint(stored, patch.fingerprints.get(name)):
            raise patch.mismatch(f"{key} in {source.folder}")
        if last not in (None, run):
            total = stored.to(total.dtype, copy=True)
        last = run
        del stored
        add_delta(total, patch.deltas[name], transposed=weight.transposed)
        stored = cast_checked(name, total, dtype)
    return stored
