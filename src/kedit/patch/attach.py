"""Side branches: a patch's effect on a model whose weights stay as they are."""

from __future__ import annotations

import warnings
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kedit.arch import ModelArch, unwrap
from kedit.delta import Delta, LowRankDelta
from kedit.errors import ArchitectureError, KEditWarning, PatchMismatchError, UnsupportedError
from kedit.fingerprint import has_fingerprint
from kedit.ledger import WRITABLE, Ledger

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

    from kedit.patch.core import EditPatch


class Attachment:
    """A patch on a model as side branches; ``detach()``, or the end of a ``with``, takes it away without a trace."""

    def __init__(self, handles: list[RemovableHandle]) -> None:
        self._handles = handles

    @property
    def attached(self) -> bool:
        """Whether the branches are in place."""
        return bool(self._handles)

    def detach(self) -> None:
        """Take the branches away; calling it twice does nothing."""
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


def attach(patch: EditPatch, model: PreTrainedModel, *, force: bool = False) -> Attachment:
    """Add y += L (Rᵀ x) beside every weight that the patch changes, computed in the factors' dtype.

    Raises:
        PatchMismatchError: the model carries this patch in its weights or beside them, has no such layer, its shape is
            another one, or its weight is plainly stored and not the one that the patch was made for. A quantized weight
            cannot be compared; this is said in a warning.
    """
    if Ledger.of(model).carries(patch):
        raise PatchMismatchError("The model carries this patch in its weights already. Revert it before attaching it.")
    check_not_attached(patch, model)
    found: list[tuple[nn.Module, Delta]] = []
    unknown = []
    for name, delta in patch.deltas.items():
        module = _module(model, name)
        patch.check_shape(name, delta, _shape(module, name))
        weight: Any = getattr(module, "weight", None)
        if not _plain(weight, delta):
            unknown.append(name)
        elif not force and not has_fingerprint(weight, patch.fingerprints.get(name)):
            raise patch.mismatch(name)
        found.append((module, delta))
    if unknown and not force:
        warnings.warn(
            f"{', '.join(unknown)}: stored quantized or elsewhere, so kedit cannot check that the patch was made for it.",
            KEditWarning,
            stacklevel=3,
        )
    attachment = Attachment([])
    try:
        for module, delta in found:
            attachment._handles.append(module.register_forward_hook(_Branch(delta)))
    except BaseException:
        attachment.detach()
        raise
    return attachment


def check_not_attached(patch: EditPatch, model: PreTrainedModel) -> None:
    """Raise :class:`PatchMismatchError` where an update of the patch is a side branch of its layer already."""
    inner = unwrap(model)
    for name, delta in patch.deltas.items():
        try:
            hooks = inner.get_submodule(name.rpartition(".")[0])._forward_hooks.values()
        except AttributeError:  # what comes next says that there is no such layer
            continue
        if any(isinstance(hook, _Branch) and hook.adds(delta) for hook in hooks):
            raise PatchMismatchError(
                f"The patch is attached to the model already ({name}), so it would count twice. Detach it first."
            )


class _Branch:
    """A forward hook that adds ΔW x; factors follow the activations to their device."""

    def __init__(self, delta: Delta) -> None:
        self._delta = delta
        self._there: dict[torch.device, Delta] = {}

    def adds(self, delta: Delta) -> bool:
        """Whether the branch is this update, also where both were loaded from one file."""
        mine, other = self._delta.tensors(), delta.tensors()
        return mine.keys() == other.keys() and all(torch.equal(mine[key], other[key].to(mine[key])) for key in mine)

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        device = output.device
        if device not in self._there:
            dtype = next(iter(self._delta.tensors().values())).dtype
            self._there[device] = self._delta.to(device, dtype)
        delta = self._there[device]
        if isinstance(delta, LowRankDelta):
            x = inputs[0].to(device, delta.left.dtype)
            branch = (x @ delta.right) @ delta.left.T
        else:
            branch = inputs[0].to(device, delta.matrix.dtype) @ delta.matrix.T
        return (output.to(branch.dtype) + branch).to(output.dtype)


def _module(model: PreTrainedModel, name: str) -> nn.Module:
    path, _, leaf = name.rpartition(".")
    if leaf.endswith("]"):
        raise UnsupportedError(
            f"{name} is one expert of a fused tensor, which no side branch can be put beside. Apply the patch to the weights."
        )
    try:
        module: nn.Module | None = unwrap(model).get_submodule(path)
    except AttributeError:
        module = None
    if module is None or leaf != "weight" or not path:
        raise PatchMismatchError(
            f"The patch changes {name}, and this {ModelArch(model).model_type} has no layer whose weight is called so. "
            "The patch was made for another model."
        )
    return module


def _shape(module: nn.Module, name: str) -> tuple[int, int]:
    """(O, I) of a linear layer, also of a quantized one, from what it says of itself."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):
        return int(module.nf), int(module.nx)
    rows, columns = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if isinstance(rows, int) and isinstance(columns, int):
        return rows, columns
    raise ArchitectureError(
        f"{name} belongs to a {type(module).__name__}, which does not say how many features it takes and gives. "
        "kedit attaches to linear layers."
    )


def _plain(weight: Any, delta: Delta) -> bool:
    """Whether a weight is stored as numbers that a fingerprint can be taken of."""
    if not isinstance(weight, nn.Parameter) or weight.is_meta or weight.dtype not in WRITABLE:
        return False
    return tuple(weight.shape) in (delta.shape, delta.shape[::-1])
