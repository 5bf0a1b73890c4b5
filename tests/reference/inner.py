"""The inner loop of ROME and the MEMIT family: find δ, and so the value v* = t0 + δ that has to be written.

Adam on δ from 0, added to a module's output at the subject's last token in every prompt, the KL prompt included:

    L = mean_j NLL_j + kl · KL(p_δ ‖ p_0) + wd · ‖δ‖ / ‖t0‖² + penalty

Conventions:
- NLL_j is the mean over the target's tokens; the mean over contexts j is unweighted; the bare prompt is one context.
- the KL prompt is "{subject} is a", without context; its distribution is read at the *subject's last token* (not at
  the prompt's last one); p_0 is the distribution at δ = 0; KL(edited ‖ original).
- weight decay uses ‖δ‖, not its square, over ‖t0‖²; its gradient at δ = 0 is 0.
- t0 is the module's output at the subject's last token in the bare prompt only.
- per step: forward, record the losses, stop if the total (penalty included) is < 0.05, stop if it is the last step,
  Adam step, then clamp ‖δ‖ to c·‖t0‖. So the last recorded losses belong to the δ that is returned.
- Adam with torch's defaults (β 0.9, 0.999, ε 1e-8), no decay; clamping does not touch its moments.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .common import Pass, Request, eager, forward, read
from .sadr import penalty


@dataclass(frozen=True)
class Hyper:
    """Hyper-parameters of the inner loop; γ as it multiplies the penalty."""

    steps: int = 20
    lr: float = 0.5
    weight_decay: float = 0.5
    kl: float = 0.0625
    clamp: float = 4.0
    gamma: float = 0.0
    masked: bool = True
    stop: float = 0.05


@dataclass(frozen=True)
class Value:
    """The outcome for one site."""

    trajectory: list[Tensor]  # δ at each step, [H] each; the first is 0, the last is what is written
    losses: list[list[float]]  # per step: total, nll, kl, weight decay, penalty
    initial: Tensor  # t0, [H]

    @property
    def delta(self) -> Tensor:
        return self.trajectory[-1]

    @property
    def target(self) -> Tensor:
        return self.initial + self.delta


def nll(request: Request, passes: list[Pass]) -> Tensor:
    """Mean over contexts of the mean over target tokens of −log p."""
    total = 0.0
    for prompt, out in zip(request.rewriting, passes, strict=True):
        log_probs = out.logits.log_softmax(-1)
        for k, token in enumerate(prompt.targets):
            total = total - log_probs[prompt.last + k, token] / len(prompt.targets)
    return total / len(passes)


def kl_divergence(edited: Tensor, original: Tensor) -> Tensor:
    """KL(edited ‖ original) of two vectors of log-probabilities."""
    return (edited.exp() * (edited - original)).sum()


def optimise(model, request: Request, site: nn.Module, hyper: Hyper) -> Value:
    """Optimise δ at one module's output."""
    _, t0 = read(model, request.rewriting[0], site)
    delta = torch.zeros_like(t0, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=hyper.lr)
    trajectory, losses = [], []
    before: list[Pass] = []
    kl_before = None

    with eager(model):
        for step in range(hyper.steps):
            passes = [forward(model, prompt, {site: delta}) for prompt in request.rewriting]
            kl_logits = forward(model, request.kl, {site: delta}).logits[request.kl.subject_last]
            kl_now = kl_logits.log_softmax(-1)
            if step == 0:
                kl_before = kl_now.detach()
                before = [Pass(p.logits.detach(), [rows.detach() for rows in p.attentions]) for p in passes]

            loss_nll = nll(request, passes)
            loss_kl = hyper.kl * kl_divergence(kl_now, kl_before)
            loss_decay = hyper.weight_decay * delta.norm() / t0.norm() ** 2
            total = loss_nll + loss_kl + loss_decay
            loss_drift = torch.zeros(())
            if hyper.gamma:
                loss_drift = penalty(request.rewriting, passes, before, hyper.gamma, masked=hyper.masked)
                loss_drift = torch.as_tensor(loss_drift)
                total = total + loss_drift

            trajectory.append(delta.detach().clone())
            losses.append([x.item() for x in (total, loss_nll, loss_kl, loss_decay, loss_drift)])
            if total < hyper.stop or step == hyper.steps - 1:
                break
            adam.zero_grad()
            total.backward()
            adam.step()
            with torch.no_grad():
                longest = hyper.clamp * t0.norm()
                if delta.norm() > longest:
                    delta.mul_(longest / delta.norm())
    return Value(trajectory, losses, t0)
