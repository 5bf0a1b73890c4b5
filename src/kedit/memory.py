"""What a wave of edits holds in memory, said before it runs.

The size of a token's activations depends on the architecture, so it is not written down here but read off one edit: the
peak of a small step, split into what grows with running tokens, with stored tokens and with read positions.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kedit.arch import ModelArch, Site
from kedit.regularizers.base import Needs
from kedit.runner import Runner, Wave

# Copies of the logits alive in the backward pass: as the head gives them, as log-probabilities in float32, and their
# gradients by way of the target and of the KL term, with the sum of the two.
LOGIT_COPIES = 5
SHARE = 0.6  # of the free memory that waves may take


@dataclass(frozen=True)
class Footprint:
    """Bytes that a wave holds at its peak, beside the model.

    Attributes:
        stored: hidden states entering the first running block, and keys and values of the tokens before.
        activations: what autograd keeps of the running tokens.
        logits: logits of the read positions, their log-probabilities and gradients.
    """

    stored: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.stored + self.activations + self.logits

    def __str__(self) -> str:
        parts = {"stored": self.stored, "activations": self.activations, "logits": self.logits}
        listed = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in parts.items())
        return f"{self.total / 2**20:,.0f} MiB ({listed})"


class LivePeak(TorchDispatchMode):
    """Counts the bytes of the storages that live at once, at most, of all that torch operations make inside.

    A model's own weights and buffers do not count, nor what is ``there`` already.
    """

    def __init__(self, model: nn.Module, there: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.peak: int = 0
        self._known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers(), *there)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and see what it made."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or size == 0:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


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
        """What ``wave`` holds when its prompts are padded to ``width`` running tokens and ``prefix`` stored ones."""
        count = len(wave.prompts)
        reads = sum(len(prompt.reads) for prompt in wave.prompts)
        return Footprint(
            stored=round(count * (width * self.entering + prefix * self.prefix)),
            activations=round(count * width * self.running),
            logits=round(reads * self.read),
        )


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device, what torch holds in reserve included; on the CPU, what the system says is available."""
    if device.type == "cuda":
        reserve = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + reserve
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 1 << 62  # not told: no limit of ours


TRIM_ABOVE = 1 << 26  # bytes of a wave's footprint; below, a trim would take longer than it is worth
TRIM_EVERY = 16  # applies; a trim costs as much as a small apply, mostly in pages that are touched anew


class HeapTrim:
    """Gives freed memory back to the system now and then.

    The small tensors that outlive an edit lie scattered in the heap between the large ones that do not, so glibc's heap keeps
    growing over a long sequence of edits although hardly anything is in use (by 0.5 GiB in 300 edits of a small model).
    Does nothing where the C library has no ``malloc_trim``.
    """

    _count = 0

    @classmethod
    def after_apply(cls) -> None:
        """Call once per apply."""
        cls._count += 1
        if cls._count % TRIM_EVERY == 0:
            cls.now()

    @classmethod
    def now(cls) -> None:
        """Give back what is free."""
        if (trim := cls._function()) is not None:
            trim(0)

    @staticmethod
    @functools.cache
    def _function() -> Callable[[int], int] | None:
        try:
            found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
        except (OSError, AttributeError, TypeError):
            return None
        return found
