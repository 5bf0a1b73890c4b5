"""``substitute_attention``: put other attention rows in the place of the model's own, for a few queries."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from kedit.capture import open_contexts
from kedit.capture.install import attention_modules, use_capture_attention
from kedit.errors import CaptureError


class Substitution:
    """Rows that stand in for the model's own: what :func:`substitute_attention` opens."""

    def __init__(
        self, model: nn.Module, positions: Tensor, rows: Mapping[int, Tensor], where: Mapping[int, Tensor] | None
    ) -> None:
        modules = attention_modules(model)
        missing = sorted(set(rows) - modules.keys())
        if missing:
            raise CaptureError(
                f"Blocks {missing} have no attention to substitute: this model has it in blocks {sorted(modules)}."
            )
        if positions.dim() != 2 or positions.is_floating_point() or positions.dtype == torch.bool:
            raise CaptureError(
                f"positions must be integers [B, R]; found {positions.dtype} of shape {tuple(positions.shape)}."
            )
        self.thread = threading.get_ident()
        self.modules = {layer: modules[layer] for layer in rows}
        self._rows = {id(self.modules[layer]): found for layer, found in rows.items()}
        self._where = {id(self.modules[layer]): found for layer, found in (where or {}).items() if layer in rows}
        self._positions = positions.to(torch.int64)
        for found in rows.values():
            self._check(found, positions)

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
        spread = value.repeat_interleave(rows.shape[1] // value.shape[1], 1).to(wide)
        new = (rows[..., : value.shape[2]].to(wide) @ spread)[prompt, head, query].to(out.dtype)
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

    @staticmethod
    def _check(rows: Tensor, positions: Tensor) -> None:
        if rows.dim() != 4 or (rows.shape[0], rows.shape[2]) != tuple(positions.shape):
            raise CaptureError(
                f"rows must be [B, A, R, Tk] with B, R = {tuple(positions.shape)}, the shape of positions; "
                f"found {tuple(rows.shape)}."
            )


@contextmanager
def substitute_attention(
    model: nn.Module,
    positions: Tensor,
    rows: Mapping[int, Tensor],
    *,
    where: Mapping[int, Tensor] | None = None,
) -> Iterator[None]:
    """Run a model with some of its attention rows replaced, without gradient.

    The rest of the attention runs as ever. With the model's own rows the output is its own, up to rounding. A capture that is
    open at the same time records the model's own rows, not the new ones.

    Args:
        model: a causal language model of transformers.
        positions: queries whose rows are replaced, int64 [B, R]; -1 is left alone.
        rows: by block, the new attention weights [B, A, R, Tk], as :func:`capture_attention` gives them.
        where: by block, which prompts and heads are changed, bool [B, A]; all of a block that is not named.

    Raises:
        CaptureError: the model's attention cannot be reached, shapes do not fit, or a substitution is open already.
    """
    with use_capture_attention(model):
        substitution = Substitution(model, positions, rows, where)
        open_contexts.open_substitution(substitution)
        try:
            yield
        finally:
            open_contexts.close_substitution(substitution)
