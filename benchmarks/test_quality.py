"""The tables: `pytest benchmarks/test_quality.py` writes benchmarks/results/."""

import math
from functools import partial

import pytest
from quality import ADR, FIVE, GAMMAS, GENERATE, MARKS, WIDER, cell, save_json, signed, table, tradeoff, value

import kedit
from kedit.bench.choice import qualifies
from kedit.bench.table import won_back
from kedit.evaluation.metrics import METRICS
from kedit.regularizers import KeyNorm
from kedit.report.figures import as_svg

pytestmark = [
    pytest.mark.timeout(0),
    # In a long sequence one target may be known already.
    pytest.mark.filterwarnings("default::kedit.errors.KEditWarning"),
]
COLUMNS = ("score", *FIVE, "fluency")
VARIANTS = {"SADR": kedit.SADR, ADR: partial(kedit.SADR, select="all")}  # rows whose γ is chosen


def rows_of(bench, name):
    """(label, regularizer) of an editor's rows: none, all-heads ADR, SADR, and what the user added."""
    found = [("", None)]
    if bench.takes(name, kedit.SADR(gamma=GAMMAS[0])):
        for label in (ADR, "SADR"):
            found.append((label, VARIANTS[label](gamma=bench.gamma(name, VARIANTS[label]))))
        found += [(own, own) for own in bench.added]
    return found


@pytest.fixture(scope="session")
def table3(bench):
    """Reports by (editor, label of the regularizer)."""
    unedited = bench.run(None, None, bench.test, generate=GENERATE)
    reports = {("none", ""): unedited}
    for name in bench.names:
        for label, regularizer in rows_of(bench, name):
            report = bench.run(bench.editor(name), regularizer, bench.test, generate=GENERATE)
            assert report.meta["weights_restored"]
            reports[name, label] = report
    return reports


def test_table_3(bench, table3):
    rows, differences, figures = [], [], {}
    for (name, label), report in table3.items():
        gamma = next((item.get("gamma") for item in report.meta["regularizers"] if item.get("gamma") is not None), None)
        shown = "" if gamma is None else f"{gamma:g}"
        if label in VARIANTS:
            shown += bench.mark(name, VARIANTS[label])
        cells = [cell(report.estimates.get(metric, {}).get("after")) for metric in COLUMNS]
        rows.append([name if not label else f"+ {label}", *cells, shown])
        figures[f"{name} {label}".strip()] = report.summary()
        for metric in FIVE:
            if metric in report.estimates:
                found = report[metric]
                assert math.isfinite(found.value)
                assert 0 <= found.value <= 100
                assert found.cases <= len(bench.test)
        if label and (name, "") in table3:
            against = report.compare(table3[name, ""], FIVE)
            share = won_back(table3[name, ""], report, "dns")
            text = "–" if share is None else share.text(0, unit="%")
            differences.append([f"{name} + {label}", *(signed(against[metric]) for metric in FIVE), text])
    heads = ["editor", *(METRICS[name].label for name in COLUMNS), "γ"]
    text = (
        "# Results in the form of Table 3\n\n"
        + bench.describe()
        + "\n\nHalf the 95% bootstrap interval by case in brackets. "
    )
    text += f"Fluency: of {GENERATE} generated tokens per edit (the paper's: of 100 with the prompt). {grid()}\n\n"
    text += (
        table(heads, rows)
        + f"\n{MARKS}\n\nPaired differences to the same editor without a regularizer, and the share of the lost DNS that is "
        "recovered:\n\n"
    )
    text += table(["", *(METRICS[name].label for name in FIVE), "DNS recovered"], differences)
    text += "\n" + "\n".join(f"- {line}" for line in claims(bench, table3)) + "\n"
    bench.write("table3.md", text)
    save_json(bench.results / "table3.json", figures)
    assert len(rows) >= 1 + len(bench.names)


def grid():
    """Describe how γ was chosen."""
    return (
        f"γ: the best Score on the development half of {', '.join(f'{g:g}' for g in GAMMAS)}, then "
        f"{', '.join(f'{g:g}' for g in WIDER)} as long as the largest is the best."
    )


def at_equal_dns(bench, table3):
    """PS of selected heads against all heads at equal DNS, as a sentence."""
    found = bench.equal_dns("rome")
    if found is None:
        return "At no γ do all heads have SADR's DNS on the development half, so PS at equal DNS cannot be compared."
    reports = [
        bench.run(bench.editor("rome"), kedit.SADR(gamma=gamma, select=select), bench.test, exact=False)
        for gamma, select in zip(found, ("max", "all"), strict=True)
    ]
    against = reports[0].compare(reports[1], ["dns", "ps", "rs"])
    if against["ps"].low > 0:
        verdict = "selecting heads is better on PS"
    elif against["ps"].high < 0:
        verdict = "selecting heads is worse on PS"
    else:
        verdict = "selecting heads does not clearly change PS here"
    return (
        f"At equal DNS on the development half (SADR with γ {found[0]:g}, all heads with γ {found[1]:g}), on the held-out "
        f"edits: DNS {signed(against['dns'])}, PS {signed(against['ps'])}, RS {signed(against['rs'])}: {verdict}."
    )


def claims(bench, table3):
    """The paper's claims for ROME, and whether they hold here."""
    if ("rome", "SADR") not in table3:
        return ["ROME with SADR was not run."]
    none, adr, sadr = (table3["rome", label] for label in ("", ADR, "SADR"))
    lines = []
    for metric in ("dns", "rs"):
        if metric in none.estimates:
            fall = none.estimates[metric]["difference"]
            says = "loses" if fall.high is not None and fall.high < 0 else "does not clearly lose"
            lines.append(f"ROME {says} {METRICS[metric].label}: {signed(fall)}.")
    share = won_back(none, sadr, "dns")
    if share is not None:
        change = signed(sadr.compare(none, ["ps"])["ps"])
        found = f"recovers {share.value:.0f}% of" if qualifies(sadr, none) else "is no cure for"
        lines.append(f"SADR {found} the lost DNS at ES {sadr['es'].value:.2f}; PS {change}.")
    if "dns" in adr.estimates:
        against = sadr.compare(adr, ["ps", "dns", "rs"])
        lines.append(
            f"SADR against all heads, each at its own γ: DNS {signed(against['dns'])}, PS {signed(against['ps'])}, "
            f"RS {signed(against['rs'])}: "
            + (
                "selective is better on PS."
                if against["ps"].low > 0
                else "no clear gain on PS from selecting heads here."
            )
        )
        lines.append(at_equal_dns(bench, table3))
    return lines


def test_the_papers_claims_on_the_embedded_model(bench, table3):
    if not bench.embedded or ("rome", "SADR") not in table3:
        pytest.skip("The claims are about ROME with SADR on the embedded model.")
    none, sadr = table3["rome", ""], table3["rome", "SADR"]
    assert len(none.records) >= 200
    assert none.estimates["dns"]["difference"].high < 0
    assert none.estimates["rs"]["difference"].high < 0
    assert won_back(none, sadr, "dns").value >= 50
    assert sadr["es"].value >= 99
    assert sadr["ps"].value >= none["ps"].value - 3


def test_the_trade_off_over_gamma(bench):
    """(b): PS against DNS and RS as γ grows, for the selected heads and for all."""
    name = "rome" if "rome" in bench.names else bench.names[0]
    cases, lines = bench.test[:100], {"dns": {}, "rs": {}}
    rows = []
    for label, select in (("SADR", "max"), (ADR, "all")):
        reports = [(0.0, bench.run(bench.editor(name), None, cases, exact=False))]
        reports += [
            (g, bench.run(bench.editor(name), kedit.SADR(gamma=g, select=select), cases, exact=False)) for g in GAMMAS
        ]
        for gamma, report in reports:
            rows.append(
                [
                    label,
                    f"{gamma:g}",
                    *(cell(report.estimates.get(metric, {}).get("after")) for metric in ("score", *FIVE)),
                ]
            )
        for metric in lines:
            if all(metric in report.estimates and "ps" in report.estimates for _, report in reports):
                lines[metric][label] = [(gamma, value(report, "ps"), report[metric]) for gamma, report in reports]
    text = f"# The trade-off over γ ({name})\n\n{bench.describe()} The first {len(cases)} held-out edits.\n\n"
    text += table(["", "γ", *(METRICS[n].label for n in ("score", *FIVE))], rows)
    for metric, found in lines.items():
        if found:
            bench.write(f"tradeoff_{metric}.svg", as_svg(tradeoff(found, METRICS[metric].label)))
            text += f"\n![{METRICS[metric].label} against PS](tradeoff_{metric}.svg)\n"
    bench.write("tradeoff.md", text)
    assert len(rows) == 2 * (len(GAMMAS) + 1)


def test_the_ablations_of_sadr(bench):
    """(c): mask rule, divergence, range of blocks, key norm instead; each with a γ of its own from the development half."""
    name = "rome" if "rome" in bench.names else bench.names[0]
    editor = bench.editor(name)
    first, last = editor.config.layers[-1] + 1, editor.arch.num_layers - 1
    middle = (first + last) // 2
    variants = {
        "SADR": partial(kedit.SADR),
        "all heads": partial(kedit.SADR, select="all"),
        "Jensen-Shannon": partial(kedit.SADR, divergence="js"),
        "squared distance": partial(kedit.SADR, divergence="l2"),
        f"blocks {first}-{middle}": partial(kedit.SADR, layers=(first, middle)),
        f"blocks {min(middle + 1, last)}-{last}": partial(kedit.SADR, layers=(min(middle + 1, last), last)),
        "attention-key norm instead": partial(KeyNorm),
    }
    cases = bench.test[:100]
    plain = bench.run(editor, None, cases, exact=False)
    rows = [["none", "", *(cell(plain.estimates.get(n, {}).get("after")) for n in ("score", *FIVE)), ""]]
    for label, variant in variants.items():
        gamma = bench.gamma(name, variant)
        report = bench.run(editor, variant(gamma=gamma), cases, exact=False)
        cells = [cell(report.estimates.get(n, {}).get("after")) for n in ("score", *FIVE)]
        gain = signed(report.compare(plain, ["dns"])["dns"]) if "dns" in report.estimates else "–"
        rows.append([label, f"{gamma:g}{bench.mark(name, variant)}", *cells, gain])
    text = f"# Ablations of SADR ({name})\n\n{bench.describe()} The first {len(cases)} held-out edits. {grid()}\n\n"
    text += table(["variant", "γ", *(METRICS[n].label for n in ("score", *FIVE)), "DNS against none"], rows)
    text += f"\n{MARKS}\n"
    bench.write("ablations.md", text)
    assert len(rows) == 1 + len(variants)


def test_single_batch_and_sequential(bench):
    """(d): the same facts alone, at once (what solves jointly), and one after the other; up to the largest number there is."""
    sizes = [size for size in (1, 20, 200, 1000) if size < len(bench.large)] + [len(bench.large)]
    rows = []
    for name in bench.names:
        for mode in ("single", "batch", "sequential") if bench.editor(name).batched else ("single", "sequential"):
            for size in sizes if mode != "single" else [min(100, len(bench.large))]:
                report = bench.run(bench.editor(name), None, bench.large[:size], mode, exact=False)
                cells = [cell(report.estimates.get(n, {}).get("after")) for n in ("score", *FIVE)]
                seconds = report.seconds.get("edit", 0.0) / size
                rows.append([name, mode, str(size), *cells, f"{1000 * seconds:.0f}", str(len(report.failures) or "")])
                assert report.meta["weights_restored"]
    text = f"# Single, batch and sequential editing\n\n{bench.describe()} "
    text += f"Batches and sequences have up to {bench.largest} edits"
    text += f", all {len(bench.large)} that there are.\n\n" if len(bench.large) < bench.largest else ".\n\n"
    text += table(
        ["editor", "mode", "edits", *(METRICS[n].label for n in ("score", *FIVE)), "ms per edit", "failed"], rows
    )
    bench.write("modes.md", text)


def test_how_the_time_splits(bench, tmp_path):
    """200 cases, before, after and a ROME edit with SADR: under four minutes on two cores."""
    if "rome" not in bench.names:
        pytest.skip("The figure is about ROME.")
    bench.suite.folder, runs = tmp_path, bench.suite.folder
    try:
        report = bench.run(bench.editor("rome"), kedit.SADR(gamma=bench_gamma(bench, runs)), bench.test, chunk=32)
    finally:
        bench.suite.folder = runs
    seconds = report.seconds
    total = sum(seconds.values())
    lines = [f"- {stage}: {found:.1f} s ({100 * found / total:.0f}%)" for stage, found in seconds.items()]
    probes = sum(len(record.after.probes) for record in report.records)
    text = f"# Time of an evaluation\n\n{bench.describe()}\n\n"
    text += f"{len(report.records)} cases with {probes} probes, ROME with SADR: {total:.1f} s.\n\n"
    bench.write("time.md", text + "\n".join(lines) + "\n")
    if bench.embedded and len(report.records) <= 200:
        assert total < 240


def bench_gamma(bench, runs):
    """The chosen γ, from the runs that are already there."""
    held, bench.suite.folder = bench.suite.folder, runs
    try:
        return bench.gamma("rome")
    finally:
        bench.suite.folder = held
