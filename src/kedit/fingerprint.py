"""What a weight is: a hash of its bytes."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def tensor_fingerprint(tensor: Tensor) -> str:
    """SHA-256 of a tensor's dtype, shape and bytes, as ``"sha256:..."``."""
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    _update(digest, tensor)
    return f"sha256:{digest.hexdigest()}"


def model_fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 of all parameters of a model, in the order of their names, as ``"sha256:..."``."""
    digest = hashlib.sha256(str(model.config.model_type).encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{parameter.dtype}{tuple(parameter.shape)}".encode())
        _update(digest, parameter)
    return f"sha256:{digest.hexdigest()}"


def _update(digest: hashlib._Hash, tensor: Tensor, step: int = 1 << 24) -> None:
    """Feed a tensor's bytes in pieces, so that no second copy of a large weight is needed."""
    flat = tensor.detach().contiguous().view(-1)
    for start in range(0, flat.numel(), step):
        digest.update(flat[start : start + step].cpu().view(torch.uint8).numpy().data)
