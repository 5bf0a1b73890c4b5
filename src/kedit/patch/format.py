"""The patch file: what is written, and what is checked before anything of it is used (docs/patch-format.md)."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kedit.errors import NonFiniteError, PatchError
from kedit.patch.content import PatchContent
from kedit.patch.delta import Delta, DenseDelta, LowRankDelta, check_finite
from kedit.utils.files import DTYPES, NAME, parse_json, read_header, to_bytes, write_safetensors

FORMAT = "kedit-patch"
FORMAT_VERSION = 1
_SUFFIXES = {"left", "right", "dense"}
_SIGNED = ("format", "format_version", "kedit_version", "fingerprints", "provenance")
DEEPEST = 200
"""How deep lists and objects may be nested in a provenance; Python's own limit lies near 1000, and depends on the caller."""
_FINGERPRINT = re.compile(r"sha256:[0-9a-f]{64}", re.ASCII)
_PROVENANCE = {
    "editor": str,
    "config": dict,
    "regularizers": list,
    "edits": list,
    "contexts": list,
    "moments": dict,
    "model": dict,
    "before": list,
    "after": list,
    "scores": dict,
    "merged": list,
}


def write_patch(path: str | Path, patch: PatchContent) -> Path:
    """Write a patch file, whole or not at all: factors in float32 (float64 where they are), sorted by name.

    Raises:
        PatchError: the file cannot be written, or :func:`read_patch` would refuse it.
    """
    deltas, fingerprints = patch.deltas, patch.fingerprints
    if not deltas:
        raise PatchError("A patch without updates is not worth a file. Nothing is written.")
    prints = _check_fingerprints(path, {name: fingerprints.get(name) for name in deltas}, deltas)
    for name, delta in deltas.items():
        _check_name(path, name)
        if not all(tensor.numel() for tensor in delta.tensors().values()):
            raise PatchError(f"{path}: the update of {name} has no columns, so it changes nothing. Leave it out.")
        check_finite(name, delta)
    tensors = _stored(deltas)
    metadata = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "kedit_version": version("kedit"),
        "fingerprints": json.dumps(prints, sort_keys=True),
        "provenance": json.dumps(check_provenance(path, plain(patch.provenance, path)), sort_keys=True),
    }
    metadata["checksum"] = checksum(tensors, metadata)
    return write_safetensors(Path(path), tensors, metadata)


def _stored(deltas: Mapping[str, Delta]) -> dict[str, Tensor]:
    """The tensors of a patch file by name: float32, or float64 where they are."""
    return {
        f"{name}.{suffix}": tensor.detach().to("cpu", torch.promote_types(tensor.dtype, torch.float32)).contiguous()
        for name, delta in deltas.items()
        for suffix, tensor in delta.tensors().items()
    }


def identity(patch: PatchContent) -> str:
    """SHA-256 of what a patch does and was made for, in hexadecimal digits; its provenance does not count."""
    prints = {name: patch.fingerprints.get(name, "") for name in patch.deltas}
    digest = checksum(_stored(patch.deltas), {"fingerprints": json.dumps(prints, sort_keys=True)})
    return digest.removeprefix("sha256:")


def read_patch(path: str | Path) -> PatchContent:
    """Read a patch file and check all of it.

    Raises:
        PatchError: the file is missing, truncated, changed, not a kedit patch, of a newer format, or holds NaN.
    """
    header = read_header(path)
    _check_format(path, header.metadata)
    for key, info in header.tensors.items():
        name, _, suffix = key.rpartition(".")
        if suffix not in _SUFFIXES or info.dtype not in DTYPES or len(info.shape) != 2 or 0 in info.shape:
            raise PatchError(
                f"{path} holds {key!r} ({info.dtype} {list(info.shape)}), which is no part of a patch. It is damaged."
            )
        _check_name(path, name)
    tensors = {key: header.read(key) for key in header.tensors}
    if header.metadata.get("checksum") != checksum(tensors, header.metadata):
        raise PatchError(f"{path} has changed since it was written: its checksum is another one. Get it again.")
    provenance = check_provenance(path, plain(_json_object(path, header.metadata, "provenance"), path))
    deltas = _deltas(path, tensors)
    fingerprints = _check_fingerprints(path, _json_object(path, header.metadata, "fingerprints"), deltas)
    return PatchContent(deltas, fingerprints, provenance)


def checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over the texts and tensors of a patch, by name: finds accidents, and is no signature."""
    digest = hashlib.sha256()
    for key in _SIGNED:
        _feed(digest, key.encode(), metadata.get(key, "").encode("utf-8", "surrogatepass"))
    for name in sorted(tensors):
        tensor = tensors[name]
        _feed(digest, f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode("utf-8", "surrogatepass"), to_bytes(tensor))
    return f"sha256:{digest.hexdigest()}"


def _feed(digest: hashlib._Hash, *parts: bytes | memoryview) -> None:
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)


def _check_format(path: str | Path, metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise PatchError(f"{path} is a safetensors file but not a kedit patch. Full models load with kedit.load().")
    number = metadata.get("format_version", "")
    if not re.fullmatch(r"[1-9][0-9]{0,5}", number, re.ASCII):
        raise PatchError(f"{path} states the format version {number[:20]!r}, which is no number. It is damaged.")
    if int(number) > FORMAT_VERSION:
        raise PatchError(f"{path} has format version {number}; this kedit reads up to {FORMAT_VERSION}. Update kedit.")


def _check_name(path: str | Path, name: str) -> None:
    if not NAME.fullmatch(name) or len(name) > 500:
        raise PatchError(f"{path}: {name[:80]!r} cannot be the name of a parameter. The patch is damaged or malicious.")


def _check_fingerprints(path: str | Path, prints: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """The fingerprints, one for each of the weights that a patch changes and of no others."""
    known = all(isinstance(value, str) and _FINGERPRINT.fullmatch(value) for value in prints.values())
    if set(prints) != set(names) or not known:
        raise PatchError(
            f"{path}: the fingerprints (sha256:...) are not those of the weights that the patch changes. It is damaged, or "
            "was not made by kedit; kedit.patch.fingerprints gives those of a model."
        )
    return dict(prints)


def _json_object(path: str | Path, metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    value = parse_json(metadata.get(key, ""), f"the {key} of {path}")
    if not isinstance(value, dict):
        raise PatchError(f"{path}: its {key} are a {type(value).__name__}, not an object. It is damaged.")
    return value


def check_provenance(path: str | Path, provenance: dict[str, Any]) -> dict[str, Any]:
    """Return the provenance, or raise where a field that kedit reads has another type than kedit writes."""
    for key, kind in _PROVENANCE.items():
        if key not in provenance:
            continue
        value = provenance[key]
        items = value if isinstance(value, list) else []
        text_items = key == "contexts"
        if not isinstance(value, kind) or not all(isinstance(item, str if text_items else dict) for item in items):
            raise PatchError(
                f"{path}: its provenance has {key!r} as {_short(value)}, not as kedit writes it. It is damaged."
            )
    return provenance


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."


def _deltas(path: str | Path, tensors: Mapping[str, Tensor]) -> dict[str, Delta]:
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, suffix = key.rpartition(".")
        parts.setdefault(name, {})[suffix] = tensor
    deltas: dict[str, Delta] = {}
    for name, part in parts.items():
        try:
            if set(part) == {"left", "right"}:
                deltas[name] = check_finite(name, LowRankDelta(part["left"], part["right"]))
            elif set(part) == {"dense"}:
                deltas[name] = check_finite(name, DenseDelta(part["dense"]))
            else:
                raise PatchError(f"the update of {name} has the parts {sorted(part)}. It is damaged.")
        except (PatchError, NonFiniteError) as error:
            raise PatchError(f"{path}: {error}") from error
    if not deltas:
        raise PatchError(f"{path} changes no weight. It is damaged.")
    return deltas


def plain(value: Any, what: str | Path, depth: int = 0) -> Any:
    """A value as strict JSON: unknown objects as their text, NaN and infinity as theirs.

    Raises:
        PatchError: lists or objects are nested deeper than :data:`DEEPEST`, so that readers could not follow.
    """
    if depth > DEEPEST:
        raise PatchError(f"{what}: its provenance is nested more than {DEEPEST} deep, which no edit is. It is damaged.")
    if isinstance(value, Mapping):
        return {str(key): plain(item, what, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, what, depth + 1) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else repr(value)
    return value if isinstance(value, str | int | bool | None) else repr(value)
