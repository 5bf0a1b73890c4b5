"""Closed forms on tensors: no model, no tokenizer. Axis letters: :mod:`kedit.shapes`."""

from __future__ import annotations

import torch
from torch import Tensor

from kedit.delta import LowRankDelta
from kedit.errors import SingularMomentError


def cholesky(moment: Tensor, layer: int | None = None) -> Tensor:
    """Lower Cholesky factor of a second moment C [I, I], in float64.

    Raises:
        SingularMomentError: C is not positive definite (or not finite).
    """
    matrix = moment.to(torch.float64)
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    diagonal = factor.diagonal()
    ok = bool(info == 0) and bool(torch.isfinite(factor).all())
    # Rounding lets some singular matrices through with a pivot of pure noise.
    floor = torch.finfo(torch.float64).eps * len(matrix) * matrix.diagonal().abs().amax()
    if not ok or bool((diagonal.square() <= floor).any()):
        where = "" if layer is None else f" of layer {layer}"
        raise SingularMomentError(
            f"The second moment{where} is not positive definite: it holds no evidence in some directions. "
            "Estimate it from more text, or add a small multiple of the identity to it."
        )
    return factor


def whiten(factor: Tensor, keys: Tensor) -> Tensor:
    """C⁻¹ k for each key, by the Cholesky factor of C.

    Args:
        factor: lower factor, [I, I] float64.
        keys: [n, I].

    Returns:
        [n, I] float64.
    """
    return torch.cholesky_solve(keys.to(factor).T, factor).T


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
    return LowRankDelta((residual.to(u) / overlap)[:, None], u[:, None])
