"""AlphaEdit (Fang et al., ICLR 2025, arXiv:2410.02355): null-space constrained, made for long sequences of edits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, get_args

import torch
from torch import Tensor

from kedit.editors.closed_forms import NullSpaceRule, Past, null_space, null_space_update, projected
from kedit.editors.config import EditorConfig, Settings
from kedit.editors.key_history import KeyHistory
from kedit.editors.memit import MEMIT, largest_weight, mixed_keys
from kedit.editors.memory import DOUBLE
from kedit.editors.solve_layers import LayerProblem
from kedit.errors import ConfigError
from kedit.keys import read
from kedit.patch.delta import Delta
from kedit.prompts.encode import Request
from kedit.utils.device_memory import offload_if_cpu

if TYPE_CHECKING:
    from kedit.patch import EditPatch


class AlphaEdit(MEMIT):
    """MEMIT's values and layers, written only into directions that ordinary keys hardly use.

    P projects on the directions that ordinary keys use least, the eigenvectors of C with small eigenvalues; Kₚ are the keys
    of the edits that the model carries::

        (P (K Kᵀ + Kₚ Kₚᵀ) + λ 1) X = P K Rᵀ,   Δ = Xᵀ

    so Δ k is zero for every key k in the preserved subspace. The past keys are :attr:`history`: explicit state, which a
    revert takes back and which is saved beside a patch (``editor.history.save(path)``).
    """

    name: ClassVar[str] = "alphaedit"

    @dataclass(frozen=True, kw_only=True)
    class Config(EditorConfig):
        """AlphaEdit's hyper-parameters.

        Attributes:
            l2: λ, by ``l2_relative``.
            threshold: which directions may be written, by ``threshold_rule`` (:func:`kedit.editors.closed_forms.null_space`).
            threshold_rule: ``"fraction"`` (of all directions, the least used), ``"mean"`` (eigenvalues below a multiple of
                their mean) or ``"absolute"`` (eigenvalues below a number: the published form, 0.02, which means something
                else for every model).
            l2_relative: whether λ is a multiple of the mean ‖P k‖² of ordinary keys. At 1 a key that lies in the free
                directions as ordinary keys do gets half of its change written, whatever the model. The published form, an
                absolute λ of 10, is ``False``.
            min_share: λ is lowered until the median edit, written alone, gets this share of its change; 0: never (the
                published form).
        """

        l2: float = 1.0
        threshold: float = 0.5
        threshold_rule: NullSpaceRule = "fraction"
        l2_relative: bool = True
        min_share: float = 0.0

        def __post_init__(self) -> None:
            """Check every field."""
            super().__post_init__()
            self.check_range("l2", above=0.0)
            self.check_range("threshold", above=0.0)
            self.check_range("min_share", below=1.0)
            if self.threshold_rule not in get_args(NullSpaceRule):
                raise ConfigError(
                    f"threshold_rule is one of {', '.join(map(repr, get_args(NullSpaceRule)))}, not {self.threshold_rule!r}."
                )
            if self.threshold_rule == "fraction" and self.threshold >= 1:
                raise ConfigError(f"threshold is a share of all directions, below 1, not {self.threshold!r}.")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.history = KeyHistory(self.model)
        self._of: object = None  # the moments that the following two belong to
        self._used: dict[tuple[int, float, str, int], Tensor] = {}
        self._energy: dict[tuple[int, float, str, int], float] = {}
        self._past: dict[tuple[int, float, str], tuple[list[Tensor], Past]] = {}

    def used_directions(self, layer: int, config: Any, expert: int = 0, device: torch.device | None = None) -> Tensor:
        """The directions of ordinary keys, which are not written: [I, d] float64; computed once per layer and expert.

        They are kept like a factor of C (:meth:`kedit.SecondMoments.factor`).
        """
        self._forget_other_moments()
        key = (layer, config.threshold, config.threshold_rule, expert)
        if key not in self._used:
            matrix = self.moments.matrix(layer, expert, device)
            self._used[key], self._energy[key] = null_space(matrix, config.threshold, config.threshold_rule)
        self._used[key] = offload_if_cpu(device, self._used[key])
        return self._used[key]

    def _forget_other_moments(self) -> None:
        if self._of is not self.moments:
            self._of = self.moments
            self._used.clear()
            self._energy.clear()
            self._past.clear()

    def solving_bytes(self, shape: tuple[int, int], edits: int, contexts: int) -> tuple[int, int]:
        """Used directions and earlier keys are kept; eigenvectors, keys and their system are held meanwhile."""
        square, past = DOUBLE * shape[1] ** 2, self.history.count
        config: Any = self.config
        used = square if config.threshold_rule != "fraction" else square * (1 - config.threshold)  # else at most all
        keys = edits + past if past < shape[1] else edits
        system = 3 * square if edits + past >= shape[1] else 3 * DOUBLE * keys**2
        return int(used) + DOUBLE * min(past, shape[1]) * shape[1], max(square, 4 * DOUBLE * keys * shape[1] + system)

    def solve(self, insertion: LayerProblem, config: Any) -> Delta:
        """The projected solution of one layer."""
        self._forget_other_moments()
        keys = self._projected(insertion.layer, mixed_keys(insertion.keys), config)
        past = self._earlier(insertion.layer, keys, config)
        return null_space_update(keys, insertion.residual, self._weight(insertion, keys, config), past)

    def _weight(self, insertion: LayerProblem, keys: Tensor, config: Any) -> float:
        """λ for some projected keys [E, N · I]; relative to what ordinary keys have in the directions of their experts."""
        weight = config.l2
        if config.l2_relative:
            rule = (insertion.layer, config.threshold, config.threshold_rule)
            parts = enumerate(keys.chunk(len(insertion.weights), 1))
            weight *= sum(self._energy[rule + (expert,)] for expert, part in parts if bool(part.any()))
        if config.min_share:
            weight = largest_weight(weight, keys.square().sum(1), config.min_share)
        return max(float(weight), torch.finfo(torch.float64).tiny)

    def _projected(self, layer: int, keys: Tensor, config: Any) -> Tensor:
        """P k for each key [n, I] (of a mixture, expert by expert), float64."""

        def project(expert: int, part: Tensor) -> Tensor:
            return projected(self.used_directions(layer, config, expert, part.device), part)

        return self.moments.each_expert(layer, keys, project)

    def _earlier(self, layer: int, like: Tensor, config: Any) -> Past:
        """The keys of earlier edits; only those are projected that are new since the last time."""
        parts = self.history.parts(layer)
        key = (layer, config.threshold, config.threshold_rule)
        known, past = self._past.get(key, ([], Past()))
        if past.device not in (None, like.device):
            known, past = [], Past()
        if len(known) > len(parts) or any(old is not new for old, new in zip(known, parts, strict=False)):
            known, past = [], Past()  # something was taken back
        fresh = parts[len(known) :]
        if fresh:
            past = past.plus(self._projected(layer, torch.cat(fresh).to(like), config))
        self._past[key] = parts, past
        return past

    def on_applied(self, patch: EditPatch, requests: Sequence[Request], settings: Settings) -> None:
        """Remember the keys of what was written, as the edited model makes them."""
        rows = [row for request in requests for row in request.rewrite]
        layers = settings.config.layers
        keys = {
            layer: mixed_keys(read.keys(self.arch, rows, layer).unflatten(0, (len(requests), -1))) for layer in layers
        }
        self.history.add(patch, {layer: found.to(torch.float32).cpu() for layer, found in keys.items()})
