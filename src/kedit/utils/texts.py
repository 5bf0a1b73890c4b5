"""Reading text files that users give, and saying what a file is where it is something else."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from kedit.errors import KEditError

_BINARY = {
    b"GGUF": "a GGUF model",
    b"PK\x03\x04": "a zip archive (such as .pt, .npz or .xlsx)",
    b"PAR1": "a Parquet file",
    b"\x1f\x8b": "a gzip archive",
    b"%PDF": "a PDF",
}
_DATA_FILES = (
    ".json",
    ".jsonl",
    ".csv",
    ".tsv",
    ".txt",
    ".text",
    ".md",
    ".gz",
    ".zip",
    ".parquet",
    ".xlsx",
    ".gguf",
    ".safetensors",
    ".bin",
    ".pt",
)


def kind_of_file(path: str | Path) -> str | None:
    """Tell what is at a path, links followed: "file", "folder", "device", "pipe", "socket"; ``None`` where nothing is.

    Raises:
        OSError: the operating system cannot say, as for links in a circle.
        ValueError: a null character in the path.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    kinds = {stat.S_IFREG: "file", stat.S_IFDIR: "folder", stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
    return kinds.get(stat.S_IFMT(mode), "device")


def read_text(path: str | Path, accepted: str, error: type[KEditError]) -> str:
    """The text of a UTF-8 file, without a byte-order mark.

    Args:
        path: the file.
        accepted: what would be taken, for the error.
        error: the class of the error.

    Raises:
        KEditError: of the given class: there is no such file, or it is no text; with what it is.
    """
    try:
        kind = kind_of_file(path)
        unfit = kind in ("folder", "device", "socket") and not os.path.samefile(path, os.devnull)
        data = b"" if unfit else Path(path).read_bytes()
    except FileNotFoundError:
        raise error(f"There is no file {str(path)!r}. Check the path, and give {accepted}.") from None
    except (OSError, ValueError) as cause:  # ValueError: a null character
        raise error(f"Cannot read {str(path)!r}: {cause}. Give {accepted}.") from cause
    if unfit:
        raise error(f"{path} is a {kind}. Give {accepted}.")
    form = binary_form(data)
    if form is not None:
        raise error(f"{path} is {form}. Give {accepted}.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        raise error(
            f"{path} is not text in UTF-8 (byte {cause.start} is {data[cause.start]:#04x}). Give {accepted}, saved as UTF-8."
        ) from cause


def binary_form(data: bytes) -> str | None:
    """Name the form of a file by its first bytes; ``None`` where it may be text."""
    for magic, form in _BINARY.items():
        if data.startswith(magic):
            return form
    length = int.from_bytes(data[:8], "little")
    if data[8:9] == b"{" and 2 <= length <= len(data):
        return "a safetensors file"
    return (
        "not text: it holds zero bytes" if b"\0" in data[:1024] and data[:2] not in (b"\xff\xfe", b"\xfe\xff") else None
    )


def text_form(path: str | Path, text: str) -> str:
    """Describe what a text that is no JSON seems to be, and its first line."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    shown = line if len(line) <= 60 else line[:57] + "..."
    suffix = Path(path).suffix.lower()
    if suffix in (".csv", ".tsv") or (not line.startswith(("{", "[")) and line.count(",") + line.count("\t") >= 2):
        return f"a table (CSV) beginning with {shown!r}"
    return f"text beginning with {shown!r}"


def names_a_file(name: str) -> bool:
    """Return whether a text that names nothing on this machine was meant as a file, and not as a data set on the hub."""
    return (
        name.lower().endswith(_DATA_FILES)
        or name.startswith((".", "~"))
        or os.path.isabs(name)
        or name.count("/") > 1
        or "\\" in name
        or not name.strip()
    )
