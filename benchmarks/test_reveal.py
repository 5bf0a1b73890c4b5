"""Tracing, attention drift and patching on held-out edits of the embedded model, compared with the paper.

``pytest benchmarks/test_reveal.py`` writes ``results/reveal.md`` with its figures: about four minutes on one core. Facts and
edits are those of the world's test half, on which nothing was chosen; hyper-parameters are the presets.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from quality import drift_table, interval, made_with

import kedit
from kedit.analysis.activation_patching import patch_activations
from kedit.analysis.edited_models import Patches
from kedit.analysis.interventions import LABELS
from kedit.analysis.results.drift import DriftResult
from kedit.analysis.results.patching import CONTAMINATE, EDITED, ORIGINAL, RESTORE, PatchingResult
from kedit.analysis.results.tracing import ROLES, TraceResult
from kedit.embedded import load_world
from kedit.embedded.cases import world_cases
from kedit.report import figures
from kedit.report.overview import head_sets, reveal

EDITS, TRACED, SAMPLES = 80, 60, 4


@dataclass
class Found:
    """All results, and where they are written."""

    trace: TraceResult
    rome: DriftResult
    sadr: DriftResult
    patching: PatchingResult
    page: Path
    results: Path


@pytest.fixture(scope="module")
def found(request, tmp_path_factory):
    torch.set_num_threads(1)
    model, tokenizer = kedit.load()
    cases = world_cases(load_world(), "test", EDITS)
    editor = kedit.ROME(model, tokenizer)
    plain, regularized = (Patches(model, tokenizer, cases, editor, name).all() for name in (None, "sadr"))
    rome, sadr = (kedit.drift(model, tokenizer, cases, patches) for patches in (plain, regularized))
    worst = max(rome.of("distracted_neighbour"), key=lambda probe: probe.loss).case
    one = next(case for case in cases if case.id == worst)
    single = reveal(model, tokenizer, one, plain, regularized=regularized)
    made = Found(
        trace=kedit.trace(model, tokenizer, cases[:TRACED], samples=SAMPLES),
        rome=rome,
        sadr=sadr,
        patching=patch_activations(model, tokenizer, cases, plain, heads=head_sets(rome)),
        page=single.save(tmp_path_factory.mktemp("page") / "edit.html"),
        results=Path(request.config.getoption("--results")),
    )
    made.results.mkdir(parents=True, exist_ok=True)
    draw(made)
    (made.results / "reveal.md").write_text(text(made), encoding="utf-8")
    return made


def draw(found):
    """The figures."""
    probe = max(found.rome.of("distracted_neighbour"), key=lambda one: one.loss)
    twin = next(one for one in found.sadr.probes if (one.case, one.prompt) == (probe.case, probe.prompt))
    states = {"before": probe.map_before, "ROME": probe.map_after, "ROME + SADR": twin.map_after}
    drawn = {
        "tracing": figures.tracing_averages(found.trace),
        "handover": figures.tracing_handover(found.trace),
        "drift": figures.drift_maps([found.rome, found.sadr]),
        "gain": figures.drift_maps([found.rome, found.sadr], "gain"),
        "attention": figures.attention_maps(probe, states),
        "correlation": figures.correlation_plot(found.rome),
        "patching": figures.patching_bars(found.patching),
        "windows": figures.patching_windows(found.patching),
    }
    for name, figure in drawn.items():
        figures.save(figure, found.results / f"reveal_{name}.png")


def text(found):
    """The page of results."""
    probes = found.rome.of("distracted_neighbour")
    parts = [
        "# What edits do inside the embedded model\n",
        f"{EDITS} held-out edits, each alone, with ROME and with ROME + SADR (presets); {len(probes)} distracted-neighbour "
        f"probes; {TRACED} facts traced with {SAMPLES} draws of the noise. {made_with()}. In brackets: 95% "
        "bootstrap intervals by fact or edit. Written by `pytest benchmarks/test_reveal.py`.\n",
        "## Comparison with the paper\n",
        *(f"- {line}" for line in claims(found)),
        "\n## Tracing\n",
        f"```\n{found.trace.summary()}\n\n{found.trace.suggest()}\n```\n",
        "![Average indirect effects](reveal_tracing.png)\n\n![Hand-over](reveal_handover.png)\n",
        "## Attention drift\n",
        drift_table(found.rome),
        "![Drift by head](reveal_drift.png)\n\n![Change of the weight on the subject](reveal_gain.png)\n",
        "![Drift against damage](reveal_correlation.png)\n\n![Attention before and after](reveal_attention.png)\n",
        f"```\n{found.rome.summary()}\n\n{found.sadr.summary()}\n```\n",
        "## Patching\n",
        f"```\n{found.patching.summary()}\n```\n",
        "![Exchanges in all blocks](reveal_patching.png)\n\n![Exchanges block by block](reveal_windows.png)\n",
    ]
    return "\n".join(parts)


def claims(found):
    """The paper's claims and whether they hold here."""
    return [*traced(found), *drifted(found), *patched(found)]


def traced(found):
    hidden = 100 * found.trace.average("hidden")[0]
    subject, last = (hidden[ROLES.index(role)] for role in ("subject last", "last"))
    end = found.trace.suggest().handover
    return [
        f"Tracing: the subject's last token holds the fact in blocks 0-{end} (indirect effect {subject[0]:.0f} points in block "
        f"0, {subject[end]:.0f} in block {end}, {subject[end + 1]:.0f} in block {end + 1}); the last token takes it over from "
        f"block {end + 1} on ({last[end]:.0f} points in block {end}, {last[end + 1]:.0f} in block {end + 1}, {last[-1]:.0f} in the "
        "last). Swapping hidden states shows the same hand-over, and so do large models."
    ]


def drifted(found):
    both = found.rome.correlations()["drift"]
    change = {kind: found.rome.against(found.sadr, kind) for kind in ("distracted_neighbour", "rewrite")}
    rome, sadr = (100 * np.mean([one.loss for one in result.of("relation")]) for result in (found.rome, found.sadr))
    neighbours, edited = (
        f"{one['here'].value:.3f} to {one['other'].value:.3f} nats per head (difference {interval(one['difference'], '+.3f')})"
        for one in change.values()
    )
    return [
        f"Drift correlates with failure: Pearson {interval(both['pearson'])}, Spearman {interval(both['spearman'])} over "
        f"{both['pearson'].n} probes. {'As in the paper.' if both['pearson'].low > 0 else 'Not as in the paper.'}",
        f"In the heads that over-attend under ROME, SADR lowers the drift from {neighbours} on distracted neighbours, and from "
        f"{edited} on the edited prompt itself.",
        f"Other facts of the subject: the right answer loses {rome:.0f} points with ROME and {sadr:.0f} with SADR. In the paper "
        f"SADR recovers a part of that; here it {'does too' if sadr < rome - 5 else 'does not'}.",
    ]


def patched(found):
    patching = found.patching
    lost = patching.score(ORIGINAL).value - patching.score(EDITED).value
    back, taken = (
        {name: patching.share(patching.find(way, name)) for name in LABELS} for way in (RESTORE, CONTAMINATE)
    )
    return [
        f"ROME loses {lost:.1f} points of DNS. Restoring the attention weights at the last token, and nothing else, recovers "
        f"{percent(back['weights'])} of them, the attention output {percent(back['attention'])}, the MLP output "
        f"{percent(back['mlp'])}. Attention carries the failure, "
        + ("as in the paper." if back["weights"].low >= 0.5 else "less than in the paper."),
        f"The reverse: with the edited model's attention weights the original model loses {percent(taken['weights'])} of them, "
        f"with its attention output {percent(taken['attention'])}, with its MLP output {percent(taken['mlp'])}. "
        + (
            "The weights alone contaminate, as in the paper."
            if taken["weights"].value >= 0.5
            else "The weights alone do less than in the paper: the last token then attends to a subject that does not encode "
            "the new object, so the wrong answer needs the edited values too."
        ),
    ]


def percent(found):
    return f"{100 * found.value:.0f}% [{100 * found.low:.0f}, {100 * found.high:.0f}]"


def test_tracing_hands_over_after_the_first_blocks(found):
    hidden = found.trace.average("hidden")
    subject, last = (hidden[:, ROLES.index(role)] for role in ("subject last", "last"))
    assert found.trace.suggest().handover == 2
    assert subject[1, :3].min() > subject[2, 3:].max()  # intervals apart
    assert last[1, -1] > last[2, :3].max()
    assert found.trace.suggest().layer in (0, 1)


def test_drift_goes_with_failure(found):
    both = found.rome.correlations()["drift"]
    assert both["pearson"].n >= 200
    assert both["pearson"].low > 0.3
    assert both["spearman"].low > 0.3


def test_restoring_only_the_attention_rows_brings_back_half_of_the_lost_dns(found):
    patching = found.patching
    assert patching.score(EDITED).high < patching.score(ORIGINAL).value
    assert patching.share(patching.find(RESTORE, "weights")).low >= 0.5


def test_few_heads_carry_most_of_it_and_others_do_not(found):
    patching = found.patching
    named = [(i, one) for i, one in enumerate(patching.conditions) if one.name and one.direction == RESTORE]
    most = patching.share(named[1][0])
    others = patching.share(named[-1][0])
    assert len(named[1][1].heads) == len(named[-1][1].heads)
    assert most.low > others.high


def test_sadr_drifts_less_in_the_heads_it_restrains(found):
    for kind in ("distracted_neighbour", "rewrite"):
        assert found.rome.against(found.sadr, kind)["difference"].high < 0


def test_the_page_of_one_edit_is_small_and_needs_nothing_else(found):
    page = found.page.read_text()
    assert len(page.encode()) < 2_000_000
    assert "http://" not in page.split("<body>")[0]
    assert "<script" not in page
