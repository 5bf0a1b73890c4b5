"""Linear algebra on tensors: no model, no tokenizer."""

from __future__ import annotations

import torch
from torch import Tensor

from kedit.errors import SingularMomentError


def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor holds neither NaN nor infinity; both show in its extremes, which cost no second tensor."""
    return not tensor.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(tensor.detach()))).all())


def cholesky(moment: Tensor, layer: int | None = None) -> Tensor:
    """Lower Cholesky factor of a second moment C [I, I], in float64.

    Raises:
        SingularMomentError: C is not positive definite (or not finite).
    """
    matrix = moment.to(torch.float64)
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    diagonal = factor.diagonal()
    ok = bool(info == 0) and is_finite(factor.mT)  # column by column, as it is stored: else the check makes a copy
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
    return solved(factor, keys.to(factor).T).T


def solved(factor: Tensor, right_side: Tensor) -> Tensor:
    """(L Lᵀ)⁻¹ B for a lower factor L [n, n] and B [n, m]; unlike ``torch.cholesky_solve``, without a copy of L."""
    half = torch.linalg.solve_triangular(factor, right_side, upper=False)
    solution: Tensor = torch.linalg.solve_triangular(factor.mT, half, upper=True)
    return solution
