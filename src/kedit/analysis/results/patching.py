"""The result of activation patching."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kedit.analysis.interventions import LABELS
from kedit.analysis.results.base import AnalysisResult
from kedit.errors import UnknownNameError
from kedit.evaluation.cases import Kind
from kedit.evaluation.statistics import Estimate, Floats, case_weights

RESTORE = "restore"
CONTAMINATE = "contaminate"
LEAST_DAMAGE = 0.01  # of probability; a share of less says nothing
ORIGINAL, EDITED = 0, 1  # the first two conditions of every result


@dataclass(frozen=True)
class Condition:
    """An exchange of activations, and the model it is made in.

    Attributes:
        direction: ``"restore"`` (the edited model gets original values) or ``"contaminate"`` (the other way round).
        activation: ``"weights"``, ``"attention"``, ``"mlp"`` or ``"hidden"``.
        layers: the blocks in which it is exchanged.
        centre: the block that the window is around; ``None`` for all blocks or chosen heads.
        name: of a set of heads.
        heads: the (block, head) pairs whose weights are exchanged; empty for all heads.
    """

    direction: str
    activation: str
    layers: tuple[int, ...]
    centre: int | None
    name: str | None = None
    heads: tuple[tuple[int, int], ...] = ()

    @classmethod
    def original(cls) -> Condition:
        """The original model, nothing exchanged."""
        return cls("original", "", (), None)

    @classmethod
    def edited(cls) -> Condition:
        """The edited model, nothing exchanged."""
        return cls("edited", "", (), None)

    def heads_of(self, layer: int, count: int) -> list[int]:
        """The heads of a block that are exchanged, of ``count``."""
        if self.name is None:
            return list(range(count))
        return [head for block, head in self.heads if block == layer]

    def __str__(self) -> str:
        if not self.activation:
            return f"the {self.direction} model"
        if self.name is not None:
            return f"{self.direction} {LABELS[self.activation]} of {self.name}"
        where = "all blocks" if self.centre is None else f"block {self.centre}"
        if self.centre is not None and len(self.layers) > 1:
            where = f"blocks {self.layers[0]}-{self.layers[-1]}"
        return f"{self.direction} {LABELS[self.activation]}, {where}"


@dataclass(frozen=True, eq=False)
class PatchingResult(AnalysisResult):
    """Probabilities of right and wrong answers under every exchange of activations.

    Attributes:
        label: the editor with its regularizers.
        kind: of the probes.
        window: blocks per window.
        num_layers: blocks of the model.
        conditions: the original model, the edited model, then the exchanges: C of them.
        cases: the case of each probe, [P].
        probabilities: of the right and of the wrong answer (geometric mean over its tokens), [C, P, 2].
        failures: why a case could not be edited, by id.
    """

    label: str
    kind: Kind
    window: int
    num_layers: int
    conditions: tuple[Condition, ...]
    cases: tuple[str, ...]
    probabilities: Floats
    failures: Mapping[str, str] = field(default_factory=dict)

    def find(
        self, direction: str, activation: str = "weights", centre: int | None = None, name: str | None = None
    ) -> int:
        """Number of a condition; ``centre=None`` is all blocks.

        Raises:
            UnknownNameError: it was not run.
        """
        for i, one in enumerate(self.conditions):
            if (one.direction, one.activation, one.centre, one.name) == (direction, activation, centre, name):
                return i
        asked = Condition(direction, activation, (), centre, name)
        raise UnknownNameError(f"{asked} was not run. There are: {'; '.join(map(str, self.conditions))}.")

    @property
    def passed(self) -> Floats:
        """100 where the right answer is the likelier one, else 0: [C, P]. Its mean is the score (DNS)."""
        return np.where(self.probabilities[..., 0] > self.probabilities[..., 1], 100.0, 0.0)

    def score(self, condition: int) -> Estimate:
        """Share of the probes whose right answer is the likelier one, in per cent, with its interval by case."""
        sums, counts, weights = self._by_case(self.passed)
        drawn = (weights @ sums[condition]) / (weights @ counts)
        return self._estimate(float(self.passed[condition].mean()), drawn)

    def damage(self, of: str) -> float:
        """Loss per probe from the edit: points of the ``"score"``, or ``"probability"`` of the right answer (0 to 1)."""
        values = self._values(of)
        return float(values[ORIGINAL].mean() - values[EDITED].mean())

    @property
    def scale(self) -> str:
        """The scale of shares: the score, or the right answer's probability where no score was lost."""
        return "score" if self.damage("score") > 0 else "probability"

    def share(self, condition: int, *, of: str | None = None) -> Estimate | None:
        """Return how much of the damage an exchange undoes (``restore``) or does (``contaminate``), as a share of all of it.

        0 is nothing, 1 is all: (exchanged - edited) / (original - edited), or its complement.

        Args:
            condition: its number.
            of: ``"score"`` or ``"probability"``; by default :attr:`scale`.

        Returns:
            The share with its interval by case; ``None`` where the edit did no damage (less than a point of probability).
        """
        of = of or self.scale
        if self.damage(of) <= (0 if of == "score" else LEAST_DAMAGE):
            return None
        sums, _, weights = self._by_case(self._values(of))
        base, sign = (EDITED, 1.0) if self.conditions[condition].direction == RESTORE else (ORIGINAL, -1.0)
        gained = sign * (sums[condition] - sums[base])
        lost = weights @ (sums[ORIGINAL] - sums[EDITED])
        drawn = np.divide(weights @ gained, lost, out=np.full_like(lost, np.nan), where=lost > 0)
        total = float(sums[ORIGINAL].sum() - sums[EDITED].sum())
        return self._estimate(float(gained.sum()) / total, drawn)

    def summary(self) -> str:
        """Scores and shares of the exchanges in all blocks and of chosen heads, as text."""
        edits = len(set(self.cases))
        before, after = self._values("probability")[: EDITED + 1].mean(1)
        scores = [self.score(state).text(1, unit="%") for state in (ORIGINAL, EDITED)]
        lines = [
            f"{self.label}: {len(self.cases)} probes ({self.kind}) of {edits} edit{'s' * (edits > 1)}. Right answer likelier: "
            f"{scores[0]} originally, {scores[1]} after the edit; its probability: {100 * before:.1f}% and {100 * after:.1f}%.",
        ]
        if self.damage(self.scale) <= (0 if self.scale == "score" else LEAST_DAMAGE):
            return "\n".join(
                [*lines, "The edit did no damage to these probes, so there is none that an exchange could undo or do."]
            )
        lines.append(f"{'Exchanged at the last token':70s} {'score':20s} share of the lost {self.scale}")
        for i, one in enumerate(self.conditions[2:], start=2):
            if one.centre is None:
                share = self.share(i)
                cell = "none was done" if share is None else share.text(1, 100, "%")
                lines.append(f"  {one!s:68s} {self.score(i).text(1, unit='%'):20s} {cell}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON values: every probability."""
        conditions = [
            {"text": str(one), "direction": one.direction, "activation": one.activation, "layers": list(one.layers)}
            for one in self.conditions
        ]
        return {
            "label": self.label,
            "kind": str(self.kind),
            "window": self.window,
            "conditions": conditions,
            "cases": list(self.cases),
            "probabilities": self.probabilities.tolist(),
        }

    def _values(self, of: str) -> Floats:
        return self.passed if of == "score" else self.probabilities[..., 0]

    def _by_case(self, values: Floats) -> tuple[Floats, Floats, Floats]:
        """Sums per condition and case [C, cases], probes per case [cases], bootstrap weights [B, cases]."""
        names = list(dict.fromkeys(self.cases))
        member = np.array([[case == name for name in names] for case in self.cases], dtype=np.float64)
        return values @ member, member.sum(0), case_weights(len(names))

    def _estimate(self, value: float, drawn: Floats) -> Estimate:
        return Estimate.of(value, drawn, len(self.cases), len(set(self.cases)))
