"""The eager oracle for the tiny models of many types (:mod:`zoo`), and inputs with padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from zoo import INSIDE as INSIDE
from zoo import OUTSIDE, VOCAB
from zoo import config_of as config_of
from zoo import eager_twin as eager_twin
from zoo import make as make

ZOO = {**INSIDE, **OUTSIDE}
NO_POSITION_IDS = ("opt", "bloom", "mpt", "xglm")


def inputs(pad: str = "none", batch: int = 3, length: int = 12) -> tuple[dict[str, Tensor], Tensor]:
    """Token ids with their mask, and rows to read [B, 4]: the last token, an earlier one, it again, a dead row."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCAB, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if pad == "right":
        mask[0, -4:], mask[1, -2:] = 0, 0
    if pad == "left":
        mask[0, :4], mask[1, :2] = 0, 0
    last = (mask * torch.arange(length)).amax(1)
    positions = torch.stack([last, last - 3, last - 3, torch.full_like(last, -1)], 1)
    return {"input_ids": ids, "attention_mask": mask}, positions


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The list of decoder blocks."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) >= 3]
    return next(m for m in lists if any("Attention" in type(x).__name__ for x in m[0].modules()))


@contextmanager
def injected(model: nn.Module, layer: int, delta: Tensor, token: int) -> Iterator[None]:
    """Add δ [H] at one token of a block's output."""

    def hook(_module: nn.Module, _args: object, output: object) -> object:
        hidden = output[0] if isinstance(output, tuple) else output
        at = torch.zeros(hidden.shape[1], 1, dtype=hidden.dtype)
        at[token] = 1
        hidden = hidden + at * delta
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = blocks_of(model)[layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def eager_rows(twin: PreTrainedModel, given: dict[str, Tensor], positions: Tensor) -> dict[int, Tensor]:
    """Rows sliced from the full attention of the oracle; dead rows 0."""
    full = twin(**given, output_attentions=True).attentions
    batch = torch.arange(len(positions))[:, None]
    live = (positions >= 0)[:, :, None, None]
    return {
        layer: (attention[batch, :, positions.clamp(min=0)] * live).transpose(1, 2)
        for layer, attention in enumerate(full)
    }


Run = Callable[[], dict[int, Tensor]]
