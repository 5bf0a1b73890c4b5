"""The tables of experiments and sweeps as Markdown and CSV, and what may be said of them."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Any

from kedit.bench.choice import FIVE, LEAST_ES, LOST_PS, MARKS, balance, qualifies, value
from kedit.bench.experiment import Experiment
from kedit.bench.rows import BEST, NONE
from kedit.bench.suite import Suite
from kedit.bench.sweep import BALANCE, Point, Sweep, text
from kedit.evaluation.cases import Kind
from kedit.evaluation.metrics import METRICS
from kedit.evaluation.provenance import describe_model, environment
from kedit.evaluation.report import EvalReport
from kedit.evaluation.statistics import Estimate, case_weights
from kedit.utils.validation import is_number

COLUMNS = (*FIVE, "score", "fluency")
PROMPTS_FOR_PS = 34  # with fewer, one prompt is worth more than the points that a γ may cost


def markdown(experiment: Experiment, about: Sequence[str] = ()) -> str:
    """The table of what is finished, paired differences, what was chosen, and sentences.

    Args:
        experiment: with its reports.
        about: sentences on the cases, in front of the table.
    """
    shown = [name for name in COLUMNS if any(name in report.estimates for report in experiment.reports.values())]
    heads = ["editor", "regularizer", "γ", *(METRICS[name].label for name in shown), "s per edit"]
    rows = [heads, ["---"] * len(heads)]
    first = next(iter(experiment.reports.values()), None)
    if first is not None:
        before = [cell(first.estimates[name]["before"]) if name in first.estimates else "–" for name in shown]
        rows.append(["unedited", "", "", *before, ""])
    for (name, label), report in experiment.reports.items():
        cells = [cell(report.estimates[metric]["after"]) if metric in report.estimates else "–" for metric in shown]
        rows.append([name, label, gamma_text(experiment, name, label), *cells, f"{seconds_per_edit(report):.1f}"])
    lines = ["# Editors and regularizers", "", "\n\n".join(_about(experiment, about)), "", *_table(rows), ""]
    differences = list(_differences(experiment))
    if differences:
        heads = ["", *(METRICS[name].label for name in FIVE), "lost DNS won back", "lost RS won back"]
        lines += [
            "Paired differences to the same editor without a regularizer, and the share of its loss that is won back:",
            "",
        ]
        lines += [*_table([heads, ["---"] * len(heads), *differences]), ""]
    lines += [f"- {sentence}" for sentence in sentences(experiment)]
    return "\n".join(lines).rstrip() + "\n"


def to_csv(experiment: Experiment) -> str:
    """A row per editor, regularizer and metric: before, after and the paired difference to the plain editor, with intervals."""
    written = io.StringIO()
    names = ["editor", "regularizer", "gamma", "metric"]
    names += [f"{what}{end}" for what in ("before", "after", "against_none") for end in ("", "_low", "_high")]
    writer = csv.DictWriter(written, [*names, "n", "cases"], lineterminator="\n")
    writer.writeheader()
    for (name, label), report in experiment.reports.items():
        plain = experiment.reports.get((name, NONE))
        against = {} if plain is None or label == NONE else report.compare(plain)
        gamma = gamma_text(experiment, name, label, marked=False)
        for metric, states in report.estimates.items():
            row: dict[str, Any] = {"editor": name, "regularizer": label, "gamma": gamma, "metric": metric}
            found = {"before": states["before"], "after": states["after"], "against_none": against.get(metric)}
            for what, estimate in found.items():
                if estimate is not None:
                    row |= {what: estimate.value, f"{what}_low": estimate.low, f"{what}_high": estimate.high}
            after = states["after"]
            writer.writerow(row | ({} if after is None else {"n": after.n, "cases": after.cases}))
    return written.getvalue()


def sentences(experiment: Experiment) -> Iterator[str]:
    """What may be said: losses, what is won back beside ES and PS, how γ was chosen, what is missing."""
    for (name, label), report in experiment.reports.items():
        plain = experiment.reports.get((name, NONE))
        if label == NONE:
            yield from _losses(name, report)
        elif plain is not None:
            yield _verdict(f"{name} + {label}", report, plain)
    for (name, label), choice in experiment.choices.items():
        tried = ", ".join(f"{gamma:g}" for gamma in sorted(choice.tried))
        mark = f" ({choice.mark}: {MARKS[choice.mark]})" if choice.mark else ""
        yield f"γ of {name} + {label}: {choice.gamma:g}{mark}; tried: {tried}."
    if experiment.choices:
        yield from _few_development_cases(experiment)
    for (name, label), reason in experiment.skipped.items():
        yield f"{name} + {label} was not run: {reason}"
    failed = sum(len(report.failures) for report in experiment.reports.values())
    if failed:
        yield f"{failed} edits failed and count as unedited; the reasons are in the folders of the runs."


def won_back(plain: EvalReport, other: EvalReport, metric: str) -> Estimate | None:
    """Share of what the plain edits lost that other edits keep, in per cent, with its interval (cases drawn together).

    ``None`` where the plain edits lost nothing that is clear of 0, or the metric was not measured.
    """
    if metric not in plain.estimates or metric not in other.estimates:
        return None
    fall = plain.estimates[metric]["difference"]
    if fall is None or fall.high is None or fall.high >= 0:
        return None
    weights = case_weights(len(plain.records))
    theirs = {record.id: record for record in other.records}
    paired = [theirs[record.id] for record in plain.records]
    before = METRICS[metric].tallies(plain.records, "before")[0].means(weights)
    without = METRICS[metric].tallies(plain.records, "after")[0].means(weights)
    now = METRICS[metric].tallies(paired, "after")[0].means(weights)
    lost = before - without
    shares = 100 * (now - without)[lost > 0] / lost[lost > 0]
    total = -fall.value
    return Estimate.of(100 * (value(other, metric) - value(plain, metric)) / total, shares, fall.n, fall.cases)


def gamma_text(experiment: Experiment, name: str, label: str, *, marked: bool = True) -> str:
    """γ of a row, of each regularizer that has one, with the mark of the one that was chosen."""
    choice = experiment.choices.get((name, label)) if marked else None
    report = experiment.reports[name, label]
    parts = next(row.parts for row in experiment.rows if row.label == label)
    found = []
    for part, item in zip(parts, report.meta.get("regularizers") or [], strict=True):
        gamma = item.get("gamma")
        if gamma is not None:
            mark = choice.mark if choice is not None and part.gamma == BEST else ""
            found.append((gamma if isinstance(gamma, str) else f"{gamma:g}") + mark)
    return ", ".join(found)


def seconds_per_edit(report: EvalReport) -> float:
    """Seconds that the optimisation and the closed form of an edit took."""
    return report.seconds.get("edit", 0.0) / max(1, len(report.records))


def model_and_machine(suite: Suite) -> list[str]:
    """The model, the versions and the machine that a table is from, and the hyper-parameters that were set."""
    model, machine = describe_model(suite.model), environment()
    size = f"{model['type']}, {model['num_layers']} blocks, {model['parameters']:,} parameters, {model['dtype']}"
    versions = ", ".join(f"{key} {machine[key]}" for key in ("kedit", "torch", "transformers") if key in machine)
    name = model["name"] or "The embedded model"
    lines = [f"{name} ({size}); {versions}; {machine['machine']}, {machine['threads']} threads."]
    given = [f"{key}={text(value)}" for key, value in suite.config.items()]
    given += [] if suite.num_contexts is None else [f"{suite.num_contexts} contexts"]
    return [*lines, f"Set: {', '.join(given)}."] if given else lines


def cell(estimate: Estimate | None, sign: str = "") -> str:
    """``49.4 [45.0, 53.1]``."""
    if estimate is None:
        return "–"
    interval = "" if estimate.low is None else f" [{estimate.low:{sign}.1f}, {estimate.high:{sign}.1f}]"
    return f"{estimate.value:{sign}.1f}{interval}"


def _about(experiment: Experiment, about: Sequence[str]) -> list[str]:
    lines = model_and_machine(experiment.suite)
    lines += [*about, f"{len(experiment.held_out)} held-out edits, each alone on the unedited model; "]
    lines[-1] += "in brackets: 95% bootstrap intervals by case. "
    lines[-1] += "Values that rows share are optimised once, and count as seconds of the first of them."
    total = sum((name, row.label) not in experiment.skipped for name in experiment.editors for row in experiment.rows)
    if len(experiment.reports) < total:
        lines.append(f"**Unfinished: {len(experiment.reports)} of {total} rows.** The same command goes on.")
    return lines


def _differences(experiment: Experiment) -> Iterator[list[str]]:
    for (name, label), report in experiment.reports.items():
        plain = experiment.reports.get((name, NONE))
        if label != NONE and plain is not None:
            against = report.compare(plain, FIVE)
            shares = [won_back(plain, report, metric) for metric in ("dns", "rs")]
            texts = ["–" if share is None else share.text(0, unit="%") for share in shares]
            yield [f"{name} + {label}", *(cell(against[metric], "+") for metric in FIVE), *texts]


def _losses(name: str, report: EvalReport) -> Iterator[str]:
    for metric in ("dns", "rs"):
        fall = report.estimates[metric]["difference"] if metric in report.estimates else None
        if fall is not None:
            clearly = fall.high is not None and fall.high < 0
            yield f"{name} {'loses' if clearly else 'does not clearly lose'} {METRICS[metric].label}: {cell(fall, '+')}."


def _verdict(label: str, report: EvalReport, plain: EvalReport) -> str:
    """What a regularizer wins back, with ES and PS beside it."""
    beside = f"ES {value(report, 'es'):.1f} (without: {value(plain, 'es'):.1f})"
    if "ps" in report.estimates:
        beside += f", PS {cell(report.compare(plain, ['ps'])['ps'], '+')}"
    shares = {metric: won_back(plain, report, metric) for metric in ("dns", "rs")}
    found = {metric: share for metric, share in shares.items() if share is not None}
    clear = [metric for metric, share in found.items() if share.low is not None and share.low > 0]
    parts = [
        f"{share.text(0, unit='%')} of the lost {METRICS[metric].label}{'' if metric in clear else ' (not clear of 0)'}"
        for metric, share in found.items()
    ]
    if not parts:
        return f"{label}: {beside}."
    if not clear:
        return f"{label} does not clearly win back anything: {' and '.join(parts)}, at {beside}."
    if qualifies(report, plain):
        return f"{label} wins back {' and '.join(parts)}, at {beside}."
    limits = f"ES {LEAST_ES:g} or the editor's own, PS at most {LOST_PS:g} points lower"
    return f"{label} is no cure: {' and '.join(parts)} won back, but {beside} (the limits: {limits})."


def _few_development_cases(experiment: Experiment) -> Iterator[str]:
    cases = experiment.development
    prompts = sum(probe.kind is Kind.PARAPHRASE for case in cases for probe in case.probes)
    if 0 < prompts < PROMPTS_FOR_PS:
        yield (
            f"Too few development cases: γ was chosen on {len(cases)} with {prompts} paraphrases, of which one is worth "
            f"{100 / prompts:.1f} points, more than the {LOST_PS:g} that γ may cost. Give more --dev-cases."
        )
    else:
        yield f"γ was chosen on {len(cases)} development cases with {prompts} paraphrases."


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in rows]


def sweep_markdown(sweep: Sweep, about: Sequence[str] = ()) -> str:
    """The table of a sweep: a row per point, the best one marked, with paired differences to it."""
    shown = [name for name in (*FIVE, sweep.by) if any(name in report.estimates for report in sweep.reports.values())]
    shown = list(dict.fromkeys(shown))
    added = f" + {', '.join(sweep.regularizers)}" if sweep.regularizers else ""
    heads = [*sweep.keys, *(METRICS[name].label for name in shown), "balance", f"{sweep.by} − the best's", "s per edit"]
    rows, best = [heads, ["---"] * len(heads)], sweep.best()
    first = next(iter(sweep.reports.values()), None)
    if first is not None:
        before = [cell(first.estimates[name]["before"]) for name in shown]
        rows.append(["unedited", *[""] * (len(sweep.keys) - 1), *before, "", "", ""])
    for point, report in sweep.reports.items():
        cells = [cell(report.estimates[metric]["after"]) if metric in report.estimates else "–" for metric in shown]
        cells.append(f"{balance(report):.1f}")
        cells.append("**best**" if point == best else cell(sweep.against_best(point), "+"))
        rows.append([*map(text, point), *cells, f"{seconds_per_edit(report):.1f}"])
    said = [*model_and_machine(sweep.suite), *about]
    said.append(f"{len(sweep.cases)} development edits, each alone; in brackets: 95% bootstrap intervals by case.")
    if len(sweep.reports) < len(sweep.points):
        said.append(f"**Unfinished: {len(sweep.reports)} of {len(sweep.points)} points.** The same command goes on.")
    lines = [f"# Sweep of {sweep.editor}{added}", "", "\n\n".join(said), "", *_table(rows), ""]
    if best is not None:
        lines += [f"- {sentence}" for sentence in _best(sweep, best)]
    return "\n".join(lines).rstrip() + "\n"


def sweep_csv(sweep: Sweep) -> str:
    """A row per point and metric, with its interval; ``best`` is 1 for the best point."""
    written = io.StringIO()
    names = [*sweep.keys, "best", "metric", "before", "after", "after_low", "after_high", "n", "cases"]
    writer = csv.DictWriter(written, names, lineterminator="\n")
    writer.writeheader()
    for point, report in sweep.reports.items():
        shared = dict(zip(sweep.keys, map(text, point), strict=True)) | {"best": int(point == sweep.best())}
        for metric, states in report.estimates.items():
            before, after = states["before"], states["after"]
            assert after is not None
            row = {"metric": metric, "after": after.value, "after_low": after.low, "after_high": after.high}
            row |= {"before": None if before is None else before.value, "n": after.n, "cases": after.cases}
            writer.writerow(shared | row)
    return written.getvalue()


def _best(sweep: Sweep, best: Point) -> Iterator[str]:
    """Sentences on the best point: what was compared, which others are not clearly worse, whether it is at an end."""
    what = "balance (of ES, PS, NS, RS, DNS)" if sweep.by == BALANCE else METRICS[sweep.by].label
    least = min(LEAST_ES, max(value(report, "es") for report in sweep.reports.values()))
    yield f"Best by {what} among the points with ES of at least {least:g}: **{sweep.label(best)}**."
    near = []
    for point, report in sweep.reports.items():
        gap = sweep.against_best(point)
        if point == best or value(report, "es") < least or gap is None:
            continue
        if gap.low is None or gap.high is None or gap.low <= 0 <= gap.high:
            near.append(sweep.label(point))
    if near:
        yield f"Not clearly worse (the interval of the paired difference holds 0): {'; '.join(near)}."
    for key, values, chosen in zip(sweep.keys, sweep.grid.values(), best, strict=True):
        if len(values) > 2 and all(is_number(one) for one in values) and chosen in (min(values), max(values)):
            yield f"The best {key} is at an end of what was tried: try values beyond {text(chosen)}."
    yield "The best of several is flattered on the cases that chose it: confirm it on others (kedit bench uses other subjects)."
