"""PMET: precise model editing (Li et al., 2024, arXiv:2308.08742)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from kedit.editors.memit import MEMIT
from kedit.models import ModelArch, Site


class PMET(MEMIT):
    """PMET: values for attention and MLP together, of which the MLP's is written.

    Two δ are optimised, at the outputs of the attention and of the MLP of the last edited block, each with its own clamp and
    weight decay. MEMIT's solution then writes the MLP's, with the residual divided by a root::

        R = (v* − m_L) / √(L − l + 1),   Δ_l = R Kᵀ (λ C + K Kᵀ)⁻¹
    """

    name: ClassVar[str] = "pmet"

    @dataclass(frozen=True, kw_only=True)
    class Config(MEMIT.Config):
        """PMET's hyper-parameters.

        Attributes:
            moment_weight: λ.
            settle: the published stopping rule: besides ``stop_loss``, an edit is finished when every target token is
                the model's first choice and the KL term is at most 0.01, and its NLL counts a tenth after a step at
                which every target token was.
        """

        moment_weight: float = 6_000.0
        kl_factor: float = 1.0
        settle: bool = True

    config: Config

    def sites(self) -> tuple[Site, ...]:
        """The MLP's output, which is written, and the attention's."""
        return (Site(self.config.layers[-1], "mlp"), Site(self.config.layers[-1], "attention"))

    def residual_divisor(self, remaining: int) -> float:
        """The root of the number of layers left to write."""
        return math.sqrt(remaining)

    @classmethod
    def rule(cls, arch: ModelArch) -> dict[str, Any]:
        """As MEMIT's, and one block further up: the lower the site, the more the attention's δ says of what is not written."""
        values = {**super().rule(arch), "lr": 0.25, "clamp": 4.0}  # half of the change is not written: it takes more
        above = values["layers"][-1] + 1
        return values if above > arch.num_layers - 2 else {**values, "layers": (*values["layers"], above)}
