"""MEMIT (arXiv:2210.07229): many associations, spread over several blocks.

For every edit a wanted hidden state z at the output of the last edited block L; then per edited block ℓ, ascending:

    R = (Z − H) / (number of edited blocks from ℓ on, ℓ included)          [O, E]
    Δ_ℓ = R Kᵀ (λ C_ℓ + K Kᵀ)⁻¹                                           [O, I]

Conventions:
- all z are optimised on the unedited model, δ at the *block's output* of the last edited block; z = t0 + δ.
- H is that block's output at the subject's last token in the bare prompt, measured again before every Δ_ℓ, on the
  model that already carries the Δ of the lower blocks.
- a key is ½ · (bare prompt's) + ½ · (mean of the other contexts'), also measured on the model that carries the lower
  Δ; with the bare prompt as the only context it is that prompt's key.
- the share counts *places in the list*, not block numbers: with blocks 3, 5, 9 the shares are 1/3, 1/2, 1.
- the solve is in float64, the weight is changed in the model's dtype (the next block is measured on the rounded one).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .common import Request, block, down, read, weight, weights_kept
from .inner import Hyper, Value, optimise


@dataclass(frozen=True)
class Spread:
    values: list[Value]  # one per edit
    updates: dict[int, Tensor]  # block -> ΔW, [O, I]
    keys: dict[int, Tensor]  # block -> K, [I, E]
    residuals: dict[int, Tensor]  # block -> R after sharing, [O, E]


Solve = Callable[[int, Tensor, Tensor], Tensor]
"""(block, K [I, E], R [O, E]), in float64 -> Δ [O, I]."""


def key(model, request: Request, module: nn.Module) -> Tensor:
    keys = [read(model, prompt, module)[0] for prompt in request.rewriting]
    if len(keys) == 1:
        return keys[0]
    return (keys[0] + sum(keys[1:]) / len(keys[1:])) / 2


def write_updates(model, updates: dict[int, Tensor]) -> None:
    """Add ΔW to the weights, in the model's dtype."""
    with torch.no_grad():
        for layer, update in updates.items():
            stored = weight(model, layer)
            stored.add_(update.to(stored.dtype))


def spread(
    model,
    requests: list[Request],
    layers: list[int],
    wanted: list[Tensor],
    site: nn.Module,
    share: Callable[[int], float],
    solve: Solve,
    values: list[Value],
) -> Spread:
    """Write the wanted outputs of `site`, block by block; the model's weights are restored."""
    updates, all_keys, residuals = {}, {}, {}
    with weights_kept(model, layers):
        for place, layer in enumerate(sorted(layers)):
            keys = torch.stack([key(model, request, down(model, layer)) for request in requests], 1)
            current = torch.stack([read(model, request.rewriting[0], site)[1] for request in requests], 1)
            residual = (torch.stack(wanted, 1) - current) / share(len(layers) - place)
            delta = solve(layer, keys.double(), residual.double())
            write_updates(model, {layer: delta})
            updates[layer], all_keys[layer], residuals[layer] = delta, keys, residual
    return Spread(values, updates, all_keys, residuals)


def memit(
    model, requests: list[Request], layers: list[int], moments: dict[int, Tensor], ridge: float, hyper: Hyper
) -> Spread:
    def solve(layer: int, keys: Tensor, residual: Tensor) -> Tensor:
        system = ridge * moments[layer].double() + keys @ keys.T
        return residual @ keys.T @ torch.linalg.inv(system)

    site = block(model, max(layers))
    values = [optimise(model, request, site, hyper) for request in requests]
    return spread(model, requests, layers, [v.target for v in values], site, lambda left: left, solve, values)
