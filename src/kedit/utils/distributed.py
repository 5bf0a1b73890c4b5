"""Several processes that share one job, as ``accelerate launch -m kedit ...`` starts them.

Nothing here happens by itself: a process belongs to a :class:`Group` from :func:`join` on, which the command line calls. Then
the corpus of the second moments, the edits whose values are optimised together and the cases of an evaluation are
shared out, and every process ends up with the whole result. The processes are accelerate's. They talk through gloo on the
CPU, whatever device the model is on: so a process that dies is noticed by the others at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from kedit.errors import KEditError, ProcessError
from kedit.utils.progress import Progress

T = TypeVar("T")

PATIENCE = timedelta(days=1)  # a process may be busy; one that died closes its connections, which is seen at once


@dataclass(frozen=True)
class Group:
    """The processes of one job, seen from one of them.

    Attributes:
        rank: number of this process, from 0.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process prints and writes files."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """Every ``size``-th item, from ``rank`` on: this process's part of a job."""
        return list(items[self.rank :: self.size])

    def gather(self, mine: T) -> list[T]:
        """Gather the values of all processes, by rank; tensors in it must be on the CPU.

        Raises:
            ProcessError: another process is gone.
        """
        everyone: list[T] = self._talk("gather_object", [mine])
        return everyone

    def run_on_all(self, call: Callable[[], T]) -> list[T]:
        """Run ``call`` in every process and gather the results, by rank; an error in one of them is raised in all.

        Raises:
            KEditError: the call failed somewhere; or as :meth:`gather`.
        """
        mine: tuple[T | None, KEditError | None]
        try:
            mine = call(), None
        except KEditError as error:
            mine = None, error
        outcomes = self.gather(mine)
        for _, failure in outcomes:
            if failure is not None:
                raise failure
        return [result for result, _ in outcomes]  # type: ignore[misc]

    def broadcast(self, mine: T) -> T:
        """The value of process 0, in every process; raises as :meth:`gather`."""
        box: list[T] = self._talk("broadcast_object_list", [mine])
        return box[0]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of every process's tensor, on its device; raises as :meth:`gather`."""
        if self.size == 1:
            return tensor
        total: Tensor = self._talk("reduce", tensor.detach().cpu(), "sum")
        return total.to(tensor.device)

    def wait(self) -> None:
        """Return when every process is here; raises as :meth:`gather`."""
        self.gather(None)

    def _talk(self, function: str, value: Any, *options: Any) -> Any:
        """Call one of accelerate's functions between processes; alone, give ``value``."""
        if self.size == 1:
            return value
        import accelerate.utils

        try:
            return getattr(accelerate.utils, function)(value, *options)
        except RuntimeError as error:
            raise ProcessError(
                f"Another of the {self.size} processes of this job is gone: {str(error).splitlines()[0]}. "
                "Nothing was half written; look at its own message, and start the job again."
            ) from error


_ALONE = Group()
_group = _ALONE


def current_group() -> Group:
    """The group this process belongs to; on its own unless :func:`join` was called."""
    return _group


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process works on its own: its part of a job is not shared out again."""
    global _group
    held, _group = _group, _ALONE
    try:
        yield
    finally:
        _group = held


def launched() -> int:
    """Return how many processes a launcher (``accelerate launch``, ``torchrun``) has started; 1 without one."""
    count = os.environ.get("WORLD_SIZE", "1")
    return int(count) if count.isdigit() else 1


def join() -> Group:
    """Become one of the processes that a launcher has started; on its own where none did.

    Raises:
        ProcessError: the others cannot be reached.
    """
    global _group
    if _group.size == 1 and launched() > 1:
        from accelerate import PartialState

        try:
            state = PartialState(cpu=True, backend="gloo", timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:
            raise ProcessError(
                f"The {launched()} processes of this job cannot reach one another: {error}. "
                "Start them with `accelerate launch -m kedit ...`."
            ) from error
        _group = Group(state.process_index, state.num_processes)
        Progress.shown = _group.leads
    return _group


def leave() -> None:
    """End what :func:`join` began."""
    global _group
    if _group.size > 1:
        from accelerate import PartialState

        _group = _ALONE
        Progress.shown = True
        PartialState().destroy_process_group()
        PartialState._reset_state()


def device() -> str | None:
    """The GPU of this process among those of its machine; ``None`` without one."""
    if not torch.cuda.is_available():
        return None
    return f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
