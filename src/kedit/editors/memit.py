"""MEMIT: mass-editing memory in a transformer (Meng et al., 2023, arXiv:2210.07229)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from kedit.editors import presets
from kedit.editors.closed_forms import largest_weight
from kedit.editors.config import EditorConfig, hyper
from kedit.editors.solve_layers import LayerProblem
from kedit.editors.value_editor import MultiLayerEditor
from kedit.models import ModelArch
from kedit.patch.delta import Delta


class MEMIT(MultiLayerEditor):
    """Mass editing: many associations, several layers, one ridge solution per layer.

    The value z is optimised at the output of the last edited block; where the block normalises its MLP's output, at the
    MLP's, as no change of the MLP gives a wanted change behind a norm. Layer by layer, lowest first, with the residual
    measured anew below L::

        R = (z − h_L) / (L − l + 1),   Δ_l = R Kᵀ (λ C + K Kᵀ)⁻¹

    exact at the bare prompt as λ → 0 with one layer and ``contexts=["{}"]``.
    """

    name: ClassVar[str] = "memit"

    @dataclass(frozen=True, kw_only=True)
    class Config(EditorConfig):
        """MEMIT's hyper-parameters.

        Attributes:
            moment_weight: λ, how much the keys of ordinary text weigh against the edits (``mom2_update_weight``).
            min_share: λ is lowered until the median edit, written alone, gets this share of its change; 0: never (the
                published form).
        """

        moment_weight: float = hyper(15_000.0)
        min_share: float = hyper(0.0, below=1)

    config: Config

    def solve(self, problem: LayerProblem) -> Delta:
        """The ridge solution of one layer."""
        keys = problem.own_keys
        return problem.ridge(keys, self.weight_for(problem, keys))

    def weight_for(self, problem: LayerProblem, keys: Tensor) -> float:
        """λ for a batch with one key per edit, [E, I]: ``moment_weight``, or less by ``min_share``."""
        weight = self.config.moment_weight
        if not self.config.min_share:
            return weight
        overlaps = (keys.double() * problem.whiten(keys)).sum(1)
        return largest_weight(weight, overlaps, self.config.min_share)

    @classmethod
    def rule(cls, arch: ModelArch) -> dict[str, Any]:
        """MEMIT's blocks, and a λ that weighs the same in every model.

        kᵀ C⁻¹ k is the keys' width on average over ordinary text, and an edit gets kᵀ C⁻¹ k / (λ + kᵀ C⁻¹ k) of its change
        written. With λ = width an ordinary key gets half, and a subject's, rarer than that, most; of a subject as common as
        ordinary words ``min_share`` sees to it.
        """
        values = super().rule(arch)
        width = arch.memory_width(values["layers"][-1])
        return {**values, "moment_weight": float(width), "min_share": presets.MIN_SHARE}
