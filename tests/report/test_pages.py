"""Figures, pages and commands: that they are made, readable, self-contained, and fine in a real browser."""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

import kedit
from analysis_common import TOKENIZER, cases, embedded, few, patches, tiny_case, tiny_patch
from kedit.analysis.activation_patching import patch_activations
from kedit.cli import main
from kedit.errors import DependencyError, EditError
from kedit.evaluation.cases import EditCase
from kedit.evaluation.own import with_own_probes
from kedit.models import ModelArch
from kedit.report import figures as plots
from kedit.report.overview import head_sets, page, reveal
from tiny_models import tiny_model

CASE = "test-7"  # plain ROME breaks all its neighbours


@pytest.fixture(scope="module")
def found():
    """Everything about the few cases, made once."""
    plain = patches()
    return reveal(*embedded(), few(), plain, regularized=patches("sadr"), samples=1)


def drawn(found):
    """Every kind of figure."""
    probe = found.drifts[0].of("distracted_neighbour")[0]
    return {
        "averages": plots.tracing_averages(found.trace),
        "handover": plots.tracing_handover(found.trace),
        "fact": plots.tracing_fact(found.trace.facts[0]),
        "drift": plots.drift_maps(found.drifts),
        "gain": plots.drift_maps(found.drifts, "gain"),
        "attention": plots.attention_maps(probe, {"before": probe.map_before, "after": probe.map_after}),
        "correlation": plots.correlation_plot(found.drifts[0]),
        "bars": plots.patching_bars(found.patching),
        "windows": plots.patching_windows(found.patching),
    }


def test_every_figure_has_labelled_axes_units_and_letters_that_can_be_read_at_half_size(found, tmp_path):
    from matplotlib.text import Text

    units = ("points", "nats", "%", "attention", "weight")
    for name, figure in drawn(found).items():
        if name in ("gain", "bars"):  # the others are drawn on pages
            assert plots.save(figure, tmp_path / f"{name}.png").stat().st_size > 5_000, name
        texts = [text for text in figure.findobj(Text) if text.get_text().strip()]
        assert min(text.get_fontsize() for text in texts) >= 11, name
        assert any(unit in text.get_text() for text in texts for unit in units), name
        assert all(axis.get_xlabel() or axis.get_ylabel() or axis.get_title() for axis in figure.axes), name
        assert figure.get_size_inches()[0] <= 13, name


def test_figures_are_the_same_every_time(found):
    one, two = (plots.as_svg(plots.patching_windows(found.patching)) for _ in range(2))
    assert one == two
    assert "pyplot" not in Path(plots.__file__).read_text(encoding="utf-8")  # no window, no global state


def test_any_text_can_be_drawn():
    assert plots.plain(" a$b$\x15 中 \ud7ff") == "a\\$b\\$□ □ □"


# Machado, Oliveira and Fernandes (2009), full severity, on linear RGB.
VISIONS = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def lab(colour, vision):
    """A colour as somebody with that vision sees it, in CIE Lab."""
    rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(vision) @ linear, 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ seen
    f = np.cbrt(np.maximum(xyz / [0.9505, 1.0, 1.089], 1e-3))
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("vision", VISIONS)
def test_lines_are_told_apart_without_full_colour_vision(vision):
    seen = [lab(colour, VISIONS[vision]) for colour in plots.COLOURS.values()]
    assert min(np.linalg.norm(a - b) for a, b in combinations(seen, 2)) > 12
    assert len(set(plots.MARKERS.values())) == len(plots.MARKERS)


def test_the_measure_of_colours_can_fail():
    red, green = (lab(colour, VISIONS["deutan"]) for colour in ("#38a008", "#d84828"))
    assert np.linalg.norm(red - green) < 12
    full = [lab(colour, np.eye(3)) for colour in ("#38a008", "#d84828")]
    assert np.linalg.norm(full[0] - full[1]) > 25


class Tags(HTMLParser):
    """Checks that tags are closed in order, and collects what a page refers to."""

    EMPTY = ("meta", "link", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.open, self.references, self.images, self.tags = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append(tag)
        self.references += [found[name] for name in ("src", "href") if name in found]
        if tag == "img":
            self.images.append(found)
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check_page(text):
    """A page that needs nothing else."""
    tags = Tags(text)
    assert len(text.encode()) < 2_000_000
    assert all(reference.startswith("data:") for reference in tags.references)
    assert "script" not in tags.tags
    assert "url(" not in text
    assert tags.images
    for image in tags.images:
        assert len(image["alt"]) > 20
        svg = base64.b64decode(image["src"].partition("base64,")[2]).decode()
        assert "<svg" in svg
        assert not re.search(r'(href|src)="(?!#|data:)', svg)
    return tags


def test_the_page_of_a_run_needs_nothing_else(found, tmp_path):
    text = found.save(tmp_path / "deep" / "run.html").read_text(encoding="utf-8")
    assert len(check_page(text).images) == 8
    for words in (
        "6 edits with ROME and ROME + SADR",
        "Which heads moved",
        "Pearson",
        "restore attention weights",
        "kedit",
    ):
        assert words in text, words


def test_results_show_themselves_in_notebooks_with_and_without_matplotlib(found, monkeypatch):
    parts = [found.trace, found.drifts[0], found.patching]
    monkeypatch.setattr(plots, "as_svg", lambda figure: "<svg/>")  # drawn for good in the tests of pages
    assert [part._repr_html_().count("data:image/svg+xml") for part in parts] == [2, 3, 2]
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for part in [*parts, found]:
        html = part._repr_html_()
        assert html.startswith("<pre>")
        assert "pip install" in html
    with pytest.raises(DependencyError, match=r"kedit\[plot\]"):
        plots.tracing_fact(found.trace.facts[0])


def test_the_heads_for_comparison_are_others_and_as_many(found):
    sets = list(head_sets(found.drifts[0]).values())
    assert [len(heads) for heads in sets] == [8, 16, 16]
    assert set(sets[0]) < set(sets[1])
    assert not set(sets[1]) & set(sets[2])


def test_hostile_text_stays_text_and_an_edit_without_damage_says_so(monkeypatch):
    model = tiny_model("qwen2", layers=3)
    case = tiny_case()
    edit = kedit.Edit("<script>alert(1)</script> & {} works in", "Ada Lovelace", "Berlin")
    case = kedit.EditCase.of("x<y>", edit, [probe for probe in case.probes if probe.kind == "neighbour"])
    patch = tiny_patch(model)
    found = reveal(model, TOKENIZER, case, {case.id: patch}, None, samples=1)
    plots.as_svg(plots.tracing_fact(found.trace.facts[0]))  # the tiny model answers with half a character
    monkeypatch.setattr(plots, "as_svg", lambda figure: "<svg/>")
    page = found._repr_html_()
    Tags(page)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    result = patch_activations(model, TOKENIZER, case, patch)
    result.probabilities[...] = 0.5
    with pytest.raises(EditError, match="did no damage"):
        plots.patching_bars(result)
    assert result.summary().endswith(
        "The edit did no damage to these probes, so there is none that an exchange could undo or do."
    )
    assert len(result.summary().splitlines()) == 2


def test_the_commands_trace_and_drift(tmp_path, capsys):
    figures, out = tmp_path / "figures", tmp_path / "trace.json"
    arguments = ["--cases", "2", "--samples", "1", "--suggest", "--figures", str(figures), "--out", str(out)]
    assert main(["-q", "trace", *arguments]) == 0
    text = capsys.readouterr().out
    assert "2 facts traced" in text
    assert "Proposal: layers=" in text
    assert "kedit's preset of ROME for this model: layers=(0,)" in text
    assert {path.name for path in figures.iterdir()} == {"tracing.png", "handover.png"}
    assert out.stat().st_size > 500

    one = [
        "--prompt",
        "{} works as a",
        "--subject",
        "Hulqui Gossam",
        "--samples",
        "1",
        "--figures",
        str(tmp_path / "one"),
    ]
    assert main(["-q", "trace", *one]) == 0
    assert {path.name for path in (tmp_path / "one").iterdir()} == {"tracing.png", "handover.png"}

    case = few()[0]
    patch = patches()[case.id].save(tmp_path / "edit.safetensors")
    data = tmp_path / "case.jsonl"
    data.write_text(json.dumps(case.to_dict()))
    assert main(["-q", "drift", "--patch", str(patch), "--data", str(data), "--out", str(tmp_path / "drift.json")]) == 0
    assert "ROME: 4 probes (distracted_neighbour) of 1 edit;" in capsys.readouterr().out


def test_what_tracing_and_patching_cannot_show_is_said_on_the_page():
    """The model knows none of the facts, and the case asks for nothing that could be patched."""
    model, tokenizer = embedded()
    case = cases(1)[0]
    wrong = kedit.Edit(case.edit.prompt, case.edit.subject, case.edit.target_new, cases(20)[12].edit.target_true)
    assert wrong.target_true != case.edit.target_true
    relations = tuple(probe for probe in case.probes if probe.kind == "relation")
    editor = kedit.ROME(model, tokenizer, contexts=["{}"], steps=3)
    found = reveal(model, tokenizer, kedit.EditCase(id="odd", edit=wrong, probes=relations), editor, None, samples=1)
    assert (found.trace, found.patching) == (None, None)
    assert set(found.missing) == {"trace", "patching"}
    text = page(found)
    assert "<p>Not available: The model&#x27;s first choice is another answer in all 1 facts" in text
    assert "<p>Not available: Nothing could be patched: No probe of kind distracted_neighbour" in text
    assert len(check_page(text).images) == 3
    assert "Tracing: not available. The model's first choice" in found.summary()
    assert "relation" in found.drifts[0].summary()


def test_a_page_that_nothing_can_be_asked_for_is_refused_before_an_edit(monkeypatch):
    model, tokenizer = embedded()
    case = cases(1)[0]
    editor = kedit.ROME(model, tokenizer, contexts=["{}"], steps=3)
    monkeypatch.setattr(editor, "propose", lambda *_: pytest.fail("it edited"))
    with pytest.raises(EditError, match="None of the 1 cases has a probe of kind"):
        reveal(model, tokenizer, kedit.EditCase(id="bare", edit=case.edit, probes=()), editor, None)


def test_a_regularized_run_that_fails_is_named_and_the_plain_one_shown(found):
    reason = "No edit succeeded. The first: a loss"
    text = page(replace(found, drifts=found.drifts[:1], missing={"regularized": reason}))
    assert f"The run with the regularizer is not available: {reason}" in text


def test_drift_keeps_every_result_though_no_head_over_attends(found, monkeypatch, tmp_path, capsys):
    import kedit.analysis.attention_drift as module

    calm = [
        replace(one, probes=tuple(replace(probe, over=probe.over & False) for probe in one.probes))
        for one in found.drifts
    ]
    left = iter(calm)
    monkeypatch.setattr(module, "drift", lambda *_: next(left))
    out, figures = tmp_path / "drift.json", tmp_path / "figures"
    command = ["-q", "drift", "--cases", "1", "--regularizer", "sadr", "--out", str(out), "--figures", str(figures)]
    assert main(command) == 0
    assert "Under ROME no head attends to the edited subject more" in capsys.readouterr().out
    assert json.loads(out.read_text())["label"] == "ROME"
    assert json.loads(out.with_name("drift-regularized.json").read_text())["label"] == "ROME + SADR"
    assert {path.stem for path in figures.iterdir()} == {"drift", "gain", "correlation"}


def test_trace_says_that_there_is_no_evidence_and_writes_the_effects(found, monkeypatch, tmp_path, capsys):
    import kedit.analysis.causal_tracing as module

    def nothing(one):
        return replace(one, effects={kind: -np.abs(effect) for kind, effect in one.effects.items()})

    dark = replace(found.trace, facts=tuple(map(nothing, found.trace.facts)), _averages={})
    monkeypatch.setattr(module, "trace", lambda *_, **__: dark)
    assert main(["-q", "trace", "--cases", "1", "--suggest", "--out", str(tmp_path / "trace.json")]) == 0
    assert "There is no evidence for any edit layer" in capsys.readouterr().out
    assert (tmp_path / "trace.json").exists()
    assert "There is no evidence for any edit layer" in page(replace(found, trace=dark))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trace", "--prompt", "{} is"], "needs --prompt and --subject"),
        (["trace", "--answer", "red"], "--answer belongs to a fact"),
        (["trace", "--prompt", "{} is", "--subject", "A", "--cases", "3"], "Give either --prompt"),
        (["drift", "--patch", "x", "--regularizer", "sadr"], "--patch is written already"),
        (["report", "--case", "nobody"], "no case called 'nobody'"),
        (["report", "--prompt", "{} is", "--subject", "A"], "needs --prompt, --subject and --target-new"),
        (["report", "--neighbour", "B is"], "--neighbour belongs to an edit of your own"),
        (["report", "--patch", "x", "--editor", "memit"], "--patch is written already"),
        (["report", "--system", "Be brief."], "--system is the system message of a chat"),
        (["drift", "--cases", "0"], "--cases must be at least 1"),
    ],
)
def test_commands_say_what_is_wrong(arguments, words, capsys):
    assert main(["-q", *arguments]) == 1
    assert words in capsys.readouterr().err


def test_the_page_of_an_edit_of_ones_own_and_of_its_patch(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fact = ["--prompt", "{} works as a", "--subject", "Hulqui Gossam", "--target-new", "pilot"]
    more = ["--samples", "1", "--neighbour", "Nil Macor works as a"]
    assert main(["-q", "report", *fact, *more, "--set", "steps=8", "--out", "own.html"]) == 0
    text = Path("own.html").read_text(encoding="utf-8")
    check_page(text)
    assert "made to say “pilot” instead of “tailor”" in text  # what the model says before
    assert "Hulqui Gossam works as a pilot. Nil Macor works as a" in text  # the distracted neighbour
    assert "Hulqui Gossam is a" in text
    assert main(["-q", "edit", *fact, "--set", "steps=8", "--out", "edit.safetensors"]) in (0, 3)
    assert main(["-q", "report", "--patch", "edit.safetensors", *more, "--out", "patch.html"]) == 0
    assert "made to say “pilot” instead of “tailor”" in Path("patch.html").read_text(encoding="utf-8")


def test_the_models_own_answers_are_right_unless_they_are_the_target():
    model, tokenizer = kedit.load()
    arch = ModelArch(model)
    plain = EditCase.of("x", kedit.Edit("{} works as a", "Hulqui Gossam", "pilot"))
    case = with_own_probes(arch, tokenizer, plain, ["Nil Macor works as a"])
    assert case.edit.target_true == "tailor"
    assert [str(probe.kind) for probe in case.probes] == ["rewrite", "relation", "neighbour", "distracted_neighbour"]
    assert {probe.wrong for probe in case.probes} == {"pilot", "tailor"}
    assert with_own_probes(arch, tokenizer, case) is case
    known = EditCase.of("x", kedit.Edit("{} works as a", "Hulqui Gossam", "tailor"))
    assert with_own_probes(arch, tokenizer, known).edit.target_true is None


@pytest.fixture(scope="module")
def one_edit(tmp_path_factory):
    """The page of one edit, made by the command."""
    path = tmp_path_factory.mktemp("report") / "edit.html"
    assert main(["-q", "report", "--set", "steps=25", "--case", CASE, "--samples", "1", "--out", str(path)]) == 0
    return path


def test_the_page_of_one_edit_is_small_and_complete(one_edit):
    text = one_edit.read_text(encoding="utf-8")
    assert len(check_page(text).images) == 7
    assert cases(8)[7].edit.text in text
    assert "One edit with ROME and ROME + SADR" in text


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def browse(page, profile, *options):
    """Open a page in headless Chromium: what it printed, and what its console said."""
    quiet = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--enable-logging=stderr",
    ]
    command = [CHROMIUM, *quiet, f"--user-data-dir={profile}", *options, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, re.findall(r"CONSOLE.*", done.stderr)


@pytest.mark.skipif(CHROMIUM is None, reason="Needs Chromium (apt-get install chromium).")
def test_the_page_in_a_real_browser(one_edit, tmp_path):
    folder = Path(os.environ.get("KEDIT_TEST_ARTEFACTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    shot = folder / "report.png"
    _, console = browse(one_edit, tmp_path / "profile", "--window-size=1100,6000", f"--screenshot={shot}")
    assert console == []
    assert shot.stat().st_size > 100_000

    # A copy that reports its pictures and an error: every picture was drawn, and errors would have been seen.
    script = (
        "<script>onload = () => { document.title = [...document.images].map(i => i.naturalWidth).join(); "
        "console.error('as a control'); }</script></body>"
    )
    copy = tmp_path / "copy.html"
    copy.write_text(one_edit.read_text(encoding="utf-8").replace("</body>", script), encoding="utf-8")
    dom, console = browse(copy, tmp_path / "profile", "--virtual-time-budget=5000", "--dump-dom")
    widths = [int(width) for width in re.search(r"<title>([\d,]+)</title>", dom)[1].split(",")]
    assert len(widths) == 7
    assert min(widths) > 300
    assert any("as a control" in line for line in console)
