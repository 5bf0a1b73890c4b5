"""The result of causal tracing."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kedit.analysis.bootstrap import mean_map
from kedit.analysis.interventions import LABELS
from kedit.analysis.results.base import AnalysisResult
from kedit.errors import ConfigError, EditError
from kedit.evaluation.statistics import Floats

ROLES = ("subject first", "subject middle", "subject last", "next", "between", "last")
ROLE_LABELS = (
    "first subject token",
    "middle subject tokens",
    "last subject token",
    "first token after",
    "further tokens",
    "last token",
)
BESIDE = 2  # blocks on each side of a proposal at which edits should be tried too
MOST_LAYERS = 5  # a proposal for the multi-layer editors, as published ones


@dataclass(frozen=True, eq=False)
class FactTrace:
    """One traced fact.

    Attributes:
        prompt: what was asked.
        subject: what it is about.
        answer: the answer whose probability was measured.
        tokens: the prompt's tokens as text, T of them.
        span: the subject's first and last token.
        clean: probability of the whole answer in the clean run.
        corrupted: the same with noise on the subject; mean over the samples.
        effects: indirect effect by kind, [T, L]: probability with the activation restored minus ``corrupted``.
        margins: by kind, [T, L]: half the width of each effect's 95% interval over the samples of the noise; NaN with one sample.
    """

    prompt: str
    subject: str
    answer: str
    tokens: tuple[str, ...]
    span: tuple[int, int]
    clean: float
    corrupted: float
    effects: Mapping[str, Floats]
    margins: Mapping[str, Floats] = field(default_factory=dict)

    def roles(self) -> list[int]:
        """Each token's role as an index into :data:`ROLES`; -1 before the subject."""
        first, last = self.span
        end = len(self.tokens) - 1
        roles = []
        for token in range(len(self.tokens)):
            if token < first:
                roles.append(-1)
            elif token <= last:
                roles.append(2 if token == last else 0 if token == first else 1)
            else:
                roles.append(5 if token == end else 3 if token == last + 1 else 4)
        return roles

    def by_role(self, kind: str) -> Floats:
        """Mean effect of the tokens in each role, [6, L]; NaN where no token has it."""
        return self._by_role(self.effects[kind])

    def interval_by_role(self, kind: str) -> Floats:
        """:meth:`by_role` with its 95% interval over the samples of the noise: [3, 6, L] (mean, low, high).

        The noise is the same for all tokens, so that the margin of a mean over tokens is taken as the mean of their margins.
        """
        mean = self.by_role(kind)
        margin = self._by_role(self.margins[kind]) if kind in self.margins else np.full_like(mean, np.nan)
        return np.stack([mean, mean - margin, mean + margin])

    def _by_role(self, values: Floats) -> Floats:
        roles = np.asarray(self.roles())
        means = np.full((len(ROLES), values.shape[1]), np.nan)
        for role in range(len(ROLES)):
            if (roles == role).any():
                means[role] = values[roles == role].mean(0)
        return means


@dataclass(frozen=True)
class Suggestion:
    """Edit layers that tracing speaks for.

    Attributes:
        layer: for editors of one block: where the MLP's effect at the subject's last token is largest.
        layers: for editors of several: the blocks beside it whose effect is at least half as large.
        handover: the highest block whose hidden state there still has half of its largest effect (``None`` if hidden
            states were not traced); above it the fact has moved on to the last token.
        evidence: per block: MLP effect (mean, low, high) and hidden-state effect (the same, or ``None``).
        facts: how many were traced.
        to_try: blocks that edits should be tried at, to check the proposal: those around it.
    """

    layer: int
    layers: tuple[int, ...]
    handover: int | None
    evidence: tuple[tuple[tuple[float, ...], tuple[float, ...] | None], ...]
    facts: int
    to_try: tuple[int, ...] = ()

    @property
    def sweep(self) -> str:
        """The option of ``kedit sweep`` that tries edits at :attr:`to_try`."""
        return _sweep(self.to_try)

    def __str__(self) -> str:
        about = f"(facts traced: {self.facts}), in points of probability [95% over facts]"
        lines = [f"Indirect effect at the subject's last token {about}:", *_rows(self.evidence, self.layers)]
        several = ", ".join(map(str, self.layers))
        lines.append(
            f"Proposal: layers={self.layer} for ROME, R-ROME and EMMET; layers=({several},) for MEMIT and its kin."
        )
        if self.handover is not None:
            lines.append(f"The hidden state there carries the fact up to block {self.handover}; edit no higher.")
        lines.append(
            f"Tracing shows where a fact is read, not where editing works best: check with kedit sweep {self.sweep}"
        )
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class TraceResult(AnalysisResult):
    """Traced facts and their averages.

    Attributes:
        facts: one :class:`FactTrace` each.
        kinds: what was restored.
        num_layers: blocks of the model, L.
        settings: noise (in deviations), deviation (of the noise itself), samples, seed, window.
        skipped: prompts whose answer the model does not know.
        unfinished: prompts that were not traced because of an interrupt.
    """

    facts: tuple[FactTrace, ...]
    kinds: tuple[str, ...]
    num_layers: int
    settings: Mapping[str, Any]
    skipped: tuple[str, ...] = ()
    unfinished: tuple[str, ...] = ()
    _averages: dict[str, Floats] = field(default_factory=dict, repr=False)

    def average(self, kind: str) -> Floats:
        """Average indirect effect by role and block with its 95% bootstrap interval over facts: [3, 6, L].

        The first axis is mean, low, high; the second follows :data:`ROLES`. NaN where no fact has the role. Of a single fact, the
        interval is over the samples of the noise.
        """
        if kind not in self._averages:
            one = len(self.facts) == 1
            self._averages[kind] = (
                self.facts[0].interval_by_role(kind)
                if one
                else mean_map(np.stack([fact.by_role(kind) for fact in self.facts]))
            )
        return self._averages[kind]

    def evidence(self) -> tuple[tuple[tuple[float, ...], tuple[float, ...] | None], ...]:
        """Per block, at the subject's last token: the MLP's effect (mean, low, high) and the hidden state's, if it was traced."""
        at = ROLES.index("subject last")
        mlp = self.average("mlp")[:, at]
        hidden = self.average("hidden")[:, at] if "hidden" in self.kinds else None
        return tuple(
            (tuple(map(float, mlp[:, i])), None if hidden is None else tuple(map(float, hidden[:, i])))
            for i in range(self.num_layers)
        )

    def suggest(self) -> Suggestion:
        """Propose edit layers; needs the kind ``"mlp"``.

        Only a block where the MLP's effect at the subject's last token is above 0 with its whole interval over the facts is
        proposed.

        Raises:
            ConfigError: MLP outputs were not traced.
            EditError: there is no such block, so tracing speaks for none; a single fact was traced, which says nothing of others.
        """
        if "mlp" not in self.kinds:
            raise ConfigError("Edit layers are proposed from the MLP's effects. Trace with kinds that include 'mlp'.")
        if len(self.facts) == 1:
            raise EditError(self._of_one_fact())
        at = ROLES.index("subject last")
        mlp = self.average("mlp")[:, at]
        hidden = self.average("hidden")[:, at] if "hidden" in self.kinds else None
        handover = None
        if hidden is not None and _supported(hidden).any():
            handover = int(np.flatnonzero(hidden[0] >= hidden[0].max() / 2)[-1])
        top = self.num_layers - 1 if handover is None else handover
        effect = np.where(_supported(mlp), mlp[0], -np.inf)[: top + 1]
        layer = int(effect.argmax())
        if not np.isfinite(effect[layer]):
            raise EditError(
                f"There is no evidence for any edit layer: up to block {top}, restoring MLP outputs at the subject's last token "
                f"brings nothing that differs from 0 (facts traced: {len(self.facts)}). Trace more facts, or more samples."
            )
        layers = _around(mlp[0], layer, top)
        to_try = tuple(sorted({*layers, *self._beside(layer)}))
        return Suggestion(layer, layers, handover, self.evidence(), len(self.facts), to_try)

    def _beside(self, layer: int) -> range:
        return range(max(0, layer - BESIDE), min(self.num_layers, layer + BESIDE + 1))

    def _of_one_fact(self) -> str:
        """The evidence of a single fact, and why nothing is proposed from it."""
        evidence = self.evidence()
        layer = int(np.argmax([mlp[0] for mlp, _ in evidence]))
        mlp = np.array(evidence[layer][0])
        said = f"the MLP output of block {layer} has the largest effect, {_cell(mlp)} points"
        clear = bool(_supported(mlp[:, None])[0]) and not np.isnan(mlp[1])
        said += "" if clear else ", which does not clearly differ from 0"
        lines = [
            "Indirect effect at the subject's last token in this fact, in points of probability [95% over the noise samples]:",
            *_rows(evidence, ()),
            f"No layers are proposed from a single fact, as others may be stored elsewhere. In this one {said}. Trace more facts "
            "(--data, --cases)"
            + (f", or see where edits work: kedit sweep {_sweep(self._beside(layer))}" if clear else "."),
        ]
        return "\n".join(lines)

    def summary(self) -> str:
        """The averages as text: per kind, where the largest effects are."""
        clean = float(np.mean([fact.clean for fact in self.facts]))
        corrupted = float(np.mean([fact.corrupted for fact in self.facts]))
        number = "1 fact" if len(self.facts) == 1 else f"{len(self.facts)} facts"
        left = f", {len(self.unfinished)} not finished" if self.unfinished else ""
        lines = [
            f"{number} traced ({len(self.skipped)} not known, left out{left}); the answer's probability is "
            f"{100 * clean:.1f}% clean and {100 * corrupted:.1f}% with noise on the subject.",
            f"Largest average indirect effects, in points of probability [95% over {self._interval_over}]:",
        ]
        for kind in self.kinds:
            average = self.average(kind)
            for role, label in ((2, ROLE_LABELS[2]), (5, ROLE_LABELS[5])):
                if np.isnan(average[0, role]).all():
                    continue
                layer = int(np.nanargmax(average[0, role]))
                lines.append(f"  {LABELS[kind]:16s} {label:18s} block {layer:2d}: {_cell(average[:, role, layer])}")
        return "\n".join(lines)

    @property
    def _interval_over(self) -> str:
        return "the noise samples" if len(self.facts) == 1 else "facts"

    def to_dict(self) -> dict[str, Any]:
        """JSON values: every fact's effects and the averages (NaN as null)."""
        facts = [
            {
                **{name: getattr(fact, name) for name in ("prompt", "subject", "answer", "clean", "corrupted")},
                "tokens": list(fact.tokens),
                "span": list(fact.span),
                "effects": {kind: fact.effects[kind].tolist() for kind in self.kinds},
                "margins": {kind: _no_nan(fact.margins[kind].tolist()) for kind in self.kinds if kind in fact.margins},
            }
            for fact in self.facts
        ]
        averages = {kind: _no_nan(self.average(kind).tolist()) for kind in self.kinds}
        return {
            "settings": dict(self.settings),
            "roles": list(ROLES),
            "averages": averages,
            "facts": facts,
            "skipped": list(self.skipped),
            **({"unfinished": list(self.unfinished)} if self.unfinished else {}),
        }


def _supported(effect: Floats) -> npt.NDArray[np.bool_]:
    """Mark where an effect (mean, low, high) [3, L] is above 0 with its interval; [L]."""
    mean, low = effect[0], effect[1]
    return np.asarray((mean > 0) & ((low > 0) | np.isnan(low)))


def _around(effect: Floats, peak: int, top: int) -> tuple[int, ...]:
    """Neighbouring blocks up to ``top`` with at least half the peak's effect, the larger side first."""
    low = high = peak
    while high - low + 1 < MOST_LAYERS:
        sides = [i for i in (low - 1, high + 1) if 0 <= i <= top and effect[i] >= effect[peak] / 2]
        if not sides:
            break
        best = max(sides, key=lambda i: effect[i])
        low, high = min(low, best), max(high, best)
    return tuple(range(low, high + 1))


def _sweep(layers: Iterable[int]) -> str:
    return f"--set layers={','.join(map(str, layers))}"


def _rows(evidence: Iterable[tuple[Any, Any]], marked: Collection[int]) -> list[str]:
    """The table of :meth:`TraceResult.evidence`, a line per block."""
    lines = ["block   MLP output             hidden state"]
    for layer, (mlp, hidden) in enumerate(evidence):
        mark = " *" if layer in marked else "  "
        lines.append(f"{layer:5d}{mark} {_cell(mlp):22s} {'' if hidden is None else _cell(hidden)}".rstrip())
    return lines


def _cell(interval: Any) -> str:
    value, low, high = (100 * float(part) for part in interval)
    return f"{value:.1f}" if np.isnan(low) else f"{value:.1f} [{low:.1f}, {high:.1f}]"


def _no_nan(values: Any) -> Any:
    if isinstance(values, list):
        return [_no_nan(value) for value in values]
    return None if values != values else values
