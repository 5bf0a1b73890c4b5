"""Side branches: a patch's effect on a model whose weights stay as they are."""

from __future__ import annotations

import warnings
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kedit.errors import ArchitectureError, KEditWarning, PatchMismatchError, UnsupportedError
from kedit.models import ARCHITECTURES, ArchSpec, Experts, ModelArch, unwrap
from kedit.models.fingerprint import has_fingerprint
from kedit.models.lock import editing
from kedit.models.offload import check_held
from kedit.patch.content import PatchContent
from kedit.patch.delta import Delta, LowRankDelta
from kedit.patch.ledger import WRITABLE, Ledger
from kedit.utils.files import numbered

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel


class Attachment:
    """A patch on a model as side branches; ``detach()``, or the end of a ``with``, takes it away without a trace."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._handles: list[RemovableHandle] = []

    @property
    def attached(self) -> bool:
        """Whether the branches are in place."""
        return bool(self._handles)

    def detach(self) -> None:
        """Take the branches away; calling it twice does nothing."""
        with editing(self._model):  # not in the midst of another thread's edit
            while self._handles:
                self._handles.pop().remove()

    def __enter__(self) -> Attachment:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


def attach(patch: PatchContent, model: PreTrainedModel, *, force: bool = False) -> Attachment:
    """Add y += L (Rᵀ x) beside every weight that the patch changes, computed in the factors' dtype.

    Raises:
        PatchMismatchError: the model carries this patch in its weights or beside them, has no such layer, its shape is
            another one, or its weight is plainly stored and not the one that the patch was made for. A quantized weight
            cannot be compared; this is said in a warning.
    """
    if Ledger.of(model).carries(patch):
        raise PatchMismatchError("The model carries this patch in its weights already. Revert it before attaching it.")
    check_not_attached(patch, model)
    check_held(unwrap(model))
    branches: list[tuple[nn.Module, _Branch]] = []
    unknown = []
    for name, delta in patch.deltas.items():
        module = _module(model, name)
        experts, number = _expert(model, module, name)
        branch = _Branch(name, delta) if experts is None else _ExpertBranch(name, delta, experts, number)
        weight: Any = getattr(module, "weight", None) if experts is None else experts.weight(number).stored
        patch.check_shape(name, _shape(module, name) if experts is None else experts.shape)
        if not _plain(weight, delta):
            unknown.append(name)
        elif not force and not has_fingerprint(weight, patch.fingerprints.get(name)):
            raise patch.mismatch(name)
        branches.append((module, branch))
    if unknown and not force:
        warnings.warn(
            f"{', '.join(unknown)}: stored quantized or elsewhere, so kedit cannot check that the patch was made for it.",
            KEditWarning,
            stacklevel=3,
        )
    attachment = Attachment(unwrap(model))
    try:
        for module, branch in branches:
            attachment._handles.append(module.register_forward_hook(branch))
    except BaseException:
        attachment.detach()
        raise
    return attachment


def check_not_attached(patch: PatchContent, model: PreTrainedModel) -> None:
    """Raise :class:`PatchMismatchError` where an update of the patch is a side branch of its layer already."""
    inner = unwrap(model)
    for name, delta in patch.deltas.items():
        try:
            hooks = inner.get_submodule(name.rpartition(".")[0])._forward_hooks.values()
        except AttributeError:  # what comes next says that there is no such layer
            continue
        if any(isinstance(hook, _Branch) and hook.adds(name, delta) for hook in hooks):
            raise PatchMismatchError(
                f"The patch is attached to the model already ({name}), so it would count twice. Detach it first."
            )


class _Branch:
    """A forward hook that adds ΔW x; factors follow the activations to their device."""

    def __init__(self, name: str, delta: Delta) -> None:
        self._leaf = name.rpartition(".")[2]
        self._delta = delta
        self._there: dict[torch.device, Delta] = {}

    def adds(self, name: str, delta: Delta) -> bool:
        """Return whether the branch is this update, also where both were loaded from one file."""
        mine, other = self._delta.tensors(), delta.tensors()
        alike = self._leaf == name.rpartition(".")[2] and mine.keys() == other.keys()
        return alike and all(torch.equal(mine[key], other[key].to(mine[key])) for key in mine)

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        branch = self._of(inputs[0], output.device)
        return (output.to(branch.dtype) + branch).to(output.dtype)

    def _of(self, x: Tensor, device: torch.device) -> Tensor:
        """ΔW x."""
        if device not in self._there:
            dtype = next(iter(self._delta.tensors().values())).dtype
            self._there[device] = self._delta.to(device, dtype)
        delta = self._there[device]
        if isinstance(delta, LowRankDelta):
            return (x.to(device, delta.left.dtype) @ delta.right) @ delta.left.T
        return x.to(device, delta.matrix.dtype) @ delta.matrix.T


class _ExpertBranch(_Branch):
    """The same for one expert of a mixture: the router's weight times ΔW k, at the tokens that the expert serves."""

    def __init__(self, name: str, delta: Delta, experts: Experts, number: int) -> None:
        super().__init__(name, delta)
        self._experts, self._number = experts, number

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        hidden, chosen, weights = (tensor.to(output.device) for tensor in inputs)
        row, place = torch.where(chosen == self._number)
        branch = self._of(self._experts.expert_keys(hidden[row], self._number), output.device)
        share = weights[row, place, None].to(branch.dtype)
        return output.to(branch.dtype).index_add(0, row, share * branch).to(output.dtype)


def _module(model: PreTrainedModel, name: str) -> nn.Module:
    path, _, leaf = name.rpartition(".")
    try:
        module: nn.Module | None = unwrap(model).get_submodule(path)
    except AttributeError:
        module = None
    if module is None or not (leaf == "weight" or leaf.endswith("]")) or not path:
        raise PatchMismatchError(
            f"The patch changes {name}, and this {ModelArch(model).model_type} has no layer whose weight is called so. "
            "The patch was made for another model."
        )
    return module


def _expert(model: PreTrainedModel, module: nn.Module, name: str) -> tuple[Experts | None, int]:
    """The experts and the number of the one whose down-projection is meant, where it is one."""
    fused, number = numbered(name)
    if number is None:
        return None, 0
    path, _, leaf = fused.rpartition(".")
    down = ARCHITECTURES.get(unwrap(model).config.model_type, ArchSpec).fused_down
    if leaf != down:
        raise UnsupportedError(
            f"{name} is no down-projection ({path}.{down}[...]), and kedit attaches to no other part of an expert. Apply the patch "
            "to the weights."
        )
    experts = Experts(module, path, leaf)
    experts.weight(number)  # there is one of that number
    return experts, number


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
    """Return whether a weight is stored as numbers that a fingerprint can be taken of."""
    if not isinstance(weight, Tensor) or weight.is_meta or weight.dtype not in WRITABLE:
        return False
    return tuple(weight.shape) in (delta.shape, delta.shape[::-1])
