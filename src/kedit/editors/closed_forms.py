"""Closed forms on tensors: no model, no tokenizer. Axis letters: ``docs/notation.md``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from einops import rearrange, reduce
from torch import Tensor

from kedit.errors import SingularMomentError
from kedit.patch.delta import LowRankDelta
from kedit.utils.linalg import cholesky, solved, whiten


def mixed_keys(keys: Tensor) -> Tensor:
    """One key per edit from the keys per context [E, C, I]: half the bare prompt's, half the mean of the others'; [E, I]."""
    return keys[:, 0] if keys.shape[1] == 1 else (keys[:, 0] + reduce(keys[:, 1:], "e c i -> e i", "mean")) / 2


def largest_weight(weight: float, overlaps: Tensor, share: float) -> float:
    """``weight``, or less: what lets the median edit have ``share`` of its change written.

    An edit alone gets x / (λ + x) of it, where x [E] is kᵀ C⁻¹ k (MEMIT) or ‖P k‖² (AlphaEdit).
    """
    return min(weight, float(overlaps.median()) * (1 - share) / share)


def rank_one(whitened: Tensor, key: Tensor, residual: Tensor) -> LowRankDelta:
    """Write one association (ROME, arXiv:2202.05262, eq. 2): Δ = r uᵀ / (uᵀ k), hence (W + Δ) k = W k + r.

    Args:
        whitened: u up to its length, [I].
        key: k, [I]: the key at which the residual shall appear.
        residual: r, [O].

    Returns:
        left = r |u| / (uᵀ k) as [O, 1] and right = u / |u| as [I, 1], float64.

    Raises:
        SingularMomentError: uᵀ k is as good as zero, so the update would blow up.
    """
    u = (whitened / whitened.norm()).to(torch.float64)
    overlap = u @ key.to(u)
    if not bool(overlap.abs() > 1e-10 * key.norm().to(u)):
        raise SingularMomentError(
            f"The whitened key hardly overlaps the key (uᵀk = {float(overlap):.3g}), so no rank-one update of "
            "sensible size writes this fact. Give the second moment more text, or fewer contexts."
        )
    return LowRankDelta(rearrange(residual.to(u) / overlap, "o -> o 1"), rearrange(u, "i -> i 1"))


def ridge(keys: Tensor, residuals: Tensor, moment: Tensor, weight: float, factor: Callable[[], Tensor]) -> LowRankDelta:
    """Write many associations at once: Δ = R Kᵀ (λ C + K Kᵀ)⁻¹ (MEMIT, arXiv:2210.07229, eq. 14).

    With A = C⁻¹ K this is R (λ 1 + Kᵀ A)⁻¹ Aᵀ (Woodbury), a system in the number of edits, for which C's factor is
    kept; used where there are fewer edits than key dimensions. λ = 0 writes every residual exactly (EMMET's form).

    Args:
        keys: K transposed, [E, I].
        residuals: R transposed, [E, O].
        moment: C, [I, I].
        weight: λ, at least 0.
        factor: makes the Cholesky factor of C; only asked where it is needed.

    Returns:
        left R as [O, E] and right [I, E], float64.

    Raises:
        SingularMomentError: the system has no solution (C not positive definite, or λ = 0 and dependent keys).
    """
    keys, residuals = keys.to(torch.float64), residuals.to(torch.float64)
    if len(keys) < keys.shape[1] or weight == 0:
        return ridge_whitened(keys, whiten(factor(), keys), residuals, weight)
    system = weight * moment.to(keys) + keys.T @ keys
    right = solved(cholesky(system), keys.T).T
    return LowRankDelta(residuals.T, right.T)


def ridge_whitened(keys: Tensor, whitened: Tensor, residuals: Tensor, weight: float | Tensor) -> LowRankDelta:
    """:func:`ridge` from A = C⁻¹ K alone, as a system in the number of edits.

    Args:
        keys: K transposed, [E, I].
        whitened: A transposed, [E, I] float64.
        residuals: R transposed, [E, O].
        weight: λ, at least 0; of every key, or [E], each one's own.
    """
    right = _solve_spd(keys.to(whitened) @ whitened.T, whitened, weight)
    return LowRankDelta(residuals.to(whitened).T, right.T)


def _solve_spd(gram: Tensor, right_side: Tensor, weight: float | Tensor) -> Tensor:
    """(gram + diag(weight))⁻¹ right_side for a symmetric positive gram matrix [n, n]."""
    gram = (gram + gram.T) / 2
    gram.diagonal().add_(weight)
    factor, info = torch.linalg.cholesky_ex(gram)
    pivots = factor.diagonal().square()
    if bool(info != 0) or bool((pivots <= torch.finfo(gram.dtype).eps * len(gram) * gram.diagonal().amax()).any()):
        raise SingularMomentError(
            "Two edits of this batch have the same key (up to the others), so they cannot both be written exactly. "
            "Remove the repeated subject, or give the ridge a weight above 0."
        )
    return solved(factor, right_side)


def whiten_beside(whitened: Tensor, held: Tensor, held_whitened: Tensor) -> Tensor:
    """(C + H Hᵀ)⁻¹ k from C⁻¹ k (Woodbury).

    Args:
        whitened: C⁻¹ k for each key, [n, I] float64.
        held: H transposed, [N, I].
        held_whitened: (C⁻¹ H) transposed, [N, I] float64.
    """
    held = held.to(held_whitened)
    return whitened - (held @ whitened.T).T @ _solve_spd(held @ held_whitened.T, held_whitened, 1.0)


NullSpaceRule = Literal["fraction", "mean", "absolute"]


def null_space(moment: Tensor, threshold: float, rule: NullSpaceRule = "fraction") -> tuple[Tensor, float]:
    """Find the directions that ordinary keys use, the complement of those that may be written.

    Args:
        moment: C, [I, I].
        threshold: what makes a direction free, by ``rule``.
        rule: ``"fraction"``: that share of all directions, those with the smallest eigenvalues, is free. It means the same for
            every model, and one enormous key (an attention sink's can hold 99% of the trace) does not change it.
            ``"mean"``: eigenvalues below this multiple of their mean. ``"absolute"``: eigenvalues below this number, the
            published form.

    Returns:
        The *used* directions U, [I, d] float64, orthonormal: the projection on the free ones is P = 1 − U Uᵀ. And the mean
        ‖P k‖² of ordinary keys, tr(P C).

    Raises:
        SingularMomentError: C is negative in some direction (or not finite).
    """
    values, vectors = torch.linalg.eigh(moment.to(torch.float64))
    # Rounding of a float32 moment makes eigenvalues of 0 a little negative; more is no second moment.
    if not bool(values[0] >= -1e-4 * values[-1].abs()):
        raise SingularMomentError(
            f"The second moment has a negative eigenvalue ({float(values[0]):.3g}), so it is no E[k kᵀ] and does not tell which "
            "directions are free to be written. Estimate it anew."
        )
    if rule == "fraction":
        free = int(threshold * len(values))
    else:
        free = int((values < (threshold * values.mean() if rule == "mean" else threshold)).sum())
    return vectors[:, free:].contiguous(), float(values[:free].clamp(min=0).sum())  # eigenvalues ascend


def projected(used: Tensor, keys: Tensor) -> Tensor:
    """P k for each key: what is left of [n, I] without the directions ``used`` [I, d]."""
    keys = keys.to(used)
    return keys - (keys @ used) @ used.T


@dataclass(frozen=True)
class Past:
    """Keys of earlier edits as the null-space update needs them: themselves while few, their sum as soon as that is smaller.

    Attributes:
        keys: Z transposed, [n, I] float64, projected; ``None`` where there are none, or as many as dimensions.
        gram: Zᵀ Z, [I, I] float64, from then on.
    """

    keys: Tensor | None = None
    gram: Tensor | None = None

    @property
    def device(self) -> torch.device | None:
        """The device of the matrices; ``None`` where there are none."""
        held = self.keys if self.gram is None else self.gram
        return None if held is None else held.device

    def plus(self, keys: Tensor) -> Past:
        """The same with more projected keys [n, I]."""
        if self.gram is not None:
            return Past(gram=self.gram + keys.T @ keys)
        every = keys if self.keys is None else torch.cat([self.keys, keys])
        return Past(every) if len(every) < every.shape[1] else Past(gram=every.T @ every)


def null_space_update(keys: Tensor, residuals: Tensor, weight: float, past: Past | None = None) -> LowRankDelta:
    """AlphaEdit (arXiv:2410.02355, eq. 14): (P (K Kᵀ + Kₚ Kₚᵀ) + λ 1) X = P K Rᵀ, Δ = Xᵀ.

    X lies in the range of P, so with Z = P [K, Kₚ] it is Z (ZᵀZ + λ 1)⁻¹ restricted to the columns of K: a system in the
    number of keys. Where there are more keys than dimensions the system in the dimensions is solved instead.

    Args:
        keys: P K transposed (:func:`projected`), [E, I] float64.
        residuals: R transposed, [E, O].
        weight: λ, above 0.
        past: keys of earlier edits, projected.

    Returns:
        left R as [O, E] and right [I, E], float64; right has no part in the used directions.
    """
    past = past or Past()
    before = keys[:0] if past.keys is None else past.keys
    both = torch.cat([keys, before])
    if past.gram is None and len(both) < both.shape[1]:
        identity = torch.eye(len(both), dtype=both.dtype, device=both.device)[:, : len(keys)]
        right = both.T @ _solve_spd(both @ both.T, identity, weight)
    else:
        system = both.T @ both
        if past.gram is not None:
            system += past.gram
        system.diagonal().add_(weight)
        right = solved(torch.linalg.cholesky(system), keys.T)
    return LowRankDelta(residuals.to(keys).T, right)
