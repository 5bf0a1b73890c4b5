"""Rows of given queries and keys: the capture without a model."""

from __future__ import annotations

import torch
from torch import Tensor

from kedit.capture.attention_rule import Rule
from kedit.capture.autograd import attention_and_rows, rows_node
from kedit.capture.dispatch import choose, load


def attention_rows(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    *,
    scaling: float,
    allow: Tensor | None = None,
    add: Tensor | None = None,
    causal: bool = False,
    offset: int | None = None,
    window: int = 0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    lse: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention probabilities of a few query rows, differentiable with respect to q and k.

    p = softmax(softcap(scaling · q kᵀ) + add) over the visible keys.

    Args:
        q: queries, [B, A, Tq, D]; float32, float64, float16 or bfloat16, any strides.
        k: keys, [B, A / G, Tk, D].
        positions: query index of each row, integers [B, R]; -1 for a dead row.
        scaling: factor of q·k.
        allow: bool mask, [B|1, A|1, Tq|1, Tk].
        add: additive mask or bias, same axes.
        causal: a query sees only the keys up to its own.
        offset: key at which query 0 stands; by default the queries are the last of the keys.
        window: width of a sliding window; 0 for none.
        softcap: bound of the scores, as in Gemma 2.
        sinks: [A], score of each head's attention sink.
        lse: [B, A, R], log-normalisers of the rows if they are already known.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.

    Returns:
        [B, A, R, Tk] in float32 (float64 for float64); a dead row, or one that sees no key, is 0.

    Raises:
        CaptureError: shapes do not fit, or the backend cannot run.
    """
    rule = Rule(
        scaling=scaling, allow=allow, add=add, causal=causal, offset=offset, window=window, softcap=softcap,
        sinks=sinks, lse=lse,
    )  # fmt: skip
    return rows_node(q, k, positions, rule, load(choose(backend, q.device, q.dtype)))


def sdpa_with_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    positions: Tensor,
    *,
    scaling: float | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``scaled_dot_product_attention`` and a few of its rows, as one node of the autograd graph.

    Args:
        q: queries, [B, A, Tq, D].
        k: keys, [B, A / G, Tk, D].
        v: values, [B, A / G, Tk, Dv].
        mask: bool or additive mask, as SDPA takes it.
        positions: query index of each row, integers [B, R]; -1 for a dead row.
        scaling: factor of q·k; D ** -0.5 if not given.
        causal: SDPA's ``is_causal``: query i sees the keys 0 to i.
        dropout: dropout of the attention; the rows are those before it.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``, for the rows.

    Returns:
        The output [B, A, Tq, Dv], exactly SDPA's, and the rows [B, A, R, Tk].

    Raises:
        CaptureError: shapes do not fit, or the backend cannot run.
    """
    scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
    is_bool = mask is not None and mask.dtype == torch.bool
    rule = Rule(
        scaling=scaling,
        allow=mask if is_bool else None,
        add=None if is_bool else mask,
        causal=causal,
        offset=0,
    )

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, mask, dropout, causal, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )

    return attention_and_rows(q, k, v, attend, positions, rule, load(choose(backend, q.device, q.dtype)))
