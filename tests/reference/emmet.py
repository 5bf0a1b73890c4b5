"""EMMET (arXiv:2403.14236): MEMIT's aim with equality constraints, which makes the batched form of ROME.

    Δ_ℓ = R (Kᵀ C'⁻¹ K + λI)⁻¹ Kᵀ C'⁻¹,   C' = αC,   λ = 0 for a batch of one

Conventions: values, keys, residuals and shares are MEMIT's (`memit.spread`); λ (0.1 as published) is only added for
two edits or more, to the E×E matrix.
"""

import torch
from torch import Tensor

from .common import Request, block
from .inner import Hyper, optimise
from .memit import Spread, spread


def emmet(
    model,
    requests: list[Request],
    layers: list[int],
    moments: dict[int, Tensor],
    alpha: float,
    ridge: float,
    hyper: Hyper,
) -> Spread:
    def solve(layer: int, keys: Tensor, residual: Tensor) -> Tensor:
        inverse = torch.linalg.inv(alpha * moments[layer].double())
        inner = keys.T @ inverse @ keys  # [E, E]
        if len(requests) > 1:
            inner = inner + ridge * torch.eye(len(requests), dtype=torch.float64)
        return residual @ torch.linalg.inv(inner) @ keys.T @ inverse

    site = block(model, max(layers))
    values = [optimise(model, request, site, hyper) for request in requests]
    return spread(model, requests, layers, [v.target for v in values], site, lambda left: left, solve, values)
