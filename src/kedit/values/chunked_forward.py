"""Running one edit whose prompts do not fit into memory together: part after part, the gradient added up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kedit.regularizers.base import Activations
from kedit.values.forward import Runner, Wave


class ChunkedForward(Runner):
    """The prompts of one edit, some at a time.

    The objective is not a sum over prompts (a regularizer may compare them), so the parts first run without gradient; the
    objective and its gradient are computed of all that they gave; then each part runs again and takes its share on to δ: the
    same gradient at the memory of one part, for one more forward pass (as in GradCache, arXiv:2101.06983).

    Args:
        whole: lays all prompts out; it is not run.
        rows: prompts per part.
    """

    def __init__(self, whole: Runner, rows: int) -> None:
        assert whole.wave.num_edits == 1
        self.whole = whole
        self.arch, self.sites, self.wave, self.needs = whole.arch, whole.sites, whole.wave, whole.needs
        self.device, self.width, self.prefix = whole.device, whole.width, whole.prefix
        self.reads, self._layout = whole.reads, whole._layout
        self._captured_names: list[tuple[str, int]] = []
        self._initial_value = self._at = torch.empty(0)
        self._leaves: list[Tensor] = []
        self._paused = False
        cuts = range(0, len(self.wave.prompts), rows)
        self.parts = [self._part(Wave(self.wave.prompts[start : start + rows], self.wave.num_edits)) for start in cuts]

    def _part(self, wave: Wave) -> Runner:
        arguments = (self.arch, self.sites, wave, self.needs)
        return type(self.whole)(*arguments, width=self.width, prefix=self.prefix)  # alike, so that rows line up

    def restrict(self, keep: Sequence[int]) -> list[int]:
        """The one edit stays."""
        assert list(keep) == list(range(self.wave.num_edits))
        return list(range(len(self.wave.prompts)))

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Nothing: each part is installed for its own pass."""
        yield

    def pause_capture(self, paused: bool) -> None:
        """See :meth:`Runner.pause_capture`; the backward pass of a step runs the parts as its forward pass did."""
        self._paused = paused

    @contextmanager
    def _installed(self, part: Runner) -> Iterator[None]:
        with part.installed():
            part.pause_capture(self._paused)
            yield

    def forward(self, delta: Tensor) -> tuple[Tensor, Activations, Tensor]:
        """See :meth:`Runner.forward`."""
        self._at = delta
        with torch.no_grad():
            self._leaves = self._passes(delta)
        logits, *captured = (leaf.requires_grad_() for leaf in self._leaves)
        by_kind: dict[str, Any] = {kind: {} for kind in _KINDS}
        for (kind, layer), tensor in zip(self._captured_names, captured, strict=True):
            by_kind[kind][layer] = tensor
        layout = self._layout
        rows = Activations(
            edit=layout.edit, context=layout.context, subject=layout.column, **self.read_logits(logits), **by_kind
        )
        return logits, rows, self._initial_value

    def _passes(self, delta: Tensor) -> list[Tensor]:
        """One pass of every part: the logits, and what was captured, of all prompts."""
        passes: list[list[Tensor]] = []
        initial: list[Tensor] = []
        for part in self.parts:
            with self._installed(part):
                logits, rows, start = part.forward(delta)
            self._captured_names = [(kind, layer) for kind in _KINDS for layer in getattr(rows, kind)]
            passes.append([logits, *self._captured_of(rows)])
            initial.append(start)
        self._initial_value = torch.cat(initial)  # of the part that holds the bare prompt; the others give none
        return [torch.cat(tensors) for tensors in zip(*passes, strict=True)]

    def backward_chunks(self) -> None:
        """Each part runs again, and takes its share of the gradient on to δ."""
        total = torch.zeros_like(self._at)
        ends = [0] * len(self._leaves)
        for part in self.parts:
            delta = self._at.detach().requires_grad_()
            with self._installed(part):
                logits, rows, _ = part.forward(delta)
                outputs, shares = [], []
                for number, output in enumerate([logits, *self._captured_of(rows)]):
                    begin, ends[number] = ends[number], ends[number] + len(output)
                    upstream = self._leaves[number].grad
                    if upstream is not None and output.requires_grad:  # rows below δ do not depend on it
                        outputs.append(output)
                        shares.append(upstream[begin : ends[number]])
                total += torch.autograd.grad(outputs, [delta], shares)[0]
        self._leaves = []
        self._at.backward(total)

    def _captured_of(self, rows: Activations) -> list[Tensor]:
        return [getattr(rows, kind)[layer] for kind, layer in self._captured_names]


_KINDS = ("attention", "hidden", "keys")
