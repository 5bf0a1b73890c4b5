"""Candidates: the hyper-parameters that a calibration tries, one coordinate after the other."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from kedit.calibration.names import STAGES
from kedit.editors.config import EditorConfig

TOP = 0.6  # of the depth: the highest block that is tried
Gamma = float | Literal["auto"]


@dataclass(frozen=True)
class Candidate:
    """Hyper-parameters to try.

    Attributes:
        config: of the editor.
        gamma: γ of the regularizer; ``None``: without it.
        label: what differs from the others of its stage.
        value: the same as a JSON value.
        changed: the fields of the editor that differ where the regularizer is used.
    """

    config: EditorConfig
    gamma: Gamma | None = None
    label: str = ""
    value: Any = None
    changed: Mapping[str, Any] = field(default_factory=dict)


def stages_of(config: EditorConfig, regularized: bool) -> tuple[str, ...]:
    """The stages that have a meaning for an editor with these hyper-parameters."""
    known = config.field_names()
    return tuple(name for name in STAGES if (name in known if name != "gamma" else regularized))


def layer_candidates(
    start: Candidate, num_layers: int, traced: Iterable[int] = (), *, quick: bool = False
) -> list[Candidate]:
    """The present blocks, those that tracing speaks for, and blocks from the lowest up to 60% of the depth.

    Editors of several blocks try spans of the same length; a block names the span that ends there.
    """
    layers = start.config.layers
    below, top = len(layers) - 1, max(min(round(TOP * num_layers), num_layers - 1), layers[-1])
    step = max(1, math.ceil((top - below + 1) / (5 if quick else 10)))
    lasts = {*range(below, top + 1, step), *(block for block in traced if below <= block < num_layers - 1)} - {
        layers[-1]
    }
    nearest = sorted(lasts, key=lambda last: (abs(last - layers[-1]), last))
    spans = [layers, *(tuple(range(last - below, last + 1)) for last in nearest)]
    return [_variant(start, "layers", span) for span in spans]


def clamp_candidates(start: Candidate, *, quick: bool = False) -> list[Candidate]:
    """The present clamp, and half to twice as much."""
    return _multiples(start, "clamp", (0.5, 2.0) if quick else (0.5, 0.75, 1.5, 2.0))


def weight_candidates(start: Candidate, name: str, *, quick: bool = False) -> list[Candidate]:
    """The present weight of the preserved keys, and a tenth to ten times as much, which is then not lowered for any edit."""
    return _multiples(start, name, (0.1, 10.0) if quick else (0.1, 0.3, 3.0, 10.0), min_share=0.0)


def threshold_candidates(start: Candidate, *, quick: bool = False) -> list[Candidate]:
    """The present threshold of the null space and others; of a fraction, from a tenth to nine tenths."""
    if getattr(start.config, "threshold_rule", None) != "fraction":
        return _multiples(start, "threshold", (0.1, 10.0) if quick else (0.01, 0.1, 10.0, 100.0))
    present: float = vars(start.config)["threshold"]
    others = [value for value in ((0.3, 0.7) if quick else (0.1, 0.3, 0.7, 0.9)) if value != present]
    return [_variant(start, "threshold", value) for value in (present, *others)]


def gamma_candidates(
    start: Candidate, usual: Gamma, taus: Sequence[float] = (0.2, 0.5), *, quick: bool = False
) -> list[Candidate]:
    """The usual γ first, then others; where the optimisation weighs the penalty (``"auto"``), other bounds τ (``stop_loss``)."""
    if usual == "auto":
        own = replace(start, gamma="auto", label="γ auto", value="auto")
        bounds = [
            Candidate(
                start.config.replace(stop_loss=tau),
                "auto",
                f"γ auto, τ {tau:g}",
                {"gamma": "auto", "stop_loss": tau},
                {**start.changed, "stop_loss": tau},
            )
            for tau in taus[: 1 if quick else None]
        ]
        return [own, *bounds, *(_with_gamma(start, gamma) for gamma in (() if quick else (0.1, 1.0, 10.0)))]
    factors = (1.0, 0.25, 4.0) if quick else (1.0, 0.1, 0.3, 2.0, 4.0)
    return [_with_gamma(start, _short(usual * factor)) for factor in factors]


def with_changes(start: Candidate, changes: Mapping[str, Any]) -> Candidate:
    """The candidate with what a preset changes where its regularizer is used."""
    return replace(start, config=start.config.replace(**changes), changed=dict(changes))


def _with_gamma(start: Candidate, gamma: float) -> Candidate:
    return replace(start, gamma=gamma, label=f"γ {gamma:g}", value=gamma)


def _multiples(start: Candidate, name: str, factors: Sequence[float], **also: Any) -> list[Candidate]:
    present: float = getattr(start.config, name)
    changes = {key: value for key, value in also.items() if key in start.config.field_names()}
    others = [_variant(start, name, _short(present * factor), **changes) for factor in factors]
    return [_variant(start, name, present), *others]


def _variant(start: Candidate, name: str, value: Any, **also: Any) -> Candidate:
    shown = value[0] if isinstance(value, tuple) and len(value) == 1 else value
    text = f"{shown[0]}-{shown[-1]}" if isinstance(shown, tuple) else f"{shown:g}"
    word = {"layers": "block" if not isinstance(shown, tuple) else "blocks"}.get(name, name)
    plain = list(value) if isinstance(value, tuple) else value
    return Candidate(start.config.replace(**{name: value, **also}), start.gamma, f"{word} {text}", plain)


def _short(number: float) -> float:
    """Three significant digits."""
    return float(f"{number:.3g}")
