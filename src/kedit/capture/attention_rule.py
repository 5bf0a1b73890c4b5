"""Turn scores into attention: everything besides queries and keys that decides an attention row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kedit.errors import CaptureError

Grads = tuple[Tensor | None, Tensor | None]
"""Gradients of queries and keys that are added to in place; ``None`` where one is not wanted."""

Memo = dict[Any, Any]
"""Values that the layers of one forward pass share, such as masks gathered at the captured rows."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Scaling, masks and the rest of one attention layer.

    Axes of size 1 of a mask stand for all; a mask without the axes B and A is read as [1, 1, Tq, Tk].

    Attributes:
        scaling: factor of q·k.
        allow: bool mask, [B|1, A|1, Tq|1, Tk]; true where the key may be seen.
        add: float mask or bias added to the scores, same axes. The smallest number of its dtype hides a key.
        causal: query i sees the keys up to ``offset + i``.
        offset: key at which query 0 stands; ``None``: the queries are the last of the keys (Tk - Tq).
        window: query at key p sees no key before ``p - window + 1``; 0 is no window.
        softcap: scores become ``softcap * tanh(score / softcap)`` before the masks.
        sinks: [A], a score per head that takes part in the normalisation and is dropped from the row. No gradient
            flows to it.
        lse: [B, A, R], the rows' log-normalisers where a fast attention already returned them (sinks included).
    """

    scaling: float
    allow: Tensor | None = None
    add: Tensor | None = None
    causal: bool = False
    offset: int | None = None
    window: int = 0
    softcap: float | None = None
    sinks: Tensor | None = None
    lse: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("allow", "add"):
            mask = getattr(self, name)
            if mask is None:
                continue
            if mask.dim() > 4 or mask.dim() == 0:
                raise CaptureError(f"The mask {name} has shape {tuple(mask.shape)}; expected [B, A, Tq, Tk].")
            while mask.dim() < 4:
                mask = mask.unsqueeze(0)
            object.__setattr__(self, name, mask)
        if self.allow is not None and self.allow.dtype != torch.bool:
            raise CaptureError(f"allow must be a bool mask, not {self.allow.dtype}. Pass an additive mask as add.")
        if self.add is not None and not self.add.is_floating_point():
            raise CaptureError(f"add must be a float mask, not {self.add.dtype}. Pass a bool mask as allow.")

    def first(self, num_queries: int, num_keys: int) -> int:
        """Key at which query 0 stands."""
        return num_keys - num_queries if self.offset is None else self.offset


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which rows are computed and returned: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gather_queries(tensor: Tensor, positions: Tensor) -> Tensor:
    """Pick query rows: [B|1, X, Tq|1, Y] and positions [B, R] give [B, X, R|1, Y]; negative positions give row 0."""
    if tensor.shape[2] == 1:
        return tensor.expand(positions.shape[0], -1, -1, -1)
    batch = torch.arange(positions.shape[0], device=tensor.device)[:, None]
    if tensor.shape[0] == 1:
        batch = torch.zeros_like(batch)
    picked = tensor[batch, :, positions.clamp(min=0)]  # [B, R, X, Y]
    return picked.transpose(1, 2)


def visible(rule: Rule, positions: Tensor, num_queries: int, num_keys: int) -> Tensor:
    """Mark the keys that each captured row sees, as the masks, causality and the window say: bool, [B, A|1, R, Tk]."""
    seen = (positions >= 0)[:, None, :, None].expand(-1, 1, -1, num_keys)
    key = torch.arange(num_keys, device=positions.device)
    at = (positions + rule.first(num_queries, num_keys))[:, None, :, None]
    if rule.causal:
        seen = seen & (key <= at)
    if rule.window:
        seen = seen & (key > at - rule.window)
    if rule.allow is not None:
        seen = seen & gather_queries(rule.allow, positions)[..., :num_keys]
    if rule.add is not None:
        floor = torch.finfo(rule.add.dtype).min / 2
        seen = seen & (gather_queries(rule.add, positions)[..., :num_keys] > floor)
    return seen


def check_positions(positions: Tensor) -> Tensor:
    """Positions as int64; raises :class:`CaptureError` unless they are integers [B, R]."""
    if positions.dim() != 2 or positions.is_floating_point() or positions.dtype == torch.bool:
        raise CaptureError(
            f"positions must be integers [B, R]; found {positions.dtype} of shape {tuple(positions.shape)}."
        )
    return positions.to(torch.int64)


def check(q: Tensor, k: Tensor, positions: Tensor) -> None:
    """Refuse shapes and dtypes that cannot belong together.

    Raises:
        CaptureError: says which tensor does not fit.
    """
    if q.dim() != 4 or k.dim() != 4:
        raise CaptureError(f"q and k need four axes [B, A, T, D]; found {tuple(q.shape)} and {tuple(k.shape)}.")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise CaptureError(f"q {tuple(q.shape)} and k {tuple(k.shape)} do not belong to one attention layer.")
    check_positions(positions)
    if positions.shape[0] != q.shape[0]:
        raise CaptureError(
            f"positions has {positions.shape[0]} rows but the forward pass has a batch of {q.shape[0]}. "
            "Give one row of positions per prompt."
        )
