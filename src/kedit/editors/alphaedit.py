"""AlphaEdit (Fang et al., ICLR 2025, arXiv:2410.02355): null-space constrained, made for long sequences of edits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from kedit import locate
from kedit.delta import Delta
from kedit.editors.base import Settings
from kedit.editors.config import EditorConfig
from kedit.editors.memit import MEMIT, mixed_keys
from kedit.history import KeyHistory
from kedit.pipeline import Insertion
from kedit.request import Request
from kedit.solve import null_space, null_space_solution, projected

if TYPE_CHECKING:
    from kedit.patch import EditPatch


class AlphaEdit(MEMIT):
    """MEMIT's values and layers, written only into directions that ordinary keys hardly use.

    P projects on the eigenvectors of C with small eigenvalues; Kₚ are the keys of the edits that the model carries::

        (P (K Kᵀ + Kₚ Kₚᵀ) + λ 1) X = P K Rᵀ,   Δ = Xᵀ

    so Δ k is zero for every key k in the preserved subspace. The past keys are :attr:`history`: explicit state, which a
    revert takes back and which is saved beside a patch (``editor.history.save(path)``).
    """

    name: ClassVar[str] = "alphaedit"

    @dataclass(frozen=True, kw_only=True)
    class Config(EditorConfig):
        """AlphaEdit's hyper-parameters.

        Attributes:
            l2: λ.
            threshold: directions whose eigenvalue is below it may be written.
            relative: whether the threshold is a multiple of the mean eigenvalue. The published code's is absolute (0.02),
                which means something else for every model and number of tokens.
        """

        l2: float = 10.0
        threshold: float = 0.02
        relative: bool = True

        def __post_init__(self) -> None:
            """Check every field."""
            super().__post_init__()
            self.check_range("l2", above=0.0)
            self.check_range("threshold", above=0.0)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.history = KeyHistory(self.model)
        self._used: dict[tuple[int, float, bool, int], Tensor] = {}

    def used_directions(self, layer: int, config: Any, expert: int = 0) -> Tensor:
        """The directions of ordinary keys, which are not written: [I, d] float64; computed once per layer and expert."""
        key = (layer, config.threshold, config.relative, expert)
        if key not in self._used:
            matrix = self.moments.matrices(layer)[expert]
            self._used[key] = null_space(matrix, config.threshold, relative=config.relative)
        return self._used[key]

    def solve(self, insertion: Insertion, config: Any) -> Delta:
        """The projected solution of one layer."""
        keys = mixed_keys(insertion.keys)
        layer = insertion.layer
        past = self.history.keys(layer, keys.shape[1]).to(keys)

        def project(expert: int, part: Tensor) -> Tensor:
            return projected(self.used_directions(layer, config, expert).to(part.device), part)

        both = insertion.moments.each_expert(layer, torch.cat([keys, past]), project)
        return null_space_solution(both, insertion.residual, config.l2)

    def kept(self, patch: EditPatch, requests: Sequence[Request], settings: Settings) -> None:
        """Remember the keys of what was written, as the edited model makes them."""
        rows = [row for request in requests for row in request.rewrite]
        layers = settings.config.layers
        keys = {
            layer: mixed_keys(locate.keys(self.arch, rows, layer).unflatten(0, (len(requests), -1))) for layer in layers
        }
        self.history.add(patch, {layer: found.to(torch.float32).cpu() for layer, found in keys.items()})
