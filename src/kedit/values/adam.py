"""Adam for many edits at once, each at a step of its own."""

from __future__ import annotations

import torch
from torch import Tensor

BETAS = (0.9, 0.999)
EPS = 1e-8


class Adam:
    """``torch.optim.Adam`` with its defaults, and a number of steps per edit: one can skip a step, or begin anew.

    Args:
        like: the values, [E, S, H].
    """

    def __init__(self, like: Tensor) -> None:
        self._mean = torch.zeros_like(like)
        self._square = torch.zeros_like(like)
        self._steps = torch.zeros(len(like), dtype=torch.float64, device=like.device)

    def change(self, gradient: Tensor, edits: Tensor, lr: float) -> Tensor:
        """What to add to the values [E, S, H] of the edits [E, bool]; 0 for the others, which do not make this step."""
        chosen = edits[:, None, None]
        self._steps += edits
        mean = self._mean.lerp(gradient, 1 - BETAS[0])
        square = (BETAS[1] * self._square).addcmul(gradient, gradient, value=1 - BETAS[1])
        self._mean = torch.where(chosen, mean, self._mean)
        self._square = torch.where(chosen, square, self._square)
        first, second = ((1 - beta**self._steps)[:, None, None] for beta in BETAS)
        spread = self._square.sqrt() / second.sqrt().to(gradient.dtype) + EPS
        change = -(lr / first).to(gradient.dtype) * self._mean / spread
        return torch.where(chosen, change, 0)

    def restart(self, edits: Tensor) -> None:
        """Forget the gradients of the edits [E, bool]."""
        self._mean[edits] = 0
        self._square[edits] = 0
        self._steps[edits] = 0
