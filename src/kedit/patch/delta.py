"""Updates of one weight matrix, low-rank or dense, in the orientation y = W x."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kedit.errors import NonFiniteError, PatchError
from kedit.utils.linalg import is_finite

_BLOCK = 1 << 17  # numbers added at a time: what fits the cache
_BLOCK_ELSEWHERE = 1 << 24


@dataclass(frozen=True)
class LowRankDelta:
    """ΔW = left @ right.T with left [O, r] and right [I, r]."""

    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        """Check the shapes."""
        if self.left.ndim != 2 or self.right.ndim != 2 or self.left.shape[1] != self.right.shape[1]:
            raise PatchError(
                f"A low-rank update needs left [O, r] and right [I, r]; found {tuple(self.left.shape)} and "
                f"{tuple(self.right.shape)}."
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.left.shape[0], self.right.shape[0]

    @property
    def rank(self) -> int:
        """Number of columns, an upper bound of the update's rank."""
        return int(self.left.shape[1])

    @property
    def dense(self) -> Tensor:
        """ΔW, [O, I]."""
        return self.left @ self.right.T

    @property
    def norm(self) -> float:
        """‖ΔW‖ (Frobenius), from the factors alone."""
        left, right = self.left.double(), self.right.double()
        return float(((left.T @ left) * (right.T @ right)).sum().clamp_min(0.0).sqrt())

    @property
    def spectral_norm(self) -> float:
        """Largest singular value of ΔW, from the factors alone."""
        _, singular, _ = factored_svd(self)
        return float(singular[0]) if singular.numel() else 0.0

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by their suffix."""
        return {"left": self.left, "right": self.right}

    def to(self, device: torch.device, dtype: torch.dtype) -> LowRankDelta:
        """The same update elsewhere."""
        return LowRankDelta(self.left.to(device, dtype), self.right.to(device, dtype))


@dataclass(frozen=True)
class DenseDelta:
    """ΔW itself, [O, I]: smaller than factors where the rank is large."""

    matrix: Tensor

    def __post_init__(self) -> None:
        """Check the shape."""
        if self.matrix.ndim != 2:
            raise PatchError(f"A dense update is a matrix [O, I]; found shape {tuple(self.matrix.shape)}.")

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.matrix.shape[0], self.matrix.shape[1]

    @property
    def rank(self) -> int:
        """Upper bound of the update's rank."""
        return min(self.matrix.shape)

    @property
    def dense(self) -> Tensor:
        """ΔW, [O, I]."""
        return self.matrix

    @property
    def norm(self) -> float:
        """‖ΔW‖ (Frobenius)."""
        return float(torch.linalg.vector_norm(self.matrix, dtype=torch.float64))

    @property
    def spectral_norm(self) -> float:
        """Largest singular value of ΔW."""
        return float(torch.linalg.matrix_norm(self.matrix.double(), 2))

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by their suffix."""
        return {"dense": self.matrix}

    def to(self, device: torch.device, dtype: torch.dtype) -> DenseDelta:
        """The same update elsewhere."""
        return DenseDelta(self.matrix.to(device, dtype))


Delta = LowRankDelta | DenseDelta


def check_finite(name: str, delta: Delta) -> Delta:
    """Return ``delta``, or raise :class:`NonFiniteError` where it holds NaN or infinity."""
    for suffix, tensor in delta.tensors().items():
        if not is_finite(tensor):
            raise NonFiniteError(
                f"The update of {name} ({suffix}) holds NaN or infinite numbers, so it is not written. "
                "Lower lr or clamp, or check the second moment."
            )
    return delta


def factored_svd(delta: LowRankDelta) -> tuple[Tensor, Tensor, Tensor]:
    """U [O, r], σ [r], V [I, r] in float64 with ΔW = U diag(σ) Vᵀ, without ever forming ΔW."""
    left_basis, left_rest = torch.linalg.qr(delta.left.double())
    right_basis, right_rest = torch.linalg.qr(delta.right.double())
    u, singular, vh = torch.linalg.svd(left_rest @ right_rest.T, full_matrices=False)
    return left_basis @ u, singular, right_basis @ vh.T


def emptied(delta: Delta) -> Delta:
    """The update 0 in the form of ``delta``."""
    if isinstance(delta, LowRankDelta):
        return LowRankDelta(torch.zeros_like(delta.left), delta.right)
    return DenseDelta(torch.zeros_like(delta.matrix))


def sum_dtype(stored: torch.dtype) -> torch.dtype:
    """The dtype in which updates of a weight are summed: float32, or float64 for a float64 weight."""
    return torch.promote_types(stored, torch.float32)


@torch.no_grad()
def add_delta(total: Tensor, delta: Delta, *, transposed: bool) -> Tensor:
    """Add an update to a running sum in place, and return the sum.

    A low-rank update is added one column pair after the other, each product and each sum rounded once. So the result
    has the same bits on every device and with any number of threads, and a patch that is several patches side by side
    gives the bits that they give one after another.

    Args:
        total: W₀ plus what was added before, as stored: [O, I], or [I, O] where ``transposed``; in the dtype of the sum.
        delta: the update, [O, I].
        transposed: the layout of ``total``.
    """
    placed = delta.to(total.device, total.dtype)
    if isinstance(placed, DenseDelta):
        return total.add_(placed.matrix.T if transposed else placed.matrix)
    rows_factor, columns_factor = (placed.right, placed.left) if transposed else (placed.left, placed.right)
    columns = columns_factor.T.contiguous()  # [r, columns of total]
    if total.device.type == "cpu":
        # NumPy adds in one thread. torch would wait for all of its threads at each of these many small steps: on a machine
        # whose cores are busy, a hundred times as long.
        with np.errstate(all="ignore"):  # whoever stores the sum checks that it is finite
            _add_columns(np, total.numpy(), rows_factor.detach().numpy(), columns.detach().numpy(), _BLOCK)
    else:
        _add_columns(torch, total, rows_factor, columns, _BLOCK_ELSEWHERE)
    return total


def _add_columns(library: Any, total: Any, rows: Any, columns: Any, size: int) -> None:
    """Add rows [n, r] times columns [r, m] to total [n, m], column after column, ``size`` numbers at a time."""
    step = max(1, size // max(1, total.shape[1]))
    for start in range(0, total.shape[0], step):
        block, factor = total[start : start + step], rows[start : start + step]
        product = library.empty_like(block)
        for i in range(columns.shape[0]):
            library.multiply(factor[:, i : i + 1], columns[i], out=product)
            library.add(block, product, out=block)


def append(deltas: list[Delta], delta: Delta) -> None:
    """Put an update of a weight behind earlier ones; where both are dense, their sum takes the last one's place."""
    last = deltas[-1] if deltas else None
    if isinstance(last, DenseDelta) and isinstance(delta, DenseDelta):
        deltas[-1] = DenseDelta(last.matrix + delta.matrix)
    else:
        deltas.append(delta)


def concatenate(deltas: list[Delta]) -> Delta:
    """The sum of several updates of one weight: factors side by side, dense as soon as that is smaller."""
    low = [delta for delta in deltas if isinstance(delta, LowRankDelta)]
    rows, columns = deltas[0].shape
    if len(low) == len(deltas) and sum(d.rank for d in low) * (rows + columns) < rows * columns:
        if len(low) == 1:
            return low[0]
        return LowRankDelta(torch.cat([d.left for d in low], 1), torch.cat([d.right for d in low], 1))
    total = deltas[0].dense.clone()
    for delta in deltas[1:]:
        total += delta.dense
    return DenseDelta(total)
