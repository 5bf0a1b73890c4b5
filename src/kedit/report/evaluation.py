"""The report of an evaluation as one self-contained page."""

from __future__ import annotations

from html import escape

from kedit.errors import DependencyError
from kedit.evaluation.metrics import METRICS
from kedit.evaluation.records import CaseRecord
from kedit.evaluation.report import EvalReport, show
from kedit.prompts.likelihood import Answer
from kedit.report.figures import before_after
from kedit.report.html import document, figure, table

SHOWN_CASES = 50
_NO_SHARES = {"em", "pm", "nm", "rm", "dnm", "fluency", "attention_gain"}  # not between 0 and 100%


def evaluation_page(report: EvalReport) -> str:
    """The whole page; without matplotlib, a sentence takes the place of the figure."""
    parts = [
        f"<p>{len(report.records)} cases.</p>",
        _metrics(report),
        _picture(report),
        _failures(report),
        f"<h2>Cases</h2><p>The first {min(SHOWN_CASES, len(report.records))}; all are in records.jsonl.</p>",
        *(_case(record) for record in report.records[:SHOWN_CASES]),
        "<h2>Run</h2>",
        table([], [[escape(key), escape(str(value))] for key, value in report.meta.items()]),
        table(["stage", "seconds"], [[escape(k), f"{v:.1f}"] for k, v in report.seconds.items()]),
    ]
    return document(report.title, parts)


def _picture(report: EvalReport) -> str:
    shares = [name for name in report.estimates if name not in _NO_SHARES and METRICS[name].scale == 100.0]
    if not shares:
        return ""
    measured = {METRICS[name].label: report.estimates[name] for name in shares}
    try:
        drawn = before_after({label: (states["before"], states["after"]) for label, states in measured.items()})
    except DependencyError as error:
        return f"<p><small>{escape(str(error))}</small></p>"
    return figure(drawn, "Before and after the edits. Bars: 95% bootstrap intervals by case.")


def _metrics(report: EvalReport) -> str:
    rows = []
    for name, states in report.estimates.items():
        metric, after = METRICS[name], states["after"]
        assert after is not None
        cells = [show(states[state], metric) for state in ("before", "after", "difference")]
        label = f'<span title="{escape(metric.summary)}">{escape(metric.label)}</span>'
        source = f"{escape(metric.protocol)}<br><small>{escape(metric.source)}</small>"
        rows.append([label, *cells, f"{after.n} ({after.cases})", metric.direction, source])
    heads = ["metric", "before", "after", "difference", "n (cases)", "better", "protocol"]
    note = (
        "<p><small>In brackets: 95% bootstrap interval by case. Point at a metric's name for what it means.</small></p>"
    )
    missing = [f"{escape(METRICS[name].label)}: {escape(reason)}" for name, reason in report.missing.items()]
    unmeasured = f"<p>Asked for, and not measured: {'; '.join(missing)}.</p>" if missing else ""
    return table(heads, rows) + note + unmeasured


def _failures(report: EvalReport) -> str:
    if not report.failures:
        return ""
    rows = [[escape(name), escape(reason)] for name, reason in report.failures.items()]
    return f'<h2 class="bad">{len(rows)} failed edits (scored as unedited)</h2>' + table(["case", "reason"], rows)


def _case(record: CaseRecord) -> str:
    rows = []
    for before, after in zip(record.before.probes, record.after.probes, strict=True):
        cells = [_pair(score.right, score.wrong) for score in (before, after)]
        rows.append([escape(str(after.kind)), *cells, escape((after.text or "")[:200])])
    answers = table(["probe", "p(right), p(wrong) before", "after", "the edited model goes on"], rows)
    mark = ' <span class="bad">failed</span>' if record.failure else ""
    return f"<details><summary>{escape(record.id)}: {escape(record.prompt)}{mark}</summary>{answers}</details>"


def _pair(right: Answer | None, wrong: Answer | None) -> str:
    return ", ".join("–" if answer is None else f"{answer.probability:.3f}" for answer in (right, wrong))
