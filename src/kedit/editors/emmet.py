"""EMMET: MEMIT's batch with ROME's exact constraint (Gupta et al. 2024, arXiv:2403.14236)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from kedit.editors import presets
from kedit.editors.config import EditorConfig
from kedit.editors.memit import MEMIT, mixed_keys
from kedit.editors.solve_layers import LayerProblem
from kedit.models import ModelArch
from kedit.patch.delta import Delta


class EMMET(MEMIT):
    """EMMET (Gupta et al., 2024, arXiv:2403.14236): equality-constrained editing of a batch in one layer.

    Δ = R (Kᵀ C'⁻¹ K + λ 1)⁻¹ Kᵀ C'⁻¹ with C' = α C, which is MEMIT's solution with the weight α λ. A single edit needs no
    λ and is then written exactly, as by ROME.
    """

    name: ClassVar[str] = "emmet"

    @dataclass(frozen=True, kw_only=True)
    class Config(EditorConfig):
        """EMMET's hyper-parameters.

        Attributes:
            alpha: α, the weight of the second moment.
            ridge: λ, used where a batch holds more than one edit.
        """

        alpha: float = 1.0
        ridge: float = 0.1

        def __post_init__(self) -> None:
            """Check every field."""
            super().__post_init__()
            self.check_range("alpha", above=0.0)
            self.check_range("ridge")

    def solve(self, insertion: LayerProblem, config: Any) -> Delta:
        """The constrained solution of one layer."""
        weight = config.alpha * config.ridge if len(insertion.keys) > 1 else 0.0
        return insertion.ridge(mixed_keys(insertion.keys), weight)

    @classmethod
    def rule(cls, arch: ModelArch) -> dict[str, Any]:
        """One layer, as ROME's; an ordinary key gets half of its change written in a batch (see :meth:`MEMIT.rule`)."""
        layer = presets.layer_rule(arch)
        return {**super().rule(arch), "layers": (layer,), "alpha": 1.0, "ridge": float(arch.memory_width(layer))}
