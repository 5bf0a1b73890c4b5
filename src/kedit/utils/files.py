"""Reading and writing safetensors files: a strict reader of headers, and writes that are whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from kedit.errors import PatchError
from kedit.utils.texts import kind_of_file

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SIZES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
}
_SIZES |= {"I32": 4, "U32": 4, "F32": 4, "C64": 8, "F64": 8, "I64": 8, "U64": 8}
_MAX_HEADER = 100_000_000  # that of the safetensors format
_MAX_INT = 1 << 62

NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*(\[(0|[1-9][0-9]{0,5})\])?", re.ASCII)
"""What a parameter may be called: dotted words, with an index at the end for one matrix of a fused tensor."""


def numbered(name: str) -> tuple[str, int | None]:
    """The name of a fused tensor and the number of one matrix of it; ``None`` for a tensor that is meant as a whole."""
    fused, _, number = name.removesuffix("]").rpartition("[")
    return (fused, int(number)) if fused and name.endswith("]") else (name, None)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a safetensors file: what it is and where its bytes are."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """A safetensors file's table of contents, checked against the file's size."""

    path: Path
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]

    def info(self, name: str) -> TensorInfo:
        """Describe a tensor and its place; with ``[n]`` at the end of its name, the n-th part of it along its first axis."""
        if name in self.tensors:
            return self.tensors[name]
        whole_name, number = numbered(name)
        whole = self.tensors[whole_name]
        assert number is not None
        assert number < whole.shape[0]
        size = (whole.stop - whole.start) // whole.shape[0]
        start = whole.start + number * size
        return TensorInfo(name, whole.dtype, whole.shape[1:], start, start + size)

    def read(self, name: str) -> Tensor:
        """One floating-point tensor of the file (or a part of one, as for ``info``), without mapping the file into memory.

        Raises:
            PatchError: the tensor is not floating point, or the file ended early.
        """
        info = self.info(name)
        if info.dtype not in DTYPES:
            raise PatchError(
                f"{name} in {self.path} is stored as {info.dtype}; kedit edits {', '.join(DTYPES)}. "
                "A quantized checkpoint cannot be edited; attach the patch to the loaded model instead."
            )
        data = bytearray(info.stop - info.start)
        with reading(self.path), open(self.path, "rb") as file:
            file.seek(info.start)
            num_bytes = file.readinto(data)
        if num_bytes != len(data):
            raise PatchError(f"{self.path} ends inside {name}: it changed while it was read. Is it complete?")
        if not data:
            return torch.empty(info.shape, dtype=DTYPES[info.dtype])
        return torch.frombuffer(data, dtype=DTYPES[info.dtype]).view(info.shape)


@contextlib.contextmanager
def reading(path: str | Path) -> Any:
    """Turn what the operating system says while reading ``path`` into a :class:`PatchError`."""
    try:
        yield
    except PatchError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise PatchError(f"Cannot read {str(path)!r}: {error}. Check the path.") from error


def read_header(path: str | Path) -> Header:
    """Read and check the head of a safetensors file.

    Raises:
        PatchError: the file is missing, empty, truncated, longer than it says, or malformed.
    """
    where = Path(path)
    with reading(path):
        if where.is_dir():
            raise PatchError(f"{str(path)!r} is a folder, not a safetensors file. Name the file in it.")
        if not where.is_file():
            raise PatchError(f"There is no file {str(path)!r}. Check the path.")
        size = where.stat().st_size
        with open(where, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(_MAX_HEADER, size - 8):
                raise _damaged(path, f"its {size} bytes cannot hold the header that it announces")
            raw = file.read(length)
    table = parse_json(raw, f"the header of {path}")
    if not isinstance(table, dict):
        raise _damaged(path, "its header is not an object")
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "its metadata are not texts")
    tensors = {name: _info(path, name, entry, 8 + length) for name, entry in table.items()}
    end = 8 + length
    for info in sorted(tensors.values(), key=lambda item: (item.start, item.stop)):
        if info.start != end:
            raise _damaged(path, f"the bytes of {info.name!r} do not follow those before")
        end = info.stop
    if end != size:
        raise _damaged(path, f"it has {size} bytes and announces {end}")
    return Header(where, tensors, metadata)


def parse_json(raw: bytes | str, what: str) -> Any:
    """Strict JSON: UTF-8, no NaN, no number too large for a float, no key twice.

    Raises:
        PatchError: it is not, with ``what`` it is.
    """
    try:
        return json.loads(raw, object_pairs_hook=unique_keys, parse_constant=_no_constant, parse_float=_number)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and too long numbers are ValueErrors
        raise PatchError(f"Found no valid JSON in {what}: {error}. It is damaged.") from error


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of some pairs, for ``object_pairs_hook``; of a key that stands twice, one value would be lost."""
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError("a key stands twice")
    return record


def _number(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:20]} is too large for a number")
    return number


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _info(path: str | Path, name: str, entry: Any, base: int) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"the entry of {name!r} needs dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _SIZES:
        raise _damaged(path, f"the dtype {dtype!r} of {name!r} is unknown")
    if not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(path, f"the shape or the place of {name!r} is impossible")
    if math.prod(shape) * _SIZES[dtype] != offsets[1] - offsets[0]:
        raise _damaged(path, f"{name!r} of shape {shape} does not fill its {offsets[1] - offsets[0]} bytes")
    return TensorInfo(name, dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < _MAX_INT for item in value)


def _damaged(path: str | Path, why: str) -> PatchError:
    return PatchError(f"{path} is not a readable safetensors file: {why}. Is it complete?")


def to_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes, without a copy where it lies contiguous in memory already."""
    flat = tensor.detach().contiguous().cpu().view(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def write_whole(target: Path, write: Callable[[IO[bytes]], None]) -> Path:
    """Write a file beside its place, make it durable, and move it there: whole or not at all.

    A symbolic link stays: the file that it leads to is written.

    Raises:
        PatchError: something that is no regular file is there, or the operating system refused; an existing file is as it was.
    """
    partial: Path | None = None
    try:
        kind = kind_of_file(target)
        if kind not in (None, "file"):
            raise PatchError(f"Cannot write {str(target)!r}: it is a {kind}, not a regular file. Name another file.")
        place = Path(os.path.realpath(target))  # Path.resolve() breaks on links in a circle
        place.parent.mkdir(parents=True, exist_ok=True)
        number, name = tempfile.mkstemp(prefix=f".{place.name[:200]}.", suffix=".partial", dir=place.parent)
        partial = Path(name)
        with os.fdopen(number, "wb") as file:
            write(file)
            file.flush()
            open_to_others(partial)
            os.fsync(file.fileno())
        partial.replace(place)
        sync_folder(place.parent)
    except PatchError:
        raise
    except (OSError, ValueError) as error:
        raise PatchError(f"Cannot write {str(target)!r}: {error}. Check the folder and the free space.") from error
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)
    return target


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the file system can."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(number)


def open_to_others(path: Path) -> None:
    """Give a file or folder that only its maker may read the permissions that a new one has."""
    now = os.umask(0)
    os.umask(now)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~now)


def write_text(target: Path, text: str) -> Path:
    """Write a text file in UTF-8, whole or not at all; see :func:`write_whole`."""
    data = text.encode("utf-8", "backslashreplace")  # half of a surrogate pair has no UTF-8

    def write(file: IO[bytes]) -> None:
        file.write(data)

    return write_whole(target, write)


def write_safetensors(target: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Write floating-point tensors as one safetensors file, sorted by name: the same content gives the same bytes."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    table: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # wide ones first: aligned
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        table[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    head = json.dumps(table, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)

    def write(file: IO[bytes]) -> None:
        file.write(len(head).to_bytes(8, "little") + head)
        for name in order:
            file.write(to_bytes(tensors[name]))

    if len(head) > _MAX_HEADER:
        raise PatchError(f"The description of the patch has {len(head)} bytes; safetensors holds {_MAX_HEADER}.")
    return write_whole(target, write)
