"""The report as one self-contained page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from kedit.evaluation.metrics import METRICS
from kedit.evaluation.records import CaseRecord
from kedit.evaluation.report import EvalReport, show
from kedit.prompts.likelihood import Answer
from kedit.report.svg import dots

SHOWN_CASES = 50
_NO_SHARES = {"em", "pm", "nm", "rm", "dnm", "fluency", "attention_gain"}  # not between 0 and 100%

_STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 1em 0; }
th, td { padding: .25em .7em; border-bottom: 1px solid #ddd; text-align: left; }
td.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; } summary { cursor: pointer; }
.bad { color: #b00020; } small { color: #666; }
"""


def page(report: EvalReport) -> str:
    """The whole page."""
    shares = [name for name in report.figures if name not in _NO_SHARES and METRICS[name].scale == 100.0]
    rows = [(METRICS[n].label, [report.figures[n]["before"], report.figures[n]["after"]]) for n in shares]
    parts = [
        f"<h1>{escape(report.title)}</h1>",
        f"<p>{len(report.records)} cases.</p>",
        _figures(report),
        "<h2>Before and after</h2>",
        dots(rows, ("before", "after")),
        _failures(report),
        f"<h2>Cases</h2><p>The first {min(SHOWN_CASES, len(report.records))}; all are in records.jsonl.</p>",
        *(_case(record) for record in report.records[:SHOWN_CASES]),
        "<h2>Run</h2>",
        _table([], [[escape(key), escape(str(value))] for key, value in report.meta.items()]),
        _table(["stage", "seconds"], [[escape(k), f"{v:.1f}"] for k, v in report.seconds.items()]),
    ]
    head = f'<meta charset="utf-8"><title>{escape(report.title)}</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def _figures(report: EvalReport) -> str:
    rows = []
    for name, found in report.figures.items():
        metric, after = METRICS[name], found["after"]
        assert after is not None
        cells = [show(found[state], metric) for state in ("before", "after", "difference")]
        label = f'<span title="{escape(metric.summary)}">{escape(metric.label)}</span>'
        source = f"{escape(metric.protocol)}<br><small>{escape(metric.source)}</small>"
        rows.append([label, *cells, f"{after.n} ({after.cases})", metric.direction, source])
    heads = ["metric", "before", "after", "difference", "n (cases)", "better", "protocol"]
    note = (
        "<p><small>In brackets: 95% bootstrap interval by case. Point at a metric's name for what it means.</small></p>"
    )
    return _table(heads, rows) + note


def _failures(report: EvalReport) -> str:
    if not report.failures:
        return ""
    rows = [[escape(name), escape(reason)] for name, reason in report.failures.items()]
    return f'<h2 class="bad">{len(rows)} failed edits (scored as unedited)</h2>' + _table(["case", "reason"], rows)


def _case(record: CaseRecord) -> str:
    rows = []
    for before, after in zip(record.before.probes, record.after.probes, strict=True):
        cells = [_pair(score.right, score.wrong) for score in (before, after)]
        rows.append([escape(str(after.kind)), *cells, escape((after.text or "")[:200])])
    table = _table(["probe", "p(right), p(wrong) before", "after", "the edited model goes on"], rows)
    mark = ' <span class="bad">failed</span>' if record.failure else ""
    return f"<details><summary>{escape(record.id)}: {escape(record.prompt)}{mark}</summary>{table}</details>"


def _pair(right: Answer | None, wrong: Answer | None) -> str:
    return ", ".join("–" if answer is None else f"{answer.probability:.3f}" for answer in (right, wrong))


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "<tr>" + "".join(f"<th>{escape(text)}</th>" for text in heads) + "</tr>" if heads else ""
    body = "".join("<tr>" + "".join(_cell(cell) for cell in row) + "</tr>" for row in rows)
    return f"<table>{head}{body}</table>"


def _cell(cell: str) -> str:
    number = cell[:1].isdigit() or cell[:1] in ("-", "–")
    return f'<td class="n">{cell}</td>' if number else f"<td>{cell}</td>"
