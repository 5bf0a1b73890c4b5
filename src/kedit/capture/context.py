"""Context managers that read or replace a few attention rows of every block while the model runs as usual."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from kedit.capture.attention_capture import CAPTURES, AttentionCapture
from kedit.capture.install import use_capture_attention
from kedit.capture.substitution import SUBSTITUTIONS, Substitution


@contextmanager
def capture_attention(
    model: nn.Module,
    positions: Tensor,
    *,
    layers: Collection[int] | None = None,
    detach: bool = False,
    backend: str = "auto",
    sdpa: bool = False,
) -> Iterator[AttentionCapture]:
    """Read attention rows of a transformers model while its output stays what it always is.

    ``with capture_attention(model, positions) as cap: model(**inputs)`` leaves in ``cap.rows[layer]`` the attention
    probabilities [B, A, R, Tk] of the chosen queries, differentiable with respect to queries and keys. Repeat the
    forward pass as often as wanted; assign ``cap.positions`` in between to read other rows.

    Args:
        model: a causal language model of transformers.
        positions: query rows to read, integers [B, R]; -1 is a dead row.
        layers: blocks to read; a range may reach past the last one. All if not given.
        detach: read without gradient.
        backend: ``"auto"``, ``"torch"`` or ``"triton"``.
        sdpa: GPT-J, GPT-Neo and CodeGen have only eager attention. If true, the captured blocks use SDPA instead: faster
            and smaller for long prompts, equal up to rounding instead of exactly. No effect on other types.

    Raises:
        CaptureError: the model's attention cannot be captured, or this thread already captures it.
    """
    with use_capture_attention(model):
        capture = AttentionCapture(model, positions, layers, detach, backend, sdpa)
        with opened(model, capture):
            yield capture


@contextmanager
def opened(model: nn.Module, capture: AttentionCapture) -> Iterator[None]:
    """Enter a capture for a model that is switched already."""
    with ExitStack() as stack:
        stack.callback(CAPTURES.leave, capture)
        CAPTURES.enter(capture)
        roots = {id(root): root for root in (model, getattr(model, "base_model", model))}
        for root in roots.values():
            handle = root.register_forward_pre_hook(lambda *_: capture.begin())
            stack.callback(handle.remove)
        yield


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
        SUBSTITUTIONS.enter(substitution)
        try:
            yield
        finally:
            SUBSTITUTIONS.leave(substitution)
