"""An open substitution: other attention rows in the place of the model's own, for a few queries."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch
from einops import rearrange
from torch import Tensor, nn

from kedit.capture.attention_rule import check_positions
from kedit.capture.modules import attention_modules
from kedit.capture.open_contexts import OpenContexts
from kedit.errors import CaptureError


class Substitution:
    """Rows that stand in for the model's own: made by :func:`~kedit.capture.substitute_attention`."""

    def __init__(
        self, model: nn.Module, positions: Tensor, rows: Mapping[int, Tensor], where: Mapping[int, Tensor] | None
    ) -> None:
        modules = attention_modules(model)
        missing = sorted(set(rows) - modules.keys())
        if missing:
            raise CaptureError(
                f"Blocks {missing} have no attention to substitute: this model has it in blocks {sorted(modules)}."
            )
        self.thread = threading.get_ident()
        self.paused = False
        self.modules = {layer: modules[layer] for layer in rows}
        self._rows = {id(self.modules[layer]): new for layer, new in rows.items()}
        self._where = {id(self.modules[layer]): heads for layer, heads in (where or {}).items() if layer in rows}
        self._positions = check_positions(positions)
        for new in rows.values():
            if new.dim() != 4 or (new.shape[0], new.shape[2]) != tuple(positions.shape):
                raise CaptureError(
                    f"rows must be [B, A, R, Tk] with B, R = {tuple(positions.shape)}, the shape of positions; "
                    f"found {tuple(new.shape)}."
                )

    def weights(self, module: nn.Module, own: Tensor) -> Tensor:
        """Attention weights with the rows in place: [B, A, Tq, Tk]; ``own`` stays as it is."""
        rows, prompt, head, query, position = self._places(module, own.shape[0], own.device)
        new = rows[prompt, head, query].to(own.dtype)
        return own.index_put((prompt, head, position), new[:, : own.shape[-1]])

    def output(self, module: nn.Module, out: Tensor, value: Tensor, *, heads_first: bool) -> Tensor:
        """The attention's output with Σ_k row_k v_k in place; ``out`` stays as it is.

        Args:
            module: the attention module.
            out: [B, Tq, A, D], or [B, A, Tq, D] where ``heads_first``.
            value: [B, A / G, Tk, D].
            heads_first: how ``out`` is laid out.
        """
        rows, prompt, head, query, position = self._places(module, out.shape[0], out.device)
        wide = torch.promote_types(out.dtype, torch.float32)
        grouped = rearrange(rows[..., : value.shape[2]].to(wide), "b (k g) r t -> b k (g r) t", k=value.shape[1])
        mixed = rearrange(grouped @ value.to(wide), "b k (g r) d -> b (k g) r d", r=rows.shape[2])
        new = mixed[prompt, head, query].to(out.dtype)
        where = (prompt, head, position) if heads_first else (prompt, position, head)
        return out.index_put(where, new)

    def _places(self, module: nn.Module, batch: int, device: torch.device) -> tuple[Tensor, ...]:
        """The rows [B, A, R, Tk], and for each that is put in place its prompt, head, number and query position."""
        rows = self._rows[id(module)].to(device)
        if rows.shape[0] != batch:
            raise CaptureError(f"Rows for {rows.shape[0]} prompts were given, but the forward pass has {batch}.")
        positions = self._positions.to(device)
        wanted = (positions >= 0)[:, None].expand(rows.shape[:3])
        chosen = self._where.get(id(module))
        if chosen is not None:
            wanted = wanted & chosen.to(device)[:, :, None]
        prompt, head, query = wanted.nonzero(as_tuple=True)
        return rows, prompt, head, query, positions[prompt, query]


SUBSTITUTIONS: OpenContexts[Substitution] = OpenContexts(
    "Rows of this model's attention are already being substituted. Close that first."
)
