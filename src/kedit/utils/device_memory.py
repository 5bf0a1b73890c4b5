"""Memory: how much is free, how much of it tensors take, and giving it back."""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SHARE = 0.6  # of the free memory that may be taken


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


def device_with_room(device: torch.device, size: int) -> torch.device:
    """The device, if ``size`` bytes are a fair share of what is free there; the CPU if not."""
    return device if device.type == "cpu" or size <= SHARE * free_memory(device) else torch.device("cpu")


def offload_if_cpu(device: torch.device | None, tensor: Tensor) -> Tensor:
    """The tensor, brought to main memory if that is where it is wanted: the device may have run out of room."""
    return tensor.cpu() if device is not None and device.type == "cpu" else tensor


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
            trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
        except (OSError, AttributeError, TypeError):
            return None
        return trim
