"""Running the regularizers' own prompts apart from the edits', where that saves padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor

from kedit.models.hooks import inference_state
from kedit.prompts.encode import Role
from kedit.utils.packing import fixed_cost
from kedit.values.forward import Reading, Runner, Wave


class SplitForward(Runner):
    """Two passes per step: the edits' prompts, then the regularizers' own.

    A prompt runs from its subject's last token on, so ``"The job of {} is"`` takes two tokens and a long question with its
    target ten times as many; side by side, all would be padded to the longest.

    Args:
        whole: lays all prompts out; it is not run.
    """

    def __init__(self, whole: Runner) -> None:
        self.whole = whole
        self.arch, self.sites, self.wave, self.needs = whole.arch, whole.sites, whole.wave, whole.needs
        self.device, self.width, self.prefix = whole.device, whole.width, whole.prefix
        own, extra = _by_role(self.wave)
        self.own = type(whole)(self.arch, self.sites, own, self.needs)
        self.extra = type(whole)(self.arch, self.sites, extra, self.needs)
        self.reads = self.own.reads
        self._paused = False

    @classmethod
    def pays(cls, whole: Runner) -> bool:
        """Whether the padding saved is worth one more forward pass."""
        parts = [part.prompts for part in _by_role(whole.wave)]
        if not all(parts):
            return False
        longest = [max(whole.length(prompt) for prompt in part) for part in parts]
        saved = sum((max(longest) - length) * len(part) for length, part in zip(longest, parts, strict=True))
        return saved > fixed_cost(whole.device.type)

    @property
    def stored_bytes(self) -> tuple[int, int]:
        """See :attr:`Runner.stored_bytes`."""
        parts = [self.own.stored_bytes, self.extra.stored_bytes]
        return parts[0][0] + parts[1][0], parts[0][1] + parts[1][1]

    def restrict(self, keep: Sequence[int]) -> list[int]:
        """See :meth:`Runner.restrict`."""
        self.wave, stays = self.wave.select(keep)
        self.own.restrict(keep)
        self.extra.restrict(keep)
        self.reads = self.own.reads
        return stays

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Weights without gradient; each part is installed for its own pass."""
        with inference_state(self.arch.model):
            yield

    def pause_capture(self, paused: bool) -> None:
        """See :meth:`Runner.pause_capture`."""
        self._paused = paused

    def run(self, delta: Tensor) -> Reading:
        """See :meth:`Runner.run`."""
        reading, further = (self._run(part, delta) for part in (self.own, self.extra))
        return replace(reading, extra=further.extra)

    def _run(self, part: Runner, delta: Tensor) -> Reading:
        with part.installed():
            part.pause_capture(self._paused)
            return part.run(delta)


def _by_role(wave: Wave) -> tuple[Wave, Wave]:
    """The prompts of the edits, and those of the regularizers."""
    own = tuple(prompt for prompt in wave.prompts if prompt.role is not Role.EXTRA)
    extra = tuple(prompt for prompt in wave.prompts if prompt.role is Role.EXTRA)
    return Wave(own, wave.num_edits), Wave(extra, wave.num_edits)
