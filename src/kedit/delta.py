"""Updates of one weight matrix, low-rank or dense, in the orientation y = W x."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kedit.errors import NonFiniteError, PatchError


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
        if not torch.isfinite(tensor).all():
            raise NonFiniteError(
                f"The update of {name} ({suffix}) holds NaN or infinite numbers, so it is not written. "
                "Lower lr or clamp, or check the second moment."
            )
    return delta


def concatenate(deltas: list[Delta]) -> Delta:
    """The sum of several updates of one weight: factors side by side, dense as soon as that is smaller."""
    if len(deltas) == 1:
        return deltas[0]
    low = [delta for delta in deltas if isinstance(delta, LowRankDelta)]
    rows, columns = deltas[0].shape
    if len(low) == len(deltas) and sum(d.rank for d in low) * (rows + columns) < rows * columns:
        return LowRankDelta(torch.cat([d.left for d in low], 1), torch.cat([d.right for d in low], 1))
    total = deltas[0].dense.clone()
    for delta in deltas[1:]:
        total += delta.dense
    return DenseDelta(total)
