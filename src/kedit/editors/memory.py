"""Estimates of the memory that an edit will take, before it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kedit.editors.solve_layers import ClosedForm
from kedit.keys import read, routing
from kedit.models import ModelArch
from kedit.models.hooks import inference_state
from kedit.prompts.encode import Request
from kedit.prompts.tokenize import TokenizedPrompt
from kedit.utils.device_memory import LivePeak
from kedit.values.memory import Footprint

DOUBLE = 8  # bytes of a float64, in which everything is solved


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one apply holds at its peak, and what stays afterwards.

    Not in it: Python and its libraries, workspace inside a BLAS or LAPACK routine, freed memory that the C library's heap
    keeps (on the CPU up to about a third more), the forward passes that estimate second moments where there are none yet.

    Attributes:
        model: parameters and buffers, as far as they lie in memory.
        moments: second moments of the edited layers.
        wave: the optimisation's largest wave.
        solving: the closed forms and the writing, at their peak.
        kept: of ``solving``, what stays for the next edit or for the revert: factors of the moments, original weights.
    """

    model: int
    moments: int
    wave: Footprint
    solving: int
    kept: int

    @property
    def total(self) -> int:
        """The peak."""
        return self.model + self.moments + max(self.wave.total, self.solving)

    def __str__(self) -> str:
        parts = {"model": self.model, "second moments": self.moments, "largest wave": self.wave.total}
        listed = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in (parts | {"solving": self.solving}).items())
        return f"{self.total / 2**20:,.0f} MiB ({listed}; kept afterwards {self.kept / 2**20:,.0f})"


def closed_form_bytes(shape: tuple[int, int], edits: int) -> tuple[int, int]:
    """Bytes that the ridge solution of one weight [O, I] keeps for later edits, and those it holds meanwhile besides."""
    square, keys = DOUBLE * shape[1] ** 2, DOUBLE * edits * shape[1]
    if edits < shape[1]:  # the moment in float64 on the way to its factor; or systems in the number of edits
        return square, max(square, 4 * keys + 3 * DOUBLE * edits**2)
    return 0, 4 * square + 3 * keys


def null_space_bytes(width: int, edits: int, past: int, used: float) -> tuple[int, int]:
    """The same of a null-space update with so many past keys, where a share ``used`` of the directions is not free."""
    square = DOUBLE * width**2
    keys = edits + past if past < width else edits
    system = 3 * square if edits + past >= width else 3 * DOUBLE * keys**2
    kept = int(used * square) + DOUBLE * min(past, width) * width
    return kept, max(square, 4 * DOUBLE * keys * width + system)


def training_footprint(arch: ModelArch, trained: Sequence[nn.Parameter], loss: Callable[[], Tensor]) -> Footprint:
    """One step as it runs, beside what training holds of the weights.

    That is the original twice, the change, its gradient twice and Adam's two averages.
    """
    with inference_state(arch.model, trained), LivePeak(arch.model) as seen:
        torch.autograd.grad(loss(), trained)
    held = 7 * sum(tensor.numel() for tensor in trained) * arch.work_dtype.itemsize
    return Footprint(stored=held, activations=seen.peak, logits=0)


def closed_form_memory(
    editor: ClosedForm, requests: Sequence[Request], layers: Sequence[int], wave: Footprint
) -> MemoryEstimate:
    """Estimate the memory of optimising values and solving for their updates; runs a few tokens to see what one costs.

    Args:
        editor: who applies them.
        requests: the edits, encoded.
        layers: the edited layers, lowest first.
        wave: what the optimisation holds at its peak.
    """
    places = _places(editor.arch, requests, layers)
    kept, solving = _solving(editor, requests, places)
    ranks = [len(requests) * (place.outer + place.inner) for place in places]
    moments = sum(editor.moments[layer].matrix.nbytes for layer in layers if layer in editor.moments)
    return _estimate(editor.arch, places, ranks, wave, moments=moments, kept=kept, solving=solving)


def dense_memory(
    arch: ModelArch, requests: Sequence[Request], layers: Sequence[int], wave: Footprint
) -> MemoryEstimate:
    """Estimate the memory of training the edited weights themselves; arguments as of :func:`closed_form_memory`."""
    places = _places(arch, requests, layers)
    return _estimate(arch, places, [place.outer * place.inner for place in places], wave)


@dataclass(frozen=True)
class _Place:
    """A layer that is written: how many matrices [O, I] of how many, and the bytes of a stored number."""

    layer: int
    touched: int
    count: int
    outer: int
    inner: int
    stored: int


def _places(arch: ModelArch, requests: Sequence[Request], layers: Sequence[int]) -> list[_Place]:
    routed = routing.shares(arch, requests, layers, contexts=True)  # keys are averaged over contexts
    places = []
    for layer in layers:
        weights = arch.weights(layer)
        served = {expert for shares in routed.get(layer, []) for expert in shares}
        outer, inner = weights[0].matrix.shape
        stored = weights[0].stored.element_size()
        places.append(_Place(layer, len(served) or len(weights), len(weights), outer, inner, stored))
    return places


def _estimate(
    arch: ModelArch,
    places: Sequence[_Place],
    factors: Sequence[int],
    wave: Footprint,
    *,
    moments: int = 0,
    kept: int = 0,
    solving: int = 0,
) -> MemoryEstimate:
    """Add what writing holds, for updates of so many numbers per matrix, to what the closed forms hold."""
    work = arch.work_dtype.itemsize
    for place, count in zip(places, factors, strict=True):
        numbers = place.outer * place.inner
        # The patch, the original, and the sum where rounding it to a shorter dtype would lose something.
        lost = work if work > place.stored else 0
        kept += place.touched * (min(count, numbers) * work + numbers * (place.stored + lost))
    sums = sum(place.touched * place.outer * place.inner * work for place in places)
    return MemoryEstimate(_model_bytes(arch.model), moments, wave, max(solving, kept + sums), kept)


def _solving(editor: ClosedForm, requests: Sequence[Request], places: Sequence[_Place]) -> tuple[int, int]:
    """The bytes that the closed forms keep, and those they hold at their peak, these included."""
    together = [requests] if editor.batched else [[request] for request in requests]
    edits, contexts = max(_columns(group) for group in together), len(requests[0].rewrite)
    work = editor.arch.work_dtype.itemsize
    kept = copies = peak = 0
    for place in places:
        factor, solving = editor.solving_bytes((place.outer, place.inner), edits)
        peak = max(peak, kept + copies + _reading(editor, requests, place.layer))
        kept += place.touched * factor
        keys = edits * contexts * place.inner * place.count * work
        peak = max(peak, kept + copies + keys + solving)
        if place is not places[-1]:  # overwritten while the next is solved for: a copy to go back to, and the sum
            lost = work if work > place.stored else 0
            copies += place.touched * place.outer * place.inner * (place.stored + lost)
            peak = max(peak, kept + copies + 3 * place.outer * place.inner * work)
    return kept, peak


def _columns(requests: Sequence[Request]) -> int:
    """How many keys the system of some edits has: their own; where keys are held, those and further ones in the contexts too."""
    held = sum(len(request.held) for request in requests)
    return held + sum(2 * request.num_contexts for request in requests) if held else len(requests)


def _reading(editor: ClosedForm, requests: Sequence[Request], layer: int) -> int:
    """The bytes of the largest pass that reads keys: per token as one short prompt shows."""
    together = requests if editor.batched else [max(requests, key=lambda request: request.rewrite[-1].subject_last)]
    passes = zip(*((request.rewrite, request.held, request.alone) for request in together), strict=True)
    return max(_pass_bytes(editor.arch, [row for rows in each for row in rows], layer) for each in passes if any(each))


def _pass_bytes(arch: ModelArch, rows: Sequence[TokenizedPrompt], layer: int) -> int:
    probe = max(rows, key=lambda row: row.subject_last)
    seen = LivePeak(arch.model)
    with seen:
        read.keys(arch, [probe], layer)
    tokens = min(read.TOKENS_PER_PASS, len(rows) * (probe.subject_last + 1))
    return seen.peak * tokens // (probe.subject_last + 1)


def _model_bytes(model: nn.Module) -> int:
    tensors = {t.untyped_storage()._cdata: t for t in (*model.parameters(), *model.buffers()) if not t.is_meta}
    sizes: list[int] = [tensor.untyped_storage().nbytes() for tensor in tensors.values()]
    return sum(sizes)
