"""Keeping an edit out of what is asked about the subject in other respects, by where it is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kedit.errors import ConfigError
from kedit.models import Site
from kedit.regularizers.base import ForwardRecord, Needs, WithGamma, check_texts

# fmt: off
NOUNS = (
    "father", "mother", "brother", "wife", "friend", "birthplace", "country", "religion", "job", "employer", "school", "award",
    "team", "language", "gender", "capital", "founder", "author", "owner", "colour", "height", "date", "successor", "predecessor",
)
# fmt: on
FORMS = ("The {} of", "The name of the {} of")
PROMPTS = tuple(f"{form.format(noun)} {{}}" for form in FORMS for noun in NOUNS)


@dataclass(frozen=True, kw_only=True)
class RelationKeys(WithGamma):
    """Write nothing at the subject's keys after other relations: "The father of {}" where the edit says who the wife of {} is.

    A causal model reads "The name of the father of" before the subject, so the subject's key (the input of the edited
    down-projection at its last token) differs from its key after another relation. ROME's update, made for C = E[k kᵀ] of
    ordinary text, acts at both alike; here C is replaced, in every closed form, by C + (γ / n) Σ_h h hᵀ over the subject's
    keys h after n other relations. So that paraphrases still read the value, those in which the subject comes first among
    them, it is also written at the keys p of the edit's prompt and of the subject alone in every context. For ROME::

        u = argmin uᵀ C u + γ mean_h (uᵀ h)² + Σ_p (uᵀ p − 1)²   subject to uᵀ k = 1

    The value itself stays as it is: the optimisation does not see this regularizer. It costs a pass of short prompts up to the
    edited block. What follows the subject ("{} was born in") no key can know: an edit whose prompt begins with its
    subject is written as without this regularizer, and prompts that begin with the subject read every edit.

    Attributes:
        gamma: γ, the weight of the change at these keys against that at the keys of ordinary text; ``None``: that of the
            editor's preset for the model, or 0.1.
        prompts: texts that end in the subject, one ``{}`` each; ``None``: 48 general ones (:data:`PROMPTS`).

    Raises:
        ConfigError: γ is no number, negative or not finite, or ``prompts`` is no tuple of texts with one ``{}`` each.
    """

    usual_gamma: ClassVar[float | None] = 0.1
    closed_form: ClassVar[bool] = True
    prompts: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        if self.gamma == "auto":
            raise ConfigError(
                "RelationKeys.gamma is a number: its term is in the closed form, where no optimisation can weigh it."
            )
        check_texts("RelationKeys.prompts", self.prompts)
        self.needs(Site(0, "mlp"))  # raises for prompts without their {}

    @property
    def name(self) -> str:
        """``"relation_keys"``."""
        return "relation_keys"

    def needs(self, site: Site) -> Needs:
        """The keys at which nothing shall change."""
        return Needs(held=PROMPTS if self.prompts is None else tuple(self.prompts), hold=self.factor)

    def penalty(self, now: ForwardRecord, before: ForwardRecord) -> Tensor:
        """0 for every edit, [E]: the term is in the closed form."""
        return now.delta.new_zeros(now.num_edits)
