"""ROME (Meng et al., 2022, arXiv:2202.05262) and R-ROME (Gupta et al., 2024, arXiv:2403.07175)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from einops import reduce

from kedit.editors.config import EditorConfig
from kedit.editors.solve_layers import LayerProblem
from kedit.editors.value_editor import ValueEditor
from kedit.errors import ConfigError
from kedit.patch.delta import Delta


class ROME(ValueEditor):
    """Rank-one model editing: one association, one layer.

    The value is optimised at the MLP's output; with k̄ the mean key over the contexts and k the bare prompt's key::

        u = C⁻¹ k̄ / ‖C⁻¹ k̄‖,   Δ = (v* − W k) uᵀ / (uᵀ k)

    hence (W + Δ) k = v* at the bare prompt (the published code's convention). Beside held keys (``relation_keys``), u is the
    vector with uᵀ k = 1 that minimises uᵀ (C + Hᵀ H) u + Σ (uᵀ p − 1)² over the keys p of the prompt and of the subject alone in
    the contexts.
    """

    name: ClassVar[str] = "rome"
    context_lengths: ClassVar[tuple[tuple[int, int], ...]] = ((5, 10), (10, 10))

    @dataclass(frozen=True, kw_only=True)
    class Config(EditorConfig):
        """ROME's hyper-parameters: those that all editors share, with a single layer."""

        def __post_init__(self) -> None:
            """Check every field."""
            super().__post_init__()
            if len(self.layers) != 1:
                raise ConfigError(f"ROME writes into one layer, not {self.layers}. MEMIT spreads an edit over several.")

    def solve(self, problem: LayerProblem) -> Delta:
        """The rank-one update of one edit."""
        [keys], [residual] = problem.keys, problem.residual  # [C, I], [O]
        return problem.rank_one(reduce(keys, "c i -> 1 i", "mean"), keys[:1], residual)


class RROME(ROME):
    """R-ROME: the mean key everywhere, which keeps long sequences of edits stable.

    Δ = (v* − W k̄) uᵀ / (uᵀ k̄), hence (W + Δ) k̄ = v* at the mean key. Joined facts of one subject have v* = W k̄ + δ: the
    value was optimised by adding δ in every context, and the published v* = W k + δ would move the bare prompt by W (k − k̄)
    besides, which can lose one of the facts. Beside held keys (``relation_keys``) it is ROME's form: what tells a key from
    held ones differs from context to context, and an update exact at the mean key writes little at the bare prompt.
    """

    name: ClassVar[str] = "rrome"

    def solve(self, problem: LayerProblem) -> Delta:
        """The rank-one update of one edit."""
        if problem.held is not None:
            return super().solve(problem)
        [keys], [residual] = problem.keys, problem.residual
        mean = reduce(keys, "c i -> 1 i", "mean")
        if problem.facts in ((), (1,)):
            residual = residual + problem.project(keys[:1] - mean)[0]  # v* − W k̄ = δ + W (k − k̄), as v* = W k + δ
        return problem.rank_one(mean, mean, residual)
