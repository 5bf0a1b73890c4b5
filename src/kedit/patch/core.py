"""Edits as artefacts: a set of weight updates with where they came from, in one small safetensors file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kedit.arch import ModelArch
from kedit.delta import Delta, DenseDelta, LowRankDelta, check_finite
from kedit.errors import NonFiniteError, PatchError, PatchMismatchError
from kedit.fingerprint import tensor_fingerprint
from kedit.ledger import Ledger

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = "kedit-patch"
FORMAT_VERSION = 1
_SUFFIXES = {"left", "right", "dense"}


@dataclass(eq=False)
class EditPatch:
    """Updates of some weights of one model.

    Attributes:
        deltas: by parameter name; ΔW in the orientation y = W x, whatever the stored layout.
        fingerprints: by parameter name, the hash of the stored weight that the update was made for.
        provenance: editor, its configuration, regularizers, edits, base model: plain JSON values.
    """

    deltas: dict[str, Delta]
    fingerprints: dict[str, str]
    provenance: dict[str, Any] = field(default_factory=dict)

    def apply(self, model: PreTrainedModel, *, force: bool = False) -> None:
        """Add the updates to the model's weights, all of them or none.

        Args:
            model: the model that the patch was made for.
            force: do not compare the weights with those that the patch was made for.

        Raises:
            PatchMismatchError: the model carries this patch already, or its weights are other ones.
        """
        ledger = Ledger.of(model)
        if ledger.carries(self):
            raise PatchMismatchError("The model carries this patch already. Revert it before applying it again.")
        if not force:
            self.check_base(model)
        ledger.apply(self, self.deltas)

    def revert(self, model: PreTrainedModel) -> None:
        """Take the updates away again; without other patches the weights are their originals bit for bit.

        Raises:
            PatchMismatchError: this patch object was not applied to this model in this process.
        """
        ledger = Ledger.of(model)
        if not ledger.carries(self):
            raise PatchMismatchError(
                "This patch is not applied to this model (or was reverted). Only what was applied in this process can "
                "be reverted; reload the base model otherwise."
            )
        ledger.revert(self)

    def check_base(self, model: PreTrainedModel) -> None:
        """Raise :class:`PatchMismatchError` unless the model's weights are those the patch was made for."""
        arch = ModelArch(model)
        for name, delta in self.deltas.items():
            try:
                weight = arch.weight_of(name)
            except Exception as error:
                raise PatchMismatchError(
                    f"The patch changes {name}, which this model does not have. {error}"
                ) from error
            if delta.shape != tuple(weight.matrix.shape):
                raise PatchMismatchError(
                    f"The patch's update of {name} has shape {delta.shape}; this model's weight has "
                    f"{tuple(weight.matrix.shape)} [O, I]. The patch was made for another model."
                )
            if self.fingerprints.get(name) != tensor_fingerprint(weight.parameter):
                base = self.provenance.get("model", {}).get("name") or "another model"
                raise PatchMismatchError(
                    f"{name} is not the weight that this patch was made for (a {base}, with the patches it carried then). "
                    "Load that model, apply earlier patches first, or force it (force=True, --force) if you know better."
                )

    def save(self, path: str | Path) -> Path:
        """Write the patch as one safetensors file and return its path; an existing file is replaced as a whole."""
        target = Path(path)
        tensors = {
            f"{name}.{suffix}": tensor.detach().contiguous().cpu()
            for name, delta in self.deltas.items()
            for suffix, tensor in delta.tensors().items()
        }
        metadata = {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "kedit_version": version("kedit"),
            "fingerprints": json.dumps(self.fingerprints, sort_keys=True),
            "provenance": json.dumps(self.provenance, sort_keys=True, ensure_ascii=False),
        }
        partial = target.with_name(target.name + ".partial")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, partial, metadata=metadata)
            partial.replace(target)
        except (OSError, SafetensorError) as error:
            raise PatchError(
                f"Cannot write the patch to {target}: {error}. Check the folder and the free space."
            ) from error
        finally:
            partial.unlink(missing_ok=True)
        return target

    @classmethod
    def load(cls, path: str | Path) -> EditPatch:
        """Read a patch; nothing of it is trusted before it is checked.

        Raises:
            PatchError: the file is missing, truncated, not a kedit patch, of a newer format, or holds NaN.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 - not a mapping
        except (OSError, SafetensorError, ValueError, TypeError) as error:
            raise PatchError(f"{path} is not a readable safetensors file: {error}. Is it complete?") from error
        _check_format(path, metadata)
        fingerprints = _json_object(path, metadata, "fingerprints")
        provenance = _json_object(path, metadata, "provenance")
        deltas = _deltas(path, tensors)
        if set(fingerprints) != set(deltas) or not all(isinstance(value, str) for value in fingerprints.values()):
            raise PatchError(f"{path}: the fingerprints do not name the weights that the patch changes. It is damaged.")
        return cls(deltas, fingerprints, provenance)


def _check_format(path: str | Path, metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise PatchError(f"{path} is a safetensors file but not a kedit patch. Full models load with kedit.load().")
    number = metadata.get("format_version", "")
    if not number.isdecimal():
        raise PatchError(f"{path} states the format version {number!r}, which is no number. It is damaged.")
    if int(number) > FORMAT_VERSION:
        raise PatchError(f"{path} has format version {number}; this kedit reads up to {FORMAT_VERSION}. Update kedit.")


def _json_object(path: str | Path, metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    try:
        value = json.loads(metadata.get(key, ""))
    except (json.JSONDecodeError, RecursionError) as error:
        raise PatchError(f"{path}: its {key} are not valid JSON ({error}). It is damaged.") from error
    if not isinstance(value, dict):
        raise PatchError(f"{path}: its {key} are a {type(value).__name__}, not an object. It is damaged.")
    return value


def _deltas(path: str | Path, tensors: Mapping[str, Tensor]) -> dict[str, Delta]:
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, suffix = key.rpartition(".")
        if not name or suffix not in _SUFFIXES or not tensor.is_floating_point():
            raise PatchError(f"{path} holds {key!r} ({tensor.dtype}), which is no part of a patch. It is damaged.")
        parts.setdefault(name, {})[suffix] = tensor
    deltas: dict[str, Delta] = {}
    for name, found in parts.items():
        if set(found) == {"left", "right"}:
            deltas[name] = LowRankDelta(found["left"], found["right"])
        elif set(found) == {"dense"}:
            deltas[name] = DenseDelta(found["dense"])
        else:
            raise PatchError(f"{path}: the update of {name} has the parts {sorted(found)}. It is damaged.")
        try:
            check_finite(name, deltas[name])
        except NonFiniteError as error:
            raise PatchError(f"{path}: {error}") from error
    if not deltas:
        raise PatchError(f"{path} changes no weight. It is damaged.")
    return deltas


def fingerprints(arch: ModelArch, names: Iterable[str]) -> dict[str, str]:
    """The hashes of some weights as they are now, by name."""
    return {name: tensor_fingerprint(arch.weight_of(name).parameter) for name in names}
