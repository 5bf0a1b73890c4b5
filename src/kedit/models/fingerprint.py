"""Fingerprints of weights and models: hashes of their bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kedit.models.offload import stored

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ABOUT = {
    "architectures",
    "dtype",  # that of the parameters counts
    "name_or_path",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def tensor_fingerprint(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes, as ``"sha256:..."``."""
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    _update(digest, tensor)
    return f"sha256:{digest.hexdigest()}"


def has_fingerprint(tensor: Tensor, expected: str | None) -> bool:
    """Return whether a weight is the one that ``expected`` was taken of, be it in another dtype that holds the same numbers.

    A bfloat16 checkpoint and the same checkpoint loaded in float32 are the same weights; a float32 weight rounded to
    bfloat16 is another one.
    """
    if expected is None:
        return False
    if tensor_fingerprint(tensor) == expected:
        return True
    for dtype in _FLOATS:
        if dtype == tensor.dtype:
            continue
        cast = tensor.detach().to(dtype)
        if torch.equal(cast.to(tensor.dtype), tensor.detach()) and tensor_fingerprint(cast) == expected:
            return True
    return False


def model_fingerprint(model: PreTrainedModel, originals: Mapping[str, Tensor] | None = None) -> str:
    """SHA-256 of what a model computes with, as ``"sha256:..."``: its configuration, parameters and stored buffers.

    Of the configuration, everything counts but where the model came from and what it is asked to return. Where the model
    lies does not count; of offloaded weights, what accelerate keeps is read.

    Args:
        model: the model.
        originals: weights that count in place of the model's, by name.
    """
    about = json.dumps(_computing(model.config.to_dict()), sort_keys=True, default=repr)
    return module_fingerprint(model, about, originals)


def module_fingerprint(module: nn.Module, about: str = "", originals: Mapping[str, Tensor] | None = None) -> str:
    """SHA-256 of a text and of all that a module stores, as ``"sha256:..."``; ``originals`` count in place of what is stored."""
    digest = hashlib.sha256(about.encode())
    for name, kept in stored(module):
        tensor = kept if originals is None else originals.get(name, kept)
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        _update(digest, tensor)
    return f"sha256:{digest.hexdigest()}"


def _computing(config: Any) -> Any:
    """The part of a configuration that changes what a model computes."""
    if isinstance(config, Mapping):
        return {str(key): _computing(value) for key, value in config.items() if not _about(str(key))}
    return config


def _about(key: str) -> bool:
    return key.startswith(("_", "output_")) or key in _ABOUT


def bit_sum(tensor: Tensor) -> int:
    """A quick sum over a tensor's bits: differs, but for rare chance, after any change; no replacement for a hash.

    Rows and columns are summed as whole numbers of up to 8 bytes, and each sum counts with a factor of its place: so rows
    or columns in another order show too. Several times as fast as adding the numbers one by one.
    """
    flat = tensor.detach().contiguous()
    if not flat.numel():
        return 0
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()  # words begin where the storage does
    rows = flat.shape[0] if flat.ndim > 1 else 1
    data = flat.view(-1).view(torch.uint8).view(rows, -1)
    size = next(size for size in (8, 4, 2, 1) if data.shape[1] % size == 0)
    words = data.view({8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[size])
    by_row, by_column = (_weighted(words.sum(axis, dtype=torch.int64)) for axis in (1, 0))
    return by_row + 3 * by_column


def _weighted(sums: Tensor) -> int:
    """Σ f(i) sᵢ modulo 2⁶⁴, with odd factors f(i) that look random."""
    place = torch.arange(1, len(sums) + 1, device=sums.device) * -7046029254386353131  # 2⁶⁴ / golden ratio, as signed
    return int((sums * ((place ^ (place >> 29)) | 1)).sum())


def _update(digest: hashlib._Hash, tensor: Tensor, step: int = 1 << 24) -> None:
    """Feed a tensor's bytes in pieces, so that no second copy of a large weight is needed."""
    flat = tensor.detach().contiguous().view(-1)
    for start in range(0, flat.numel(), step):
        digest.update(flat[start : start + step].cpu().view(torch.uint8).numpy().data)
