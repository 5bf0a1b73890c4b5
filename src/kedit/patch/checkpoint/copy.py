"""Large files copied in the background: durable as they arrive, and without filling the page cache."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import IO

from kedit.errors import PatchError

_STEP = 1 << 24  # bytes between two looks at whether to go on
_AT_ONCE = 2  # while one file waits for the disk to take it, the next is read


class Copies:
    """Files on their way into a folder, the first named first; leaving the ``with`` ends what still runs.

    Args:
        old: the folder they come from; a link there (as the hub's cache has) is followed.
        new: the folder they go to.
        copied: names of the files to copy.
        linked: names of the files to hard-link, or to copy where the file systems do not allow it.
    """

    def __init__(self, old: Path, new: Path, copied: Iterable[str], linked: Iterable[str] = ()) -> None:
        self._stop = threading.Event()
        self._pool = ThreadPoolExecutor(_AT_ONCE, "kedit-copy")
        self._futures: dict[str, Future[None]] = {}
        for names, link in ((copied, False), (linked, True)):
            for name in names:
                self._futures[name] = self._pool.submit(self._take, (old / name).resolve(), new / name, link=link)

    def wait(self, name: str) -> None:
        """Return when a file is complete and on the disk, or raise what came in between."""
        self._futures[name].result()

    def __enter__(self) -> Copies:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _take(self, old: Path, new: Path, *, link: bool) -> None:
        if link:
            with contextlib.suppress(OSError):  # another file system, or one without links
                os.link(old, new)
                return
        with open(old, "rb", buffering=0) as source, open(new, "xb", buffering=0) as target:
            size, done = os.fstat(source.fileno()).st_size, 0
            while done < size and not self._stop.is_set():
                count = _copy_some(source, target, done, min(_STEP, size - done))
                if not count:
                    raise PatchError(f"{old} ends early: it changed while it was read. Is it complete?")
                _forget(source, done, count)
                done += count
            os.fsync(target.fileno())
            _forget(target, 0, size)


def _copy_some(source: IO[bytes], target: IO[bytes], start: int, most: int) -> int:
    """Copy up to ``most`` bytes from ``start`` to the same place; return how many. 0: the source ends there."""
    if hasattr(os, "copy_file_range"):
        # Shares the blocks where the file system can. Where it cannot, or says 0, reading decides.
        with contextlib.suppress(OSError):
            count = os.copy_file_range(source.fileno(), target.fileno(), most, start, start)
            if count:
                return count
    source.seek(start)
    target.seek(start)
    data = memoryview(source.read(most))
    left = data
    while left:
        left = left[target.write(left) :]
    return len(data)


def _forget(file: IO[bytes], start: int, count: int) -> None:
    """Take a part of a file out of the page cache: it is not needed again, and fresh pages cost more than the copy."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(file.fileno(), start, count, os.POSIX_FADV_DONTNEED)
