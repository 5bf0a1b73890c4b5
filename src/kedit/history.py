"""Keys of past edits: the explicit memory of methods that protect earlier edits from later ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kedit.errors import PatchError
from kedit.ledger import Ledger

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kedit.patch import EditPatch


class KeyHistory:
    """The keys that edits wrote, by layer; those of a patch that was reverted no longer count."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._loaded: dict[int, Tensor] = {}
        self._by_patch: WeakKeyDictionary[EditPatch, dict[int, Tensor]] = WeakKeyDictionary()

    def add(self, patch: EditPatch, keys: Mapping[int, Tensor]) -> None:
        """Remember the keys [E, I] that ``patch`` wrote, by layer."""
        self._by_patch[patch] = dict(keys)

    def keys(self, layer: int, width: int) -> Tensor:
        """All remembered keys of a layer, [n, width]; n is 0 at first."""
        ledger = Ledger.of(self._model)
        parts = [found[layer] for patch, found in self._by_patch.items() if layer in found and ledger.carries(patch)]
        if layer in self._loaded:
            parts.insert(0, self._loaded[layer])
        return torch.cat(parts) if parts else torch.empty((0, width))

    def clear(self) -> None:
        """Forget everything."""
        self._loaded.clear()
        self._by_patch.clear()

    def save(self, path: str | Path) -> Path:
        """Write the remembered keys to a safetensors file, one tensor [n, I] per layer."""
        layers = {layer for found in self._by_patch.values() for layer in found} | set(self._loaded)
        tensors = {f"keys.{layer}": self.keys(layer, 0).contiguous() for layer in sorted(layers)}
        try:
            save_file(tensors, path, metadata={"format": "kedit-key-history"})
        except (OSError, SafetensorError) as error:
            raise PatchError(f"Cannot write the key history to {path}: {error}.") from error
        return Path(path)

    def load(self, path: str | Path) -> None:
        """Add the keys of a saved history: of a model that comes with earlier edits."""
        try:
            tensors = load_file(path)
            found = {int(name.removeprefix("keys.")): tensor for name, tensor in tensors.items()}
        except (OSError, SafetensorError, ValueError) as error:
            raise PatchError(f"{path} is no key history: {error}.") from error
        for layer, keys in found.items():
            if keys.ndim != 2 or not torch.isfinite(keys).all():
                raise PatchError(f"{path}: the keys of layer {layer} are not a finite matrix [n, I].")
            self._loaded[layer] = torch.cat([self._loaded[layer], keys]) if layer in self._loaded else keys
