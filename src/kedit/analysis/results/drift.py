"""The result of attention drift: every probe and every head before and after edits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kedit.analysis.bootstrap import correlation, pearson, spearman
from kedit.analysis.checks import as_kind
from kedit.analysis.results.base import AnalysisResult
from kedit.errors import EditError
from kedit.evaluation.cases import Kind
from kedit.evaluation.statistics import Estimate, Floats, Tally, case_weights, difference, estimate

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
        """The probability that the right answer lost."""
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


@dataclass(frozen=True, eq=False)
class DriftResult(AnalysisResult):
    """Attention before and after the edits of some cases.

    Attributes:
        label: the editor with its regularizers.
        probes: one :class:`DriftProbe` each.
        layers: the blocks that have attention, L of them.
        failures: why a case could not be edited, by id.
    """

    label: str
    probes: tuple[DriftProbe, ...]
    layers: tuple[int, ...]
    failures: Mapping[str, str] = field(default_factory=dict)
    _correlations: dict[str, dict[str, dict[str, Estimate]]] = field(default_factory=dict, repr=False)

    def of(self, kind: Kind | str) -> tuple[DriftProbe, ...]:
        """The probes of one kind.

        Raises:
            EditError: there are none.
            ConfigError: there is no such kind.
        """
        wanted = as_kind(kind)
        probes = tuple(probe for probe in self.probes if probe.kind == wanted)
        if not probes:
            kinds = ", ".join(sorted({str(probe.kind) for probe in self.probes}))
            raise EditError(f"No probe of kind {kind} was asked; there are {kinds}.")
        return probes

    @property
    def main_kind(self) -> Kind:
        """Distracted neighbours where there are any, else the first kind that was asked."""
        kinds = [probe.kind for probe in self.probes]
        return Kind.DISTRACTED if Kind.DISTRACTED in kinds else kinds[0]

    def stack(self, name: str, kind: Kind | str | None = None) -> Floats:
        """A [L, A] attribute of all probes of a kind, [P, L, A]."""
        return np.stack([getattr(probe, name) for probe in self.of(kind or self.main_kind)]).astype(np.float64)

    def map(self, name: str, kind: Kind | str | None = None) -> Floats:
        """Mean over the probes of a kind, [L, A].

        ``name`` is an array of :class:`DriftProbe`, ``"gain"`` (the change of the weight on the subject) or ``"excess"`` (the
        same where the head over-attends, else 0).
        """
        if name in ("gain", "excess"):
            gain = self.stack("weight_after", kind) - self.stack("weight_before", kind)
            return np.asarray((gain * self.stack("over", kind) if name == "excess" else gain).mean(0))
        return np.asarray(self.stack(name, kind).mean(0))

    def heads(self, kind: Kind | str | None = None) -> list[Head]:
        """All heads, those that over-attend to the edited subject most first (by ``excess``)."""
        probes = self.of(kind or self.main_kind)
        loss = np.array([probe.loss for probe in probes])
        kl = self.stack("kl", kind)
        maps = {name: self.map(name, kind) for name in ("over", "excess", "gain", "kl", "weight_before")}
        heads = [
            Head(
                layer=layer,
                head=head,
                share=float(maps["over"][place, head]),
                excess=float(maps["excess"][place, head]),
                gain=float(maps["gain"][place, head]),
                before=float(maps["weight_before"][place, head]),
                kl=float(maps["kl"][place, head]),
                pearson=pearson(kl[:, place, head], loss),
            )
            for place, layer in enumerate(self.layers)
            for head in range(kl.shape[2])
        ]
        return sorted(heads, key=lambda one: -one.excess)

    def correlations(self, kind: Kind | str | None = None) -> dict[str, dict[str, Estimate]]:
        """By measure: Pearson's and Spearman's correlation with the loss, with intervals by case."""
        chosen = kind or self.main_kind
        if str(chosen) in self._correlations:  # thousands of resamples: drawn once
            return self._correlations[str(chosen)]
        probes = self.of(chosen)
        loss = np.array([probe.loss for probe in probes])
        groups = [probe.case for probe in probes]
        correlations = self._correlations.setdefault(str(chosen), {})
        for name in MEASURES:
            values = np.array([probe.measure(name) for probe in probes])
            correlations[name] = {
                "pearson": correlation(pearson, values, loss, groups),
                "spearman": correlation(spearman, values, loss, groups),
            }
        return correlations

    def against(self, other: DriftResult, kind: Kind | str | None = None) -> dict[str, Estimate]:
        """The drift of the heads that over-attend here, here and in ``other``, and the paired difference (other - here).

        Probes that only one of the two has asked are left out. Keys: ``"here"``, ``"other"``, ``"difference"``; mean KL of a
        head, in nats, with intervals by case.

        Raises:
            EditError: the two have no probe in common, or no head over-attends.
        """
        theirs = {(probe.case, probe.prompt): probe for probe in other.of(kind or self.main_kind)}
        pairs = [(one, theirs.get((one.case, one.prompt))) for one in self.of(kind or self.main_kind)]
        cases = list(dict.fromkeys(mine.case for mine, twin in pairs if twin is not None))
        if not cases:
            raise EditError("The two results are about different probes. Compare results of the same cases.")
        here: dict[str, list[float]] = {case: [] for case in cases}
        there: dict[str, list[float]] = {case: [] for case in cases}
        for mine, twin in pairs:
            if twin is not None and mine.over.any():
                here[mine.case].append(float(mine.kl[mine.over].mean()))
                there[mine.case].append(float(twin.kl[mine.over].mean()))
        tallies = [Tally.of([values[case] for case in cases]) for values in (here, there)]
        weights = case_weights(len(cases))
        means = [estimate([tally], weights) for tally in tallies]
        change = difference([tallies[1]], [tallies[0]], weights)
        if means[0] is None or means[1] is None or change is None:
            raise EditError(f"Under {self.label} no head attends to the edited subject more than any did before.")
        return {"here": means[0], "other": means[1], "difference": change}

    def comparison(self, other: DriftResult) -> str:
        """Say how :meth:`against` compares the two, or why they cannot be compared."""
        try:
            drift = self.against(other)
        except EditError as error:
            return str(error)
        return (
            f"In the heads that over-attend under {self.label}, the mean drift is {drift['here'].value:.3f} nats; "
            f"under {other.label} it is {drift['other'].value:.3f}."
        )

    def summary(self) -> str:
        """The correlations and the heads that over-attend most, as text."""
        kind = self.main_kind
        probes = self.of(kind)
        edits = len({probe.case for probe in probes})
        loss = float(np.mean([probe.loss for probe in probes]))
        lines = [
            f"{self.label}: {len(probes)} probes ({kind}) of {edits} edit{'s' * (edits > 1)}; the right answer's probability "
            f"changes by {-100 * loss:+.1f} points."
        ]
        if edits > 1:
            lines.append("Correlation with the loss of that probability [95%]:")
            for name, both in self.correlations(kind).items():
                lines.append(f"  {name:10s} Pearson {both['pearson'].text()}  Spearman {both['spearman'].text()}")
        lines.append("Heads that over-attend to the edited subject most:")
        lines.append("  block head  over-attends  weight before  gain    KL (nats)  Pearson with loss")
        for one in self.heads(kind)[:8]:
            lines.append(
                f"  {one.layer:5d} {one.head:4d}  {100 * one.share:10.0f}%  {one.before:13.3f}  {one.gain:+.3f}  "
                f"{one.kl:9.3f}  {'-' if one.pearson != one.pearson else format(one.pearson, '.2f'):>17s}"
            )
        if self.failures:
            lines.append(f"{len(self.failures)} cases could not be edited.")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON values: every probe with its numbers by block and head."""
        names = ["case", "prompt", "right", "wrong", "column"]
        names += ("right_before", "right_after", "wrong_before", "wrong_after")
        arrays = ("kl", "weight_before", "weight_after", "over")
        probes = [
            {
                **{name: getattr(probe, name) for name in names},
                "kind": str(probe.kind),
                **{name: getattr(probe, name).tolist() for name in arrays},
            }
            for probe in self.probes
        ]
        return {"label": self.label, "layers": list(self.layers), "probes": probes, "failures": dict(self.failures)}
