"""New folders: made beside their place under a name of their own, held by one process, moved there when complete."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kedit.errors import PatchError
from kedit.utils.files import open_to_others, sync_folder


def check_new(out: Path) -> None:
    """Raise unless ``out`` can be the name of a new folder: nothing is there, or an empty folder.

    Raises:
        PatchError: it is taken, or the operating system knows no such name.
    """
    try:
        os.lstat(out)
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as error:  # ValueError: a null character
        raise PatchError(f"{str(out)!r} cannot be the name of a new folder: {error}. Name another one.") from error
    if out.is_symlink() or not out.is_dir() or any(out.iterdir()):
        raise PatchError(f"{out} exists already. Name a new folder, or remove it first.")


def is_within(path: Path, folder: Path) -> bool:
    """Return whether ``path`` is ``folder`` or lies in it, links followed as far as they lead."""
    try:
        one, other = (Path(os.path.realpath(item)) for item in (path, folder))  # resolve() breaks on links in a circle
    except (OSError, ValueError):  # no such name can be
        return False
    return one == other or other in one.parents


def replace_folder(new: Path, out: Path, stale: Callable[[str], bool] = lambda name: False) -> None:
    """Move a complete folder to its place: as a whole where nothing is, else file by file.

    Args:
        new: the complete folder, on the same file system.
        out: its place: missing, an empty folder, or one whose files of the same names are replaced and others stay.
        stale: names of files of ``out`` that are removed first, as they would not go with the new ones.
    """
    if not out.exists() or not any(out.iterdir()):
        os.replace(new, out)
    else:
        for path in sorted(out.iterdir()):
            if path.is_file() and stale(path.name):
                path.unlink()
        for path in sorted(new.iterdir()):
            if path.is_dir() and (out / path.name).is_dir():
                shutil.rmtree(out / path.name)
            os.replace(path, out / path.name)
        sync_folder(out)
    sync_folder(out.parent)


@contextmanager
def partial_folder(out: Path) -> Iterator[Path]:
    """A folder beside ``out``, removed unless it was moved there; what killed runs left behind is removed first."""
    out.parent.mkdir(parents=True, exist_ok=True)
    for old in out.parent.glob(f".{_glob_safe(out.name)}.*.partial"):
        if _abandoned(old):
            shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    lock = lock_folder(folder)
    try:
        open_to_others(folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            unlock(lock)


def _glob_safe(name: str) -> str:
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)


def lock_folder(folder: Path) -> int | None:
    """Hold a folder for this process; the system lets go when the process ends, however it ends. None: it is held."""
    number = os.open(folder, os.O_RDONLY)
    try:
        import fcntl

        fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        os.close(number)
        return None
    return number


def _abandoned(folder: Path) -> bool:
    if folder.is_symlink() or not folder.is_dir():
        return False
    lock = lock_folder(folder)
    if lock is not None:
        unlock(lock)
    return lock is not None


def unlock(lock: int) -> None:
    """Let go of what :func:`lock_folder` holds."""
    os.close(lock)
