"""kedit bench and kedit sweep: what they choose, write, keep and refuse."""

import csv
import json
import re
from dataclasses import replace

import pytest
import torch

from kedit.bench import Experiment, Row, Suite, Sweep, choose_gamma
from kedit.bench.cases import Source, choose_cases
from kedit.bench.choice import GammaChoice
from kedit.bench.progress import TimeLeft
from kedit.bench.rows import rows_of
from kedit.bench.table import gamma_text, markdown, sentences, won_back
from kedit.cli import main
from kedit.cli.sweep import values_of
from kedit.edit import Edit
from kedit.editors import presets
from kedit.errors import ConfigError, UnknownNameError
from kedit.evaluation import EditCase, EvalReport, Kind, Probe, known_cases, split_by_subject
from kedit.evaluation.probing import EvalOptions, ProbeScorer
from kedit.evaluation.records import CaseRecord, CaseScore, ProbeScore
from kedit.evaluation.statistics import Estimate
from kedit.keys.second_moment import Moment
from kedit.prompts.likelihood import Answer
from tiny_models import tiny_model, tokenizer

TOWNS = ["Paris", "Rome", "Madrid", "Oslo", "Berlin", "London", "Vienna", "Seattle"]
QUICK = ["--set", "layers=1", "--set", "steps=2", "--contexts", "2", "--moments-corpus"]


def a_case(name: str, new: str, true: str) -> EditCase:
    probes = [
        Probe(kind=Kind.PARAPHRASE, prompt=f"The home of {name} is", right=new, wrong=true),
        Probe(kind=Kind.NEIGHBOUR, prompt="Danielle stays in", right=true, wrong=new),
        Probe(kind=Kind.RELATION, prompt=f"{name} works as a", right="teacher", wrong=new),
    ]
    return EditCase.of(name, Edit("{} lives in", name, new, true), probes)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model, cases that it knows on both sides of the split, and a corpus."""
    folder = tmp_path_factory.mktemp("bench")
    model, tok = tiny_model("gpt2"), tokenizer("plain")
    model.save_pretrained(folder / "model")
    tok.save_pretrained(folder / "model")
    cases = _told_apart(model, tok, [f"Person {number}" for number in range(30)])
    known = known_cases(model, tok, cases).cases
    cases = [case for case in cases if case in known]
    assert all(len(side) >= 4 for side in split_by_subject(cases))
    (folder / "cases.jsonl").write_text("\n".join(json.dumps(case.to_dict()) for case in cases))
    (folder / "corpus.txt").write_text("\n\n".join(f"Ada lives in Rome with {i} others." for i in range(300)))
    return folder


def _told_apart(model, tok, names) -> list[EditCase]:
    """A case per name whose true object is its most likely town, and the new one the least likely."""
    probes = [[Probe(kind=Kind.PARAPHRASE, prompt=f"{name} lives in", right=town) for town in TOWNS] for name in names]
    edits = [Edit("{} lives in", name, TOWNS[0]) for name in names]
    asked = [EditCase.of(edit.subject, edit, towns) for edit, towns in zip(edits, probes, strict=True)]
    cases = []
    for name, score in zip(names, ProbeScorer(model, tok, EvalOptions(exact=False), asked).score(asked), strict=True):
        towns = sorted(zip([probe.right.nll for probe in score.probes[1:]], TOWNS, strict=True))
        cases.append(a_case(name, towns[-1][1], towns[0][1]))
    return cases


@pytest.fixture
def start(place, tmp_path, monkeypatch):
    """Start a command on the tiny model; returns its status."""
    monkeypatch.setenv("KEDIT_CACHE", str(place / "cache"))

    def run(command, *options, out="out", quick=True):
        words = [
            command,
            "--model",
            str(place / "model"),
            "--data",
            str(place / "cases.jsonl"),
            "--out",
            str(tmp_path / out),
        ]
        return main([*words, *(QUICK if quick else QUICK[4:]), str(place / "corpus.txt"), *options])

    return run


def rows_in(path) -> list[dict]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


BENCH = ("--cases", "3", "--dev-cases", "2", "--gammas", "1", "--editors", "rome,ft")


def test_the_table_of_a_bench_and_going_on_without_running_again(start, tmp_path, monkeypatch, capsys):
    assert start("bench", *BENCH) == 0
    out = tmp_path / "out"
    text = (out / "table.md").read_text()
    for row in ("| unedited |", "| rome | none |", "| rome | sadr |", "| rome | sadr:auto | auto |", "| ft | none |"):
        assert row in text
    assert "| rome | relations | 0.25 |" in text
    assert "ft + sadr was not run: FT optimises no value" in text
    assert re.search(r"held-out: of \d+ facts asked, the unedited model knows 3", text)
    assert "Too few development cases: γ was chosen on 2 with 2 paraphrases" in text
    assert "Unfinished" not in text
    rows = rows_in(out / "table.csv")
    assert {(row["editor"], row["regularizer"]) for row in rows} == {
        ("rome", "none"), ("rome", "sadr"), ("rome", "sadr:auto"), ("rome", "relations"), ("ft", "none"),
    }  # fmt: skip
    plain = next(row for row in rows if (row["regularizer"], row["metric"]) == ("none", "es"))
    assert plain["against_none"] == ""
    assert (out / "tradeoff.svg").read_text().startswith("<?xml")
    chosen = json.loads((out / "cases.json").read_text())
    halves = [{case["edit"]["subject"] for case in chosen[half]} for half in ("development", "held_out")]
    assert [len(half) for half in halves] == [2, 3]
    assert not halves[0] & halves[1]
    capsys.readouterr()

    monkeypatch.setattr("kedit.bench.suite.evaluate", lambda *args, **options: pytest.fail("ran again"))
    monkeypatch.setattr("kedit.bench.cases.known_cases", lambda *args, **options: pytest.fail("asked again"))
    words = ["bench", "--config", str(out / "config.yaml")]
    assert main(words) == 0  # the settings that were written give the same table
    assert (out / "table.md").read_text() == text


def test_an_interrupted_bench_writes_what_it_has_and_goes_on(start, tmp_path, monkeypatch, capsys):
    import kedit.bench.suite as suite

    calls, evaluate = [], suite.evaluate

    def interrupted(*args, **options):
        calls.append(options["out"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*args, **options)

    monkeypatch.setattr("kedit.bench.suite.evaluate", interrupted)
    options = ("--cases", "2", "--regularizers", "none,relations,sadr:auto")
    assert start("bench", *options) == 130
    assert "1 rows are in" in capsys.readouterr().err
    text = (tmp_path / "out/table.md").read_text()
    assert "**Unfinished: 1 of 3 rows.**" in text
    assert "| rome | none |" in text
    assert start("bench", *options) == 0
    assert len(calls) == 4  # the first run was read
    assert calls[1] == calls[2]
    assert "Unfinished" not in (tmp_path / "out/table.md").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--editors", "romee"), "rome"),
        (("--regularizers", "sadrr"), "sadr"),
        (("--regularizers", ","), "no row"),
        (("--regularizers", "none,sadr:-1"), "gamma"),
        (("--regularizers", "none,relations:nan"), "gamma"),
        (("--gammas", "0,1"), "above 0"),
        (("--gammas", "x"), "list of numbers"),
        (("--dev-cases", "0"), "--dev-cases"),
        (("--cases", "0"), "--cases"),
        (("--contexts", "0"), "--contexts"),
        (("--set", "clmp=2"), "clmp"),
        (("--set", "memit.clamp=2"), "memit.clamp"),
        (("--exclude", "missing.json"), "missing.json"),
        (("--data", "missing.json"), "missing.json"),
    ],
)
def test_bad_options_are_said_in_a_sentence(start, capsys, options, message):
    assert start("bench", *options) == 1
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_a_sweep_marks_the_best_point_and_goes_on(start, tmp_path, monkeypatch):
    words = (
        "--dev-cases",
        "3",
        "--set",
        "layers=1,[0,1]",
        "--set",
        "steps=1,20",
        "--editor",
        "memit",
        "--contexts",
        "2",
    )
    assert start("sweep", *words, quick=False) == 0
    rows = rows_in(tmp_path / "out/sweep.csv")
    assert [(row["layers"], row["steps"]) for row in rows if row["metric"] == "es"] == [
        ("1", "1"), ("1", "20"), ("[0,1]", "1"), ("[0,1]", "20"),
    ]  # fmt: skip
    text = (tmp_path / "out/sweep.md").read_text()
    assert text.count("**best**") == 1
    best = {(row["layers"], row["steps"]) for row in rows if row["best"] == "1"}
    assert len(best) == 1
    es = {(row["layers"], row["steps"]): float(row["after"]) for row in rows if row["metric"] == "es"}
    assert es[best.pop()] == max(es.values()) > min(es.values())
    assert (tmp_path / "out/sweep.svg").is_file()
    monkeypatch.setattr("kedit.bench.suite.evaluate", lambda *args, **options: pytest.fail("ran again"))
    assert main(["sweep", "--config", str(tmp_path / "out/config.yaml")]) == 0
    assert (tmp_path / "out/sweep.md").read_text() == text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "at least one --set"),
        (("--set", "layers"), "KEY=VALUE"),
        (("--set", "layers="), "KEY=VALUE"),
        (("--set", "blocks=1"), "blocks"),
        (("--set", "gamma=1"), "--regularizer"),
        (("--set", "sadr.select=all"), "--regularizer sadr"),
        (("--set", "layers=1,99"), "99"),
        (("--set", "layers=1", "--by", "dnss"), "dns"),
        (("--set", "layers=1", "--by", "fluency"), "does not measure fluency"),
        (("--set", "layers=1", "--by", "rewrite_exact"), "does not measure rewrite_exact"),
        (("--set", "layers=[3,[4]]"), "numbers, texts or lists"),
        (("--set", "layers=0", "--set", "layers=1"), "layers is given twice"),
    ],
)
def test_bad_grids_are_said_before_anything_runs(start, capsys, tmp_path, options, message):
    assert start("sweep", *options, quick=False) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out/runs").exists()


def test_values_of_a_grid():
    items = ["layers=3,[4,5]", "gamma=auto,0.1", "dtype=None", "sadr.select=max,all", "clamp=2"]
    assert values_of(items) == {
        "layers": [3, (4, 5)],
        "gamma": ["auto", 0.1],
        "dtype": [None],
        "sadr.select": ["max", "all"],
        "clamp": [2],
    }


def test_rows_say_where_gamma_comes_from():
    rows = rows_of(
        ["none", "sadr", "sadr:auto", "sadr:0.5", "relations", "relations:best", "adr:1", "relations+sadr:auto"]
    )
    assert [row.chooses_gamma for row in rows] == [False, True, False, False, False, True, False, False]
    assert rows[1].regularizers(0.3)[0].gamma == 0.3
    assert [row.regularizers()[0].gamma for row in rows[2:5]] == ["auto", 0.5, None]
    assert rows[4].regularizers()[0].factor == 0.25
    assert rows[6].regularizers()[0].select == "all"
    assert [(item.name, item.gamma) for item in rows[7].regularizers()] == [("relations", None), ("sadr", "auto")]
    with pytest.raises(ConfigError, match="more than one"):
        Row.of("sadr+relations:best")
    with pytest.raises(UnknownNameError):
        Row.of("sadr:atuo")


def report_of(*, es=100.0, ps=100.0, dns=50.0, before=80.0, cases=40) -> EvalReport:
    """A report with so many per cent right, on so many cases with one probe of each kind."""

    def score(shares, number):
        probes = []
        for kind, share in shares.items():
            right = number < round(share * cases / 100)
            answers = {side: Answer(nll, (1,), (1,)) for side, nll in (("right", 2.0 - right), ("wrong", 1.5))}
            probes.append(ProbeScore(kind=kind, **answers))
        return CaseScore(probes=tuple(probes))

    kinds = (Kind.REWRITE, Kind.PARAPHRASE, Kind.DISTRACTED)
    records = []
    for number in range(cases):
        states = {
            "before": score(dict(zip(kinds, (0.0, 0.0, before), strict=True)), number),
            "after": score(dict(zip(kinds, (es, ps, dns), strict=True)), number),
        }
        records.append(CaseRecord(id=str(number), prompt="", asked=(), seconds={}, failure=None, **states))
    return EvalReport(records, {"regularizers": []}, ("es", "ps", "dns"))


def verdict(other: EvalReport, plain: EvalReport) -> str:
    made = object.__new__(Experiment)
    vars(made).update(reports={("rome", "none"): plain, ("rome", "x"): other}, choices={}, skipped={})
    return next(sentence for sentence in sentences(made) if sentence.startswith("rome + x"))


def test_a_cure_is_claimed_only_with_es_and_ps():
    plain = report_of(dns=30.0)
    assert won_back(plain, report_of(dns=70.0), "dns").value == pytest.approx(80.0)
    assert won_back(report_of(dns=80.0), report_of(dns=80.0), "dns") is None  # nothing was lost
    assert won_back(plain, report_of(dns=70.0), "rs") is None
    cured = verdict(report_of(dns=70.0), plain)
    assert cured.startswith("rome + x wins back 80%")
    assert "ES 100.0 (without: 100.0), PS +0.0" in cured
    for worse in (report_of(dns=80.0, es=50.0), report_of(dns=80.0, ps=90.0)):
        assert "is no cure" in verdict(worse, plain)
        assert "wins back" not in verdict(worse, plain)
    assert "does not clearly win back anything" in verdict(report_of(dns=32.5), plain)
    # ES that the plain editor does not reach either is not asked for
    assert "wins back" in verdict(report_of(dns=70.0, es=95.0), report_of(dns=30.0, es=95.0))


def test_gamma_is_looked_for_beyond_the_grid_and_ties_go_to_the_smallest():
    ran = []

    def run(best):
        def outcome(gamma):
            ran.append(gamma)
            ran.sort()
            return report_of(dns=75.0 if gamma == best else 40.0, ps=100.0 if gamma <= 20 else 50.0)

        return outcome

    plain = report_of(dns=40.0)
    grid, larger, smaller = (0.1, 1.0), (10.0, 100.0), (0.01, 0.001)
    found = choose_gamma(run(10.0), plain, grid, larger, smaller)
    assert (found.gamma, found.mark) == (0.1, "")  # 10 was not tried, as the larger of the grid was not the best
    assert ran == [0.1, 1.0]
    ran.clear()
    assert choose_gamma(run(0.01), plain, (0.1,), (), smaller).gamma == 0.1
    ran.clear()
    found = choose_gamma(run(1.0), plain, grid, larger, smaller)
    assert (found.gamma, ran) == (1.0, [0.1, 1.0, 10.0])
    ran.clear()
    found = choose_gamma(run(0.1), plain, grid, larger, smaller)
    assert (found.gamma, ran) == (0.1, [0.01, 0.1, 1.0])
    ran.clear()
    found = choose_gamma(run(0.01), plain, (50.0,), larger, smaller)
    assert (found.gamma, found.mark, ran) == (0.01, "", [0.001, 0.01, 50.0])
    found = choose_gamma(lambda gamma: report_of(es=0.0), plain, grid, larger, smaller)
    assert (found.gamma, found.mark) == (0.001, "†")


def test_where_the_score_is_0_the_mean_of_its_parts_decides():
    class Scoreless:
        """A report whose Score is 0 because RS is."""

        def __init__(self, dns):
            shown = {"es": 100.0, "ps": 100.0, "rs": 0.0, "dns": dns, "score": 0.0}
            self.estimates = {name: {"after": Estimate(found, None, None, 1, 1)} for name, found in shown.items()}

    found = choose_gamma(lambda gamma: Scoreless(30.0 + 10 * (gamma == 1.0)), Scoreless(20.0), (0.1, 1.0, 5.0))
    assert found.gamma == 1.0
    assert choose_gamma(lambda gamma: Scoreless(30.0), Scoreless(20.0), (0.1, 1.0, 5.0)).gamma == 0.1


def test_the_time_that_is_left():
    clock = TimeLeft([("rome", 10), ("rome sadr", 20), ("rome", 10)])
    assert clock.seconds() is None
    clock.finish("rome", 10, 30.0)
    assert clock.seconds() == pytest.approx(30 + 60)
    clock.finish("rome sadr", 5, 50.0)
    assert clock.seconds() == pytest.approx(30 + 15 * 10)
    assert clock.text() == "about 3 min left"
    clock.finish("rome sadr", 5, 50.0, planned=False)
    assert clock.seconds() == pytest.approx(30 + 15 * 10)


def test_kept_cases_are_the_same_and_are_chosen_anew_where_anything_differs(place, tmp_path):
    model, tok = tiny_model("gpt2"), tokenizer("plain")
    suite = Suite(model, tok, tmp_path)
    cases = [EditCase.from_dict(json.loads(line)) for line in (place / "cases.jsonl").read_text().splitlines()]
    source = Source("people", *split_by_subject(cases))
    options = {"development": 2, "held_out": 3, "file": tmp_path / "cases.json"}
    first = choose_cases(suite, [source], **options)
    again = choose_cases(suite, [source], **options)
    assert again == first
    assert [case.to_dict() for case in again.held_out] == [case.to_dict() for case in first.held_out]
    more = choose_cases(suite, [source], **{**options, "held_out": 4})
    assert more.held_out[:3] == first.held_out
    (tmp_path / "cases.json").write_text("{")
    assert choose_cases(suite, [source], **options) == first
    without = choose_cases(suite, [source], **options, exclude={first.held_out[0].edit.subject})
    assert first.held_out[0] not in without.held_out


def test_an_experiment_without_development_cases_chooses_no_gamma(place, tmp_path):
    suite = Suite(tiny_model("gpt2"), tokenizer("plain"), tmp_path)
    cases = [a_case("Ada", "Rome", "Paris")]
    with pytest.raises(ConfigError, match="development"):
        Experiment(suite, ["rome"], rows_of(["sadr"]), [], cases)
    with pytest.raises(ConfigError, match="'Ada'"):
        Experiment(suite, ["rome"], rows_of(["none"]), cases, [replace(cases[0], id="other")])


def test_a_run_is_kept_under_all_that_matters_to_it(place, tmp_path):
    model = tiny_model("gpt2")
    suite = Suite(model, tokenizer("plain"), tmp_path, config={"layers": 1, "rome.steps": 2, "memit.steps": 3})
    assert suite.editor("rome").config.steps == 2
    assert suite.editor("rome", steps=4).config.steps == 4
    cases = [a_case("Ada", "Rome", "Paris")]
    editor = suite.editor("rome")
    editor.moments = {1: torch.eye(112)}
    names = [suite.folder_of(editor, None, cases), suite.folder_of(editor, "sadr", cases)]
    names += [suite.folder_of(editor, None, cases, exact=False), suite.folder_of(editor, None, cases * 2)]
    names.append(suite.folder_of(editor, "relations", cases))
    editor._preset = presets.Preset(type(editor).rule(editor.arch), {"relations": {"self": {"gamma": 3.0}}})
    assert suite.folder_of(editor, None, cases) == names[0]
    names.append(suite.folder_of(editor, "relations", cases))
    editor.moments = {1: 2 * torch.eye(112)}
    names.append(suite.folder_of(editor, None, cases))
    assert len(set(names)) == len(names)


def test_moments_are_estimated_in_the_dtype_of_their_editor(tmp_path, monkeypatch):
    made = []

    def estimate(arch, tok, layers, corpus, *, ridge, compute_dtype):
        made.append((compute_dtype, layers))
        return {layer: Moment(torch.eye(112)) for layer in layers}

    monkeypatch.setattr("kedit.bench.suite.estimate_moments", estimate)
    suite = Suite(tiny_model("gpt2"), tokenizer("plain"), tmp_path)
    dtypes = (None, "bfloat16", None)
    suite.prepare([suite.editor("rome", layers=at, compute_dtype=dtype) for at, dtype in enumerate(dtypes)])
    assert made == [(None, [0, 2]), ("bfloat16", [1])]


def test_the_mark_is_at_the_gamma_that_was_chosen():
    [row] = rows_of(["relations:best+sadr:0.5"])
    report = report_of()
    report.meta["regularizers"] = [{"gamma": 2.0}, {"gamma": 0.5}]
    made = object.__new__(Experiment)
    vars(made).update(
        rows=[row], reports={("rome", row.label): report}, choices={("rome", row.label): GammaChoice(2.0, "‡", {})}
    )
    assert gamma_text(made, "rome", row.label) == "2‡, 0.5"
    assert gamma_text(made, "rome", row.label, marked=False) == "2, 0.5"


def test_a_hyper_parameter_that_is_wrong_is_no_row_that_was_not_run(tmp_path):
    suite = Suite(tiny_model("gpt2"), tokenizer("plain"), tmp_path)
    made = Experiment(suite, ["ft"], rows_of(["sadr:1"]), [], [a_case("Ada", "Rome", "Paris")])
    assert list(made._planned({"ft": suite.editor("ft")})) == []
    assert list(made.skipped) == [("ft", "sadr:1")]
    broken = suite.editor("ft")
    broken._given = {"layers": 99}
    with pytest.raises(ConfigError, match="99"):
        list(made._planned({"ft": broken}))


def test_an_empty_table_says_that_it_is_unfinished(tmp_path):
    suite = Suite(tiny_model("gpt2"), tokenizer("plain"), tmp_path)
    made = Experiment(suite, ["rome"], rows_of(["none"]), [], [a_case("Ada", "Rome", "Paris")])
    assert "**Unfinished: 0 of 1 rows.**" in markdown(made)
    with pytest.raises(ConfigError, match="no hyper-parameter 'x'"):
        Sweep(suite, "rome", {"x": [1]}, made.held_out)
    plain = [replace(case, probes=case.probes[:2]) for case in made.held_out]
    with pytest.raises(ConfigError, match="No case has relation probes"):
        Sweep(suite, "rome", {"steps": [1]}, plain, by="rs")
    with pytest.raises(ConfigError, match="No case has"):
        Sweep(suite, "rome", {"steps": [1]}, plain, by="score")
