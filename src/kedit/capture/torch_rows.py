"""Rows and their gradient in torch, without copies of the keys: the implementation used where no GPU kernel runs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kedit.capture.attention_rule import Grads, Memo, Rule, accumulator, gather_queries, visible
from kedit.capture.reference import normalise

COPIED = 1 << 20  # numbers of the keys that are copied at once


def _bias(rule: Rule, positions: Tensor, q: Tensor, k: Tensor, memo: Memo | None) -> Tensor:
    """The bias of the scores, -inf at hidden keys: [B, A|1, R, Tk]; made once for all layers that share masks."""
    num_queries, num_keys, dtype = q.shape[2], k.shape[2], accumulator(q.dtype)
    shape = (num_queries, num_keys, dtype, q.device)
    key = ("bias", id(rule.allow), id(rule.add), id(positions), rule.causal, rule.offset, rule.window, shape)
    if memo is not None and key in memo:
        known: Tensor = memo[key][0]
        return known
    seen = visible(rule, positions, num_queries, num_keys)
    values = torch.zeros((), dtype=dtype, device=q.device)
    if rule.add is not None:
        values = gather_queries(rule.add, positions)[..., :num_keys].to(dtype)
    bias = torch.where(seen, values, -torch.inf)
    if memo is not None:
        memo[key] = (bias, rule, positions)  # the tensors whose ids stand in the key stay alive
    return bias


def _batches(k: Tensor) -> Iterator[slice]:
    """Prompts whose products are computed together: on a CPU, where keys laid out [B, T, A, D] are copied first, a few MB."""
    step = k.shape[0]
    if k.device.type == "cpu":
        step = COPIED * step // max(k.numel(), 1)
    for start in range(0, k.shape[0], max(step, 1)):
        yield slice(start, start + max(step, 1))


def _queries(q: Tensor, k: Tensor, positions: Tensor) -> Tensor:
    """Captured queries with the heads of one key head side by side: [B, A / G, G R, D]."""
    rows = gather_queries(q, positions).expand(-1, -1, positions.shape[1], -1)
    return rows.reshape(q.shape[0], k.shape[1], -1, q.shape[3]).to(accumulator(q.dtype))


def _products(q: Tensor, k: Tensor, positions: Tensor, scaling: float) -> Tensor:
    """Scaled q kᵀ of the captured rows: [B, A / G, G R, Tk]."""
    rows = _queries(q, k, positions)
    scores = rows.new_empty((*rows.shape[:3], k.shape[2]))
    for batch in _batches(k):
        torch.matmul(rows[batch], k[batch].transpose(2, 3).to(rows.dtype), out=scores[batch])
    return scores.mul_(scaling)


def forward(q: Tensor, k: Tensor, positions: Tensor, rule: Rule, memo: Memo | None = None) -> Tensor:
    """:func:`~kedit.capture.reference.reference_rows` without autograd; same arguments and result."""
    scores = _products(q, k, positions, rule.scaling)
    if rule.softcap is not None:
        scores = scores.div_(rule.softcap).tanh_().mul_(rule.softcap)
    scores = scores.view(q.shape[0], q.shape[1], positions.shape[1], k.shape[2])
    scores += _bias(rule, positions, q, k, memo)
    return normalise(scores, rule.sinks, rule.lse)


def backward(grad: Tensor, rows: Tensor, q: Tensor, k: Tensor, positions: Tensor, rule: Rule, grads: Grads) -> None:
    """Add the gradient of the rows to that of the queries, ``dq``, and of the keys, ``dk``, in place.

    ds = p (dp - Σ p dp), through the softcap; dq += scaling · ds k, dk += scaling · dsᵀ q. A key that has no weight takes
    no part, whatever ``grad`` holds there.

    Args:
        grad: gradient of the rows, [B, A, R, Tk].
        rows: what :func:`forward` returned.
        q: queries, [B, A, Tq, D].
        k: keys, [B, A / G, Tk, D].
        positions: [B, R].
        rule: as in the forward pass.
        grads: dq [B, A, Tq, D] in the dtype of q and dk [B, A / G, Tk, D] in the dtype of k; ``None`` if not wanted.
    """
    dq, dk = grads
    grad = torch.where(rows == 0, 0, grad.to(rows.dtype))
    ds = rows * (grad - (rows * grad).sum(-1, keepdim=True))
    ds = ds.view(q.shape[0], k.shape[1], -1, k.shape[2])
    if rule.softcap is not None:
        ds = ds / torch.cosh(_products(q, k, positions, rule.scaling).div_(rule.softcap)).square_()
    ds = ds * rule.scaling
    queries = _queries(q, k, positions)
    products = torch.empty_like(queries) if dq is not None else None
    for batch in _batches(k):
        if products is not None:
            torch.matmul(ds[batch], k[batch].to(ds.dtype), out=products[batch])
        if dk is not None:
            dk[batch] += ds[batch].transpose(2, 3) @ queries[batch]
    if dq is not None and products is not None:
        _scatter(dq, products.view(q.shape[0], q.shape[1], -1, q.shape[3]), positions)


def _scatter(dq: Tensor, gradients: Tensor, positions: Tensor) -> None:
    """Add [B, A, R, D] to the rows ``positions`` of dq; rows named twice receive both."""
    batch = torch.arange(dq.shape[0], device=dq.device)[:, None]
    dead = (positions < 0)[:, :, None, None]
    values = gradients.transpose(1, 2).masked_fill(dead, 0).to(dq.dtype)
    dq.transpose(1, 2).index_put_((batch, positions.clamp(min=0)), values, accumulate=True)
