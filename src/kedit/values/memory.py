"""Estimates the memory that a wave of edits takes, before it runs.

The size of a token's activations depends on the architecture, so it is not written down here but read off one edit: the
peak of a small step, split into what grows with running tokens, with stored tokens and with read positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import log_softmax

from kedit.models import ModelArch, Site
from kedit.regularizers.base import Needs
from kedit.utils.device_memory import LivePeak
from kedit.values.forward import Runner, Wave, check_gradient

# Copies of the logits alive in the backward pass: as the head gives them, as log-probabilities in float32, and their
# gradients by way of the target and of the KL term, with the sum of the two.
LOGIT_COPIES = 5


@dataclass(frozen=True)
class Footprint:
    """Bytes that a wave holds at its peak, beside the model.

    Attributes:
        stored: hidden states entering the first running block, and keys and values of the tokens before.
        activations: what autograd keeps of the running tokens.
        logits: logits of the read positions, their log-probabilities and gradients.
        copy: parameters of the copy of the model that the passes run on, where that is needed.
    """

    stored: int
    activations: int
    logits: int
    copy: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.stored + self.activations + self.logits + self.copy

    @classmethod
    def in_parts(cls, parts: Sequence[Footprint]) -> Footprint:
        """The bytes of prompts that run one part after the other: when the objective is computed, or while a part runs.

        All logits are there for the objective with their copies, for a part with their gradient alone.
        """
        stored, logits = sum(part.stored for part in parts), sum(part.logits for part in parts)
        kept = 2 * logits // LOGIT_COPIES
        running = max(part.activations + 2 * part.logits // LOGIT_COPIES for part in parts)
        return cls(stored, running, kept) if running + kept > logits else cls(stored, 0, logits)

    def __str__(self) -> str:
        parts = {"stored": self.stored, "activations": self.activations, "logits": self.logits}
        if self.copy:
            parts["copy of the model"] = self.copy
        listed = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in parts.items())
        return f"{self.total / 2**20:,.0f} MiB ({listed})"


@dataclass(frozen=True)
class UnitCosts:
    """Bytes per unit, read off one edit.

    Attributes:
        running: per running token: activations.
        entering: per running token: the stored hidden state.
        prefix: per stored token: keys and values of all running blocks.
        read: per read position: the logits and their copies.
    """

    running: float
    entering: float
    prefix: float
    read: float

    @classmethod
    def measure(cls, arch: ModelArch, sites: Sequence[Site], wave: Wave, needs: Needs, kind: type[Runner]) -> UnitCosts:
        """Run one step of the wave's longest edit, backward pass included, and see what it holds at its peak.

        The longest one, because attention also keeps something per stored token, and the wave is padded to it.
        """
        longest = max(wave.prompts, key=lambda prompt: len(prompt.tokens)).edit
        alone, _ = wave.select([longest])
        runner = kind(arch, sites, alone, needs)
        shape = (1, len(sites), arch.hidden)
        delta = torch.zeros(shape, dtype=arch.work_dtype, device=arch.input_device, requires_grad=True)
        with runner.installed(), LivePeak(arch.model) as seen:
            reading = runner.run(delta)
            check_gradient(reading.logits)
            log_probs = log_softmax(reading.logits.to(arch.work_dtype), -1)
            token, subject = log_probs.gather(1, runner.reads.last[:, None]), log_probs[runner.reads.subject]
            (token.sum() + subject.sum()).backward()
            entering, prefix = runner.stored_bytes
        del log_probs, token, subject
        tokens = len(alone.prompts) * runner.width
        read = LOGIT_COPIES * arch.work_dtype.itemsize * reading.logits.shape[-1]
        return cls(
            running=max(0.0, seen.peak - read * len(reading.logits)) / tokens,
            entering=entering / tokens,
            prefix=prefix / max(1, len(alone.prompts) * runner.prefix),
            read=read,
        )

    def footprint(self, wave: Wave, width: int, prefix: int) -> Footprint:
        """The bytes of ``wave`` when its prompts are padded to ``width`` running tokens and ``prefix`` stored ones."""
        count = len(wave.prompts)
        reads = sum(len(prompt.reads) for prompt in wave.prompts)
        return Footprint(
            stored=round(count * (width * self.entering + prefix * self.prefix)),
            activations=round(count * width * self.running),
            logits=round(reads * self.read),
        )
