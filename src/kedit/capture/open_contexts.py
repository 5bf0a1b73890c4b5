"""Which models are switched and which captures are open: the process-wide books of the capture.

Attention functions are called by transformers with nothing but the attention module, possibly from an autograd thread
that recomputes a checkpointed block. So the books are kept by module, not in context variables.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import torch
from torch import nn

from kedit.errors import CaptureError

if TYPE_CHECKING:
    from kedit.capture.context import AttentionCapture
    from kedit.capture.substitute import Substitution

LOCK = threading.RLock()
_OPEN: dict[int, list[AttentionCapture]] = {}
_SUBSTITUTED: dict[int, list[Substitution]] = {}


def open_capture(capture: AttentionCapture) -> None:
    """Enter a capture for its attention modules.

    Raises:
        CaptureError: this thread already captures the model.
    """
    with LOCK:
        for module in capture.modules.values():
            if any(other.thread == capture.thread for other in _OPEN.get(id(module), ())):
                raise CaptureError(
                    "This model's attention is already being captured by an enclosing context. "
                    "Close it first, or change its positions."
                )
        for module in capture.modules.values():
            _OPEN.setdefault(id(module), []).append(capture)


def close_capture(capture: AttentionCapture) -> None:
    """Strike a capture from the books; harmless where it was never entered."""
    with LOCK:
        for module in capture.modules.values():
            still = [other for other in _OPEN.get(id(module), ()) if other is not capture]
            if still:
                _OPEN[id(module)] = still
            else:
                _OPEN.pop(id(module), None)


def capture_of(module: nn.Module) -> AttentionCapture | None:
    """The capture that the running forward pass of ``module`` belongs to, if any."""
    captures = _OPEN.get(id(module))
    if not captures:
        return None
    here = threading.get_ident()
    for capture in captures:
        if capture.thread == here:
            return capture
    if not recomputing():
        return None
    if len(captures) > 1:
        raise CaptureError(
            "Two threads capture one model while a checkpointed block is recomputed on a third; "
            "it cannot be told whose it is. Give each thread its own model."
        )
    return captures[0]


def open_substitution(substitution: Substitution) -> None:
    """Enter a substitution for its attention modules.

    Raises:
        CaptureError: this thread already substitutes rows of one of them.
    """
    with LOCK:
        for module in substitution.modules.values():
            if any(other.thread == substitution.thread for other in _SUBSTITUTED.get(id(module), ())):
                raise CaptureError("Rows of this model's attention are already being substituted. Close that first.")
        for module in substitution.modules.values():
            _SUBSTITUTED.setdefault(id(module), []).append(substitution)


def close_substitution(substitution: Substitution) -> None:
    """Strike a substitution from the books."""
    with LOCK:
        for module in substitution.modules.values():
            still = [other for other in _SUBSTITUTED.get(id(module), ()) if other is not substitution]
            if still:
                _SUBSTITUTED[id(module)] = still
            else:
                _SUBSTITUTED.pop(id(module), None)


def substitution_of(module: nn.Module) -> Substitution | None:
    """The substitution that this thread has open for ``module``, if any."""
    here = threading.get_ident()
    return next((found for found in _SUBSTITUTED.get(id(module), ()) if found.thread == here), None)


def recomputing() -> bool:
    """Whether a backward pass runs in this thread: a forward seen now only recomputes a checkpointed block."""
    task: int = torch._C._current_graph_task_id()
    return task != -1
