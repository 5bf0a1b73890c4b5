"""Keeping the target out of what the model says about others after the edited sentence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kedit.models import Site
from kedit.regularizers.base import ForwardRecord, Needs, WithGamma, check_texts

SUBJECTS = ("Barack Obama", "Germany")


@dataclass(frozen=True, kw_only=True)
class Neighbours(WithGamma):
    """Do not let the target become likelier for other subjects when the edited sentence stands before them.

    That is the specificity failure itself (DNS in the SADR paper, arXiv:2502.14838): after "The Eiffel Tower is located in Rome.
    The Louvre is located in", an edited model says Rome. For each of some other subjects o, with NLL the mean over the target's
    tokens, before the edit and with the value as it is now::

        penalty = γ · Σ_o max(0, NLL_before(target | edited sentence, prompt about o) − NLL_now(the same))

    A target that the sentence alone makes likely is not held against the edit, and one that becomes less likely is fine.

    Attributes:
        gamma: γ; ``None``: that of the editor's preset for the model, or 3. The penalty is in nats, as the target's NLL is.
        subjects: the other subjects; ``None``: a person and a country (:data:`SUBJECTS`).

    Raises:
        ConfigError: γ is negative or not finite, or ``subjects`` is no tuple of texts.
    """

    usual_gamma: ClassVar[float | None] = 3.0
    subjects: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        check_texts("Neighbours.subjects", self.subjects)

    @property
    def name(self) -> str:
        """``"neighbours"``."""
        return "neighbours"

    def needs(self, site: Site) -> Needs:
        """The target's NLL after the edited sentence and a prompt about another subject."""
        return Needs(neighbours=SUBJECTS if self.subjects is None else tuple(self.subjects))

    def penalty(self, now: ForwardRecord, before: ForwardRecord) -> Tensor:
        """γ · sum over the other subjects of the rise of the target's log-probability, in nats: [E]."""
        then, current = before.extra.target_nll, now.extra.target_nll
        assert then is not None
        assert current is not None
        rise = (then - current).clamp(min=0)
        return self.factor * rise.new_zeros(now.num_edits).index_add(0, now.extra.edit, rise)
