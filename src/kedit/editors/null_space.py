"""The null space of ordinary keys, and editors that write only there and protect the keys of earlier edits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor

from kedit.editors.closed_forms import NullSpaceRule, Past, mixed_keys, null_space, projected
from kedit.editors.config import EditorConfig, hyper
from kedit.editors.key_history import KeyHistory
from kedit.editors.memory import null_space_bytes
from kedit.editors.value_editor import MultiLayerEditor
from kedit.errors import ConfigError
from kedit.keys import read
from kedit.keys.second_moment import SecondMoments
from kedit.prompts.encode import Request
from kedit.utils.device_memory import offload_if_cpu

if TYPE_CHECKING:
    from kedit.patch import EditPatch


class NullSpace:
    """Projections on the directions that ordinary keys use least; computed once per layer and expert, on first use.

    Args:
        moments: C by layer.
        threshold: the bound of the free directions, by ``rule`` (:func:`kedit.editors.closed_forms.null_space`).
        rule: how to read ``threshold``.
    """

    def __init__(self, moments: SecondMoments, threshold: float, rule: NullSpaceRule) -> None:
        self.moments, self.threshold, self.rule = moments, threshold, rule
        self._used: dict[tuple[int, int], Tensor] = {}
        self._energy: dict[tuple[int, int], float] = {}
        self._past: dict[int, tuple[list[Tensor], Past]] = {}

    def used(self, layer: int, expert: int = 0, device: torch.device | None = None) -> Tensor:
        """The directions of ordinary keys, which are not written: [I, d] float64, kept like a factor of C."""
        key = (layer, expert)
        if key not in self._used:
            matrix = self.moments.matrix(layer, expert, device)
            self._used[key], self._energy[key] = null_space(matrix, self.threshold, self.rule)
        self._used[key] = offload_if_cpu(device, self._used[key])
        return self._used[key]

    def project(self, layer: int, keys: Tensor) -> Tensor:
        """P k for each key [n, I] (of a mixture, expert by expert), float64."""
        return self.moments.each_expert(
            layer, keys, lambda expert, part: projected(self.used(layer, expert, part.device), part)
        )

    def energy(self, layer: int, projected_keys: Tensor) -> float:
        """The mean ‖P k‖² of ordinary keys, in the experts that the projected keys [n, N · I] use."""
        experts = projected_keys.chunk(len(self.moments.matrices(layer)), 1)
        return sum(self._energy[layer, expert] for expert, part in enumerate(experts) if bool(part.any()))

    def past(self, layer: int, earlier: list[Tensor], device: torch.device) -> Past:
        """The keys of earlier edits [E, I], projected; only those that are new since the last call are computed."""
        known, past = self._past.get(layer, ([], Past()))
        taken_back = len(known) > len(earlier) or any(old is not new for old, new in zip(known, earlier, strict=False))
        if taken_back or past.device not in (None, device):
            known, past = [], Past()
        if fresh := earlier[len(known) :]:
            past = past.plus(self.project(layer, torch.cat(fresh).to(device, torch.float64)))
        self._past[layer] = earlier, past
        return past


class NullSpaceEditor(MultiLayerEditor):
    """A multi-layer editor that writes into the null space of ordinary keys and remembers the keys of its edits.

    The keys of past edits are :attr:`history`: explicit state, which a revert takes back and which is saved beside a patch
    (``editor.history.save(path)``).
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(EditorConfig):
        """The hyper-parameters of the null space.

        Attributes:
            threshold: which directions may be written, by ``threshold_rule`` (:func:`kedit.editors.closed_forms.null_space`).
            threshold_rule: ``"fraction"`` (of all directions, the least used), ``"mean"`` (eigenvalues below a multiple of
                their mean) or ``"absolute"`` (eigenvalues below a number: the published form, 0.02, which means something
                else for every model).
        """

        threshold: float = hyper(0.5, above=0)
        threshold_rule: NullSpaceRule = hyper("fraction", choices=get_args(NullSpaceRule))

        def __post_init__(self) -> None:
            """Check every field."""
            super().__post_init__()
            if self.threshold_rule == "fraction" and self.threshold >= 1:
                raise ConfigError(f"threshold is a share of all directions, below 1, not {self.threshold!r}.")

    config: Config

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.history = KeyHistory(self.model)
        self._null_space: NullSpace | None = None

    @property
    def null_space(self) -> NullSpace:
        """The null space of :attr:`moments`, by the threshold of :attr:`config`."""
        wanted, made = (self.moments, self.config.threshold, self.config.threshold_rule), self._null_space
        if made is None or made.moments is not wanted[0] or (made.threshold, made.rule) != wanted[1:]:
            self._null_space = made = NullSpace(*wanted)
        return made

    def on_applied(self, patch: EditPatch, requests: Sequence[Request]) -> None:
        """Remember the keys of the edits, as the edited model makes them."""
        mixed = {i: mixed_keys(read.request_keys(self.arch, requests, i)) for i in self.config.layers}
        subjects = [request.edit.subject for request in requests] if self.config.join_subjects else []
        self.history.add(patch, {layer: each.to(torch.float32).cpu() for layer, each in mixed.items()}, subjects)

    def solving_bytes(self, shape: tuple[int, int], edits: int) -> tuple[int, int]:
        """Used directions and earlier keys are kept; eigenvectors, keys and their system are held meanwhile."""
        # Of the other rules the number of free directions is not known before the decomposition.
        used = 1 - self.config.threshold if self.config.threshold_rule == "fraction" else 1.0
        return null_space_bytes(shape[1], edits, self.history.count, used)
