"""Stabilisers for long sequences of edits, as children of kedit's editors; ``bench_sequential_real.py`` knows them by name.

ENCORE's early stop needs no code of its own: with ``--set stop_loss=0.7`` the optimisation ends once the target is as likely as
everything else together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from kedit import EditPatch
from kedit.editors import EDITORS
from kedit.editors.alphaedit import AlphaEdit
from kedit.editors.base import Call
from kedit.editors.closed_forms import mixed_keys
from kedit.editors.config import hyper
from kedit.editors.key_history import KeyHistory
from kedit.editors.memit import MEMIT
from kedit.editors.solve_layers import LayerProblem
from kedit.keys import read
from kedit.models import Site
from kedit.patch.delta import Delta, LowRankDelta
from kedit.prompts.encode import Request
from kedit.utils.linalg import cholesky, solved
from kedit.values.optimize import Values


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
        weight = self.weight_for(problem, keys)
        system = weight * moment + earlier.T @ earlier + keys.T @ keys
        system.diagonal().add_(self.config.norm_weight * weight * moment.trace() / len(moment))
        return LowRankDelta(problem.residual.double().T, solved(cholesky(system), keys.T.contiguous()))

    def on_applied(self, patch: EditPatch, requests: Sequence[Request]) -> None:
        """Remember the keys that were written."""
        keys = {layer: mixed_keys(read.request_keys(self.arch, requests, layer)) for layer in self.config.layers}
        self.history.add(patch, {layer: each.float().cpu() for layer, each in keys.items()})


class NAS(AlphaEdit):
    """AlphaEdit whose values have the length that they have on the unedited model (Norm-Anchor Scaling, arXiv:2602.02543).

    With v₀ the MLP's output at the last edited block, v* = v₀ + δ is scaled to m, the mean ‖v*‖ of the first call's edits, the
    longest twentieth left out; one longer than 2 m is dropped (v* = v₀). The published m is that of 1,000 other facts.
    """

    name: ClassVar[str] = "nas"
    anchor: float | None = None

    def _optimize(self, requests: Sequence[Request], call: Call) -> Values:
        values = super()._optimize(requests, call)
        site = Site(self.config.layers[-1], "mlp")
        delta = values.delta[:, 0]
        before = read.request_outputs(self.arch, requests, site).to(delta)
        value = before + delta
        lengths = value.norm(dim=1)
        if self.anchor is None:
            kept = lengths.sort().values[: math.ceil(0.95 * len(lengths))]
            self.anchor = float(kept.mean())
        scaled = torch.where((lengths > 2 * self.anchor)[:, None], before, value * (self.anchor / lengths)[:, None])
        return replace(values, delta=(scaled - before)[:, None])


EDITORS.register("encore", ENCORE)
EDITORS.register("nas", NAS)
