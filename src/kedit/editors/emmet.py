"""EMMET: MEMIT's batch with ROME's exact constraint (Gupta et al., 2024, arXiv:2403.14236)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from kedit.editors import presets
from kedit.editors.config import EditorConfig, hyper
from kedit.editors.solve_layers import LayerProblem
from kedit.editors.value_editor import MultiLayerEditor
from kedit.models import ModelArch
from kedit.patch.delta import Delta


class EMMET(MultiLayerEditor):
    """Equality-constrained editing: a batch in one layer, every residual written exactly where λ is 0.

    ::

        Δ = R (Kᵀ C'⁻¹ K + λ 1)⁻¹ Kᵀ C'⁻¹   with C' = α C

    which is MEMIT's solution with the weight α λ. A single edit needs no λ.
    """

    name: ClassVar[str] = "emmet"

    @dataclass(frozen=True, kw_only=True)
    class Config(EditorConfig):
        """EMMET's hyper-parameters.

        Attributes:
            alpha: α, the weight of the second moment.
            ridge: λ, used where a batch holds more than one edit.
        """

        alpha: float = hyper(1.0, above=0)
        ridge: float = hyper(0.1)

    config: Config

    def solve(self, problem: LayerProblem) -> Delta:
        """The constrained solution of one layer."""
        weight = self.config.alpha * self.config.ridge if len(problem.keys) > 1 else 0.0
        return problem.ridge(problem.own_keys, weight)

    @classmethod
    def rule(cls, arch: ModelArch) -> dict[str, Any]:
        """One layer, as ROME's; an ordinary key gets half of its change written in a batch (see :meth:`MEMIT.rule`)."""
        layer = presets.layer_rule(arch)
        return {**super().rule(arch), "layers": (layer,), "alpha": 1.0, "ridge": float(arch.memory_width(layer))}
