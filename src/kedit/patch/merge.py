"""Several patches as one: side by side exactly, or recompressed to a stated error."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from kedit.errors import ConfigError, NonFiniteError, PatchError, PatchMismatchError
from kedit.patch.content import PatchContent
from kedit.patch.delta import Delta, DenseDelta, LowRankDelta, check_finite, factored_svd
from kedit.utils.validation import is_number

_ROUNDING = 1e-12  # relative size of the singular values that float64 makes of nothing


def merge(patches: Iterable[PatchContent], *, tolerance: float | None = None) -> PatchContent:
    """Several patches as one, which changes a model as they do one after another, in the order given.

    Without ``tolerance``, low-rank updates stand side by side, and the merged patch gives the same bits as its parts
    one after another. A weight with a dense part gets a dense sum, equal up to rounding. A weight's fingerprint is that
    of the first patch that changes it, so the merged patch goes onto the model that the first one was made for.

    Args:
        patches: at least one; all for the same model.
        tolerance: recompress every weight's update by SVD to the smallest rank with
            ‖ΔW − recompressed‖ ≤ tolerance · ‖ΔW‖ (Frobenius); each error is recorded in the provenance.

    Raises:
        PatchMismatchError: the patches are for models of different types or shapes.
    """
    parts = list(patches)
    if not parts:
        raise PatchError("There is nothing to merge: the list of patches is empty.")
    check_tolerance(tolerance)
    _check_models(parts)
    deltas: dict[str, Delta] = {}
    fingerprints: dict[str, str] = {}
    errors: dict[str, float] = {}
    for name in dict.fromkeys(name for patch in parts for name in patch.deltas):
        owners = [patch for patch in parts if name in patch.deltas]
        fingerprints[name] = owners[0].fingerprints.get(name, "")
        delta = side_by_side(name, [patch.deltas[name] for patch in owners])
        if tolerance is not None:
            delta, errors[name] = recompress(name, delta, tolerance)
        deltas[name] = check_finite(name, delta)
    provenance: dict[str, Any] = {"editor": "merge", "model": parts[0].provenance.get("model", {})}
    provenance["edits"] = [edit for patch in parts for edit in patch.provenance.get("edits", [])]
    provenance["merged"] = [{**patch.provenance, "fingerprints": patch.fingerprints} for patch in parts]
    if tolerance is not None:
        provenance["config"] = {"tolerance": tolerance, "errors": errors}
    return PatchContent(deltas, fingerprints, provenance)


def side_by_side(name: str, deltas: list[Delta]) -> Delta:
    """The sum of updates: factors side by side where all are low-rank, else a dense sum."""
    shapes = {delta.shape for delta in deltas}
    if len(shapes) > 1:
        raise PatchMismatchError(f"The patches change {name} as a matrix of shapes {sorted(shapes)}: different models.")
    if len(deltas) == 1:
        return deltas[0]
    low = [delta for delta in deltas if isinstance(delta, LowRankDelta)]
    if len(low) == len(deltas):
        wide = max(
            (tensor.dtype for delta in low for tensor in delta.tensors().values()), key=lambda dtype: dtype.itemsize
        )
        left = torch.cat([delta.left.to("cpu", wide) for delta in low], 1)
        return LowRankDelta(left, torch.cat([delta.right.to("cpu", wide) for delta in low], 1))
    total = torch.zeros(deltas[0].shape, dtype=torch.float64)
    for delta in deltas:
        total += delta.dense.to("cpu", torch.float64)
    return DenseDelta(total.float())


def recompress(name: str, delta: Delta, tolerance: float) -> tuple[Delta, float]:
    """The update in the smallest rank within a relative Frobenius error, and the error; dense where that is smaller.

    Raises:
        NonFiniteError: the squares of its numbers are beyond float64, so it has no norm; or its factors beyond float32.
    """
    rows, columns = delta.shape
    if not math.isfinite(delta.norm):
        raise NonFiniteError(f"The update of {name} has numbers whose squares float64 cannot hold, so it has no norm.")
    if isinstance(delta, LowRankDelta):
        u, singular, v = factored_svd(delta)
    else:
        u, singular, vh = torch.linalg.svd(delta.matrix.double(), full_matrices=False)
        v = vh.T
    rank, error = choose_rank(singular, tolerance)
    if rank * (rows + columns) >= rows * columns:
        return check_finite(name, DenseDelta(delta.dense.float())), 0.0
    return check_finite(name, from_svd(u[:, :rank], singular[:rank], v[:, :rank])), error


def choose_rank(singular: torch.Tensor, tolerance: float) -> tuple[int, float]:
    """The smallest rank (from 1) whose left-out singular values are within ``tolerance``, and their relative norm."""
    tails = singular.square().flip(0).cumsum(0).flip(0).sqrt()  # tails[i]: norm of what is left out at rank i
    relative = torch.cat([tails / tails[0].clamp_min(torch.finfo(tails.dtype).tiny), tails.new_zeros(1)])
    fits = (relative <= max(tolerance, _ROUNDING)).nonzero().flatten()
    rank = max(1, int(fits[0]))
    return rank, float(relative[rank])


def from_svd(u: torch.Tensor, singular: torch.Tensor, v: torch.Tensor) -> LowRankDelta:
    """Balanced float32 factors of U diag(σ) Vᵀ."""
    root = singular.sqrt()
    return LowRankDelta((u * root).float().contiguous(), (v * root).float().contiguous())


def check_tolerance(tolerance: float | None) -> None:
    """Raise unless the tolerance is a relative error."""
    if tolerance is not None and not (is_number(tolerance) and 0 <= tolerance < 1):
        raise ConfigError(f"tolerance is a relative error from 0 to below 1, not {tolerance!r}.")


def _check_models(patches: list[PatchContent]) -> None:
    models = [patch.provenance.get("model") or {} for patch in patches]
    for key in ("type", "num_layers", "hidden"):
        known = {str(model[key]) for model in models if model.get(key) is not None}
        if len(known) > 1:
            raise PatchMismatchError(
                f"The patches are for different models: their {key} is {', '.join(map(repr, sorted(known)))}. Merge only "
                "patches of one model."
            )
