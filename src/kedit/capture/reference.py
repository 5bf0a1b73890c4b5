"""Attention rows in plain, readable torch: what every other implementation is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from kedit.capture.attention_rule import Rule, accumulator, check, gather_queries, visible


def reference_rows(q: Tensor, k: Tensor, positions: Tensor, rule: Rule) -> Tensor:
    """Attention probabilities of a few query rows, differentiable by autograd.

    p = softmax(softcap(scaling · q kᵀ) + add) over the visible keys, with the sinks in the normalisation.

    Args:
        q: queries, [B, A, Tq, D], any float dtype and strides.
        k: keys, [B, A / G, Tk, D].
        positions: query index of each captured row, [B, R]; -1 for a dead row.
        rule: scaling and masks.

    Returns:
        [B, A, R, Tk], float32 (float64 for float64 queries). A row that is dead or sees no key is 0.
    """
    check(q, k, positions)
    dtype = accumulator(q.dtype)
    num_keys, groups = k.shape[2], q.shape[1] // k.shape[1]
    rows = gather_queries(q, positions).to(dtype)
    if rows.shape[2] != positions.shape[1]:  # a single query, asked for several times
        rows = rows.expand(-1, -1, positions.shape[1], -1)
    keys = k.to(dtype).repeat_interleave(groups, dim=1)
    scores = rows @ keys.transpose(2, 3) * rule.scaling
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    if rule.add is not None:
        scores = scores + gather_queries(rule.add, positions)[..., :num_keys].to(dtype)
    seen = visible(rule, positions, q.shape[2], num_keys)
    scores = torch.where(seen, scores, -torch.inf)
    return normalise(scores, rule.sinks, rule.lse)


def normalise(scores: Tensor, sinks: Tensor | None = None, lse: Tensor | None = None) -> Tensor:
    """Softmax over the last axis of [B, A, R, Tk]; a row of only -inf becomes 0, not NaN."""
    if lse is not None:
        return torch.exp(scores - lse.to(scores.dtype).unsqueeze(-1))
    top = scores.amax(-1, keepdim=True)
    if sinks is not None:
        sink = sinks.detach().to(scores.dtype)[:, None, None]
        top = torch.maximum(top, sink)
    top = torch.where(top == -torch.inf, 0.0, top).detach()
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sink - top)
    return weights / torch.where(total == 0, 1.0, total)
