"""Stabilisers for long sequences of edits, as children of kedit's editors; ``bench_sequential_real.py`` knows them by name.

ENCORE's early stop needs no code of its own: with ``--set stop_loss=0.7`` the optimisation ends once the target is as likely as
everything else together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from kedit import EditPatch
from kedit.editors import EDITORS
from kedit.editors.closed_forms import largest_weight, mixed_keys
from kedit.editors.config import hyper
from kedit.editors.key_history import KeyHistory
from kedit.editors.memit import MEMIT
from kedit.editors.solve_layers import LayerProblem
from kedit.keys import read
from kedit.patch.delta import Delta, LowRankDelta
from kedit.prompts.encode import Request
from kedit.utils.linalg import cholesky, solved


class ENCORE(MEMIT):
    """MEMIT with a norm penalty and the keys of earlier edits (Gupta et al., 2025, arXiv:2502.01636).

    Δ = R Kᵀ (λ C + Kₚ Kₚᵀ + ν 1 + K Kᵀ)⁻¹ with Kₚ the keys of the edits that the model carries and ν the weight of ‖Δ‖².
    """

    name: ClassVar[str] = "encore"

    @dataclass(frozen=True, kw_only=True)
    class Config(MEMIT.Config):
        """MEMIT's hyper-parameters, and ``norm_weight``: ν in units of λ tr(C) / I (the published ν are absolute, 10 to 20)."""

        norm_weight: float = hyper(0.2)

    config: Config

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.history = KeyHistory(self.model)

    def solve(self, problem: LayerProblem) -> Delta:
        """The ridge solution of one layer, of a single matrix."""
        keys = problem.own_keys.double()
        moment = problem.moments[problem.layer].matrix.to(keys)
        earlier = self.history.keys(problem.layer, keys.shape[1]).to(keys)
        weight = self.config.moment_weight
        if self.config.min_share:
            weight = largest_weight(weight, (keys * problem.whiten(keys)).sum(1), self.config.min_share)
        system = weight * moment + earlier.T @ earlier + keys.T @ keys
        system.diagonal().add_(self.config.norm_weight * weight * moment.trace() / len(moment))
        return LowRankDelta(problem.residual.double().T, solved(cholesky(system), keys.T).T.contiguous())

    def on_applied(self, patch: EditPatch, requests: Sequence[Request]) -> None:
        """Remember the keys that were written."""
        keys = {layer: mixed_keys(read.request_keys(self.arch, requests, layer)) for layer in self.config.layers}
        self.history.add(patch, {layer: each.float().cpu() for layer, each in keys.items()})


EDITORS.register("encore", ENCORE)
