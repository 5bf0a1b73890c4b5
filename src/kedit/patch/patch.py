"""A set of weight updates with where they came from, in one small safetensors file (docs/patch-format.md)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedit.errors import ArchitectureError, PatchMismatchError
from kedit.models import ModelArch, unwrap
from kedit.models.fingerprint import has_fingerprint, module_fingerprint, tensor_fingerprint
from kedit.models.lock import editing
from kedit.models.offload import check_held
from kedit.patch.attach import Attachment, attach, check_not_attached
from kedit.patch.card import model_card
from kedit.patch.content import PatchContent
from kedit.patch.describe import show
from kedit.patch.diff import diff
from kedit.patch.format import FORMAT_VERSION as FORMAT_VERSION
from kedit.patch.format import read_patch, write_patch
from kedit.patch.gguf import to_gguf
from kedit.patch.hub import from_pretrained, push_to_hub
from kedit.patch.ledger import Ledger, check_writable
from kedit.patch.merge import merge
from kedit.patch.peft import to_peft

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class EditPatch(PatchContent):
    """Updates of some weights of one model.

    Attributes:
        deltas: by parameter name; ΔW in the orientation y = W x, whatever the stored layout.
        fingerprints: by parameter name, the hash of the stored weight that the update was made for.
        provenance: editor, its configuration, regularizers, edits, base model: plain JSON values.
    """

    # On a model in memory

    def apply(self, model: PreTrainedModel, *, force: bool = False) -> None:
        """Add the updates to the model's weights, all of them or none.

        Args:
            model: the model that the patch was made for.
            force: do not compare the weights with those that the patch was made for.

        Raises:
            PatchMismatchError: the model carries this patch already, in its weights or attached, or its weights are
                other ones.
        """
        with editing(unwrap(model)):
            ledger = Ledger.of(model)
            if ledger.carries(self):
                raise PatchMismatchError("The model carries this patch already. Revert it before applying it again.")
            check_not_attached(self, model)
            if not force:
                self.check_base(model)
            ledger.apply(self, self.deltas)

    def revert(self, model: PreTrainedModel) -> None:
        """Take the updates away again; without other patches the weights are their originals bit for bit.

        Raises:
            PatchMismatchError: this patch object was not applied to this model in this process.
        """
        with editing(unwrap(model)):
            ledger = Ledger.of(model)
            if not self.deltas:
                return
            if not ledger.carries(self):
                raise PatchMismatchError(
                    "This patch is not applied to this model (or was reverted). Only what was applied in this process can "
                    "be reverted; reload the base model otherwise."
                )
            ledger.revert(self)

    def attach(self, model: PreTrainedModel, *, force: bool = False) -> Attachment:
        """Add the updates as side branches, y += L (Rᵀ x), and leave every weight alone.

        For quantized, offloaded or read-only weights. Use as a context manager, or call ``.detach()``.

        Args:
            model: the model that the patch was made for, possibly quantized.
            force: do not compare the weights with those that the patch was made for.
        """
        with editing(unwrap(model)):
            return attach(self, model, force=force)

    def check_base(self, model: PreTrainedModel) -> None:
        """Raise :class:`PatchMismatchError` unless the model's weights are those the patch was made for."""
        arch = ModelArch(model)
        check_held(arch.model)
        for name in self.deltas:
            try:
                weight = arch.weight_of(name)
            except ArchitectureError as error:
                raise PatchMismatchError(
                    f"The patch changes {name}, which this model does not have as a plain weight. {error}"
                ) from error
            self.check_shape(name, tuple(weight.matrix.shape))
            if weight.packed:
                check_writable(weight)
            if not has_fingerprint(weight.stored, self.fingerprints.get(name)):
                raise self.mismatch(name)

    # As a file

    def save(self, path: str | Path) -> Path:
        """Write the patch as one safetensors file and return its path; an existing file is replaced as a whole.

        Raises:
            PatchError: the file cannot be written.
        """
        return write_patch(path, self)

    @classmethod
    def load(cls, path: str | Path) -> EditPatch:
        """Read a patch; nothing of it is trusted before it is checked.

        Raises:
            PatchError: the file is missing, truncated, changed, not a kedit patch, of a newer format, or holds NaN.
        """
        return cls._of(read_patch(path))

    def to_peft(self, folder: str | Path, model: PreTrainedModel) -> Path:
        """Write the patch as a PEFT LoRA adapter for ``model``; see :func:`kedit.patch.peft.to_peft`."""
        return to_peft(self, folder, model)

    def to_gguf(self, path: str | Path, model: PreTrainedModel) -> Path:
        """Write the patch as a LoRA adapter for llama.cpp; see :func:`kedit.patch.gguf.to_gguf`."""
        return to_gguf(self, path, model)

    # On the hub

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> EditPatch:
        """Read a patch from a folder or from the hub; see :func:`kedit.patch.hub.from_pretrained`."""
        return cls._of(from_pretrained(source, **options))

    def push_to_hub(self, repo: str, **options: Any) -> str:
        """Upload the patch with its model card and return the commit's address; see :func:`kedit.patch.hub.push_to_hub`."""
        return push_to_hub(self, repo, **options)

    def model_card(self) -> str:
        """Write what was edited, with which result, and how to undo it: Markdown, for a README.md beside the patch."""
        return model_card([self.provenance], list(self.deltas))

    # With other patches

    @classmethod
    def merge(cls, patches: Iterable[PatchContent], *, tolerance: float | None = None) -> EditPatch:
        """Several patches as one; see :func:`kedit.patch.merge.merge`."""
        return cls._of(merge(patches, tolerance=tolerance))

    @classmethod
    def diff(
        cls, base: PreTrainedModel | str | Path, edited: PreTrainedModel | str | Path, **options: Any
    ) -> EditPatch:
        """The patch that leads from one model or checkpoint to another; see :func:`kedit.patch.diff.diff`."""
        return cls._of(diff(base, edited, **options))

    def show(self) -> str:
        """Describe who made the patch, of what and where, with norms and scores: a text for people."""
        return show(self)

    @classmethod
    def _of(cls, content: PatchContent) -> EditPatch:
        return cls(content.deltas, content.fingerprints, content.provenance)


def fingerprints(arch: ModelArch, names: Iterable[str]) -> dict[str, str]:
    """The hashes of some weights as they are now, by name; of a packed one, that of all that its layer stores."""
    hashes: dict[str, str] = {}
    for name in names:
        weight = arch.weight_of(name)
        layer = arch.model.get_submodule(name.rpartition(".")[0])
        hashes[name] = module_fingerprint(layer) if weight.packed else tensor_fingerprint(weight.stored)
    return hashes
