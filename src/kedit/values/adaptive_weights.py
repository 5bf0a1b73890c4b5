"""Factors for penalties that have none of their own: the least penalty among the values that say the target."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kedit.values.plateau import Plateau

START = 0.1  # nats: the weight at first
RISE, FALL = 1.4, 0.5  # by which the weight changes per step at most
PATIENCE = 5  # steps without a smaller penalty, after which an edit is finished
SHARE, LEAST = 1 / 3, 5  # steps after the one that says the target: so much of those before it at most, or so many


class AdaptiveWeights:
    """One weight per edit, found by dual ascent.

    The problem is: minimise the penalty D(δ) subject to NLL(δ) ≤ τ, where τ is the objective's ``stop_loss``. Until the
    target is said for the first time (NLL ≤ τ), nothing is restrained, as the plain optimisation does. From then on the
    objective has the term::

        w · mean_r D_r(δ) / D_r(δ₁)

    over the adaptive regularizers r, where δ₁ is the value that first said the target. The weight w starts at 0.1
    nats and is multiplied by τ / NLL after each step, by 1.4 at most and 0.5 at least. An edit is finished 5 steps after its
    penalty stopped falling, or when it has made a third as many steps as until the target was said (five where that is less).
    Of the values that said the target, the one with the least penalty is kept; where there is none, the last value.

    A penalty counts only relative to itself, so its unit, and the number of heads and blocks in it, have no influence.
    """

    def __init__(self, names: Sequence[str], threshold: float, delta: Tensor) -> None:
        self.names = tuple(names)
        self.threshold = threshold
        edits = len(delta)
        self._scale = delta.new_zeros(len(names), edits)  # 1 / D(δ₁); 0 where there is nothing to restrain
        self._weight = delta.new_zeros(edits)
        self._reached = torch.zeros(edits, dtype=torch.bool, device=delta.device)
        self._before, self._after = delta.new_zeros(2, edits)  # steps until the target is said, and from then on
        self._plateau = Plateau(edits, delta.detach())
        self._best = delta.detach().clone()

    def weigh(
        self, terms: dict[str, Tensor], delta: Tensor, active: Tensor
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Replace the penalties in ``terms`` by what counts of them at this step.

        Args:
            terms: the objective's terms, one value per active edit each; those of the adaptive regularizers are D. They may be
                missing as long as no edit has said its target.
            delta: δ of all edits, [E, S, H].
            active: the edits at work, [A].

        Returns:
            Further columns of the log ("weight", and D as "NAME_raw"), which active edits are finished, [A], and which of all
            edits have said their target for the first time, [E].
        """
        if self.names[0] not in terms:
            nothing = torch.zeros_like(terms["nll"])
            terms.update(dict.fromkeys(self.names, nothing))
            self._before[active] += 1
            return {"weight": nothing}, torch.zeros_like(active, dtype=torch.bool), torch.zeros_like(self._reached)
        said = terms["nll"].detach() <= self.threshold
        penalties = torch.stack([terms[name] for name in self.names])
        raw = penalties.detach()
        first = said & ~self._reached[active]
        started = active[first]
        self._scale[:, started] = torch.where(raw[:, first] > 0, 1 / raw[:, first], 0)
        self._weight[started] = START
        self._reached[started] = True
        relative = penalties * self._scale[:, active]
        self._keep_best(relative.detach().mean(0), said, delta, active)
        weight = self._weight[active].clone()
        for name, one in zip(self.names, relative, strict=True):
            terms[name] = weight * one / len(self.names)
        reached = self._reached[active]
        tiny = torch.finfo(weight.dtype).tiny
        ratio = (self.threshold + tiny) / (terms["nll"].detach().to(weight) + tiny)
        self._weight[active] = weight * ratio.clamp(FALL, RISE)
        self._before[active] += ~reached
        self._after[active] += reached & ~first
        columns = {"weight": weight} | {f"{name}_raw": one for name, one in zip(self.names, raw, strict=True)}
        most = (SHARE * self._before[active]).floor().clamp(min=LEAST)
        ended = (self._plateau.waited[active] >= PATIENCE) | (self._plateau.least[active] <= 0)
        ended |= self._after[active] >= most
        start = torch.zeros_like(self._reached)
        start[started] = True
        return columns, reached & ended, start

    def any_reached(self, active: Tensor) -> bool:
        """Whether one of the edits ``active`` [A] has said its target, now or earlier: only then do the penalties count."""
        return bool(self._reached[active].any())

    def _keep_best(self, score: Tensor, said: Tensor, delta: Tensor, active: Tensor) -> None:
        chosen = active[self._plateau.step(score, said, active)]
        self._best[chosen] = delta.detach()[chosen]

    def best(self, delta: Tensor) -> Tensor:
        """δ of all edits [E, S, H]: the best value of those that said the target, else the last one."""
        return torch.where(self._reached[:, None, None], self._best, delta.detach())
