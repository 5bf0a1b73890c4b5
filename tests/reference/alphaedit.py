"""AlphaEdit (arXiv:2410.02355): MEMIT's spread, with the update projected on what the model's own keys leave free.

    C = U diag(s) Uᵀ,  U₀ the eigenvectors with s < 0.02 (absolute),  P = U₀U₀ᵀ
    (P (KKᵀ + C_p) + L2·I) X = P K Rᵀ,   Δ = Xᵀ

Conventions: values, keys, residuals and shares are MEMIT's. C_p holds the keys of earlier batches, Σ KKᵀ per block; it
is 0 in the first batch. After a batch is written *at every block*, its keys are read again on the edited model and
their KKᵀ added. The system is solved as it stands (it is not symmetric); X lies in the range of P all the same, as
L2·X = P (K Rᵀ − (KKᵀ + C_p) X). Published in float32, here in float64.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .common import Request, block, down, weights_kept
from .inner import Hyper, optimise
from .memit import Spread, key, spread, write_updates


def projector(second_moment: Tensor, threshold: float = 0.02) -> Tensor:
    values, vectors = torch.linalg.eigh(second_moment.double())
    free = [vectors[:, i] for i in range(len(values)) if values[i] < threshold]
    total = torch.zeros_like(second_moment, dtype=torch.float64)
    for vector in free:
        total += torch.outer(vector, vector)
    return total


@dataclass(frozen=True)
class Step:
    spread: Spread
    past: dict[int, Tensor]  # C_p after this batch, per block [I, I]


def alphaedit(
    model,
    requests: list[Request],
    layers: list[int],
    moments: dict[int, Tensor],
    l2: float,
    hyper: Hyper,
    past: dict[int, Tensor] | None = None,
    threshold: float = 0.02,
) -> Step:
    """Run one batch; the model's weights stay as they were (apply `spread.updates` before the next batch)."""
    width = next(iter(moments.values())).shape[0]
    past = past or {layer: torch.zeros(width, width, dtype=torch.float64) for layer in layers}

    def solve(layer: int, keys: Tensor, residual: Tensor) -> Tensor:
        p = projector(moments[layer], threshold)
        system = p @ (keys @ keys.T + past[layer]) + l2 * torch.eye(width, dtype=torch.float64)
        return (torch.linalg.inv(system) @ p @ keys @ residual.T).T

    site = block(model, max(layers))
    values = [optimise(model, request, site, hyper) for request in requests]
    result = spread(model, requests, layers, [v.target for v in values], site, lambda left: left, solve, values)

    after = {}
    with weights_kept(model, layers):
        write_updates(model, result.updates)
        for layer in layers:
            keys = torch.stack([key(model, request, down(model, layer)) for request in requests], 1).double()
            after[layer] = past[layer] + keys @ keys.T
    return Step(result, after)
