"""The only Adam loop: the value to write, for several edits at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from kedit.errors import NonFiniteError
from kedit.regularizers.base import ForwardRecord, Regularizer, is_adaptive, score
from kedit.utils.progress import Progress, tell
from kedit.values.adam import Adam
from kedit.values.adaptive_weights import AdaptiveWeights
from kedit.values.forward import Runner, check_gradient
from kedit.values.plateau import Plateau

StepLog = dict[str, float]
LOSS_SCALE = 1024.0  # of float16 passes, whose small gradients would become 0


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The loss that is minimised, and when to stop.

    total = mean over contexts of NLL(target) + kl_factor · KL("{subject} is a") + weight_decay · ‖δ‖ / ‖v₀‖²
    + the regularizers' penalties. (The norm of δ is not squared: the published code's form.)

    Attributes:
        steps: forward passes at most, times the number of its facts for an edit that has several; the last one does not
            update.
        lr: Adam's step size.
        lr_relative: whether ``lr`` counts in units of v₀'s root mean square, ‖v₀‖ / √H, per edit and site. A step then has a
            length of about ``lr`` · ‖v₀‖, so the same number means the same for every model.
        clamp: bound of ‖δ‖ / ‖v₀‖, enforced after every update.
        stop_loss: an edit whose total falls below is finished.
        patience: with penalties, an edit whose NLL is at most ``stop_loss`` is also finished after so many steps in which its
            total did not fall by 1%; 0: never (the published form).
        settle: PMET's rule: an edit is also finished when every target token is the first choice and the KL term is
            at most 0.01; its NLL counts a tenth after a step at which every target token was.
        dtype: of δ; ``None``: float32, or float64 for a float64 model.
        compute_dtype: of the forward and backward passes (:func:`kedit.models.compute_copy.compute_dtype`); δ, the losses and
            the penalties are in ``dtype``.
    """

    steps: int
    lr: float
    weight_decay: float
    kl_factor: float
    clamp: float
    stop_loss: float
    lr_relative: bool = False
    settle: bool = False
    patience: int = 0
    dtype: torch.dtype | None = None
    compute_dtype: str | None = None


@dataclass(frozen=True)
class Values:
    """Optimised values.

    Attributes:
        delta: δ, [E, S, H].
        initial: v₀, the sites' output on the bare prompt before the edit, [E, S, H].
        log: per edit and step: step, total, nll, kl, weight_decay and one column per regularizer; with adaptive ones also
            ``weight`` and, where they were computed, their penalties before it, ``NAME_raw``.
        known: per edit, whether the model said the target before the edit.
    """

    delta: Tensor
    initial: Tensor
    log: list[list[StepLog]]
    known: list[bool]

    @property
    def value(self) -> Tensor:
        """v* = v₀ + δ, [E, S, H]."""
        return self.initial + self.delta

    def to(self, device: torch.device | str) -> Values:
        """The same on another device."""
        return replace(self, delta=self.delta.to(device), initial=self.initial.to(device))

    def only(self, edit: int) -> Values:
        """The value of one edit."""
        one = slice(edit, edit + 1)
        return Values(self.delta[one], self.initial[one], self.log[one], self.known[one])


def optimize(
    runner: Runner,
    objective: Objective,
    regularizers: Sequence[Regularizer] = (),
    *,
    numbers: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> Values:
    """Minimise the objective over δ for all edits of the runner's wave, each stopping on its own.

    The edits do not depend on one another: Adam works element by element, and a finished edit leaves the batch. Regularizers
    without a factor get one of their own per edit (:class:`~kedit.values.adaptive_weights.AdaptiveWeights`), which replaces the
    stopping rules.

    Args:
        runner: executes the wave.
        objective: the terms' factors and the stopping rule.
        regularizers: further terms.
        numbers: how the edits are called in messages; 0, 1, ... by default.
        progress: told about every finished edit.

    Raises:
        NonFiniteError: a loss is NaN or infinite.
    """
    state = _State(runner, numbers or range(runner.wave.num_edits), objective.dtype)
    names = [regularizer.name for regularizer in regularizers if is_adaptive(regularizer)]
    adaptive = AdaptiveWeights(names, objective.stop_loss, state.delta) if names else None
    # Attention that nothing weighs yet need not be captured.
    lazy = len(names) == len(regularizers) and bool(runner.needs.attention or runner.needs.keys)
    plateau = Plateau(len(state.delta), state.delta.detach())
    with runner.installed():
        steps = objective.steps * max(state.facts.tolist())
        for step in range(steps):
            tell("optimisation steps", step, steps)
            watched = step == 0 or adaptive is None or not lazy or adaptive.any_reached(state.active)
            runner.pause_capture(not watched)
            terms = state.run(step, objective, regularizers if watched else ())
            if not watched and bool((terms["nll"] <= objective.stop_loss).any()):
                del terms  # this pass lacks what the penalties see
                runner.pause_capture(False)
                terms = state.run(step, objective, regularizers)
            notes: dict[str, Tensor] = {}
            if adaptive is not None:
                notes, finished, started = adaptive.weigh(terms, state.delta, state.active)
                state.adam.restart(started)  # what it averaged so far belongs to another objective
            total = torch.stack(list(terms.values())).sum(0)
            state.record(step, total, {**terms, **notes})
            if adaptive is None:
                finished = total < objective.stop_loss
                if regularizers and objective.patience:
                    plateau.step(total.detach(), terms["nll"] <= objective.stop_loss, state.active)
                    finished |= plateau.waited[state.active] >= objective.patience
                if objective.settle:
                    finished |= state.settle(terms["kl"])
            finished |= step + 1 >= objective.steps * state.facts[state.active]
            if progress is not None:
                progress.advance(int(finished.sum()))
            if finished.all():
                break
            state.update(total, ~finished, objective)
            del terms, total  # or this step's logits would live on through the next one
            if finished.any():
                state.keep(torch.nonzero(~finished).flatten())
    values = state.values()
    return values if adaptive is None else replace(values, delta=adaptive.best(values.delta))


class _State:
    """δ of all edits, and which of them are still at work."""

    def __init__(self, runner: Runner, names: Sequence[int], dtype: torch.dtype | None) -> None:
        arch, num_edits, device = runner.arch, runner.wave.num_edits, runner.device
        shape = (num_edits, len(runner.sites), arch.hidden)
        self.runner = runner
        self.names = names
        self.delta = torch.zeros(shape, dtype=dtype or arch.work_dtype, device=device, requires_grad=True)
        self.active = torch.arange(num_edits, device=device)
        self.facts = runner.wave.facts.to(device)
        self.log: list[list[StepLog]] = [[] for _ in range(num_edits)]
        self.known = [False] * num_edits
        self._initial: Tensor | None = None
        self._before: ForwardRecord | None = None
        self._subject_log_probs: Tensor | None = None
        self._nll_factor = torch.ones(num_edits, device=device)
        self._missed: Tensor | None = None  # target tokens that are not the first choice, per active edit
        self.adam = Adam(self.delta.detach())
        self._loss_scale: Tensor | None = None  # per edit, [E]
        if arch.dtype == torch.float16:
            self._loss_scale = self.delta.new_full((num_edits,), LOSS_SCALE)

    @property
    def initial(self) -> Tensor:
        """v₀ of all edits, [E, S, H]; known after the first forward pass."""
        assert self._initial is not None
        return self._initial

    def values(self) -> Values:
        return Values(self.delta.detach(), self.initial, self.log, self.known)

    def run(self, step: int, objective: Objective, regularizers: Sequence[Regularizer]) -> dict[str, Tensor]:
        """One forward pass: the objective's terms, one value per active edit each."""
        reading = self.runner.run(self.delta[self.active])
        check_gradient(reading.logits)
        dtype, device = self.delta.dtype, self.delta.device
        if step == 0:
            self._initial = reading.initial.to(dtype)
        delta = self.delta[self.active]
        nll, subject = self._read(reading.logits, count_misses=step == 0 or objective.settle)
        if step == 0:
            self._subject_log_probs = subject.detach()
        assert self._subject_log_probs is not None
        kl = kl_div(self._subject_log_probs, subject, log_target=True, reduction="none").sum(-1)
        norms = self.initial[self.active].norm(dim=-1)
        decay = (delta.norm(dim=-1) / norms.square()).sum(-1)
        terms = {
            "nll": (nll * self._nll_factor.to(nll)).to(dtype),
            "kl": objective.kl_factor * kl.to(dtype),
            "weight_decay": objective.weight_decay * decay,
        }
        now = ForwardRecord(
            step=step, delta=delta, initial=self.initial[self.active], rewrite=reading.rewrite, extra=reading.extra
        )
        if step == 0:
            self._before = now.detach()
        assert self._before is not None
        for regularizer in regularizers:
            penalty = score(regularizer, now, self._before, self.runner.sites, self.runner.needs)
            terms[regularizer.name] = penalty.to(device, dtype)
        return terms

    def _read(self, logits: Tensor, *, count_misses: bool) -> tuple[Tensor, Tensor]:
        """NLL of the target, mean over tokens and contexts, [E]; log-probabilities of the KL prompt [E, V]."""
        reads = self.runner.reads
        log_probs = log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
        token_nll = -log_probs[reads.target, reads.label]
        nll = log_probs.new_zeros(len(self.active)).index_add(0, reads.edit, token_nll * reads.weight.to(token_nll))
        if count_misses:
            missed = log_probs.detach().argmax(1)[reads.target] != reads.label
            self._missed = torch.zeros_like(reads.subject).index_add(0, reads.edit, missed.long())
            if self._before is None:
                bare = torch.zeros_like(reads.subject).index_add(0, reads.edit, (missed & reads.bare).long())
                self.known = (bare == 0).tolist()
        return nll, log_probs[reads.subject]

    def record(self, step: int, total: Tensor, terms: dict[str, Tensor]) -> None:
        """Write the log; raise where a loss is not finite."""
        columns = {"total": total, **terms}
        rows = torch.stack(list(columns.values())).detach().cpu().tolist()
        for i, edit in enumerate(self.active.tolist()):
            row = {name: rows[j][i] for j, name in enumerate(columns)}
            self.log[edit].append({"step": float(step), **row})
            if not math.isfinite(row["total"]):
                bad = ", ".join(f"{name} {value:.4g}" for name, value in row.items())
                raise NonFiniteError(
                    f"The loss of edit {self.names[edit]} is not finite at step {step} ({bad}). Nothing was written. "
                    "Lower lr, or load the model in float32 or bfloat16 if it is float16."
                )

    def settle(self, kl: Tensor) -> Tensor:
        """PMET's second stopping rule [E]; sets the factor of the NLL for the next step."""
        assert self._missed is not None
        all_first = self._missed == 0
        self._nll_factor = torch.ones_like(kl).masked_fill(all_first, 0.1)
        return all_first & (kl <= 0.01)

    def update(self, total: Tensor, goes_on: Tensor, objective: Objective) -> None:
        """One Adam step for the edits that go on, and the clamp."""
        self.delta.grad = None
        scaled = total if self._loss_scale is None else total * self._loss_scale[self.active]
        scaled[goes_on].sum().backward()
        self.runner.backward_chunks()
        gradient = self.delta.grad
        assert gradient is not None
        moved = torch.zeros(len(self.delta), dtype=torch.bool, device=self.delta.device)
        moved[self.active[goes_on]] = True
        if self._loss_scale is not None:
            gradient, moved = self._unscaled(gradient, moved, self._loss_scale)
        with torch.no_grad():
            change = self.adam.change(gradient, moved, objective.lr)
            initial = self.initial.norm(dim=-1, keepdim=True)
            if objective.lr_relative:  # Adam's step does not depend on the gradient's scale
                change *= initial / math.sqrt(self.initial.shape[-1])
            value = self.delta + change
            bound = objective.clamp * initial
            norm = value.norm(dim=-1, keepdim=True)
            value *= torch.where(norm > bound, bound / norm, torch.ones_like(norm))
            self.delta[moved] = value[moved]

    def _unscaled(self, gradient: Tensor, moved: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient without the loss scale, and the edits whose gradient float16 can hold; others try a smaller scale next."""
        skipped = moved & ~gradient.isfinite().flatten(1).all(1) & (scale > 1)
        gradient = (gradient / scale[:, None, None]).masked_fill(skipped[:, None, None], 0)
        self._loss_scale = torch.where(skipped, (scale / 8).clamp(min=1), scale)
        return gradient, moved & ~skipped

    def keep(self, stays: Tensor) -> None:
        """Let the other edits leave the batch."""
        assert self._before is not None
        assert self._subject_log_probs is not None
        self.active = self.active[stays]
        self._before = self._before.keep_edits(stays)
        self._subject_log_probs = self._subject_log_probs[stays]
        self._nll_factor = self._nll_factor[stays]
        self.runner.restrict(stays.tolist())
