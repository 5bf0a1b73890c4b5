"""Noticing, per edit, that something falls no further."""

from __future__ import annotations

import torch
from torch import Tensor

PROGRESS = 0.01  # by how much a score must be smaller to count as such, relative


class Plateau:
    """The least score of each edit so far, and how many steps ago it was; 0 before the first one that counts.

    Args:
        edits: number of edits, E.
        like: a tensor of the scores' dtype and device.
    """

    def __init__(self, edits: int, like: Tensor) -> None:
        self.least = like.new_full((edits,), float("inf"))
        self.waited = torch.zeros(edits, dtype=torch.int64, device=like.device)

    def step(self, score: Tensor, counts: Tensor, active: Tensor) -> Tensor:
        """Take the scores [A] of the edits ``active`` [A], as far as they count [A]; returns those that are smaller, [A]."""
        better = counts & (score < self.least[active] * (1 - PROGRESS))
        self.least[active[better]] = score[better]
        self.waited[active] = torch.where(better, 0, self.waited[active] + self.least[active].isfinite())
        return better
