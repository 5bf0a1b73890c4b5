"""Keeping what the model says about the subject in other respects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import einsum
from torch import Tensor

from kedit.models import Site
from kedit.regularizers.base import ForwardRecord, Needs, WithGamma

PROMPTS = (
    "{} was born in",
    "{} works as",
    "{} is located in",
    "{} was founded in",
    "{} is known for",
    "{} belongs to",
    "The job of {} is",
    "The birthplace of {} is",
    "The nationality of {} is",
    "The partner of {} is",
    "The language of {} is",
    "The leader of {} is",
    "The creator of {} is",
    "The faith of {} is",
    "The school that {} attended is",
    "The size of {} is",
)


@dataclass(frozen=True, kw_only=True)
class Relations(WithGamma):
    """Keep the predictions after other prompts about the subject.

    The value of an edit is read by every prompt about the subject, so one that is optimised for a single prompt pushes its
    target into all of them. With p the original and q the current distribution of the next token after a prompt r, and a the
    original one after the edit's own prompt::

        penalty = γ · Σ_r (1 − BC(p_r, a)) · KL(p_r ‖ q_r),   BC(p, a) = Σ_v √(p(v) a(v))

    The overlap BC (Bhattacharyya coefficient) lets go of prompts that ask for the edited fact in other words: the model answered
    them as it answered the edit's. The same idea, with a single prompt and without the overlap, is the KL term of ROME.

    Attributes:
        gamma: γ; ``None``: that of the editor's preset for the model, or 0.25. The penalty is in nats, as the target's NLL is, so
            that 1 would count every prompt as much as the target.
        prompts: texts about the subject, one ``{}`` each; ``None``: 16 general ones (:data:`PROMPTS`).

    Raises:
        ConfigError: γ is negative or not finite, or a prompt has no ``{}``.
    """

    usual_gamma: ClassVar[float | None] = 0.25
    prompts: tuple[str, ...] | None = None

    @property
    def name(self) -> str:
        """``"relations"``."""
        return "relations"

    def needs(self, site: Site) -> Needs:
        """The logits after the edit's prompt and after the others."""
        return Needs(logits=True, prompts=PROMPTS if self.prompts is None else tuple(self.prompts))

    def penalty(self, now: ForwardRecord, before: ForwardRecord) -> Tensor:
        """γ · sum over the prompts of the weighted divergence, [E]."""
        original, current = _log_probs(before.extra.logits), _log_probs(now.extra.logits)
        divergence = (original.exp() * (original - current)).sum(-1) * (1 - _overlap(before))
        total = divergence.new_zeros(now.num_edits).index_add(0, now.extra.edit, divergence)
        return self.factor * total


def _log_probs(logits: Tensor | None) -> Tensor:
    assert logits is not None, "needs() asks for them"
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _overlap(before: ForwardRecord) -> Tensor:
    """BC of every extra prompt with its edit's own prompt, [P]; of several facts, with the closest one."""
    assert before.rewrite.logits is not None
    bare = before.rewrite.context == 0
    own = (_log_probs(before.rewrite.logits[bare]) / 2).exp()
    others = (_log_probs(before.extra.logits) / 2).exp()
    all_pairs = einsum(others, own, "p v, b v -> p b")
    same = before.extra.edit[:, None] == before.rewrite.edit[bare][None]
    return torch.where(same, all_pairs, 0).amax(1).clamp(max=1)
