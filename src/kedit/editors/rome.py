"""ROME (Meng et al., 2022, arXiv:2202.05262) and R-ROME (Gupta et al., 2024, arXiv:2403.07175)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from kedit.editors.closed_forms import rank_one
from kedit.editors.config import EditorConfig
from kedit.editors.solve_layers import LayerProblem
from kedit.editors.value_editor import ValueEditor
from kedit.errors import ConfigError
from kedit.models import Site
from kedit.patch.delta import Delta


class ROME(ValueEditor):
    """Rank-one model editing: one association, one layer.

    The value is optimised at the MLP's output; with k̄ the mean key over the contexts and k the bare prompt's key::

        u = C⁻¹ k̄ / ‖C⁻¹ k̄‖,   Δ = (v* − W k) uᵀ / (uᵀ k)

    hence (W + Δ) k = v* at the bare prompt (the published code's convention).
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(EditorConfig):
        """ROME's hyper-parameters: those that all editors share, with a single layer."""

        def __post_init__(self) -> None:
            """Check every field."""
            super().__post_init__()
            if len(self.layers) != 1:
                raise ConfigError(f"ROME writes into one layer, not {self.layers}. MEMIT spreads an edit over several.")

    name: ClassVar[str] = "rome"
    context_lengths: ClassVar[tuple[tuple[int, int], ...]] = ((5, 10), (10, 10))

    def sites(self, config: Any) -> tuple[Site, ...]:
        """The MLP's output of the edited block."""
        return (Site(config.layers[-1], "mlp"),)

    def solve(self, insertion: LayerProblem, config: Any) -> Delta:
        """The rank-one update of one edit."""
        keys = insertion.keys[0]  # [C, I]
        whitened = insertion.whiten(keys.mean(0, keepdim=True))[0]
        return rank_one(whitened, keys[0], insertion.residual[0])


class RROME(ROME):
    """R-ROME: the mean key everywhere, which keeps long sequences of edits stable.

    Δ = (v* − W k̄) uᵀ / (uᵀ k̄), hence (W + Δ) k̄ = v* at the mean key.
    """

    name: ClassVar[str] = "rrome"

    def solve(self, insertion: LayerProblem, config: Any) -> Delta:
        """The rank-one update of one edit."""
        keys = insertion.keys[0]
        mean = keys.mean(0)
        whitened = insertion.whiten(mean[None])[0]
        # v* − W k̄ = δ + W (k − k̄), as v* = W k + δ.
        shift = insertion.project((keys[0] - mean)[None])[0]
        return rank_one(whitened, mean, insertion.residual[0] + shift)
