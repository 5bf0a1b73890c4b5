"""Calibrations of tiny models: what they leave, keep and write, and how they go on after an interrupt."""

import json
from dataclasses import replace
from itertools import permutations

import pytest

import kedit
from kedit.analysis.results.tracing import ROLES
from kedit.calibration import calibrate
from kedit.calibration.cases import development_cases
from kedit.calibration.search import _trace
from kedit.cli import main
from kedit.editors import presets
from kedit.errors import ConfigError, EditError
from kedit.evaluation import EditCase, Kind, Probe
from kedit.values.scheduler import Engine
from tiny_models import tiny_model, tokenizer

FIRST = ("Ada", "Danielle", "Quentin", "Michel", "Roger", "Vera")
LAST = ("Lovelace", "Darrieux", "Berlin")
TOWNS = ("Paris", "Rome and London", "Madrid", "Oslo", "Vienna")
TEXTS = [f"{first} {last} lives in {town} and works there." for first in FIRST for last in LAST for town in TOWNS]


def make_cases(*kinds):
    """Facts about 18 subjects with every pair of towns; of each subject the model prefers some true object."""
    cases = []
    for number, subject in enumerate(f"{first} {last}" for first in FIRST for last in LAST):
        other = f"{FIRST[(number + 1) % 6]} {LAST[number % 3]}"
        for new, true in permutations(TOWNS, 2):
            probes = [
                Probe(kind=Kind.PARAPHRASE, prompt=f"The home of {subject} is", right=new, wrong=true),
                Probe(kind=Kind.NEIGHBOUR, prompt=f"{other} lives in", right=true, wrong=new),
                Probe(kind=Kind.RELATION, prompt=f"{subject} works as a", right="teacher", wrong="king"),
            ]
            wanted = [probe for probe in probes if not kinds or probe.kind in kinds]
            edit = kedit.Edit("{} lives in", subject, new, true)
            cases.append(EditCase.of(f"{subject} {new} {true}", edit, wanted))
    return cases


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("kedit.calibration.cases.MARGIN", 0.0)  # a random model knows nothing by a nat
    monkeypatch.setattr("kedit.editors.presets.VALUE_RULE", {**presets.VALUE_RULE, "steps": 4})
    return tmp_path / "cache"


@pytest.fixture
def optimisations(monkeypatch):
    """How many edits were optimised in each call of the engine."""
    calls = []
    optimize = Engine.optimize

    def counting(self, sites, requests, *args):
        calls.append(len(requests))
        return optimize(self, sites, requests, *args)

    monkeypatch.setattr(Engine, "optimize", counting)
    return calls


def run(editor="rome", model=None, **options):
    given = {"quick": True, "number": 3, "corpus": TEXTS, "compute_dtype": None, "contexts": 1, **options}
    return calibrate(model or tiny_model("gpt2"), tokenizer(), make_cases(), editor, **given)


def test_it_chooses_what_was_best_and_leaves_the_model_as_it_was(cache, tmp_path):
    model = tiny_model("gpt2")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = run(model=model, regularizer="relations", check=2)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert [stage.name for stage in found.stages] == ["layers", "clamp", "gamma"]
    assert found.chosen == found.stages[-1].chosen
    for stage in found.stages:
        assert stage.rows[stage.best].value == stage.chosen.value
        assert {"es", "ps", "ns", "dns", "rs"} == set(stage.rows[0].metrics)
    assert found.stages[2].rows[0].label == "no regularizer"
    text = found.to_markdown()
    assert "| unedited |" in text
    assert "3 development cases" in text
    assert "2 other cases" in text
    for stage in found.stages:
        assert f"**{stage.rows[stage.best].label}**" in text
    file = found.save(tmp_path / "found.json")
    editor = kedit.ROME(model, tokenizer(), preset=file)
    assert editor.config == found.chosen.config
    assert editor.describe_call("relations")["regularizers"][0]["gamma"] == found.chosen.gamma
    evidence = json.loads(file.read_text())["rome"]["evidence"]
    assert evidence["cases"] == 3
    assert evidence["environment"]["kedit"] == kedit.__version__
    assert len(evidence["stages"]["layers"]["tried"]) == len(found.stages[0].rows)
    assert evidence["compared"]["held_out"]["cases"] == 2


def test_a_second_call_edits_nothing_and_finds_the_same(optimisations):
    first = run()
    assert optimisations
    optimisations.clear()
    second = run()
    assert not optimisations
    assert second.to_markdown() == first.to_markdown()


def test_after_an_interrupt_it_goes_on(monkeypatch, optimisations, tmp_path):
    whole = run(work=tmp_path / "whole").to_markdown()
    needed = sum(optimisations)
    optimisations.clear()
    counting = Engine.optimize

    def interrupted(self, *args):
        if len(optimisations) == 2:
            raise KeyboardInterrupt
        return counting(self, *args)

    model = tiny_model("gpt2")
    monkeypatch.setattr(Engine, "optimize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model=model, work=tmp_path / "broken")
    monkeypatch.setattr(Engine, "optimize", counting)
    assert run(model=model, work=tmp_path / "broken").to_markdown() == whole
    assert sum(optimisations) == needed


def test_closed_forms_share_the_values(optimisations):
    run("memit", search=["moment_weight"])
    assert optimisations == [3]  # three weights of the second moment, one optimisation
    run("alphaedit", search=["threshold", "l2"])
    assert optimisations == [3, 3]


def test_it_begins_with_a_preset_and_keeps_what_is_not_searched(tmp_path):
    file = presets.save(tmp_path / "p.json", "rome", presets.Preset({"layers": [3], "steps": 2, "clamp": 1.0}))
    found = run(preset=file, search=["clamp"])
    assert found.chosen.config.layers == (3,)
    assert found.chosen.config.steps == 2
    assert [row.value for row in found.stages[0].rows] == [1.0, 0.5, 2.0]


def test_what_holds_with_regularizers_is_carried_over_and_added_to(tmp_path):
    changes = {"sadr": {"steps": 3, "self": {"gamma": 0.01}}, "relations": {"stop_loss": 0.5}}
    start = presets.save(tmp_path / "p.json", "rome", presets.Preset({"layers": [1], "steps": 2}, changes))
    found = run(preset=start, search=["gamma"], regularizer="relations")
    assert found.chosen.config.stop_loss == 0.5
    assert found.preset.values["stop_loss"] == kedit.ROME.Config(layers=1).stop_loss
    assert found.preset.regularized["sadr"] == changes["sadr"]
    own = found.preset.regularized["relations"]
    assert own == {"stop_loss": 0.5, "self": {"gamma": found.chosen.gamma}}
    file = found.save(tmp_path / "found.json")
    run(search=["gamma"], regularizer="neighbours").save(file)
    saved = presets.read(file)["rome"].regularized
    assert saved["sadr"] == changes["sadr"]
    assert saved["relations"] == own
    assert "gamma" in saved["neighbours"]["self"]
    editor = kedit.ROME(tiny_model("gpt2"), tokenizer(), preset=file)
    assert editor.describe_call("relations")["config"]["stop_loss"] == 0.5


def test_editors_and_models_share_a_folder(tmp_path, optimisations):
    options = {"search": ["clamp"], "work": tmp_path / "work"}
    run(**options)
    run("rrome", **options)
    optimisations.clear()
    run(model=tiny_model("gpt2", seed=2), **options)
    assert optimisations


def test_a_model_that_carries_edits_is_refused():
    model, tok = tiny_model("gpt2"), tokenizer()
    editor = kedit.FT(model, tok, steps=1)
    with editor.unchecked():
        editor.apply(kedit.Edit("{} lives in", "Ada Lovelace", "Paris"))
    with pytest.raises(ConfigError, match="carries edits"):
        run(model=model)


def test_tracing_is_evidence_beside_the_edits(monkeypatch):
    monkeypatch.setattr("kedit.calibration.search.SAMPLES", 2)
    monkeypatch.setattr("kedit.analysis.causal_tracing.known", lambda _, facts: [True] * len(facts))
    monkeypatch.setattr("kedit.analysis.facts.known", lambda _, facts: [True] * len(facts))
    found = run(quick=False, check=0, search=["layers"])
    assert all(row.effect is not None for row in found.stages[0].rows)
    assert "traced" in found.to_markdown()
    monkeypatch.setattr("kedit.calibration.search.trace", None)  # kept, as everything is
    assert run(quick=False, check=0, search=["layers"]).to_markdown() == found.to_markdown()


def test_what_was_traced_of_another_model_is_not_read(monkeypatch, tmp_path):
    traced = []

    class Result:
        unfinished = False

        def average(self, kind):
            return [[float(len(traced))] * 5] * len(ROLES), None

    def trace(*args, **options):
        traced.append(args)
        return Result()

    monkeypatch.setattr("kedit.calibration.search.trace", trace)
    monkeypatch.setattr("kedit.analysis.facts.known", lambda _, facts: [True] * len(facts))
    model, tok, cases = tiny_model("gpt2"), tokenizer(), make_cases()[:1]
    found = [_trace(model, tok, cases, tmp_path, fingerprint)[0] for fingerprint in ("a", "b", "a")]
    assert found == [100.0, 200.0, 100.0]


def test_the_plot_shows_every_candidate():
    found = run()
    panels = found.figure().axes
    assert [axis.get_title("left") for axis in panels] == ["layers", "clamp"]
    assert [len(axis.lines) for axis in panels] == [len(stage.rows) for stage in found.stages]
    written = [sum(len(text.get_text().split(", ")) for text in axis.texts) for axis in panels]
    assert written == [len(stage.rows) for stage in found.stages]  # a label each, or one for those that lie together
    for axis in panels:
        heights = [axis.transData.transform(text.xy)[1] for text in axis.texts]
        assert len(set(heights)) == len(axis.texts)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"editor": "ft"}, "optimises no value"),
        ({"search": ["speed"]}, "search is 'layers'"),
        ({"search": ["threshold"]}, "has none of the stages threshold"),
        ({"search": ["gamma"]}, "needs a regularizer"),
        ({"search": ["clamp"], "regularizer": "relations"}, "which is not searched"),
        ({"number": 2}, "number must be"),
        ({"contexts": 0}, "contexts must be"),
    ],
)
def test_options_that_do_not_fit(options, words):
    with pytest.raises(ConfigError, match=words):
        run(**options)


def test_cases_that_do_not_serve():
    model, tok = tiny_model("gpt2"), tokenizer()
    options = {"quick": True, "number": 3, "corpus": TEXTS}
    with pytest.raises(EditError, match="no cases to calibrate on"):
        calibrate(model, tok, [], **options)
    unknown = [
        EditCase.of(
            "0",
            kedit.Edit("{} lives in", "Ada", "Paris"),
            [Probe(kind=Kind.RELATION, prompt="a", right="b", wrong="c")],
        )
    ]
    with pytest.raises(EditError, match="true object"):
        calibrate(model, tok, unknown, **options)
    with pytest.raises(EditError, match="nothing shows what an edit harms"):
        calibrate(model, tok, make_cases(Kind.PARAPHRASE), **options)
    mixed = [case if number % 2 else replace(case, probes=case.probes[:2]) for number, case in enumerate(make_cases())]
    taken = development_cases(model, tok, mixed, 9)
    assert len(taken) > 3
    assert all(any(probe.kind is Kind.RELATION for probe in case.probes) for case in taken)
    few = [case for case in make_cases() if case.edit.subject.startswith("Ada")]
    with pytest.raises(EditError, match="needs at least 3|knows none"):
        calibrate(model, tok, few, **options, exclude=["Ada Lovelace", "Ada Berlin"])


@pytest.fixture
def files(tmp_path):
    """A model's folder, cases and a corpus."""
    folder = tmp_path / "model"
    tiny_model("gpt2").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    data, corpus = tmp_path / "cases.jsonl", tmp_path / "text.txt"
    data.write_text("\n".join(json.dumps(case.to_dict()) for case in make_cases()))
    corpus.write_text("\n\n".join(TEXTS))
    return folder, ["calibrate", "--model", str(folder), "--data", str(data), "--moments-corpus", str(corpus)]


def test_the_command(files, tmp_path, capsys):
    folder, command = files
    command += ["--quick", "--cases", "3", "--search", "clamp", "--all-subjects"]
    assert main([*command, "--beside"]) == 0
    assert f"preset: {folder / presets.FILE}" in capsys.readouterr().out
    saved = presets.read(folder / presets.FILE)["rome"]
    assert main([*command, "--beside"]) == 1
    assert "has a preset of rome already" in capsys.readouterr().err
    assert main([*command, "--editor", "rrome", "--beside", "--work", str(tmp_path / "work")]) == 0
    assert presets.read(folder / presets.FILE)["rome"] == saved
    assert {"calibration.md", "calibration.png"} <= {path.name for path in (tmp_path / "work").iterdir()}
    assert main(command) == 0
    model, tok = kedit.load(folder)
    (folder / presets.FILE).unlink()
    assert kedit.ROME(model, tok).config == kedit.ROME.Config.from_dict(saved.values)  # found in the cache


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--out", "{data}/preset.json"], "Cannot write"),
        (["--work", "{data}"], "not a folder"),
        (["--out", "{data}"], "not a file of presets"),
        (["--data", "none.json"], "There is no file"),
        (["--model", "gpt2", "--beside"], "--beside writes into the model's folder"),
    ],
)
def test_the_command_says_what_does_not_fit(files, capsys, options, words):
    _, command = files
    assert main([*command, *(option.format(data=command[4]) for option in options)]) == 1
    assert words in capsys.readouterr().err


def test_the_command_needs_data_for_a_model_of_the_users(files, capsys):
    folder, _ = files
    assert main(["calibrate", "--model", str(folder)]) == 1
    assert "Give --data FILE" in capsys.readouterr().err
