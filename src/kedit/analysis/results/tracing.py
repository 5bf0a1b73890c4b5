"""The result of causal tracing."""

from __future__ import annotations

from collections.abc import Mapping
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
    """

    prompt: str
    subject: str
    answer: str
    tokens: tuple[str, ...]
    span: tuple[int, int]
    clean: float
    corrupted: float
    effects: Mapping[str, Floats]

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
        roles = np.asarray(self.roles())
        effect = self.effects[kind]
        means = np.full((len(ROLES), effect.shape[1]), np.nan)
        for role in range(len(ROLES)):
            if (roles == role).any():
                means[role] = effect[roles == role].mean(0)
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
    """

    layer: int
    layers: tuple[int, ...]
    handover: int | None
    evidence: tuple[tuple[tuple[float, ...], tuple[float, ...] | None], ...]
    facts: int

    def __str__(self) -> str:
        lines = [
            f"Indirect effect at the subject's last token (facts traced: {self.facts}), in points of probability [95%]:",
            "block   MLP output             hidden state",
        ]
        for layer, (mlp, hidden) in enumerate(self.evidence):
            mark = " *" if layer in self.layers else "  "
            lines.append(f"{layer:5d}{mark} {_cell(mlp):22s} {'' if hidden is None else _cell(hidden)}".rstrip())
        several = ", ".join(map(str, self.layers))
        lines.append(
            f"Proposal: layers={self.layer} for ROME, R-ROME and EMMET; layers=({several},) for MEMIT and its kin."
        )
        if self.handover is not None:
            lines.append(f"The hidden state there carries the fact up to block {self.handover}; edit no higher.")
        lines.append("Tracing shows where a fact is read, not where editing works best: compare with kedit eval.")
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

        The first axis is mean, low, high; the second follows :data:`ROLES`. NaN where no fact has the role.
        """
        if kind not in self._averages:
            self._averages[kind] = mean_map(np.stack([fact.by_role(kind) for fact in self.facts]))
        return self._averages[kind]

    def suggest(self) -> Suggestion:
        """Propose edit layers; needs the kind ``"mlp"``.

        Only a block where the MLP's effect at the subject's last token is above 0 is proposed; with several facts its whole
        interval has to be.

        Raises:
            ConfigError: MLP outputs were not traced.
            EditError: there is no such block, so tracing speaks for none.
        """
        if "mlp" not in self.kinds:
            raise ConfigError("Edit layers are proposed from the MLP's effects. Trace with kinds that include 'mlp'.")
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
        evidence = tuple(
            (tuple(map(float, mlp[:, i])), None if hidden is None else tuple(map(float, hidden[:, i])))
            for i in range(self.num_layers)
        )
        return Suggestion(layer, layers, handover, evidence, len(self.facts))

    def summary(self) -> str:
        """The averages as text: per kind, where the largest effects are."""
        clean = float(np.mean([fact.clean for fact in self.facts]))
        corrupted = float(np.mean([fact.corrupted for fact in self.facts]))
        number = "1 fact" if len(self.facts) == 1 else f"{len(self.facts)} facts"
        left = f", {len(self.unfinished)} not finished" if self.unfinished else ""
        lines = [
            f"{number} traced ({len(self.skipped)} not known, left out{left}); the answer's probability is "
            f"{100 * clean:.1f}% clean and {100 * corrupted:.1f}% with noise on the subject.",
            "Largest average indirect effects, in points of probability [95%]:",
        ]
        for kind in self.kinds:
            average = self.average(kind)
            for role, label in ((2, ROLE_LABELS[2]), (5, ROLE_LABELS[5])):
                if np.isnan(average[0, role]).all():
                    continue
                layer = int(np.nanargmax(average[0, role]))
                lines.append(f"  {LABELS[kind]:16s} {label:18s} block {layer:2d}: {_cell(average[:, role, layer])}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON values: every fact's effects and the averages (NaN as null)."""
        facts = [
            {
                **{name: getattr(fact, name) for name in ("prompt", "subject", "answer", "clean", "corrupted")},
                "tokens": list(fact.tokens),
                "span": list(fact.span),
                "effects": {kind: fact.effects[kind].tolist() for kind in self.kinds},
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


def _cell(interval: Any) -> str:
    value, low, high = (100 * float(part) for part in interval)
    return f"{value:.1f}" if np.isnan(low) else f"{value:.1f} [{low:.1f}, {high:.1f}]"


def _no_nan(values: Any) -> Any:
    if isinstance(values, list):
        return [_no_nan(value) for value in values]
    return None if values != values else values
