"""One question, and one head, before and after edits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kedit.analysis.intervals import Floats
from kedit.evaluation.cases import Kind

MEASURES = {
    "drift": "drift: KL(before ‖ after) of the last token's row, summed over blocks and heads, in nats",
    "restrained": "the same, over the heads that attend to the subject more than any head did before",
    "subject": "change of the last token's attention to the subject's last token, mean over blocks and heads",
}


@dataclass(frozen=True, eq=False)
class DriftProbe:
    """One question before and after its edit.

    Attributes:
        case: id of the case.
        kind: of the probe.
        prompt: what was asked.
        right: the right answer.
        wrong: the wrong one, if any.
        tokens: the prompt's tokens as text, T of them.
        column: the last token of the edited subject's last mention.
        right_before: probability of the right answer (geometric mean over its tokens) in the original model.
        right_after: the same in the edited model.
        wrong_before: probability of the wrong answer.
        wrong_after: the same in the edited model.
        kl: KL(before ‖ after) of the last token's row in nats, [L, A].
        weight_before: its weight on ``column`` before, [L, A].
        weight_after: and after.
        over: whether the head attends to ``column`` more than any head of its block did before (SADR's mask), bool [L, A].
        map_before: highest weight of the heads of each block, [L, T].
        map_after: the same in the edited model.
    """

    case: str
    kind: Kind
    prompt: str
    right: str
    wrong: str | None
    tokens: tuple[str, ...]
    column: int
    right_before: float
    right_after: float
    wrong_before: float | None
    wrong_after: float | None
    kl: Floats
    weight_before: Floats
    weight_after: Floats
    over: npt.NDArray[np.bool_]
    map_before: Floats
    map_after: Floats

    @property
    def loss(self) -> float:
        """How much probability the right answer lost."""
        return self.right_before - self.right_after

    def measure(self, name: str) -> float:
        """One of :data:`MEASURES`."""
        if name == "drift":
            return float(self.kl.sum())
        if name == "restrained":
            return float((self.kl * self.over).sum())
        return float((self.weight_after - self.weight_before).mean())


@dataclass(frozen=True)
class Head:
    """One head over all probes of a kind.

    Attributes:
        layer: its block.
        head: its number.
        share: share of probes in which it over-attends to the edited subject (SADR's mask).
        excess: weight on the subject that it gained there, mean over all probes (0 where it does not over-attend).
        gain: mean change of its weight on the subject.
        before: its mean weight on the subject before.
        kl: mean KL in nats.
        pearson: correlation of its KL with the loss of the right answer's probability; NaN where it never moves.
    """

    layer: int
    head: int
    share: float
    excess: float
    gain: float
    before: float
    kl: float
    pearson: float
