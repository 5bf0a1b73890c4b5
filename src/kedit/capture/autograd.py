"""Rows as nodes of the autograd graph: alone, or together with the attention they belong to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kedit.capture.attention_rule import Memo, Rule, check
from kedit.capture.dispatch import RowsBackend

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class _RowsAlone(torch.autograd.Function):
    """Rows alone; for attention whose own graph autograd has to keep (eager attention)."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, positions: Tensor, rule: Rule, backend: RowsBackend, memo: Memo | None
    ) -> Tensor:
        rows = backend.forward(q, k, positions, rule, memo)
        ctx.save_for_backward(q, k, positions, rows)
        ctx.rule, ctx.backend = rule, backend
        return rows

    @staticmethod
    @once_differentiable  # type: ignore[misc, unused-ignore]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, positions, rows = ctx.saved_tensors
        dq = torch.zeros_like(q) if ctx.needs_input_grad[0] else None
        dk = torch.zeros_like(k) if ctx.needs_input_grad[1] else None
        ctx.backend.backward(grad, rows, q, k, positions, ctx.rule, (dq, dk))
        return dq, dk, None, None, None, None


class _AttentionAndRows(torch.autograd.Function):
    """Attention and rows; the gradient of the rows is added in place to the one that attention returns."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, attend: Attend,
        positions: Tensor, rule: Rule, backend: RowsBackend, memo: Memo | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        wanted = ctx.needs_input_grad[:3]
        inner = [x.detach().requires_grad_(need) for x, need in zip((q, k, v), wanted, strict=True)]
        with torch.enable_grad():
            out = attend(*inner)
        rows = backend.forward(q, k, positions, rule, memo)
        ctx.save_for_backward(positions, rows)
        ctx.inner, ctx.out, ctx.rule, ctx.backend = inner, out, rule, backend
        ctx.set_materialize_grads(False)
        return out.detach(), rows

    @staticmethod
    @once_differentiable  # type: ignore[misc, unused-ignore]
    def backward(ctx: Any, grad_out: Tensor | None, grad_rows: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.inner is None:
            raise RuntimeError("Trying to backward through the captured attention a second time without retain_graph.")
        positions, rows = ctx.saved_tensors
        inner: list[Tensor] = ctx.inner
        keep = _keeps_graph()
        grads: list[Tensor | None] = [None, None, None]
        if grad_out is not None:
            wanted = [i for i in range(3) if ctx.needs_input_grad[i]]
            computed = torch.autograd.grad(ctx.out, [inner[i] for i in wanted], grad_out, retain_graph=keep)
            for i, grad in zip(wanted, computed, strict=True):
                grads[i] = grad
        if grad_rows is not None:
            for i in range(2):
                if ctx.needs_input_grad[i]:
                    grads[i] = _writable(grads[i], inner[i])
            q, k = inner[0].detach(), inner[1].detach()
            ctx.backend.backward(grad_rows, rows, q, k, positions, ctx.rule, (grads[0], grads[1]))
        if not keep:
            ctx.inner = ctx.out = None
        return (*grads, None, None, None, None, None)


def _keeps_graph() -> bool:
    """Return whether the running backward pass was asked to retain its graph; if torch does not say, assume so."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())


def _writable(grad: Tensor | None, like: Tensor) -> Tensor:
    """A gradient that may be added to in place: zeros where there is none, a copy where elements share memory."""
    if grad is None:
        return torch.zeros_like(like)
    shared = any(stride == 0 and size > 1 for stride, size in zip(grad.stride(), grad.shape, strict=True))
    return grad.clone(memory_format=torch.contiguous_format) if shared else grad


def _needs_graph(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def rows_node(
    q: Tensor, k: Tensor, positions: Tensor, rule: Rule, backend: RowsBackend, memo: Memo | None = None
) -> Tensor:
    """Rows [B, A, R, Tk], differentiable with respect to q and k."""
    check(q, k, positions)
    if not _needs_graph(q, k):
        return backend.forward(q.detach(), k.detach(), positions, rule, memo)
    rows: Tensor = _RowsAlone.apply(q, k, positions, rule, backend, memo)  # type: ignore[no-untyped-call]
    return rows


def attention_and_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attend: Attend,
    positions: Tensor,
    rule: Rule,
    backend: RowsBackend,
    memo: Memo | None = None,
) -> tuple[Tensor, Tensor]:
    """``attend(q, k, v)`` and the rows, in one node.

    ``attend`` may depend on no tensor that needs a gradient besides its three arguments.
    """
    check(q, k, positions)
    if not _needs_graph(q, k, v):
        return attend(q, k, v), backend.forward(q.detach(), k.detach(), positions, rule, memo)
    both: tuple[Tensor, Tensor] = _AttentionAndRows.apply(  # type: ignore[no-untyped-call]
        q, k, v, attend, positions, rule, backend, memo
    )
    return both
