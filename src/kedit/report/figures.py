"""Figures of what an edit does: one style, for eyes of every colour vision, readable at half size.

Needs matplotlib (``pip install 'kedit[plot]'``). Every function returns a ``matplotlib.figure.Figure`` and touches no global
state; :func:`save` and :func:`as_svg` write it.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np

from kedit.analysis.interventions import LABELS
from kedit.analysis.results.drift import MEASURES, DriftProbe, DriftResult
from kedit.analysis.results.patching import CONTAMINATE, EDITED, RESTORE, PatchingResult
from kedit.analysis.results.tracing import ROLE_LABELS, ROLES, FactTrace, TraceResult
from kedit.errors import DependencyError, EditError
from kedit.evaluation.statistics import Estimate, Floats

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Paul Tol's "bright" colours and two maps of matplotlib, all told apart without red-green vision.
COLOURS = {"weights": "#ee6677", "attention": "#ccbb44", "mlp": "#4477aa", "hidden": "#222222"}

AMOUNT, CHANGE = "cividis", "PuOr_r"
STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib, so figures look alike everywhere
    "font.size": 14,
    "axes.titlesize": 15,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 13,
    "lines.linewidth": 2.2,
    "lines.markersize": 7,
    "figure.dpi": 100,
    "savefig.dpi": 120,
    "svg.hashsalt": "kedit",
}
MARKERS = {"weights": "o", "attention": "s", "mlp": "^", "hidden": "D"}
_TOKEN_WIDTH = 0.42  # inches

Given = ParamSpec("Given")


def styled(draw: Callable[Given, Figure]) -> Callable[Given, Figure]:
    """Draw in the house style.

    Raises:
        DependencyError: matplotlib is not installed.
    """

    @wraps(draw)
    def drawn(*args: Given.args, **kwargs: Given.kwargs) -> Figure:
        with style():
            return draw(*args, **kwargs)

    return drawn


def style() -> Any:
    """The house style as a context; raises ``DependencyError`` without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise DependencyError(
            "Figures need matplotlib, which is not installed. Install it with pip install 'kedit[plot]'."
        ) from error
    return matplotlib.rc_context(STYLE)


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure; the ending says how (.png, .svg, .pdf)."""
    target = Path(path)
    with style():
        figure.savefig(target)
    return target


def as_svg(figure: Figure) -> str:
    """A figure as SVG text, the same every time."""
    text = io.StringIO()
    with style():
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def plain(text: str) -> str:
    """Text as matplotlib can draw it: no formulas, and a box for what the font does not have."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont(STYLE["font.family"]))
    shown = (char if char.isprintable() and font.get_char_index(ord(char)) else "□" for char in text.strip())
    return "".join(shown).replace("$", r"\$")


def _new(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _panels(count: int, width: float, height: float) -> tuple[Figure, Any]:
    """A figure with panels side by side that share their vertical axis."""
    figure = _new(width, height)
    return figure, figure.subplots(1, count, sharey=True, squeeze=False)[0]


def _effects(effects: Mapping[str, Floats], top: float, height: float) -> tuple[Figure, Any, Any]:
    """A panel of effects [rows, L], up to ``top``, per kind of activation; also the last image, for a colour bar."""
    figure, axes = _panels(len(effects), 2.6 + 3.4 * len(effects), height)
    for axis, (kind, effect) in zip(axes, effects.items(), strict=True):
        image = _heat(axis, 100 * effect, 0.0, 100 * top)
        _blocks(axis, range(effect.shape[1]))
        axis.set_title(LABELS[kind])
    return figure, axes, image


@styled
def before_after(rows: Mapping[str, tuple[Estimate | None, Estimate | None]]) -> Figure:
    """Metrics in per cent before and after the edits, a row each, with their intervals."""
    figure = _new(9, 1.5 + 0.45 * len(rows))
    axis = figure.subplots()
    for state, (label, colour, marker) in enumerate((("before", "#4477aa", "o"), ("after", "#ee6677", "s"))):
        shown = [(place, pair[state]) for place, pair in enumerate(rows.values())]
        places = [place + 0.3 * state - 0.15 for place, estimate in shown if estimate is not None]
        values, lows, highs = bounds([estimate for _, estimate in shown if estimate is not None])
        error = [values - lows, highs - values]
        axis.errorbar(values, places, xerr=error, fmt=marker, color=colour, label=label, clip_on=False)
    axis.set_yticks(range(len(rows)), list(rows))
    axis.set_ylim(len(rows) - 0.5, -0.5)  # the first on top
    axis.set_xlim(0, 100)
    axis.set_xlabel("share (%)")
    axis.grid(axis="x", color="#dddddd")
    figure.legend(loc="outside upper center", ncols=2)
    return figure


@styled
def tracing_averages(result: TraceResult) -> Figure:
    """Average indirect effect by token role and block, a panel per kind of activation."""
    top = max(float(np.nanmax(result.average(kind)[0])) for kind in result.kinds)
    there = [role for role in range(len(ROLES)) if not np.isnan(result.average(result.kinds[0])[0, role]).all()]
    figure, axes, image = _effects({kind: result.average(kind)[0][there] for kind in result.kinds}, top, 4.6)
    axes[0].set_yticks(range(len(there)), [ROLE_LABELS[role] for role in there])
    figure.colorbar(image, ax=list(axes), label="average indirect effect\n(points of probability)")
    return figure


@styled
def tracing_handover(result: TraceResult) -> Figure:
    """Indirect effect of the hidden state at the subject's last token and at the last token, and of the MLP, by block."""
    figure = _new(8, 4.6)
    axis = figure.subplots()
    lines = [
        ("hidden", "subject last", "#4477aa", "o"),
        ("mlp", "subject last", "#ccbb44", "^"),
        ("hidden", "last", "#ee6677", "s"),
    ]
    for kind, role, colour, marker in lines:
        if kind in result.kinds:
            effects = 100 * result.average(kind)[:, ROLES.index(role)]
            label = f"{LABELS[kind]}, {ROLE_LABELS[ROLES.index(role)]}"
            _line(axis, range(result.num_layers), effects, label, colour, marker)
    _blocks(axis, range(result.num_layers))
    one = len(result.facts) == 1
    axis.set_ylabel(f"{'' if one else 'average '}indirect effect\n(points of probability)")
    axis.set_title(plain(result.facts[0].prompt) if one else f"{len(result.facts)} facts")
    axis.grid(axis="y", color="#dddddd")
    figure.legend(loc="outside upper center", ncols=2)
    return figure


@styled
def tracing_fact(fact: FactTrace) -> Figure:
    """Every effect of one fact: tokens down, blocks across, a panel per kind."""
    tokens = len(fact.tokens)
    top = max(0.01, *(float(effect.max()) for effect in fact.effects.values()))
    figure, axes, image = _effects(fact.effects, top, 1.8 + 0.36 * tokens)
    first, last = fact.span
    names = [plain(token) + (" *" if first <= i <= last else "") for i, token in enumerate(fact.tokens)]
    axes[0].set_yticks(range(tokens), names)
    axes[0].set_ylabel("token (* subject)")
    noisy = f"{100 * fact.corrupted:.0f}% with noise on “{plain(fact.subject)}”"
    about = f"“{plain(fact.answer)}”: {100 * fact.clean:.0f}% clean, {noisy}"
    figure.suptitle("\n".join(textwrap.wrap(about, 24 * len(fact.effects))), x=0.01, ha="left")
    figure.colorbar(image, ax=list(axes), label=f"indirect effect on “{plain(fact.answer)}”\n(points of probability)")
    return figure


@styled
def drift_maps(results: Sequence[DriftResult], name: str = "kl") -> Figure:
    """Head × block maps of several results on one scale: mean ``"kl"`` or ``"gain"`` of the weight on the subject."""
    maps = [result.map(name) for result in results]
    blocks, heads = maps[0].shape
    width, height = 1.8 + len(maps) * max(2.8, 0.55 * heads), 1.8 + max(2.2, 0.5 * min(blocks, 16))
    figure, axes = _panels(len(maps), width, height)
    top = max(float(np.abs(values).max()) for values in maps)
    for axis, values, result in zip(axes, maps, results, strict=True):
        image = _heat(axis, values, -top if name == "gain" else 0.0, top, CHANGE if name == "gain" else AMOUNT)
        axis.set_title(plain(result.label))
        axis.set_xlabel("head")
        axis.set_xticks(range(0, heads, 1 if heads <= 12 else 4))
    step = 1 if blocks <= 12 else 4
    axes[0].set_yticks(range(0, blocks, step), list(results[0].layers)[::step])
    axes[0].set_ylabel("block")
    label = (
        "change of the weight\non the edited subject" if name == "gain" else "drift of the last token's row\n(KL, nats)"
    )
    figure.colorbar(image, ax=list(axes), label=label)
    return figure


@styled
def attention_maps(probe: DriftProbe, states: Mapping[str, Floats]) -> Figure:
    """Plot where the last token looks, highest head of every block ([L, T] each): the first state, and the change in the others.

    The first token takes most of the attention in most models, so its column does not count for the scale of the first panel, and
    is clipped there. Dashed lines mark the edited subject's last token.
    """
    (first, before), *others = states.items()
    blocks = len(before)
    panel = 0.7 + min(2.2, 0.26 * blocks)
    figure = _new(max(8, 2.2 + _TOKEN_WIDTH * len(probe.tokens)), 1.6 + len(states) * panel)
    axes = figure.subplots(len(states), 1, sharex=True, squeeze=False)[:, 0]
    top = min(1.0, max(0.05, float(before[:, 1:].max()))) if before.shape[1] > 1 else 1.0
    amount = _heat(axes[0], before, 0.0, top)
    axes[0].set_title(plain(first))
    changes = [after - before for _, after in others]
    most = max([0.01, *(float(np.abs(change).max()) for change in changes)])
    for axis, (label, _), change in zip(axes[1:], others, changes, strict=True):
        image = _heat(axis, change, -most, most, CHANGE)
        axis.set_title(f"{plain(label)}: change")
    for axis in axes:
        for side in (-0.5, 0.5):
            axis.axvline(probe.column + side, color="#ee6677", lw=1.6, ls="--")
        axis.set_ylabel("block")
        axis.set_yticks(range(0, blocks, 1 if blocks <= 6 else max(2, blocks // 5)))
    names = [plain(token) + (" *" if i == probe.column else "") for i, token in enumerate(probe.tokens)]
    axes[-1].set_xticks(range(len(names)), names, rotation=55, ha="right", rotation_mode="anchor")
    axes[-1].set_xlabel("token (* the edited subject's last)")
    clipped = "\n(highest head; ▲ clipped)" if float(before.max()) > top else "\n(highest head)"
    figure.colorbar(
        amount, ax=axes[0], label=f"attention{clipped}", extend="max" if float(before.max()) > top else "neither"
    )
    if others:
        figure.colorbar(image, ax=list(axes[1:]), label="change of attention\n(highest head)")
    return figure


@styled
def correlation_plot(result: DriftResult, measure: str = "drift") -> Figure:
    """Every probe: how far its attention drifted against how much probability the right answer lost."""
    probes = result.of(result.main_kind)
    figure = _new(7.5, 5.2)
    axis = figure.subplots()
    values = [probe.measure(measure) for probe in probes]
    axis.scatter(values, [100 * probe.loss for probe in probes], s=34, alpha=0.6, color="#4477aa", edgecolors="none")
    if measure != "subject" and min(values) > 0:
        axis.set_xscale("log")
        ticks = _log_ticks(*axis.get_xlim())
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()  # matplotlib would write numbers beside these too, one over the other
    both = result.correlations()[measure]
    edits = len({probe.case for probe in probes})
    about = f"{plain(result.label)}: {len(probes)} probes of {edits} edit{'s' * (edits != 1)}"
    axis.set_title(f"{about}\nPearson {both['pearson'].text()}\nSpearman {both['spearman'].text()}", fontsize=14)
    scale = " (logarithmic scale)" if axis.get_xscale() == "log" else ""
    axis.set_xlabel("\n".join(textwrap.wrap(MEASURES[measure] + scale, 56)))
    axis.set_ylabel("loss of the right answer's\nprobability (points)")
    axis.grid(color="#dddddd")
    return figure


@styled
def patching_bars(result: PatchingResult) -> Figure:
    """Plot how much of the damage each exchange undoes or does: all blocks at once and chosen heads, with intervals."""
    chosen = [(i, one) for i, one in enumerate(result.conditions) if i > EDITED and one.centre is None]
    shares = [(one, result.share(i)) for i, one in chosen]
    kept = [(one, share) for one, share in shares if share is not None]
    _need(kept)
    figure = _new(9.5, 1.9 + 0.5 * len(kept))
    axis = figure.subplots()
    for place, (one, share) in enumerate(kept):
        value, low, high = 100 * bounds([share])
        restores = one.direction == RESTORE
        axis.barh(
            place, value, xerr=None if share.low is None else [value - low, high - value], height=0.7,
            color=COLOURS[one.activation], alpha=1 if restores else 0.45, hatch=None if restores else "//",
            error_kw={"lw": 1.6, "capsize": 4},
        )  # fmt: skip
    names = [f"{_verb(one.direction)}: {plain(one.name or LABELS[one.activation])}" for one, _ in kept]
    axis.set_yticks(range(len(kept)), ["\n".join(textwrap.wrap(name, 36, break_on_hyphens=False)) for name in names])
    axis.set_ylim(len(kept) - 0.4, -0.6)  # the first on top
    axis.axvline(0, color="black", lw=1)
    axis.set_xlabel(f"share of the lost {result.scale} that is recovered or lost (%)")
    axis.grid(axis="x", color="#dddddd")
    return figure


@styled
def patching_windows(result: PatchingResult) -> Figure:
    """Plot how much of the damage each exchange undoes or does, window by window."""
    ways = [way for way in (RESTORE, CONTAMINATE) if any(one.direction == way for one in result.conditions)]
    figure, axes = _panels(len(ways), 2.2 + 5 * len(ways), 4.8)
    drawn = []
    for axis, way in zip(axes, ways, strict=True):
        for activation in LABELS:
            numbers = [
                i for i, one in enumerate(result.conditions)
                if (one.direction, one.activation) == (way, activation) and one.centre is not None
            ]  # fmt: skip
            shares = [share for share in map(result.share, numbers) if share is not None]
            if numbers and shares:
                label = LABELS[activation] if way == ways[0] else "_"
                points = 100 * bounds(shares)
                _line(axis, range(len(numbers)), points, label, COLOURS[activation], MARKERS[activation])
                drawn.append(activation)
        _blocks(axis, range(result.num_layers))
        axis.set_title(f"{_verb(way)} in {'one block' if result.window == 1 else f'{result.window} blocks around'}")
        axis.grid(axis="y", color="#dddddd")
    _need(drawn)
    axes[0].set_ylabel(f"share of the lost {result.scale}\nrecovered or lost (%)")
    figure.legend(loc="outside upper center", ncols=4)
    return figure


def _heat(axis: Any, values: Floats, low: float, high: float, colours: str = AMOUNT) -> Any:
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    return axis.imshow(values, vmin=low, vmax=high, cmap=colours, aspect="auto", interpolation="nearest")


def _line(axis: Any, xs: Sequence[int], values: Floats, label: str, colour: str, marker: str) -> None:
    """A line through means [0] with its interval [1], [2] as a band."""
    axis.plot(xs, values[0], marker=marker, color=colour, label=label)
    if not np.isnan(values[1]).any():
        axis.fill_between(xs, values[1], values[2], color=colour, alpha=0.18, lw=0)


def bounds(estimates: Sequence[Estimate]) -> Floats:
    """Values and the ends of their intervals, [3, N]; the value itself where there is no interval."""
    ends = [(one.value, *(one.value if end is None else end for end in (one.low, one.high))) for one in estimates]
    return np.array(list(zip(*ends, strict=True)), dtype=np.float64).reshape(3, -1)


def _log_ticks(low: float, high: float) -> list[float]:
    """A handful of round numbers from ``low`` to ``high`` for a logarithmic axis; decades where there are many."""
    from matplotlib.ticker import MaxNLocator

    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    for digits in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0)):
        shown = [digit * 10.0**power for power in decades for digit in digits if low <= digit * 10.0**power <= high]
        if len(shown) >= 3:
            return shown[:: 1 + len(shown) // 8]
    return [float(tick) for tick in MaxNLocator(nbins=4).tick_values(low, high) if low <= tick <= high]


def _blocks(axis: Any, layers: range) -> None:
    axis.set_xlabel("block")
    axis.set_xticks(list(layers) if len(layers) <= 12 else list(layers)[::4])


def _verb(direction: str) -> str:
    return "restored" if direction == RESTORE else "contaminated"


def _need(drawn: Sequence[Any]) -> None:
    if not drawn:
        raise EditError("The edits did no damage to these probes, so there are no shares of it to draw.")
