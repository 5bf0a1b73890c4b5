"""PMET (arXiv:2308.08742): optimise attention and MLP together, write only the MLP.

Two δ in the last edited block, at the outputs of the attention's output projection and of the down-projection, both
added at the subject's last token and optimised by one Adam; then MEMIT's spread with the down-projection's output as
the wanted quantity and *square-root* shares:

    R = (V − W K_bare) / √(number of edited blocks from ℓ on),   Δ_ℓ = R Kᵀ (λ C_ℓ + K Kᵀ)⁻¹

Conventions, where they differ from the inner loop of ROME and MEMIT:
- weight decay is the sum over the two sites of wd · ‖δ_site‖ / ‖t0_site‖²; each δ is clamped on its own t0.
- the NLL carries a factor: 1 at first; when, at a step, every target token of every context prompt is the argmax,
  0.1 from the *next* step on; 1 again after a step where that does not hold. The recorded NLL carries the factor.
- stop: total < 0.05; then: all targets argmax *and* the recorded KL (with its factor) ≤ 0.01; then the last step.
- R is measured at the down-projection of the *last edited block*, bias included, in the bare prompt.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .common import Pass, Request, attention_out, down, eager, forward, read
from .inner import Hyper, Value, kl_divergence, nll
from .memit import Spread, spread
from .sadr import penalty


@dataclass(frozen=True)
class TwoValues:
    attention: Value
    mlp: Value


def all_argmax(request: Request, passes: list[Pass]) -> bool:
    for prompt, out in zip(request.rewriting, passes, strict=True):
        for k, token in enumerate(prompt.targets):
            if out.logits[prompt.last + k].argmax() != token:
                return False
    return True


def optimise_two(model, request: Request, layer: int, hyper: Hyper) -> TwoValues:
    sites = [attention_out(model, layer), down(model, layer)]
    initial = [read(model, request.rewriting[0], site)[1] for site in sites]
    deltas = [torch.zeros_like(t0, requires_grad=True) for t0 in initial]
    adam = torch.optim.Adam(deltas, lr=hyper.lr)
    trajectories: list[list[Tensor]] = [[], []]
    losses = []
    factor = 1.0

    with eager(model):
        for step in range(hyper.steps):
            at = dict(zip(sites, deltas, strict=True))
            passes = [forward(model, prompt, at) for prompt in request.rewriting]
            kl_now = forward(model, request.kl, at).logits[request.kl.subject_last].log_softmax(-1)
            if step == 0:
                kl_before = kl_now.detach()
                before = [Pass(p.logits.detach(), [rows.detach() for rows in p.attentions]) for p in passes]

            loss_nll = factor * nll(request, passes)
            loss_kl = hyper.kl * kl_divergence(kl_now, kl_before)
            loss_decay = torch.zeros(())
            for delta, t0 in zip(deltas, initial, strict=True):
                loss_decay = loss_decay + hyper.weight_decay * delta.norm() / t0.norm() ** 2
            total = loss_nll + loss_kl + loss_decay
            loss_drift = torch.zeros(())
            if hyper.gamma:
                loss_drift = penalty(request.rewriting, passes, before, hyper.gamma, masked=hyper.masked)
                loss_drift = torch.as_tensor(loss_drift)
                total = total + loss_drift

            for trajectory, delta in zip(trajectories, deltas, strict=True):
                trajectory.append(delta.detach().clone())
            losses.append([x.item() for x in (total, loss_nll, loss_kl, loss_decay, loss_drift)])
            reached = all_argmax(request, passes)
            if total < hyper.stop or (reached and loss_kl <= 0.01) or step == hyper.steps - 1:
                break
            factor = 0.1 if reached else 1.0
            adam.zero_grad()
            total.backward()
            adam.step()
            with torch.no_grad():
                for delta, t0 in zip(deltas, initial, strict=True):
                    longest = hyper.clamp * t0.norm()
                    if delta.norm() > longest:
                        delta.mul_(longest / delta.norm())
    return TwoValues(*[Value(t, losses, t0) for t, t0 in zip(trajectories, initial, strict=True)])


def write(
    model,
    requests: list[Request],
    layers: list[int],
    moments: dict[int, Tensor],
    ridge: float,
    values: list[Value],
) -> Spread:
    """Write the MLP's values."""

    def solve(layer: int, keys: Tensor, residual: Tensor) -> Tensor:
        system = ridge * moments[layer].double() + keys @ keys.T
        return residual @ keys.T @ torch.linalg.inv(system)

    wanted = [value.target for value in values]
    return spread(model, requests, layers, wanted, down(model, max(layers)), lambda left: left**0.5, solve, values)


def pmet(
    model, requests: list[Request], layers: list[int], moments: dict[int, Tensor], ridge: float, hyper: Hyper
) -> Spread:
    """Optimise and write; the values of the result are the MLP's."""
    values = [optimise_two(model, request, max(layers), hyper).mlp for request in requests]
    return write(model, requests, layers, moments, ridge, values)
