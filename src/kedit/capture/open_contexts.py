"""The captures and substitutions that are open, by attention module.

Attention functions are called by transformers with nothing but the attention module, possibly from an autograd thread
that recomputes a checkpointed block. So contexts are kept by module, not in context variables.
"""

from __future__ import annotations

import threading
from typing import Generic, Protocol, TypeVar

import torch
from torch import nn

from kedit.errors import CaptureError

LOCK = threading.RLock()


class OpenContext(Protocol):
    """A capture or a substitution: its attention modules by block, the thread that opened it, whether it has no effect now."""

    modules: dict[int, nn.Module]
    thread: int
    paused: bool


Context = TypeVar("Context", bound=OpenContext)


class OpenContexts(Generic[Context]):
    """The open contexts of one type; one per thread and attention module."""

    def __init__(self, refusal: str) -> None:
        self._open: dict[int, list[Context]] = {}
        self._refusal = refusal

    def enter(self, context: Context) -> None:
        """Register a context for its attention modules.

        Raises:
            CaptureError: this thread has one open for one of them.
        """
        with LOCK:
            if any(self.of(module) is not None for module in context.modules.values()):
                raise CaptureError(self._refusal)
            for module in context.modules.values():
                self._open.setdefault(id(module), []).append(context)

    def leave(self, context: Context) -> None:
        """Remove a context; harmless where it was never entered."""
        with LOCK:
            for module in context.modules.values():
                rest = [other for other in self._open.pop(id(module), ()) if other is not context]
                if rest:
                    self._open[id(module)] = rest

    def of(self, module: nn.Module) -> Context | None:
        """The context that this thread has open for ``module``, if any."""
        here = threading.get_ident()
        return next((context for context in self._open.get(id(module), ()) if context.thread == here), None)

    def running(self, module: nn.Module) -> Context | None:
        """The context that the running forward pass of ``module`` belongs to, unless it is paused.

        A recomputed pass runs on another thread.

        Raises:
            CaptureError: a block is recomputed, and several threads have a context open.
        """
        own = self.of(module)
        contexts = self._open.get(id(module), ())
        if own is not None or not contexts or not recomputing():
            return None if own is None or own.paused else own
        if len(contexts) > 1:
            raise CaptureError(
                "Two threads capture one model while a checkpointed block is recomputed on a third, which may belong to "
                "either. Give each thread its own model."
            )
        return None if contexts[0].paused else contexts[0]


def recomputing() -> bool:
    """Return whether a backward pass runs in this thread: a forward seen now only recomputes a checkpointed block."""
    task: int = torch._C._current_graph_task_id()
    return task != -1
