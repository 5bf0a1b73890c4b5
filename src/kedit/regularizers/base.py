"""The interface of a regularizer: one method asks for activations, one scores them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from kedit.errors import ConfigError
from kedit.models import Site
from kedit.utils.validation import check_number, is_number


def blocks_from(first: int, last: int | None = None) -> range:
    """Blocks ``first`` to ``last`` (included); to the top of the model without ``last``."""
    return range(first, (1 << 30) if last is None else last + 1)


def _cover(one: range, other: range) -> range:
    """The smallest range that holds both."""
    if not one or not other:
        return one or other
    return range(min(one.start, other.start), max(one.stop, other.stop))


@dataclass(frozen=True, kw_only=True)
class Needs:
    """The activations that a regularizer wants to see of every forward pass.

    Attributes:
        attention: blocks whose attention rows are captured (the row of the last prompt token, before the target);
            a range may reach past the last block: ``blocks_from(3)``.
        hidden: blocks whose output is captured at the last prompt token.
        keys: blocks whose attention keys are captured at the subject's last token.
        logits: whether the logits at the last prompt token are wanted.
        prompts: further prompts about the edit's subject, one ``{}`` each; they run beside the edit's own prompts,
            and what is captured of them stands in ``ForwardRecord.extra``.
        neighbours: other subjects. For each, and for each of several facts, a prompt runs in which the edited sentence comes first
            and then the edit's prompt about the other subject, with the edit's target after it (``Activations.target_nll``);
            their numbers in ``ForwardRecord.extra`` follow those of ``prompts``.
        held: prompts about the edit's subject, one ``{}`` each, at whose keys of the subject the closed form shall change nothing,
            while it writes the value also where the subject stands alone. They are no part of the forward passes. For an edit
            whose prompt says nothing before its subject nothing is held: its key is that of the subject alone.
        hold: how much the mean squared change at these keys weighs, against that at the keys of ordinary text.
    """

    attention: range = range(0)
    hidden: range = range(0)
    keys: range = range(0)
    logits: bool = False
    prompts: tuple[str, ...] = ()
    neighbours: tuple[str, ...] = ()
    held: tuple[str, ...] = ()
    hold: float = 1.0

    def __post_init__(self) -> None:
        """Check the prompts and the other subjects."""
        for name, prompts in (("prompts", self.prompts), ("held", self.held)):
            if isinstance(prompts, str) or any(p.count("{}") != 1 for p in prompts):
                raise ConfigError(
                    f"Needs.{name} is a tuple of texts with one '{{}}' each, the place of the subject; found {prompts!r}."
                )
        check_number("Needs.hold", self.hold)
        if isinstance(self.neighbours, str) or any(not name.strip() or "{}" in name for name in self.neighbours):
            raise ConfigError(
                f"Needs.neighbours is a tuple of other subjects, each a text without '{{}}'; found {self.neighbours!r}."
            )

    def __or__(self, other: Needs) -> Needs:
        """The activations of both; extra prompts stay in order, those of ``self`` first."""
        return Needs(
            attention=_cover(self.attention, other.attention),
            hidden=_cover(self.hidden, other.hidden),
            keys=_cover(self.keys, other.keys),
            logits=self.logits or other.logits,
            prompts=tuple(dict.fromkeys((*self.prompts, *other.prompts))),
            neighbours=tuple(dict.fromkeys((*self.neighbours, *other.neighbours))),
            held=tuple(dict.fromkeys((*self.held, *other.held))),
            hold=max([one.hold for one in (self, other) if one.held], default=self.hold),
        )

    def numbers_in(self, asked: Needs) -> list[int]:
        """The numbers that the further prompts have among those of ``asked``."""
        after = len(asked.prompts)
        return [
            *(asked.prompts.index(prompt) for prompt in self.prompts),
            *(after + asked.neighbours.index(subject) for subject in self.neighbours),
        ]


def mean_by_edit(values: Tensor, edit: Tensor, num_edits: int) -> Tensor:
    """Mean of values [P, ...] over the prompts of each edit, by the edit [P] of every prompt: [E, ...]."""
    total = values.new_zeros(num_edits, *values.shape[1:]).index_add(0, edit, values)
    counts = torch.bincount(edit, minlength=num_edits).clamp(min=1)
    return total / counts.view(-1, *[1] * (values.ndim - 1))


@dataclass(frozen=True, kw_only=True)
class Activations:
    """The activations of P prompts, read at each prompt's last token.

    Attributes:
        edit: [P], the edit (0..E-1) that each prompt belongs to.
        context: [P], number of the context (or of the extra prompt, as in ``Needs.prompts``) among those of its edit.
        subject: [P], column of the subject's last token in the attention rows.
        attention: by block, [P, A, Tk]: probabilities of the last prompt token's row, float32 or float64.
        hidden: by block, [P, H].
        keys: by block, [P, A / G, D]: attention keys of the subject's last token, after rotary embedding.
        logits: [P, V], or ``None`` if nobody asked.
        target_nll: [P], mean NLL of the target's tokens in nats after the prompts of ``Needs.neighbours``, 0 for others; ``None``
            if nobody asked.
    """

    edit: Tensor
    context: Tensor
    subject: Tensor
    attention: Mapping[int, Tensor] = field(default_factory=dict)
    hidden: Mapping[int, Tensor] = field(default_factory=dict)
    keys: Mapping[int, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None
    target_nll: Tensor | None = None

    def mean_per_edit(self, values: Tensor, num_edits: int) -> Tensor:
        """Mean of one value per prompt [P] over the prompts of each edit: [E]."""
        return mean_by_edit(values, self.edit, num_edits)

    def detach(self) -> Activations:
        """The same without gradient."""
        return replace(
            self,
            attention={layer: rows.detach() for layer, rows in self.attention.items()},
            hidden={layer: rows.detach() for layer, rows in self.hidden.items()},
            keys={layer: keys.detach() for layer, keys in self.keys.items()},
            logits=None if self.logits is None else self.logits.detach(),
            target_nll=None if self.target_nll is None else self.target_nll.detach(),
        )

    def take(self, prompts: Tensor) -> Activations:
        """Only the given prompts."""
        return replace(
            self,
            edit=self.edit[prompts],
            context=self.context[prompts],
            subject=self.subject[prompts],
            attention={layer: rows[prompts] for layer, rows in self.attention.items()},
            hidden={layer: rows[prompts] for layer, rows in self.hidden.items()},
            keys={layer: keys[prompts] for layer, keys in self.keys.items()},
            logits=None if self.logits is None else self.logits[prompts],
            target_nll=None if self.target_nll is None else self.target_nll[prompts],
        )

    def keep_edits(self, keep: Tensor, num_edits: int) -> Activations:
        """Only the prompts of the edits ``keep`` of ``num_edits``, renumbered in order."""
        number = torch.full((num_edits,), -1, device=self.edit.device)
        number[keep] = torch.arange(len(keep), device=self.edit.device)
        taken = self.take(torch.nonzero(number[self.edit] >= 0).flatten())
        return replace(taken, edit=number[taken.edit])

    def only(self, needs: Needs) -> Activations:
        """Only the kinds and blocks that ``needs`` names."""
        return replace(
            self,
            attention={layer: rows for layer, rows in self.attention.items() if layer in needs.attention},
            hidden={layer: rows for layer, rows in self.hidden.items() if layer in needs.hidden},
            keys={layer: keys for layer, keys in self.keys.items() if layer in needs.keys},
            logits=self.logits if needs.logits else None,
            target_nll=self.target_nll if needs.neighbours else None,
        )

    def keep_contexts(self, keep: Sequence[int]) -> Activations:
        """Only the contexts ``keep``, numbered by their place in it; rows in the order of edit and context."""
        number = {old: new for new, old in enumerate(keep)}
        held = [
            (edit, number[context], row)
            for row, (edit, context) in enumerate(zip(self.edit.tolist(), self.context.tolist(), strict=True))
            if context in number
        ]
        order = torch.tensor([row for _, _, row in sorted(held)], dtype=torch.int64, device=self.edit.device)
        context = torch.tensor([new for _, new, _ in sorted(held)], dtype=torch.int64, device=self.edit.device)
        return replace(self.take(order), context=context)


@dataclass(frozen=True, kw_only=True)
class ForwardRecord:
    """One forward pass as a regularizer sees it.

    Attributes:
        step: number of the optimisation step, from 0; at step 0 δ is 0 and ``now`` equals ``before``.
        delta: δ, [E, S, H].
        initial: the site's output before any edit, [E, S, H].
        rewrite: the edit's prompt in every context.
        extra: the regularizers' own prompts.
    """

    step: int
    delta: Tensor
    initial: Tensor
    rewrite: Activations
    extra: Activations

    @property
    def num_edits(self) -> int:
        """E."""
        return int(self.delta.shape[0])

    def detach(self) -> ForwardRecord:
        """The same without gradient."""
        return replace(self, delta=self.delta.detach(), rewrite=self.rewrite.detach(), extra=self.extra.detach())

    def only(self, needs: Needs, asked: Needs) -> ForwardRecord:
        """The activations that ``needs`` names, of those captured for ``asked``; extra prompts are numbered as in ``needs``."""
        if needs == asked:
            return self
        extra = self.extra.keep_contexts(needs.numbers_in(asked))
        return replace(self, rewrite=self.rewrite.only(needs), extra=extra.only(needs))

    def keep_edits(self, keep: Tensor) -> ForwardRecord:
        """Only the edits ``keep``, renumbered in order."""
        return replace(
            self,
            delta=self.delta[keep],
            initial=self.initial[keep],
            rewrite=self.rewrite.keep_edits(keep, self.num_edits),
            extra=self.extra.keep_edits(keep, self.num_edits),
        )


@runtime_checkable
class Regularizer(Protocol):
    """A term added to the objective of every value optimisation.

    Write a class with these members and pass an object of it: ``editor.apply(edit, regularizer=Mine())``.
    A dataclass field left ``None`` may be filled from the editor's presets. A regularizer with the attribute ``adaptive =
    True`` returns penalties that need no factor: the optimisation finds the least penalty among the values that say the target
    (:class:`kedit.values.adaptive_weights.AdaptiveWeights`). It may be asked only at step 0 and once some target is said.
    One with the attribute ``closed_form = True`` has its term in the closed form (``Needs.held``) instead of the optimisation,
    which never asks for its penalty.
    """

    @property
    def name(self) -> str:
        """Its column in the log; unique among the regularizers of one run."""
        ...

    def needs(self, site: Site) -> Needs:
        """The activations to capture when a value is written at ``site``."""
        ...

    def penalty(self, now: ForwardRecord, before: ForwardRecord) -> Tensor:
        """One value per edit, [E]; ``before`` is step 0 without gradient."""
        ...


@dataclass(frozen=True, kw_only=True)
class WithGamma:
    """A regularizer whose penalty is γ times a measure.

    Attributes:
        gamma: γ; ``None``: that of the editor's preset for the model, and where there is none ``usual_gamma`` of the class,
            or, without one, as ``"auto"``: the optimisation finds, per edit, the least measure among the values that say the target
            (:class:`kedit.values.adaptive_weights.AdaptiveWeights`).

    Raises:
        ConfigError: γ is negative, not finite, or another text than ``"auto"``.
    """

    gamma: float | Literal["auto"] | None = None
    usual_gamma: ClassVar[float | None] = None  # where neither γ is given nor a preset has one

    def __post_init__(self) -> None:
        """Check γ."""
        if self.gamma is None or self.gamma == "auto":
            return
        if isinstance(self.gamma, str):
            raise ConfigError(f"{type(self).__name__}.gamma is a number, 'auto' or None, not {self.gamma!r}.")
        check_number(f"{type(self).__name__}.gamma", self.gamma)

    @property
    def adaptive(self) -> bool:
        """Whether the optimisation chooses the factor."""
        return not is_number(self._gamma)

    @property
    def factor(self) -> float:
        """What the measure is multiplied by: γ, or 1 where the optimisation weighs it."""
        return self._gamma if is_number(self._gamma) else 1.0

    @property
    def _gamma(self) -> float | Literal["auto"] | None:
        return self.usual_gamma if self.gamma is None else self.gamma


def check_texts(field: str, texts: tuple[str, ...] | None) -> None:
    """Raise ``ConfigError`` where a regularizer's texts, if any are given, are one text or none."""
    if texts is not None and (isinstance(texts, str) or not texts):
        raise ConfigError(f"{field} is a tuple of texts, one at least; found {texts!r}.")


def is_adaptive(regularizer: Regularizer) -> bool:
    """Whether the optimisation chooses the factor of a regularizer's penalty."""
    return bool(getattr(regularizer, "adaptive", False))


def in_closed_form(regularizer: Regularizer) -> bool:
    """Whether a regularizer has no part in the optimisation of the value."""
    return bool(getattr(regularizer, "closed_form", False))


def needs_of(regularizers: Sequence[Regularizer], sites: Sequence[Site]) -> Needs:
    """Collect the needs of some regularizers.

    Raises:
        ConfigError: ``needs`` of one of them returns something else.
    """
    needs = Needs()
    for regularizer in regularizers:
        for site in sites:
            asked: object = regularizer.needs(site)
            if not isinstance(asked, Needs):
                raise ConfigError(
                    f"needs(site) of the regularizer {regularizer.name!r} must return a kedit.regularizers.Needs; it returned "
                    f"{asked!r}. One that looks at nothing but δ returns Needs()."
                )
            needs = needs | asked
    return needs


def score(
    regularizer: Regularizer, now: ForwardRecord, before: ForwardRecord, sites: Sequence[Site], asked: Needs
) -> Tensor:
    """The penalty of one regularizer, which sees only what it asked for of all that was ``asked``; [E].

    Raises:
        ConfigError: the penalty is not one number per edit.
    """
    needs = needs_of([regularizer], sites)
    penalty = regularizer.penalty(now.only(needs, asked), before.only(needs, asked))
    if not isinstance(penalty, Tensor) or penalty.shape != (now.num_edits,):
        given = f"shape {tuple(penalty.shape)}" if isinstance(penalty, Tensor) else type(penalty).__name__
        raise ConfigError(
            f"The penalty of {regularizer.name!r} must be one number per edit, shape ({now.num_edits},); found {given}."
        )
    return penalty
