"""Patches on checkpoints that need not fit into memory: tensor by tensor, and whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kedit.delta import add_delta, sum_dtype
from kedit.errors import PatchError, PatchMismatchError, UnsupportedError
from kedit.fingerprint import has_fingerprint
from kedit.ledger import cast_checked
from kedit.patch.checkpoint import Checkpoint, skeleton, weight_in
from kedit.patch.rewrite import RECORD, DiskReport, Stage, quiet, write_folder

if TYPE_CHECKING:
    from kedit.arch import ModelArch
    from kedit.patch.core import EditPatch


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
    arch = cache(partial(skeleton, base))  # built when it is first asked for: while shards are copied already
    changes = {
        source.key_of(name): partial(_edited, source, arch, name, patches, force=force) for name in _names(patches)
    }
    applied = [{"provenance": patch.provenance, "fingerprints": patch.fingerprints} for patch in patches]
    record = {"kedit_version": version("kedit"), "patches": [*_earlier(source.folder), *applied]}
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

    Args:
        edited: a checkpoint that carries ``patches``, and no others on the same weights.
        base: the checkpoint that they were applied to.
        patches: all of them, in the order of application.
        out: the new folder; must not exist, or be empty.
        force: do not check that base plus patches is what ``edited`` holds.
        link: as for :func:`apply_to_checkpoint`.
        on_stage: is called with a word on each thing that was done.
    """
    if not patches:
        raise PatchError("There is no patch to take away. Name at least one.")
    source, origin = Checkpoint.open(edited), Checkpoint.open(base)
    arch = cache(partial(skeleton, edited))

    def original(name: str) -> Tensor:
        there, here = weight_in(source, arch(), name)[0], weight_in(origin, arch(), name)[0]
        if not force and not torch.equal(source.read(there), _edited(origin, arch, name, patches, force=False)):
            raise PatchMismatchError(
                f"{there} in {edited} is not what {base} with the given patches holds, so it carries other changes too. "
                "Name all of its patches in their order, or force it (--force) to give it the base's weights anyway."
            )
        return origin.read(here)

    changes = {source.key_of(name): partial(original, name) for name in _names(patches)}
    return write_folder(source, changes, Path(out), link=link, record=None, stage=on_stage or quiet)


def _names(patches: Sequence[EditPatch]) -> list[str]:
    names = list(dict.fromkeys(name for patch in patches for name in patch.deltas))
    for name in names:
        if name.endswith("]"):
            raise UnsupportedError(
                f"{name} is one expert of a fused tensor, which checkpoints store in another form. Load the model, apply the "
                "patch to it, and save it with save_pretrained."
            )
    return names


def _edited(
    source: Checkpoint, arch: Callable[[], ModelArch], name: str, patches: Sequence[EditPatch], *, force: bool
) -> Tensor:
    """``cast(W₀ + Σ deltas)`` of one weight, checking before each patch that it was made for what is there."""
    key, weight = weight_in(source, arch(), name)
    stored = source.read(key)
    dtype, total = stored.dtype, stored.to(sum_dtype(stored.dtype), copy=True)
    for patch in patches:
        if name not in patch.deltas:
            continue
        patch.check_shape(name, patch.deltas[name], tuple(weight.matrix.shape))
        if not force and not has_fingerprint(stored, patch.fingerprints.get(name)):
            raise patch.mismatch(f"{key} in {source.folder}")
        del stored
        add_delta(total, patch.deltas[name], transposed=weight.transposed)
        stored = cast_checked(name, total, dtype)
    return stored


def _earlier(folder: Path) -> list[Any]:
    """What the record in a checkpoint says of the patches that it carries already."""
    try:
        known = json.loads((folder / RECORD).read_text(encoding="utf-8"))["patches"]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError, TypeError, KeyError) as error:
        raise PatchError(
            f"{folder / RECORD} is not a record that kedit wrote ({error}). Remove or repair it."
        ) from error
    return known if isinstance(known, list) else [known]
