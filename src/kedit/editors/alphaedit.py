"""AlphaEdit: null-space constrained editing, made for long sequences (Fang et al., ICLR 2025, arXiv:2410.02355)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from kedit.editors import presets
from kedit.editors.closed_forms import largest_weight, null_space_update, whiten_beside
from kedit.editors.config import hyper
from kedit.editors.null_space import NullSpaceEditor
from kedit.editors.solve_layers import LayerProblem
from kedit.models import ModelArch
from kedit.patch.delta import Delta


class AlphaEdit(NullSpaceEditor):
    """MEMIT's values and layers, written only into directions that ordinary keys hardly use.

    P projects on the directions that ordinary keys use least, the eigenvectors of C with small eigenvalues; Kₚ are the keys
    of the edits that the model carries (:attr:`history`)::

        (P (K Kᵀ + Kₚ Kₚᵀ) + λ 1) X = P K Rᵀ,   Δ = Xᵀ

    so Δ k is zero for every key k in the preserved subspace.
    """

    name: ClassVar[str] = "alphaedit"

    @dataclass(frozen=True, kw_only=True)
    class Config(NullSpaceEditor.Config):
        """AlphaEdit's hyper-parameters, beside those of the null space.

        Attributes:
            l2: λ, by ``l2_relative``.
            l2_relative: whether λ is a multiple of the mean ‖P k‖² of ordinary keys. At 1 a key that lies in the free
                directions as ordinary keys do gets half of its change written, whatever the model. The published form, an
                absolute λ of 10, is ``False``.
            min_share: λ is lowered until the median edit, written alone, gets this share of its change; 0: never (the
                published form).
        """

        l2: float = hyper(1.0, above=0)
        l2_relative: bool = True
        min_share: float = hyper(0.0, below=1)

    config: Config

    def solve(self, problem: LayerProblem) -> Delta:
        """The projected solution of one layer."""
        space, layer = self.null_space, problem.layer
        columns, residuals = problem.columns(problem.own_keys)
        columns = space.project(layer, columns)
        past = space.past(layer, self.history.parts(layer, without=problem.subjects), columns.device)
        energy = space.energy(layer, columns)
        weight = self.config.l2 * (energy if self.config.l2_relative else 1)
        keys = whitened = columns[: len(problem.keys)]
        held = None if problem.held is None else space.project(layer, problem.held)
        if held is not None:
            # λ 1 stands for λ C with tr(P C) on the diagonal: so the held keys weigh as in MEMIT's solution.
            held *= (problem.weights[0].matrix.shape[1] / energy) ** 0.5
            whitened = whiten_beside(keys, held, held)
        if self.config.min_share:
            weight = largest_weight(weight, (keys * whitened).sum(1), self.config.min_share)
        weight = max(weight, torch.finfo(torch.float64).tiny)
        if held is not None:
            past = past.plus(weight**0.5 * held)
        return problem.folded(null_space_update(columns, residuals, weight, past))

    @classmethod
    def rule(cls, arch: ModelArch) -> dict[str, Any]:
        """MEMIT's blocks; the defaults of the other hyper-parameters mean the same in every model."""
        return {**super().rule(arch), "min_share": presets.MIN_SHARE}
