"""Keys of past edits: the explicit memory of methods that protect earlier edits from later ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kedit.errors import PatchError
from kedit.models import ModelArch
from kedit.patch.ledger import Ledger
from kedit.utils.files import read_header, write_safetensors
from kedit.utils.linalg import is_finite

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kedit.patch import EditPatch

FORMAT = "kedit-key-history"
_SAME = 1e-3  # relative difference of keys that another machine computed


class KeyHistory:
    """The keys that edits wrote, by layer; those of a patch that was reverted no longer count."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._loaded: dict[int, Tensor] = {}
        self._by_patch: WeakKeyDictionary[EditPatch, dict[int, Tensor]] = WeakKeyDictionary()
        self._subjects: WeakKeyDictionary[EditPatch, tuple[str, ...]] = WeakKeyDictionary()

    def add(self, patch: EditPatch, keys: Mapping[int, Tensor], subjects: Sequence[str] = ()) -> None:
        """Remember the keys [E, I] that ``patch`` wrote, by layer, and the ``subjects`` that they belong to."""
        self._by_patch[patch] = dict(keys)
        self._subjects[patch] = tuple(subjects)

    def keys(self, layer: int, width: int) -> Tensor:
        """All remembered keys of a layer, [n, width]; n is 0 at first."""
        parts = self.parts(layer)
        return torch.cat(parts) if parts else torch.empty((0, width))

    def parts(self, layer: int, *, without: Sequence[str] = ()) -> list[Tensor]:
        """The same in order, those of each patch apart [E, I]; the same objects from call to call.

        Those of the subjects ``without`` are left out: a new fact about a subject has the key of the earlier ones, and cannot be
        written where that key must keep its value. (Which subjects loaded keys belong to is not known.)
        """
        ledger, left_out = Ledger.of(self._model), set(without)
        matrices = [self._loaded[layer]] if layer in self._loaded else []
        for patch, keys in self._by_patch.items():
            if layer not in keys or not ledger.carries(patch):
                continue
            subjects = self._subjects[patch]
            if left_out.isdisjoint(subjects):
                matrices.append(keys[layer])
            elif rest := [row for row, subject in enumerate(subjects) if subject not in left_out]:
                matrices.append(keys[layer][rest])
        return matrices

    @property
    def layers(self) -> list[int]:
        """The layers of which keys are remembered."""
        known = {layer for by_layer in self._by_patch.values() for layer in by_layer} | set(self._loaded)
        return sorted(layer for layer in known if self.parts(layer))

    @property
    def count(self) -> int:
        """The number of remembered keys, of the layer with the most."""
        return max((sum(map(len, self.parts(layer))) for layer in self.layers), default=0)

    def begins_with(self, path: str | Path) -> bool:
        """Return whether the keys in a file are the first of those remembered, but for rounding: nothing is lost by writing there.

        Raises:
            PatchError: the file is no key history of this model.
        """
        known = KeyHistory(self._model)
        known.load(path)
        for layer in known.layers:
            old = known.keys(layer, 0)
            new = self.keys(layer, old.shape[1])[: len(old)]
            if len(new) < len(old) or float((new - old).norm()) > _SAME * float(old.norm()):
                return False
        return True

    def clear(self) -> None:
        """Forget everything."""
        self._loaded.clear()
        self._by_patch.clear()

    def save(self, path: str | Path) -> Path:
        """Write the remembered keys to a safetensors file, one tensor [n, I] per layer."""
        tensors = {f"keys.{layer}": self.keys(layer, 0).contiguous() for layer in self.layers}
        return write_safetensors(Path(path), tensors, {"format": FORMAT})

    def load(self, path: str | Path) -> None:
        """Add the keys of a saved history: of a model that comes with earlier edits."""
        header, arch = read_header(path), ModelArch(self._model)
        if header.metadata.get("format") != FORMAT:
            raise PatchError(f"{path} is no key history. Give a file that editor.history.save wrote.")
        loaded = {}
        for name in header.tensors:
            number = name.removeprefix("keys.")
            if not number.isdecimal() or int(number) >= arch.num_layers:
                raise PatchError(f"{path} holds {name!r}, and this model has the layers 0-{arch.num_layers - 1}.")
            keys, width = header.read(name), arch.memory_width(int(number))
            if keys.ndim != 2 or keys.shape[1] != width or not is_finite(keys):
                raise PatchError(f"{path}: the keys of layer {number} are not a finite matrix [n, {width}].")
            loaded[int(number)] = keys
        for layer, keys in loaded.items():
            self._loaded[layer] = torch.cat([self._loaded[layer], keys]) if layer in self._loaded else keys
