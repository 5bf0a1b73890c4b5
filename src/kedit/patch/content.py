"""The content of a patch: updates of weights, what they were made for, and where they came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kedit.errors import PatchMismatchError
from kedit.patch.delta import Delta
from kedit.utils.terminal import printable


@dataclass(eq=False)
class PatchContent:
    """Updates of some weights of one model; the base of :class:`kedit.EditPatch`.

    Attributes:
        deltas: by parameter name; ΔW in the orientation y = W x, whatever the stored layout.
        fingerprints: by parameter name, the hash of the stored weight that the update was made for.
        provenance: editor, its configuration, regularizers, edits, base model: plain JSON values.
    """

    deltas: dict[str, Delta]
    fingerprints: dict[str, str]
    provenance: dict[str, Any] = field(default_factory=dict)

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise :class:`PatchMismatchError` unless the update of ``name`` fits a weight of this shape [O, I]."""
        update_shape = self.deltas[name].shape
        if update_shape != shape:
            raise PatchMismatchError(
                f"The patch's update of {name} has shape {update_shape}; this model's weight has {shape} [O, I]. "
                "The patch was made for another model."
            )

    def mismatch(self, name: str) -> PatchMismatchError:
        """The error that says that ``name`` is another weight."""
        base = printable(str(self.provenance.get("model", {}).get("name") or "another model"))
        return PatchMismatchError(
            f"{name} is not the weight that this patch was made for ({base}, with the patches that it carried then). "
            "Load that model, apply earlier patches first, or force it (force=True, --force) if you know better."
        )

    def __repr__(self) -> str:
        ranks = ", ".join(f"{name}: rank {delta.rank}" for name, delta in self.deltas.items())
        return f"{type(self).__name__}({ranks})"
