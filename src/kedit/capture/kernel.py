"""The Triton kernels of the attention rows.

One program handles one prompt and one key head. Its rows are the G query heads of that key head times the R captured
queries, each head padded to RP rows, in blocks of BM: so the keys are read once per key head. Queries are gathered by
position; all arithmetic is float32. Notation: s = softcap(scaling · q kᵀ) + add, p = softmax(s).

The kernels use no atomics: results do not depend on the order in which programs run.
"""

# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _rows_of_block(block, kv, pos_ptr, batch, R, G: tl.constexpr, RP: tl.constexpr, BM: tl.constexpr):
    """Of each of the BM rows: head in the group and in all, captured row, position (-1: dead), query, and whether it is one."""
    m = block * BM + tl.arange(0, BM)
    g = m // RP
    r = m % RP
    inside = (g < G) & (r < R)
    pos = tl.load(pos_ptr + batch * R + r, mask=inside, other=-1)
    live = inside & (pos >= 0)
    return g, kv * G + g, r, pos, tl.where(live, pos, 0).to(tl.int64), inside, live


@triton.jit
def _tanh(x):
    """Tanh to float32 rounding, also near 0, without a device library."""
    x2 = x * x
    series = x * (1 + x2 * (-1 / 3 + x2 * (2 / 15 + x2 * (-17 / 315 + x2 * (62 / 2835)))))
    e = tl.exp(-2 * tl.abs(x))
    far = (1 - e) / (1 + e)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -far, far))


@triton.jit
def _capped(q, k_ptrs, k_mask, scaling, cap, CAPPED: tl.constexpr, UPCAST: tl.constexpr):
    """One tile of scores before the masks, and the keys."""
    k = tl.load(k_ptrs, mask=k_mask, other=0.0)
    if UPCAST:
        k = k.to(tl.float32)
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scaling
    if CAPPED:
        s = cap * _tanh(s / cap)
    return s, k


@triton.jit
def _hide(s, n, TK, at, live, window, allow_ptrs, san, add_ptrs, sdn, floor,
          ALLOW: tl.constexpr, ADD: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):  # fmt: skip
    """Add the additive mask and put -inf at hidden keys."""
    seen = live[:, None] & (n < TK)[None, :]
    if CAUSAL:
        seen = seen & (n[None, :] <= at[:, None])
    if WINDOW:
        seen = seen & (n[None, :] > at[:, None] - window)
    if ADD:
        add = tl.load(add_ptrs[:, None] + n[None, :] * sdn, mask=seen, other=0.0).to(tl.float32)
        seen = seen & (add > floor)
        s += add
    if ALLOW:
        seen = seen & (tl.load(allow_ptrs[:, None] + n[None, :] * san, mask=seen, other=0) != 0)
    return tl.where(seen, s, float("-inf"))


@triton.jit
def rows_fwd_kernel(
    q_ptr, k_ptr, pos_ptr, p_ptr, allow_ptr, add_ptr, sink_ptr, lse_ptr,
    sqb, sqh, sqt, sqd, skb, skh, skt, skd, spb, sph, spr, sab, sah, sat, san, sdb, sdh, sdt, sdn, slb, slh, slr,
    KH, R, TK, first, window, scaling, cap, floor,
    G: tl.constexpr, D: tl.constexpr, RP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    ALLOW: tl.constexpr, ADD: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
    SINKS: tl.constexpr, LSE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """P[b, h, r, :] = softmax(s) in two sweeps over the keys (one where the log-normaliser is given)."""
    batch = (tl.program_id(0) // KH).to(tl.int64)
    kv = (tl.program_id(0) % KH).to(tl.int64)
    g, head, r, pos, query, inside, live = _rows_of_block(tl.program_id(1), kv, pos_ptr, batch, R, G, RP, BM)
    at = query + first
    d = tl.arange(0, BD)
    q_ptrs = q_ptr + batch * sqb + head[:, None] * sqh + query[:, None] * sqt + d[None, :] * sqd
    q = tl.load(q_ptrs, mask=live[:, None] & (d < D)[None, :], other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    k_base = k_ptr + batch * skb + kv * skh + d[None, :] * skd
    allow_ptrs = allow_ptr + batch * sab + head * sah + query * sat
    add_ptrs = add_ptr + batch * sdb + head * sdh + query * sdt

    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    if LSE:
        top = tl.load(lse_ptr + batch * slb + head * slh + r * slr, mask=live, other=0.0).to(tl.float32)
        total += 1.0
    else:
        for start in range(0, TK, BN):
            n = start + tl.arange(0, BN)
            k_mask = (n < TK)[:, None] & (d < D)[None, :]
            s, _ = _capped(q, k_base + n[:, None].to(tl.int64) * skt, k_mask, scaling, cap, CAPPED, UPCAST)
            s = _hide(s, n, TK, at, live, window, allow_ptrs, san, add_ptrs, sdn, floor, ALLOW, ADD, CAUSAL, WINDOW)
            higher = tl.maximum(top, tl.max(s, 1))
            safe = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp(top - safe) + tl.sum(tl.exp(s - safe[:, None]), 1)
            top = higher
        if SINKS:
            sink = tl.load(sink_ptr + head, mask=inside, other=0.0).to(tl.float32)
            higher = tl.maximum(top, sink)
            total = total * tl.exp(top - higher) + tl.exp(sink - higher)
            top = higher
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.where(total == 0.0, 1.0, total)

    p_rows = p_ptr + batch * spb + head * sph + r * spr
    for start in range(0, TK, BN):
        n = start + tl.arange(0, BN)
        k_mask = (n < TK)[:, None] & (d < D)[None, :]
        s, _ = _capped(q, k_base + n[:, None].to(tl.int64) * skt, k_mask, scaling, cap, CAPPED, UPCAST)
        s = _hide(s, n, TK, at, live, window, allow_ptrs, san, add_ptrs, sdn, floor, ALLOW, ADD, CAUSAL, WINDOW)
        p = tl.exp(s - top[:, None]) / total[:, None]
        tl.store(p_rows[:, None] + n[None, :], p, mask=inside[:, None] & (n < TK)[None, :])


@triton.jit
def rows_bwd_dq_kernel(
    q_ptr, k_ptr, pos_ptr, p_ptr, dp_ptr, ds_ptr, dq_ptr,
    sqb, sqh, sqt, sqd, skb, skh, skt, skd, spb, sph, spr, sgb, sgh, sgr, sdqb, sdqh, sdqt, sdqd,
    KH, R, TK, scaling, cap,
    G: tl.constexpr, D: tl.constexpr, RP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    CAPPED: tl.constexpr, WANT_DQ: tl.constexpr, WANT_DS: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Ds = p (dp - Σ p dp) · softcap′ · scaling, kept for dk; dq[pos] += ds k, rows with one position together."""
    batch = (tl.program_id(0) // KH).to(tl.int64)
    kv = (tl.program_id(0) % KH).to(tl.int64)
    g, head, r, pos, query, inside, live = _rows_of_block(tl.program_id(1), kv, pos_ptr, batch, R, G, RP, BM)
    d = tl.arange(0, BD)
    d_in = (d < D)[None, :]
    p_rows = p_ptr + batch * spb + head * sph + r * spr
    g_rows = dp_ptr + batch * sgb + head * sgh + r * sgr
    s_rows = ds_ptr + ((batch * KH * G + head) * R + r) * TK

    weighted = tl.zeros([BM], tl.float32)
    for start in range(0, TK, BN):
        n = start + tl.arange(0, BN)
        tile = live[:, None] & (n < TK)[None, :]
        p = tl.load(p_rows[:, None] + n[None, :], mask=tile, other=0.0)
        dp = tl.load(g_rows[:, None] + n[None, :], mask=tile, other=0.0)
        weighted += tl.sum(tl.where(p == 0.0, 0.0, p * dp), 1)

    k_base = k_ptr + batch * skb + kv * skh + d[None, :] * skd
    if CAPPED:
        q_ptrs = q_ptr + batch * sqb + head[:, None] * sqh + query[:, None] * sqt + d[None, :] * sqd
        q = tl.load(q_ptrs, mask=live[:, None] & d_in, other=0.0)
        if UPCAST:
            q = q.to(tl.float32)
    dq = tl.zeros([BM, BD], tl.float32)
    for start in range(0, TK, BN):
        n = start + tl.arange(0, BN)
        tile = live[:, None] & (n < TK)[None, :]
        p = tl.load(p_rows[:, None] + n[None, :], mask=tile, other=0.0)
        dp = tl.load(g_rows[:, None] + n[None, :], mask=tile, other=0.0)
        ds = tl.where(p == 0.0, 0.0, p * (dp - weighted[:, None])) * scaling
        k_ptrs = k_base + n[:, None].to(tl.int64) * skt
        k_mask = (n < TK)[:, None] & d_in
        if CAPPED:
            s, k = _capped(q, k_ptrs, k_mask, scaling, cap, CAPPED, UPCAST)
            ds = ds * (1 - (s / cap) * (s / cap))
        else:
            k = tl.load(k_ptrs, mask=k_mask, other=0.0)
        if WANT_DS:
            tl.store(s_rows[:, None] + n[None, :], ds, mask=inside[:, None] & (n < TK)[None, :])
        if WANT_DQ:
            dq += tl.dot(ds, k.to(tl.float32), input_precision=PRECISION)

    if WANT_DQ:
        m = tl.arange(0, BM)
        same = (pos[:, None] == pos[None, :]) & (g[:, None] == g[None, :]) & live[:, None] & live[None, :]
        earlier = tl.sum(tl.where(same & (m[None, :] < m[:, None]), 1, 0), 1)
        dq = tl.dot(tl.where(same, 1.0, 0.0), dq, input_precision="ieee")
        writes = (live & (earlier == 0))[:, None] & d_in
        out = dq_ptr + batch * sdqb + head[:, None] * sdqh + query[:, None] * sdqt + d[None, :] * sdqd
        before = tl.load(out, mask=writes, other=0.0)
        if UPCAST:
            before = before.to(tl.float32)
        tl.store(out, (before + dq).to(dq_ptr.dtype.element_ty), mask=writes)


@triton.jit
def rows_bwd_dk_kernel(
    q_ptr, pos_ptr, ds_ptr, dk_ptr,
    sqb, sqh, sqt, sqd, sdkb, sdkh, sdkt, sdkd,
    KH, R, TK, blocks,
    G: tl.constexpr, D: tl.constexpr, RP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Dk += dsᵀ q over all rows of the key head, for one block of keys."""
    batch = (tl.program_id(0) // KH).to(tl.int64)
    kv = (tl.program_id(0) % KH).to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    d = tl.arange(0, BD)
    d_in = (d < D)[None, :]
    dk = tl.zeros([BN, BD], tl.float32)
    for block in range(0, blocks):
        g, head, r, pos, query, inside, live = _rows_of_block(block, kv, pos_ptr, batch, R, G, RP, BM)
        q_ptrs = q_ptr + batch * sqb + head[:, None] * sqh + query[:, None] * sqt + d[None, :] * sqd
        q = tl.load(q_ptrs, mask=live[:, None] & d_in, other=0.0).to(tl.float32)
        s_rows = ds_ptr + ((batch * KH * G + head) * R + r) * TK
        ds = tl.load(s_rows[:, None] + n[None, :], mask=live[:, None] & (n < TK)[None, :], other=0.0)
        dk += tl.dot(tl.trans(ds), q, input_precision=PRECISION)
    writes = (n < TK)[:, None] & d_in
    out = dk_ptr + batch * sdkb + kv * sdkh + n[:, None].to(tl.int64) * sdkt + d[None, :] * sdkd
    before = tl.load(out, mask=writes, other=0.0)
    if UPCAST:
        before = before.to(tl.float32)
    tl.store(out, (before + dk).to(dk_ptr.dtype.element_ty), mask=writes)
