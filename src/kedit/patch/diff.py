"""Compute the difference of two models as a patch, where it is low-rank."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kedit.errors import ArchitectureError, ConfigError, KEditError, NonFiniteError, PatchError, PatchMismatchError
from kedit.models import unwrap, weight_of
from kedit.models.fingerprint import tensor_fingerprint
from kedit.models.offload import read
from kedit.patch.checkpoint.read import Checkpoint, stored_experts, stored_names
from kedit.patch.content import PatchContent
from kedit.patch.delta import Delta, LowRankDelta, check_finite
from kedit.patch.merge import check_tolerance, choose_rank, from_svd
from kedit.utils.linalg import is_finite
from kedit.utils.validation import check_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SMALL = 1024  # up to this many rows or columns, the whole SVD is taken
_FIRST_GUESS = 16
_OVERSAMPLING = 8
MOST_NOISE = 0.25
"""How large rounding may be beside a difference: above it, what a patch would leave out is no longer only rounding."""


def diff(
    base: PreTrainedModel | str | Path,
    edited: PreTrainedModel | str | Path,
    *,
    tolerance: float = 1e-4,
    max_rank: int | None = None,
) -> PatchContent:
    """The patch that leads from ``base`` to ``edited``.

    A weight's rank is the smallest with ‖ΔW − L Rᵀ‖ ≤ tolerance · ‖ΔW‖ (Frobenius), or with an error within what
    rounding to the stored dtype alone makes: the rounding of a bfloat16 checkpoint is noise of full rank, which is no
    part of an edit. Where that noise is more than a quarter of the difference, no edit can be told from it, and the
    weight is refused. The error of every weight is in ``provenance["config"]["errors"]``.

    Args:
        base: a model, or a checkpoint folder (which is read one tensor at a time).
        edited: the same model after edits, in the same form.
        tolerance: relative error.
        max_rank: refuse what needs more; missing: refuse where the factors are no smaller than the matrix.

    Raises:
        PatchMismatchError: the models have different parameters.
        PatchError: they are equal, or a difference is not low-rank, or too small to be told from rounding; the weight
            is named.
        NonFiniteError: a weight holds NaN, or a difference has no norm in float64.
    """
    check_tolerance(tolerance)
    if max_rank is not None:
        check_whole("max_rank", max_rank, 1)
    model, pairs = _pairs(base, edited)
    deltas: dict[str, Delta] = {}
    prints: dict[str, str] = {}
    errors: dict[str, float] = {}
    for pair in pairs:
        transposed = _layout(model, pair.name)
        deltas[pair.name], errors[pair.name] = _low_rank(pair, tolerance, max_rank, transposed=transposed)
        prints[pair.name] = tensor_fingerprint(pair.before)
    if not deltas:
        raise PatchError("The two models have the same weights, so there is no patch between them.")
    source = base if isinstance(base, str | Path) else getattr(base.config, "_name_or_path", "")
    config = model.config.get_text_config()
    provenance: dict[str, Any] = {
        "editor": "diff",
        "config": {"tolerance": tolerance, "max_rank": max_rank, "errors": errors},
        "model": {
            "name": Path(str(source)).name if os.path.exists(str(source)) else str(source),
            "type": model.config.model_type,
            "num_layers": getattr(config, "num_hidden_layers", None),
            "hidden": getattr(config, "hidden_size", None),
        },
    }
    return PatchContent(deltas, prints, provenance)


@dataclass(frozen=True)
class _Pair:
    """A parameter that differs: as stored in the one and in the other model."""

    name: str
    before: Tensor
    after: Tensor


def _pairs(base: Any, edited: Any) -> tuple[PreTrainedModel, Iterator[_Pair]]:
    """The base model, empty where it is a folder, and what differs."""
    on_disk = [isinstance(item, str | Path) for item in (base, edited)]
    if all(on_disk):
        one, other = Checkpoint.open(base), Checkpoint.open(edited)
        return one.model, _disk_pairs(one, other)
    if any(on_disk):
        raise ConfigError(
            "diff compares two models or two folders, not one of each. Load the folder with kedit.load()."
        )
    model = unwrap(base)
    return model, _memory_pairs(model, unwrap(edited))


def _memory_pairs(base: PreTrainedModel, edited: PreTrainedModel) -> Iterator[_Pair]:
    before, after = dict(base.named_parameters()), dict(edited.named_parameters())
    _check_same_names(set(before), set(after), "the base model", "the edited model")
    for name in before:
        old, new = read(base, name, before[name]).detach(), read(edited, name, after[name]).detach()
        _check_alike(name, (tuple(old.shape), str(old.dtype)), (tuple(new.shape), str(new.dtype)))
        if torch.equal(old, new.to(old.device)):
            continue
        if not _is_fused(base, name):
            yield _Pair(name, old, new.to(old.device))
            continue
        parts = zip(_matrices(name, len(old)), old, new.to(old.device), strict=True)
        yield from (_Pair(*part) for part in parts if not torch.equal(*part[1:]))


def _disk_pairs(base: Checkpoint, edited: Checkpoint) -> Iterator[_Pair]:
    names = _Names(base.model)
    _check_same_names(set(base.files), set(edited.files), str(base.folder), str(edited.folder))
    for key in base.files:
        old, new = base.shards[base.files[key]].tensors[key], edited.shards[edited.files[key]].tensors[key]
        _check_alike(key, (old.shape, old.dtype), (new.shape, new.dtype))
        if base.same_bytes(key, edited):
            continue
        name = names.of(key)
        count = old.shape[0] if _is_fused(base.model, name) else None
        for part, matrix in zip(_matrices(key, count), _matrices(name, count), strict=True):
            pair = _Pair(matrix, base.read(part), edited.read(part))
            if not torch.equal(pair.before, pair.after):  # 0.0 and -0.0 differ in their bytes alone
                yield pair


def _matrices(name: str, count: int | None) -> list[str]:
    """A tensor's name, or those of the matrices that are fused into it."""
    return [name] if count is None else [f"{name}[{number}]" for number in range(count)]


def _is_fused(model: PreTrainedModel, name: str) -> bool:
    """Return whether a parameter is the matrices of a mixture's experts in one tensor."""
    try:
        weight_of(model, f"{name}[0]")
    except KEditError:
        return False
    return True


class _Names:
    """A model's names for the tensors of a checkpoint."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        parameters = dict(model.named_parameters())
        self._own = list(parameters)
        self._renamed = {key: name for name, key in stored_names(model).items()}
        self._experts = {
            key: f"{name}[{number}]"
            for name, parameter in parameters.items()
            if parameter.ndim == 3 and _is_fused(model, name)
            for number, key in enumerate(stored_experts(model, name))
        }

    def of(self, key: str) -> str:
        """The model's name for a stored tensor."""
        known = {**self._experts, **{name: name for name in self._own}}
        if key in self._renamed:
            return self._renamed[key]
        names = [known[key]] if key in known else [known[name] for name in known if name.endswith(f".{key}")]
        if len(names) != 1:
            raise PatchMismatchError(
                f"{key} differs, and is no parameter of the {self.model.config.model_type} that config.json describes."
            )
        return names[0]


def _check_same_names(before: set[str], after: set[str], one: str, other: str) -> None:
    if before != after:
        example = min(before ^ after)
        raise PatchMismatchError(
            f"Only one of {one} and {other} has {example}. A patch leads between two states of one model."
        )


def _check_alike(name: str, before: tuple[Any, str], after: tuple[Any, str]) -> None:
    if before != after:
        raise PatchMismatchError(
            f"{name} is {before[1]} {list(before[0])} in the one model and {after[1]} {list(after[0])} in the other. "
            "A patch leads between two states of one model; load both in the same dtype."
        )


def _layout(model: PreTrainedModel, name: str) -> bool:
    try:
        return weight_of(model, name).transposed
    except ArchitectureError as error:
        raise PatchError(f"{name} differs, and a patch cannot hold that: {error}") from error


def _low_rank(pair: _Pair, tolerance: float, max_rank: int | None, *, transposed: bool) -> tuple[Delta, float]:
    """ΔW in as many columns as it needs, and the relative error."""
    after, change, norm = _difference(pair, transposed=transposed)
    rows, columns = change.shape
    most = max_rank or max(1, (rows * columns - 1) // (rows + columns))
    noise = _rounding(after) / norm
    if noise > MOST_NOISE and tolerance < MOST_NOISE:
        raise PatchError(
            f"The difference of {pair.name} is too small to be told from rounding to {after.dtype}: rounding alone is "
            f"{noise:.2g} times as large, and a patch is trusted up to {MOST_NOISE} times. Give the models in float32, ship the "
            "whole checkpoint, or name the error that you accept (tolerance)."
        )
    allowed = tolerance if noise > MOST_NOISE else max(tolerance, noise)
    rank, (u, singular, v), error = _svd(change, allowed, most)
    if rank > most:
        raise PatchError(
            f"The difference of {pair.name} is not low-rank: {most} columns do not reach a relative error of {allowed:.3g}. "
            "It comes from training rather than from an edit; ship the whole checkpoint, or raise the tolerance."
        )
    delta: LowRankDelta = from_svd(u[:, :rank], singular[:rank], v[:, :rank])
    return check_finite(pair.name, delta), error


def _difference(pair: _Pair, *, transposed: bool) -> tuple[Tensor, Tensor, float]:
    """The weight after the edit, the difference [O, I] in float64, and its norm."""
    if pair.before.ndim != 2:
        raise PatchError(f"{pair.name} differs, and has shape {list(pair.before.shape)}; a patch holds matrices.")
    before, after = (pair.before.T, pair.after.T) if transposed else (pair.before, pair.after)
    change = after.double() - before.double()
    if not is_finite(change):
        raise NonFiniteError(f"{pair.name} holds NaN or infinite numbers, so there is no difference to speak of.")
    norm = float(change.norm())
    if not 0 < norm < math.inf:
        raise NonFiniteError(
            f"The difference of {pair.name} has numbers whose squares float64 cannot hold. A patch of such numbers is of no use."
        )
    return after, change, norm


def _rounding(after: Tensor) -> float:
    """The norm of what rounding to the stored dtype adds: uniform within half a unit of each number's last place."""
    exponent = torch.frexp(after.double()).exponent
    unit = torch.ldexp(torch.full_like(after, torch.finfo(after.dtype).eps, dtype=torch.float64), exponent - 1)
    return 1.1 * float(unit.norm()) / 12**0.5


def _svd(change: Tensor, allowed: float, most: int) -> tuple[int, tuple[Tensor, Tensor, Tensor], float]:
    """The rank that is needed (``most + 1``: more than allowed), the SVD, and the error at that rank."""
    if min(change.shape) <= _SMALL:
        u, singular, vh = torch.linalg.svd(change, full_matrices=False)
        rank, error = choose_rank(singular, allowed)
        return rank, (u, singular, vh.T), error
    total = float(change.square().sum())
    width = min(_FIRST_GUESS, most + _OVERSAMPLING)
    while True:  # subspace iteration (Halko et al., 2011) with twice as many columns each time
        parts, left = _sketch(change, width)
        tails = (parts[1].square().flip(0).cumsum(0).flip(0) + left).div(total).sqrt()  # at ranks 0, 1, ...
        fits = (torch.cat([tails[1:], tails.new_tensor([(left / total) ** 0.5])]) <= allowed).nonzero().flatten()
        if fits.numel():
            rank = int(fits[0]) + 1
            error = float(tails[rank]) if rank < width else (left / total) ** 0.5
            return rank, parts, error
        if width >= min(most + _OVERSAMPLING, *change.shape):
            return most + 1, parts, float("inf")
        width = min(2 * width, most + _OVERSAMPLING, *change.shape)


def _sketch(change: Tensor, width: int) -> tuple[tuple[Tensor, Tensor, Tensor], float]:
    """The leading ``width`` singular triples, and the squared norm of what they leave out."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(change.shape[1], width, generator=generator, dtype=change.dtype).to(change.device)
    basis = torch.linalg.qr(change @ start).Q
    for _ in range(2):
        basis = torch.linalg.qr(change @ torch.linalg.qr(change.T @ basis).Q).Q
    small = basis.T @ change
    u, singular, vh = torch.linalg.svd(small, full_matrices=False)
    return (basis @ u, singular, vh.T), float((change - basis @ small).square().sum())
