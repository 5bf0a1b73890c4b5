"""Measure how far attention rows have moved, with the gradient in closed form."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kedit.errors import CaptureError

Divergence = Literal["kl", "js", "l2"]


def _value(kind: str, p: Tensor, q: Tensor, eps: float) -> Tensor:
    if kind == "l2":
        return (p - q).square().sum(-1)
    if kind == "exact":
        return (torch.xlogy(p, p) - p * q.clamp(min=torch.finfo(q.dtype).tiny).log()).sum(-1)
    p, q = p + eps, q + eps
    if kind == "kl":
        return (p * (p / q).log()).sum(-1)
    middle = (p + q) / 2
    return ((p * (p / middle).log()).sum(-1) + (q * (q / middle).log()).sum(-1)) / 2


def _slope(kind: str, p: Tensor, q: Tensor, eps: float) -> Tensor:
    """Derivative of the value by q."""
    if kind == "l2":
        return 2 * (q - p)
    if kind == "exact":
        return -p / q.clamp(min=torch.finfo(q.dtype).tiny)
    p, q = p + eps, q + eps
    return -p / q if kind == "kl" else (2 * q / (p + q)).log() / 2


class _Divergence(torch.autograd.Function):
    """Value per row and its derivative, without intermediates kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, reference: Tensor, selected: Tensor | None, kind: str, eps: float) -> Tensor:
        ctx.save_for_backward(rows, reference, selected)
        ctx.kind, ctx.eps = kind, eps
        value = _value(kind, reference, rows, eps)
        return value if selected is None else value * selected

    @staticmethod
    @once_differentiable  # type: ignore[misc, unused-ignore]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, reference, selected = ctx.saved_tensors
        grad = grad if selected is None else grad * selected
        return grad.unsqueeze(-1) * _slope(ctx.kind, reference, rows, ctx.eps), None, None, None, None


def row_divergence(
    rows: Tensor,
    reference: Tensor,
    *,
    divergence: Divergence = "kl",
    exact: bool = False,
    eps: float = 1e-8,
    subject_column: Tensor | None = None,
) -> Tensor:
    """Divergence D(p, q) of each row q from its reference p, differentiable with respect to q.

    - ``"kl"``: Σ (p+ε) log((p+ε)/(q+ε)), the form of SADR's authors (arXiv:2502.14838). Its gradient vanishes where q < ε.
    - ``"kl"`` with ``exact``: Σ p log(p/q). Through the softmax of the rows its gradient on the scores is q Σp - p, which
      does not vanish as long as q does not underflow (a score 87 below the top in float32).
    - ``"js"``: Jensen-Shannon, of p+ε and q+ε; ``"l2"``: Σ (p-q)².

    Args:
        rows: q, [B, A, ..., Tk].
        reference: p, same shape; no gradient flows to it.
        divergence: ``"kl"``, ``"js"`` or ``"l2"``.
        exact: the exact KL.
        eps: ε.
        subject_column: column s of the edited subject, integers [B]. If given, a row counts only where
            q_h(s) > max_h' p_h'(s): where its head attends more to the subject than any head did. Else it gives 0.

    Returns:
        [B, A, ...], in the dtype of the rows.

    Raises:
        CaptureError: shapes differ, or the combination of options has no meaning.
    """
    if rows.shape != reference.shape or rows.dim() < 3:
        raise CaptureError(
            f"rows {tuple(rows.shape)} and reference {tuple(reference.shape)} must have one shape, [B, A, ..., Tk]."
        )
    if divergence not in ("kl", "js", "l2"):
        raise CaptureError(f'There is no divergence {divergence!r}. Choose "kl", "js" or "l2".')
    if exact and divergence != "kl":
        raise CaptureError(f"exact is a form of the KL divergence; it has no meaning with {divergence!r}.")
    reference = reference.detach().to(rows.dtype)
    selected = None if subject_column is None else over_attending(rows, reference, subject_column)
    kind = "exact" if exact else divergence
    value: Tensor = _Divergence.apply(rows, reference, selected, kind, eps)  # type: ignore[no-untyped-call]
    return value


def over_attending(rows: Tensor, reference: Tensor, subject_column: Tensor) -> Tensor:
    """SADR's mask 1[q_h(s) > max_h' p_h'(s)]: bool, [B, A, ...]; rows and reference as in :func:`row_divergence`."""
    if subject_column.shape != rows.shape[:1]:
        raise CaptureError(f"subject_column must be [B] = [{rows.shape[0]}], not {tuple(subject_column.shape)}.")
    column = subject_column.to(rows.device).view(-1, *(1,) * (rows.dim() - 1)).expand(*rows.shape[:-1], 1)
    highest = reference.gather(-1, column).squeeze(-1).amax(1, keepdim=True)
    return rows.detach().gather(-1, column).squeeze(-1) > highest


def row_kl(
    rows: Tensor,
    reference: Tensor,
    *,
    exact: bool = True,
    eps: float = 1e-8,
    subject_column: Tensor | None = None,
) -> Tensor:
    """KL(reference ‖ rows) of each row, [B, A, ...]; see :func:`row_divergence`."""
    return row_divergence(rows, reference, exact=exact, eps=eps, subject_column=subject_column)
