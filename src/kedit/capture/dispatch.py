"""Choose the implementation that computes the rows: once, logged, never changed silently."""

from __future__ import annotations

import importlib.util
import logging
import os
from typing import Protocol, cast

import torch
from torch import Tensor

from kedit.capture import torch_rows
from kedit.capture.attention_rule import Grads, Memo, Rule
from kedit.errors import CaptureError

LOGGER = logging.getLogger("kedit.capture")
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class RowsBackend(Protocol):
    """An implementation of the rows; see :mod:`kedit.capture.torch_rows` for what the functions do."""

    def forward(self, q: Tensor, k: Tensor, positions: Tensor, rule: Rule, memo: Memo | None = None) -> Tensor:
        """The rows, without autograd."""
        ...

    def backward(
        self, grad: Tensor, rows: Tensor, q: Tensor, k: Tensor, positions: Tensor, rule: Rule, grads: Grads
    ) -> None:
        """Add the rows' gradient to ``grads`` in place."""
        ...


def choose(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Decide between ``"torch"`` and ``"triton"`` for tensors of one device and dtype.

    Args:
        backend: ``"auto"`` takes the kernel on a CUDA device with Triton, for float32, float16 and bfloat16.
        device: where the queries are.
        dtype: dtype of the queries.

    Raises:
        CaptureError: the name is unknown, or the kernel was asked for and cannot run.
    """
    if backend == "torch":
        return backend
    if backend not in ("auto", "triton"):
        raise CaptureError(f'There is no backend {backend!r}. Choose "auto", "torch" or "triton".')
    obstacle = _obstacle(device, dtype, interpreted=backend == "triton")
    if obstacle is None:
        return "triton"
    if backend == "triton":
        raise CaptureError(f'The Triton kernel cannot run: {obstacle}. Use backend="auto" or "torch".')
    return "torch"


def _obstacle(device: torch.device, dtype: torch.dtype, interpreted: bool) -> str | None:
    """Return why the kernel cannot run, or ``None``."""
    if dtype not in KERNEL_DTYPES:
        return f"it computes in float32, and the queries are {dtype}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if interpreted and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda":
        return f"the queries are on {device.type}, not on a CUDA device, and TRITON_INTERPRET is not 1"
    return None


def load(name: str) -> RowsBackend:
    """The implementation called ``"torch"`` or ``"triton"``; Triton is imported only here."""
    if name == "torch":
        return torch_rows
    from kedit.capture import triton_rows

    return cast(RowsBackend, triton_rows)


def report(asked: str, name: str, device: torch.device, dtype: torch.dtype) -> None:
    """Log a choice."""
    LOGGER.info("attention rows: %s backend (asked for %r) for %s on %s", name, asked, dtype, device)
