"""MEMIT (Meng et al., 2023, arXiv:2210.07229) and its relatives that share the ridge solution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kedit.editors import presets
from kedit.editors.config import EditorConfig
from kedit.editors.solve_layers import LayerProblem
from kedit.editors.value_editor import ValueEditor
from kedit.models import ModelArch, Site
from kedit.patch.delta import Delta


def mixed_keys(keys: Tensor) -> Tensor:
    """One key per edit from the keys per context [E, C, I]: half the bare prompt's, half the mean of the others'."""
    return keys[:, 0] if keys.shape[1] == 1 else (keys[:, 0] + keys[:, 1:].mean(1)) / 2


def largest_weight(weight: float, overlaps: Tensor, share: float) -> float:
    """``weight``, or less: what lets the median edit have ``share`` of its change written.

    An edit alone gets x / (λ + x) of it, where x [E] is kᵀ C⁻¹ k (MEMIT) or ‖P k‖² (AlphaEdit).
    """
    return min(weight, float(overlaps.median()) * (1 - share) / share)


class MEMIT(ValueEditor):
    """Mass editing: many associations, several layers, one ridge solution per layer.

    The value z is optimised at the output of the last edited block; where the block normalises its MLP's output, at the
    MLP's, as no change of the MLP gives a wanted change behind a norm. Layer by layer, lowest first, with the residual
    measured anew below L::

        R = (z − h_L) / (L − l + 1),   Δ_l = R Kᵀ (λ C + K Kᵀ)⁻¹

    exact at the bare prompt as λ → 0 with one layer and ``contexts=["{}"]``.
    """

    name: ClassVar[str] = "memit"
    batched: ClassVar[bool] = True

    @dataclass(frozen=True, kw_only=True)
    class Config(EditorConfig):
        """MEMIT's hyper-parameters.

        Attributes:
            moment_weight: λ, how much the keys of ordinary text weigh against the edits (``mom2_update_weight``).
            min_share: λ is lowered until the median edit, written alone, gets this share of its change; 0: never (the
                published form).
        """

        moment_weight: float = 15_000.0
        min_share: float = 0.0

        def __post_init__(self) -> None:
            """Check every field."""
            super().__post_init__()
            self.check_range("moment_weight")
            self.check_range("min_share", below=1.0)

    def sites(self, config: Any) -> tuple[Site, ...]:
        """The output of the last edited block, or its MLP's where the block normalises that."""
        return (self.arch.output_site(config.layers[-1]),)

    def residual_divisor(self, config: Any, layer: int) -> float:
        """The number of layers left to write, this one included."""
        return float(len(config.layers) - config.layers.index(layer))

    def solve(self, insertion: LayerProblem, config: Any) -> Delta:
        """The ridge solution of one layer."""
        keys, weight = mixed_keys(insertion.keys), config.moment_weight
        if config.min_share:
            overlaps = (keys.to(torch.float64) * insertion.whiten(keys)).sum(1)
            weight = largest_weight(weight, overlaps, config.min_share)
        return insertion.ridge(keys, weight)

    @classmethod
    def rule(cls, arch: ModelArch) -> dict[str, Any]:
        """The blocks around ROME's, up to five of them, and a λ that weighs the same in every model.

        kᵀ C⁻¹ k is the keys' width on average over ordinary text, and an edit gets kᵀ C⁻¹ k / (λ + kᵀ C⁻¹ k) of its change
        written. With λ = width an ordinary key gets half, and a subject's, rarer than that, most; of a subject as common as
        ordinary words ``min_share`` sees to it.
        """
        layers = presets.layer_span_rule(arch)
        found = {**super().rule(arch), "layers": layers}
        if "moment_weight" in cls.Config.field_names():
            found["moment_weight"] = float(arch.memory_width(layers[-1]))
        if "min_share" in cls.Config.field_names():
            found["min_share"] = presets.MIN_SHARE
        return found
