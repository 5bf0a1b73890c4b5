"""An open capture: which attention rows are read, and the rows of the last forward pass."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn

from kedit.capture.attention_rule import Memo, Rule, check_positions
from kedit.capture.autograd import Attend, attention_and_rows, rows_node
from kedit.capture.dispatch import RowsBackend, choose, load, report
from kedit.capture.modules import attention_modules
from kedit.capture.open_contexts import OpenContexts, recomputing
from kedit.errors import CaptureError


class AttentionCapture:
    """An open capture: what is wanted, and the rows of the last forward pass.

    Attributes:
        rows: by block, [B, A, R, Tk] in float32 (float64 for a float64 model), pre-dropout. Every forward pass starts
            a new dictionary, so one that was kept stays as it is.
        layers: the blocks that are captured, ascending.
        detach: whether the rows carry no gradient.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.
        sdpa: whether GPT-J and its kind compute captured blocks with SDPA.
        paused: while true, forward passes run as without a capture, and leave no rows.
        columns: column of one key per prompt, int64 [B], or ``None``; assign to it as to ``positions``.
        keys: by block, [B, A / G, D]: the keys in those columns as the attention sees them, with gradient unless
            ``detach``; empty without ``columns``.
    """

    def __init__(
        self,
        model: nn.Module,
        positions: Tensor,
        layers: Collection[int] | None,
        detach: bool,
        backend: str,
        sdpa: bool = False,
    ) -> None:
        self.modules = _choose(attention_modules(model), layers)
        self.layers = tuple(self.modules)
        self.detach = detach
        self.backend = backend
        self.sdpa = sdpa
        self.paused = False
        self.rows: dict[int, Tensor] = {}
        self.keys: dict[int, Tensor] = {}
        self.columns: Tensor | None = None
        self.thread = threading.get_ident()
        self._number = {id(module): layer for layer, module in self.modules.items()}
        self._grad: bool | None = None
        self._read: Tensor | None = None
        self._memo: Memo = {}
        self._backends: dict[tuple[torch.device, torch.dtype], RowsBackend] = {}
        self.positions = positions

    @property
    def positions(self) -> Tensor:
        """Captured query rows, int64 [B, R]: indices among the queries of a forward pass; -1 is a dead row (zeros).

        Assign to it between forward passes; nothing is installed anew.
        """
        return self._positions

    @positions.setter
    def positions(self, positions: Tensor) -> None:
        self._positions = check_positions(positions)
        self._memo = {}
        self._highest = int(positions.max()) if positions.numel() else -1

    def begin(self) -> None:
        """A forward pass of the model starts."""
        if threading.get_ident() == self.thread and not recomputing():
            self.rows = {}
            self.keys = {}
            self._memo = {}
            self._read = self._positions
            self._grad = torch.is_grad_enabled()

    def record(self, module: nn.Module, q: Tensor, k: Tensor, rule: Rule) -> None:
        """Compute and keep the rows of one attention layer, whose own attention runs apart."""
        backend = self._backend(q)
        self._keep_key(module, k)

        def compute(positions: Tensor) -> Tensor:
            return rows_node(q, k, positions, rule, backend, self._memo)

        self.keep(module, compute, q.shape[2], q.device)

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, rule: Rule, attend: Attend) -> Tensor:
        """Run one layer's attention and keep its rows, in one node of the graph where the rows carry gradient."""
        if self.detach:
            out = attend(q, k, v)
            self.record(module, q, k, rule)
            return out
        outs: list[Tensor] = []
        backend = self._backend(q)
        self._keep_key(module, k)

        def compute(positions: Tensor) -> Tensor:
            out, rows = attention_and_rows(q, k, v, attend, positions, rule, backend, self._memo)
            outs.append(out)
            return rows

        self.keep(module, compute, q.shape[2], q.device)
        return outs[0]

    def keep(
        self, module: nn.Module, compute: Callable[[Tensor], Tensor], num_queries: int, device: torch.device
    ) -> None:
        """Keep what ``compute(positions)`` returns as the rows of one attention layer."""
        if self._highest >= num_queries:
            raise CaptureError(
                f"Row {self._highest} was asked for, but the forward pass has {num_queries} queries. "
                "Positions count from the first query of the pass, not from the first key."
            )
        if self._grad and not self.detach and not torch.is_grad_enabled():
            raise CaptureError(
                "The rows would carry no gradient: a block runs without one, as reentrant gradient checkpointing does. "
                "Turn checkpointing on with use_reentrant=False, or pass detach=True."
            )
        if recomputing() and self._positions is not self._read:
            raise CaptureError(
                "positions was changed between a forward pass and its backward pass, which recomputes checkpointed blocks. "
                "Change it after the backward pass."
            )
        key = ("positions", num_queries, device)
        if key not in self._memo:
            self._memo[key] = self._rows_to_read(num_queries, device)
        positions = self._memo[key]
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach):
            rows = compute(positions)
        if not recomputing():
            self._store(self._number[id(module)], rows)

    def _keep_key(self, module: nn.Module, k: Tensor) -> None:
        """Keep one key per prompt, if wanted."""
        if self.columns is not None and not recomputing():
            key = k[torch.arange(k.shape[0], device=k.device), :, self.columns.to(k.device)]
            self.keys[self._number[id(module)]] = key.detach() if self.detach else key

    def _rows_to_read(self, num_queries: int, device: torch.device) -> Tensor:
        """Positions [B, R] for a pass with so many queries."""
        return self._positions.to(device)

    def _store(self, layer: int, rows: Tensor) -> None:
        self.rows[layer] = rows

    def _backend(self, q: Tensor) -> RowsBackend:
        key = (q.device, q.dtype)
        if key not in self._backends:
            name = choose(self.backend, *key)
            report(self.backend, name, *key)
            self._backends[key] = load(name)
        return self._backends[key]


def _choose(modules: dict[int, nn.Module], layers: Collection[int] | None) -> dict[int, nn.Module]:
    if layers is None:
        return modules
    if not isinstance(layers, range):
        missing = sorted(set(layers) - modules.keys())
        if missing:
            raise CaptureError(
                f"Blocks {missing} have no attention to capture: this model has it in blocks {sorted(modules)}."
            )
    return {layer: module for layer, module in modules.items() if layer in layers}


CAPTURES: OpenContexts[AttentionCapture] = OpenContexts(
    "This model's attention is already being captured by an enclosing context. Close it first, or change its positions."
)
