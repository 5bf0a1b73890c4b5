"""Recording many rows of many forward passes, for analysis: no gradient, buffers allocated once."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kedit.capture.attention_capture import AttentionCapture
from kedit.capture.context import opened
from kedit.capture.install import use_capture_attention
from kedit.capture.modules import decoder_of
from kedit.errors import CaptureError
from kedit.models.offload import device_of


class AttentionRecord(AttentionCapture):
    """Rows of several forward passes.

    Attributes:
        buffers: by block, [steps, B, A, R, keys] in float32: pass number, prompt, head, query, key. What no pass wrote
            is 0.
        num_keys: number of keys of each pass recorded so far.
    """

    def __init__(
        self, model: nn.Module, *, batch: int, queries: int, keys: int, steps: int,
        layers: Collection[int] | None, backend: str, device: torch.device | None
    ) -> None:  # fmt: skip
        super().__init__(model, torch.full((batch, queries), -1), layers, detach=True, backend=backend)
        config = decoder_of(model).config
        heads = int(config.get_text_config(decoder=True).num_attention_heads)  # type: ignore[union-attr, operator]
        shape = (steps, batch, heads, queries, keys)
        self.buffers = {
            layer: torch.zeros(shape, device=device or _device(module)) for layer, module in self.modules.items()
        }
        self.num_keys: list[int] = []
        self._fresh = False
        self._shape = shape

    @property
    def num_steps(self) -> int:
        """Forward passes recorded so far."""
        return len(self.num_keys)

    def begin(self) -> None:
        """A forward pass of the model starts."""
        super().begin()
        if threading.get_ident() == self.thread:
            self._fresh = True

    def _rows_to_read(self, num_queries: int, device: torch.device) -> Tensor:
        """The last queries of the pass; dead rows in front where it has fewer."""
        _, batch, _, queries, _ = self._shape
        last = torch.arange(num_queries - queries, num_queries, device=device).clamp(min=-1)
        return last.expand(batch, -1)

    def _store(self, layer: int, rows: Tensor) -> None:
        steps, batch, heads, queries, keys = self._shape
        if self._fresh:
            if self.num_steps == steps:
                raise CaptureError(f"The record is full: it was made for {steps} forward passes. Ask for more steps.")
            if rows.shape[:3] != (batch, heads, queries) or rows.shape[3] > keys:
                raise CaptureError(
                    f"Rows of shape {tuple(rows.shape)} do not fit the record's {(batch, heads, queries, keys)} "
                    "[batch, heads, queries, keys]. Make it for the batch and the longest text it will see."
                )
            self.num_keys.append(rows.shape[3])
            self._fresh = False
        self.buffers[layer][self.num_steps - 1, ..., : rows.shape[3]] = rows


def _device(attention: nn.Module) -> torch.device:
    """The device on which an attention module computes, be its weights offloaded."""
    parts = ((part, leaf) for part in attention.modules() for leaf, _ in part.named_parameters(recurse=False))
    return device_of(*next(parts))


@contextmanager
def record_attention(
    model: nn.Module,
    *,
    batch: int,
    keys: int,
    queries: int = 1,
    steps: int = 1,
    layers: Collection[int] | None = None,
    backend: str = "auto",
    device: torch.device | None = None,
) -> Iterator[AttentionRecord]:
    """Record the attention rows of the last queries of every forward pass, also those of ``model.generate``.

    Args:
        model: a causal language model of transformers.
        batch: number of prompts in every pass, B.
        keys: most keys that a pass will have.
        queries: how many of the last queries to record, R; a pass with fewer leaves the first rows 0.
        steps: most forward passes.
        layers: blocks to record; a range may reach past the last one. All if not given.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.
        device: where the buffers are; with each block if not given.

    Raises:
        CaptureError: the model's attention cannot be captured, or a pass does not fit the buffers.
    """
    with use_capture_attention(model):
        record = AttentionRecord(
            model, batch=batch, queries=queries, keys=keys, steps=steps, layers=layers, backend=backend, device=device
        )
        with opened(model, record):
            yield record
