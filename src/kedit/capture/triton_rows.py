"""Launching the Triton kernels: shapes, strides and tile sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kedit.capture import kernel
from kedit.capture.attention_rule import Grads, Memo, Rule

MAX_ROWS = 64  # captured rows of one launch; more are done in turn


def _power(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of one launch: BM rows, BN keys, BD ≥ D, RP rows kept for each head; blocks of BM rows in all."""

    rows_per_head: int
    block_m: int
    block_n: int
    block_d: int
    blocks: int

    def constants(self, groups: int, width: int) -> dict[str, int]:
        """The kernels' constants."""
        return {
            "G": groups,
            "D": width,
            "RP": self.rows_per_head,
            "BM": self.block_m,
            "BN": self.block_n,
            "BD": self.block_d,
        }


def tiles(num_rows: int, groups: int, width: int, num_keys: int, dtype: torch.dtype) -> Tiles:
    """Choose tile sizes from shapes alone; small enough for 96 KiB of shared memory per program."""
    rows_per_head = _power(num_rows)
    block_m = min(max(16, rows_per_head * _power(groups)), max(16, rows_per_head, 32))
    block_d = max(16, _power(width))
    budget = 32 * 256 if dtype == torch.float32 else 64 * 256  # elements of one tile of keys
    block_n = min(128, max(16, budget // block_d), max(16, _power(num_keys)))
    heads = block_m // rows_per_head
    return Tiles(rows_per_head, block_m, block_n, block_d, -(-groups // heads))


def _strides(tensor: Tensor | None, shape: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Strides of a mask over [B, A, Tq, Tk], 0 along axes of size 1."""
    if tensor is None:
        return (0, 0, 0, 0)
    sizes, strides = tensor.shape, tensor.stride()
    return tuple(0 if size == 1 and full != 1 else s for size, full, s in zip(sizes, shape, strides, strict=True))  # type: ignore[return-value]


def _floor(add: Tensor | None) -> float:
    """Additive masks at or below this hide a key."""
    return torch.finfo(torch.float32 if add is None else add.dtype).min / 2


def _launch(function: Any, grid: tuple[int, int], *args: Any, device: torch.device, **constants: Any) -> None:
    if device.type == "cuda":
        with torch.cuda.device(device):
            function[grid](*args, num_warps=4, num_stages=2, **constants)
    else:
        function[grid](*args, **constants)


def forward(q: Tensor, k: Tensor, positions: Tensor, rule: Rule, memo: Memo | None = None) -> Tensor:
    """See :func:`kedit.capture.torch_rows.forward`."""
    batch, heads, num_queries, width = q.shape
    kv_heads, num_keys = k.shape[1], k.shape[2]
    groups = heads // kv_heads
    rows = torch.empty((batch, heads, positions.shape[1], num_keys), dtype=torch.float32, device=q.device)
    allow, add = rule.allow, rule.add
    shape = (batch, heads, num_queries, num_keys)
    sinks = None if rule.sinks is None else rule.sinks.detach().contiguous()
    for start in range(0, positions.shape[1], MAX_ROWS):
        part = slice(start, start + MAX_ROWS)
        at, out = positions[:, part].contiguous(), rows[:, :, part]
        lse = None if rule.lse is None else rule.lse[:, :, part]
        size = tiles(at.shape[1], groups, width, num_keys, q.dtype)
        _launch(
            kernel.rows_fwd_kernel, (batch * kv_heads, size.blocks),
            q, k, at, out, _or(allow, q), _or(add, q), _or(sinks, q), _or(lse, q),
            *q.stride(), *k.stride(), *out.stride()[:3], *_strides(allow, shape), *_strides(add, shape),
            *((0, 0, 0) if lse is None else lse.stride()),
            kv_heads, at.shape[1], num_keys, rule.first(num_queries, num_keys), rule.window,
            rule.scaling, rule.softcap or 0.0, _floor(add),
            device=q.device, **size.constants(groups, width), ALLOW=allow is not None, ADD=add is not None,
            CAUSAL=rule.causal, WINDOW=rule.window > 0, CAPPED=rule.softcap is not None, SINKS=sinks is not None,
            LSE=lse is not None, UPCAST=_upcast(q),
        )  # fmt: skip
    return rows


def backward(grad: Tensor, rows: Tensor, q: Tensor, k: Tensor, positions: Tensor, rule: Rule, grads: Grads) -> None:
    """See :func:`kedit.capture.torch_rows.backward`."""
    dq, dk = grads
    batch, heads, _, width = q.shape
    kv_heads, num_keys = k.shape[1], k.shape[2]
    groups = heads // kv_heads
    precision = "ieee" if q.dtype == torch.float32 else "tf32"
    grad = grad.to(torch.float32)
    if grad.stride(-1) != 1:
        grad = grad.contiguous()
    for start in range(0, positions.shape[1], MAX_ROWS):
        part = slice(start, start + MAX_ROWS)
        at, p, dp = positions[:, part].contiguous(), rows[:, :, part], grad[:, :, part]
        num_rows = at.shape[1]
        size = tiles(num_rows, groups, width, num_keys, q.dtype)
        constants = size.constants(groups, width)
        ds = p if dk is None else torch.empty((batch, heads, num_rows, num_keys), dtype=torch.float32, device=q.device)
        _launch(
            kernel.rows_bwd_dq_kernel, (batch * kv_heads, size.blocks),
            q, k, at, p, dp, ds, _or(dq, q),
            *q.stride(), *k.stride(), *p.stride()[:3], *dp.stride()[:3], *_or(dq, q).stride(),
            kv_heads, num_rows, num_keys, rule.scaling, rule.softcap or 0.0,
            device=q.device, **constants, CAPPED=rule.softcap is not None, WANT_DQ=dq is not None,
            WANT_DS=dk is not None, UPCAST=_upcast(q), PRECISION=precision,
        )  # fmt: skip
        if dk is not None:
            _launch(
                kernel.rows_bwd_dk_kernel, (batch * kv_heads, -(-num_keys // size.block_n)),
                q, at, ds, dk, *q.stride(), *dk.stride(), kv_heads, num_rows, num_keys, size.blocks,
                device=q.device, **constants, UPCAST=_upcast(q), PRECISION=precision,
            )  # fmt: skip


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A stand-in for a tensor that the kernel will not read."""
    return other if tensor is None else tensor


def _upcast(q: Tensor) -> bool:
    """Return whether to multiply in float32: the interpreter computes bfloat16 wrongly, and it alone runs on a CPU."""
    return q.device.type != "cuda"
