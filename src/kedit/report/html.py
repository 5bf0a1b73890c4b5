"""Results as HTML: one self-contained page, or the part that a notebook shows. No scripts, nothing from the network."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from kedit.analysis.results.drift import DriftProbe, DriftResult
from kedit.analysis.results.patching import PatchingResult
from kedit.analysis.results.tracing import TraceResult
from kedit.errors import DependencyError, EditError
from kedit.report import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN_HEADS = 10
SHOWN_PROBES = 40
STYLE = """
body { font: 16px/1.5 sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; color: #222; background: #fff; }
h1 { font-size: 1.6em; line-height: 1.25; } h2 { margin-top: 2em; border-top: 1px solid #ddd; padding-top: .8em; }
figure { margin: 1.2em 0; } figure img { max-width: 100%; height: auto; } figcaption { color: #555; max-width: 48em; }
table { border-collapse: collapse; margin: 1em 0; } .wide { overflow-x: auto; }
th, td { padding: .25em .7em; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
summary { cursor: pointer; } small { color: #555; }
pre { background: #f6f6f6; padding: .8em; white-space: pre-wrap; } .bad { color: #b00020; font-weight: bold; }
"""


def document(title: str, parts: Iterable[str]) -> str:
    """A whole page, of HTML ``parts`` under its title."""
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>"
    )
    body = "".join([f"<h1>{escape(title)}</h1>", *parts])
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def notebook_html(result: Any) -> str:
    """A result of :mod:`kedit.analysis` as a notebook shows it."""
    return in_notebook(result, next(html for kind, html in _HTML.items() if isinstance(result, kind)))


def in_notebook(result: Any, html: Callable[[Any], str]) -> str:
    """The HTML of a result; its summary where there is no matplotlib."""
    try:
        return html(result)
    except DependencyError as error:
        return f"<pre>{escape(result.summary())}</pre><p>{escape(str(error))}</p>"


def answers_html(drifts: Sequence[DriftResult]) -> str:
    """Probabilities of right and wrong answers, before and after each way of editing."""
    after = [{(probe.case, probe.prompt): probe for probe in result.probes} for result in drifts]
    rows = []
    for probe in _worst_first(drifts[0])[:SHOWN_PROBES]:
        cells = [_pair(probe.right_before, probe.wrong_before)]
        for other in after:
            now = other.get((probe.case, probe.prompt))
            cells.append("–" if now is None else _pair(now.right_after, now.wrong_after))
        asked = [
            escape(str(probe.kind).replace("_", " ")),
            escape(probe.prompt),
            escape(probe.right),
            escape(probe.wrong or "–"),
        ]
        rows.append([*asked, *cells])
    heads = ["probe", "prompt", "right", "wrong", "before", *(result.label for result in drifts)]
    note = "p(right) / p(wrong) in %; bold where the wrong answer is the likelier one."
    if len(drifts[0].probes) > SHOWN_PROBES:
        note += f" The {SHOWN_PROBES} of {len(drifts[0].probes)} probes that lost most."
    return f'<div class="wide">{table(heads, rows)}</div><p>{note}</p>'


def trace_html(result: TraceResult) -> str:
    """Tracing: heatmap, hand-over, summary and the proposal."""
    parts = []
    if len(result.facts) == 1:
        fact = result.facts[0]
        text = f"Causal tracing of “{fact.prompt}”: what giving one activation its clean value back does for “{fact.answer}”."
        parts.append(figure(figures.tracing_fact(fact), text))
        text = "The fact is handed over from the subject's last token to the last token. Bands: 95% intervals over the noise."
        parts.append(figure(figures.tracing_handover(result), text))
    else:
        text = f"Causal tracing, mean over {len(result.facts)} facts: what giving one activation its clean value back brings."
        parts.append(figure(figures.tracing_averages(result), text))
        text = "The fact is handed over from the subject's last token to the last token. Bands: 95% bootstrap intervals by fact."
        parts.append(figure(figures.tracing_handover(result), text))
    words = result.summary()
    if "mlp" in result.kinds:
        try:
            words += f"\n\n{result.suggest()}"
        except EditError as error:
            words += f"\n\n{error}"
    return "".join([*parts, f"<pre>{escape(words)}</pre>"])


def maps_html(drifts: Sequence[DriftResult]) -> str:
    """Attention maps of the probe that lost most, before and after each way of editing."""
    probe = max(drifts[0].of(drifts[0].main_kind), key=lambda one: one.loss)
    states = {"before": probe.map_before}
    for result in drifts:
        for other in result.probes:
            if (other.case, other.prompt) == (probe.case, probe.prompt):
                states[result.label] = other.map_after
    text = (
        f"The last token of “{probe.prompt}”, the probe that lost most under {drifts[0].label}: "
        f"“{probe.right}” {_moved(probe.right_before, probe.right_after)}."
    )
    return figure(figures.attention_maps(probe, states), text)


def _moved(before: float, after: float) -> str:
    """How a probability went."""
    old, new = f"{100 * before:.0f}%", f"{100 * after:.0f}%"
    if old == new:
        return f"stays at {old}"
    return f"{'falls' if after < before else 'rises'} from {old} to {new}"


def heads_html(drifts: Sequence[DriftResult]) -> str:
    """Drift maps, the ranking of heads, the comparison with a regularizer, and the correlation."""
    compared = [f"<p>{escape(drifts[0].comparison(other))}</p>" for other in drifts[1:]]
    return "".join([drift_html(drifts[0], drifts), *compared])


def drift_html(result: DriftResult, beside: Sequence[DriftResult] = ()) -> str:
    """Drift maps (with those of other results ``beside``), the ranking of heads, and the correlation."""
    shown = list(beside) or [result]
    count = len(result.of(result.main_kind))
    about = f"mean over {count} probes ({result.main_kind})".replace("_", " ")
    parts = [
        figure(figures.drift_maps(shown), f"How far the last token's attention rows moved, {about}."),
        figure(
            figures.drift_maps(shown, "gain"), f"How its weight on the edited subject's last token changed, {about}."
        ),
        table(
            ["block", "head", "over-attends", "weight before", "gain", "KL (nats)", "Pearson with loss"],
            [
                [str(one.layer), str(one.head), f"{100 * one.share:.0f}%", f"{one.before:.3f}", f"{one.gain:+.3f}"]
                + [f"{one.kl:.3f}", "–" if one.pearson != one.pearson else f"{one.pearson:.2f}"]
                for one in result.heads()[:SHOWN_HEADS]
            ],
        ),
        f"<p>The {SHOWN_HEADS} heads that over-attend to the edited subject most under {escape(result.label)}.</p>",
    ]
    if len({probe.case for probe in result.probes}) > 1:
        text = f"Drift against damage under {result.label}: every dot is a probe. Intervals: 95%, bootstrap by edit."
        parts.append(figure(figures.correlation_plot(result), text))
    return "".join(parts)


def patching_html(result: PatchingResult) -> str:
    """Patching: shares of the damage by exchange, and the summary."""
    words = f"<pre>{escape(result.summary())}</pre>"
    try:
        bars, windows = figures.patching_bars(result), figures.patching_windows(result)
    except EditError as error:
        return f"<p>{escape(str(error))}</p>{words}"
    text = "Exchanged at the last token in all blocks: restored in the edited model, or contaminating the original one (hatched)."
    return figure(bars, text) + figure(windows, "The same, window of blocks by window of blocks.") + words


def figure(drawn: Figure, caption: str) -> str:
    """A figure with its caption; the picture is part of the page."""
    data = base64.b64encode(figures.as_svg(drawn).encode()).decode()
    text = escape(caption, quote=True)
    return f'<figure><img alt="{text}" src="data:image/svg+xml;base64,{data}"><figcaption>{text}</figcaption></figure>'


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of HTML cells; ``heads`` are plain text."""
    head = "<tr>" + "".join(f"<th>{escape(text)}</th>" for text in heads) + "</tr>" if heads else ""
    body = "".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in rows)
    return f"<table>{head}{body}</table>"


def _cell(cell: str) -> str:
    number = cell[:1].isdigit() or cell[:1] in ("-", "+", "–") or cell.startswith('<span class="bad">')
    return f'<td class="n">{cell}</td>' if number else f"<td>{cell}</td>"


def _pair(right: float, wrong: float | None) -> str:
    if wrong is None:
        return f"{100 * right:.1f}"
    text = f"{100 * right:.1f} / {100 * wrong:.1f}"
    return f'<span class="bad">{text}</span>' if wrong > right else text


def _worst_first(result: DriftResult) -> list[DriftProbe]:
    """All probes; with many, those that lost most come first."""
    if len(result.probes) <= SHOWN_PROBES:
        return list(result.probes)
    return sorted(result.probes, key=lambda probe: -probe.loss)


_HTML: dict[type, Callable[[Any], str]] = {
    TraceResult: trace_html,
    DriftResult: drift_html,
    PatchingResult: patching_html,
}
