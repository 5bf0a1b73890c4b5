"""The runner: what it restores, what it repeats, what a broken-off run leaves and how it goes on."""

import dataclasses
import json
import re

import pytest
import torch

import kedit.evaluation.probing as examine
import kedit.evaluation.provenance as identity
import kedit.evaluation.runner as runner_module
from kedit.edit import Edit
from kedit.editors import get_editor as make_editor
from kedit.editors import presets
from kedit.errors import ConfigError, EditError, NonFiniteError, UnknownNameError
from kedit.evaluation import EditCase, EvalReport, Kind, Probe, evaluate
from kedit.evaluation.language import TfIdf
from kedit.patch.ledger import Ledger
from tiny_models import moments, tiny_model, tokenizer

NAMES = ["Ada Lovelace", "Danielle Darrieux", "Quentin", "Michel Rocard", "Roger Nimier"]
TOWNS = ["Paris", "Rome and London", "Madrid", "Oslo"]


def make_cases(count: int = 5) -> list[EditCase]:
    cases = []
    for i in range(count):
        name, new, true = NAMES[i % 5], TOWNS[i % 4], TOWNS[(i + 1) % 4]
        other = NAMES[(i + 1) % 5]
        probes = [
            Probe(kind=Kind.PARAPHRASE, prompt=f"The home of {name} is", right=new, wrong=true),
            Probe(kind=Kind.NEIGHBOUR, prompt=f"{other} stays in", right=true, wrong=new),
            Probe(kind=Kind.RELATION, prompt=f"{name} works as a", right="teacher", wrong=new),
            Probe(kind=Kind.GENERATION, prompt=f"{name} often"),
        ]
        edit = Edit(f"In {i} years {{}} lives in", name, new, true)
        cases.append(EditCase.of(f"case {i}", edit, probes, references=(f"{new} is a town.",)))
    return cases


def make(name: str = "rome", **fields):
    model, tok = tiny_model("gpt2"), tokenizer("plain")
    settings = {"layers": 1, "steps": 3, "lr": 0.3, **fields}
    layers = settings["layers"] if isinstance(settings["layers"], tuple) else (settings["layers"],)
    editor = make_editor(
        name,
        model,
        tok,
        moments={layer: moments(112, layer) for layer in layers},
        contexts=["{}", "So. {}"],
        **settings,
    )
    return model, tok, editor


def weights(model) -> dict:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model, before) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def facts(report: EvalReport) -> dict:
    """Everything but the time."""
    records = [dataclasses.replace(record, seconds={}).to_dict() for record in report.records]
    summary = report.summary()
    del summary["seconds"]
    summary["run"].pop("prepare_seconds")
    return {"records": records, **summary}


@pytest.mark.parametrize("mode", ["single", "batch", "sequential"])
@pytest.mark.parametrize("name", ["rome", "memit"])
def test_the_model_is_as_before_and_the_figures_are_those_of_the_edited_one(mode, name):
    model, tok, editor = make(name, layers=(1, 2) if name == "memit" else 1)
    cases = make_cases(3)
    before = weights(model)
    report = evaluate(model, tok, cases, editor, mode=mode)
    assert same(model, before)
    assert not Ledger.of(model).touched
    assert report.meta["weights_restored"] is True
    assert not report.failures
    # the same by hand: edit, ask, compare
    groups = [[case] for case in cases] if mode == "single" else [cases]
    for group in groups:
        if mode == "sequential":
            results = [editor.apply(case.edit) for case in group]
        else:
            results = [editor.apply([case.edit for case in group])]
        unedited = evaluate(model, tok, cases, None)
        for case, record in zip(cases, report.records, strict=True):
            if case in group:
                hand = unedited.records[cases.index(case)].after
                for mine, plain in zip(record.after.probes, hand.probes, strict=True):
                    if mine.right is not None:
                        assert mine.right.nll == pytest.approx(plain.right.nll, abs=1e-4)
        for result in reversed(results):
            result.revert()
    assert any(record.before != record.after for record in report.records)


def test_an_unedited_run_changes_nothing():
    model, tok, _ = make()
    report = evaluate(model, tok, make_cases(), None, texts="Ada lives in Paris. " * 5, attention=True, generate=4)
    assert all(record.before == record.after for record in report.records)
    assert report["kl_drift"].value == 0.0
    assert report["attention_drift"].value == 0.0
    assert report.meta["editor"] is None


def test_everything_that_can_be_measured_is_there():
    model, tok, editor = make()
    report = evaluate(model, tok, make_cases(), editor, texts=("Ada lives in Paris. " * 5,), attention=True, generate=8)
    from kedit.evaluation.metrics import chosen

    no_probes = {"alias_success", "commonsense", "portability_acc", "portability_all", "portability_exact"}
    assert set(report.estimates) == {metric.name for metric in chosen()} - no_probes
    assert report["kl_drift"].value > 0
    assert report["attention_drift"].value > 0
    for found in report.estimates.values():
        for value in found.values():
            assert value.n >= 1
            assert value.low <= value.value <= value.high
    assert report["rs"].n == 5
    with pytest.raises(EditError, match="commonsense"):
        report["commonsense"]


def test_the_reference_score_is_that_of_all_generated_texts_of_a_case_joined(monkeypatch):
    model, tok, _ = make()
    said = {"Ada": "rome is old", "So": "by the sea", "Zoe": "rome again"}
    monkeypatch.setattr(
        examine,
        "continue_rows",
        lambda arch, tok, rows, *args, **options: [(said[tok.decode(row)], True) for row in rows],
    )
    probes = [Probe(kind=Kind.GENERATION, prompt=prompt) for prompt in said]
    references = (("rome is by the sea", "the sea is old"), ("paris lies within france",), ())
    cases = [
        EditCase.of(str(i), Edit("{} is", "Ada", "old"), probes[: 2 + i // 2], references=found)
        for i, found in enumerate(references)
    ]
    report = evaluate(model, tok, cases, None, generate=3, exact=False)
    weights = TfIdf([" ".join(found) for found in references if found])
    expected = weights.similarity("rome is old by the sea", "rome is by the sea the sea is old")
    assert [record.after.reference for record in report.records] == [pytest.approx(expected), 0.0, None]
    assert report["reference_score"].value == pytest.approx(100 * expected / 2)
    assert report["reference_score"].cases == report["reference_score"].n == 2
    alone = sum(weights.similarity(said[name], " ".join(references[0])) for name in ("Ada", "So")) / 2
    assert abs(alone - expected) > 0.05  # the mean over single texts is another figure


CUT = {(1, "single"), (0, "batch"), (1, "sequential")}  # the others run with the slow tests


@pytest.mark.parametrize(
    ("stop_after", "mode"),
    [
        pytest.param(stop_after, mode, marks=[pytest.mark.slow] * ((stop_after, mode) not in CUT))
        for mode in ("single", "batch", "sequential")
        for stop_after in (0, 1, 3)
    ],
)
def test_an_interrupted_run_goes_on_and_gives_the_same_report(tmp_path, monkeypatch, mode, stop_after):
    model, tok, editor = make()
    cases = make_cases()
    before = weights(model)
    whole = evaluate(model, tok, cases, editor, None, mode, out=tmp_path / "whole", chunk=2)
    append = runner_module.Journal.append

    def breaks(self, record):
        if len(self.records) == stop_after:
            raise KeyboardInterrupt
        append(self, record)

    out = tmp_path / "parts"
    monkeypatch.setattr(runner_module.Journal, "append", breaks)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, tok, cases, editor, None, mode, out=out, chunk=2)
    assert same(model, before)
    assert not Ledger.of(model).touched
    monkeypatch.undo()
    if stop_after:
        with (out / "records.jsonl").open("a") as file:
            file.write('{"id": "case 4", "prom')  # a line that was being written
    asked = []
    ask = runner_module.ProbeScorer.score
    monkeypatch.setattr(
        runner_module.ProbeScorer, "score", lambda self, group: asked.append(len(group)) or ask(self, group)
    )
    again = evaluate(model, tok, cases, editor, None, mode, out=out, chunk=2)
    assert facts(again) == facts(whole)
    assert (out / "summary.md").read_text().split("Time:")[0] == (tmp_path / "whole/summary.md").read_text().split(
        "Time:"
    )[0]
    if mode == "single":
        assert asked == [1] * (5 - stop_after)  # the rest, after its edit; what is before is kept
    assert same(model, before)


def test_a_finished_run_is_read_back_without_the_model_running(tmp_path, monkeypatch):
    model, tok, editor = make()
    whole = evaluate(model, tok, make_cases(), editor, out=tmp_path)
    monkeypatch.setattr(runner_module, "ProbeScorer", None)
    again = evaluate(model, tok, make_cases(), editor, out=tmp_path)
    assert [record.to_dict() for record in again.records] == [record.to_dict() for record in whole.records]
    assert EvalReport.load(tmp_path).estimates == whole.estimates


def test_a_report_names_the_hyper_parameters_that_were_used_also_when_it_is_read_back(tmp_path, monkeypatch):
    own = presets.Preset({}, {"sadr": {"steps": 2, "self": {"gamma": 0.125}}})
    monkeypatch.setitem(presets.PRESETS, "rome", {("gpt2", 5, 48): own})
    model, tok = tiny_model("gpt2"), tokenizer("plain")
    editor = make_editor("rome", model, tok, moments={1: moments(112, 1)}, contexts=["{}"], layers=1, lr=0.3)
    for _ in range(2):
        meta = evaluate(model, tok, make_cases(2), editor, "sadr", out=tmp_path, exact=False).meta
        assert meta["config"]["steps"] == 2
        assert meta["regularizers"][0]["gamma"] == 0.125


@pytest.mark.parametrize("mode", ["single", "batch", "sequential"])
def test_the_model_is_as_before_the_moment_an_error_is_caught(tmp_path, monkeypatch, mode):
    model, tok, editor = make()
    before = weights(model)

    def full(self, record):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runner_module.Journal, "append", full)
    with pytest.raises(OSError, match="No space") as held:  # whose traceback holds what was running
        evaluate(model, tok, make_cases(3), editor, None, mode, out=tmp_path)
    assert same(model, before)
    assert not Ledger.of(model).touched
    assert held.value.errno == 28


def test_other_line_ends_inside_a_text_end_no_record(tmp_path):
    model, tok, editor = make()
    cases = [
        EditCase.of(str(i), Edit(f"{{}} lives{end}in", "Ada", "Paris", "Rome")) for i, end in enumerate("\u2028\x85\r")
    ]
    first = evaluate(model, tok, cases, editor, out=tmp_path, exact=False)
    again = evaluate(model, tok, cases, editor, out=tmp_path, exact=False)
    assert [record.prompt for record in again.records] == [f"Ada lives{end}in → Paris" for end in "\u2028\x85\r"]
    assert EvalReport.load(tmp_path).estimates == first.estimates


def test_before_and_after_are_written_and_decoded_to_the_same_length():
    model, tok, editor = make()
    model.generation_config.eos_token_id = None
    tok.eos_token = None
    cases = [
        EditCase.of(
            str(i),
            Edit("{} lives in", "Ada", "Paris" + " and Rome" * i, "Oslo"),
            [Probe(kind=Kind.GENERATION, prompt="word " * words + "Ada")],
        )
        for i, words in enumerate((0, 28))
    ]
    unedited = [evaluate(model, tok, [case], None, generate=45).records[0] for case in cases]
    report = evaluate(model, tok, cases, editor, generate=45)
    for alone, record in zip(unedited, report.records, strict=True):
        assert [probe.text for probe in record.before.probes] == [probe.text for probe in alone.before.probes]


def test_a_folder_of_another_run_is_refused(tmp_path):
    model, tok, editor = make()
    evaluate(model, tok, make_cases(3), editor, out=tmp_path)
    with pytest.raises(EditError, match=r"another run \(its cases differ\)"):
        evaluate(model, tok, make_cases(4), editor, out=tmp_path)
    _, _, other = make(steps=4)
    with pytest.raises(EditError, match=r"another run \(its config differ\)"):
        evaluate(other.model, tok, make_cases(3), other, out=tmp_path)


def stale(tmp_path, editor, change, **options):
    """Return the error of evaluate for a finished run after a change of one of its inputs."""
    model, tok = editor.model, editor.tokenizer
    measured = None if options.get("unedited") else editor
    evaluate(model, tok, make_cases(2), measured, out=tmp_path, exact=False)
    change()
    with pytest.raises(EditError, match="another run") as caught:
        evaluate(model, editor.tokenizer, make_cases(2), measured, out=tmp_path, exact=False)
    return re.search(r"its (.*) differ", str(caught.value)).group(1)


def test_a_run_with_other_second_moments_or_contexts_is_another_run(tmp_path):
    _, _, editor = make()
    assert stale(tmp_path / "1", editor, lambda: setattr(editor, "moments", {1: torch.eye(112)})) == "moments"
    assert stale(tmp_path / "2", editor, lambda: setattr(editor, "_contexts", ("{}",))) == "contexts"


@pytest.mark.parametrize("unedited", [False, True])
def test_a_run_on_other_weights_is_another_run_wherever_they_differ(tmp_path, unedited):
    model, _, editor = make()

    def nudge():
        with torch.no_grad():
            model.transformer.ln_f.bias[3] += 1e-3

    assert stale(tmp_path, editor, nudge, unedited=unedited) == "model"


def test_a_run_with_another_tokenizer_is_another_run(tmp_path):
    _, _, editor = make()
    assert stale(tmp_path, editor, lambda: setattr(editor, "tokenizer", tokenizer("bos")), unedited=True) == "tokenizer"


def test_a_run_of_another_version_is_another_run(tmp_path, monkeypatch):
    _, _, editor = make()
    assert stale(tmp_path, editor, lambda: monkeypatch.setattr(identity, "version", lambda name: "0.0")) == "versions"


def test_a_run_after_other_edits_whose_keys_alphaedit_remembers_is_another_run(tmp_path):
    model, _, editor = make("alphaedit", layers=(1, 2), threshold=0.6, threshold_rule="mean", l2=1e-2)
    result = editor.apply(Edit("{} sings", "Zoe", "loudly"))
    editor.history.save(tmp_path / "keys.safetensors")
    result.revert()
    assert stale(tmp_path / "run", editor, lambda: editor.history.load(tmp_path / "keys.safetensors")) == "history"


@pytest.mark.parametrize("name", ["rome", "alphaedit"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_sequence_that_was_interrupted_while_editing_goes_on_where_it_stopped(
    tmp_path, monkeypatch, name, batch_size
):
    settings = {"layers": (1, 2), "threshold": 0.6, "threshold_rule": "mean", "l2": 1e-2} if name == "alphaedit" else {}
    model, tok, editor = make(name, **settings)
    cases, before = make_cases(), weights(model)
    options = {"mode": "sequential", "batch_size": batch_size, "exact": False}
    apply, applied = editor.apply, []

    def counts(edits, regularizer):
        applied.append(len(edits))
        if len(applied) == 3:
            raise KeyboardInterrupt
        if len(applied) == 2:  # a step that fails is remembered too
            raise NonFiniteError("The loss is not finite.")
        return apply(edits, regularizer)

    monkeypatch.setattr(editor, "apply", counts)
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, tok, cases, editor, out=tmp_path / "parts", **options)
    assert same(model, before)
    steps = tmp_path / "parts/patches/steps.jsonl"
    assert [json.loads(line)["failure"] for line in steps.read_text().split("\n")[:-1]] == [
        None,
        "The loss is not finite.",
    ]
    with steps.open("a") as file:
        file.write('{"step": 2, "fail')  # a line that was being written
    again = evaluate(model, tok, cases, editor, out=tmp_path / "parts", **options)
    assert sum(applied[3:]) == 5 - 2 * batch_size  # nothing twice
    assert set(again.failures) == {case.id for case in cases[batch_size : 2 * batch_size]}
    assert same(model, before)

    applied.clear()  # the same unbroken
    monkeypatch.setattr(
        editor,
        "apply",
        lambda edits, regularizer: counts(edits, regularizer) if len(applied) < 2 else apply(edits, regularizer),
    )
    unbroken = evaluate(model, tok, cases, editor, out=tmp_path / "unbroken", **options)
    assert facts(again) == facts(unbroken)


def test_chunks_do_not_change_the_figures_beyond_rounding():
    model, tok, editor = make()
    one, many = (evaluate(model, tok, make_cases(), editor, chunk=chunk) for chunk in (1, 5))
    for a, b in zip(one.records, many.records, strict=True):
        for left, right in zip(a.after.probes, b.after.probes, strict=True):
            if left.right is not None:
                assert left.right.nll == pytest.approx(right.right.nll, abs=2e-3)


def test_single_edits_go_through_propose(monkeypatch):
    model, tok, editor = make()
    sizes = []
    propose = editor.propose
    monkeypatch.setattr(editor, "propose", lambda edits, reg: sizes.append(len(edits)) or propose(edits, reg))
    monkeypatch.setattr(editor, "apply", None)
    evaluate(model, tok, make_cases(), editor, chunk=3)
    assert sizes == [3, 2]


def test_a_failing_edit_is_named_and_counts_as_unedited(monkeypatch):
    model, tok, editor = make()
    propose = editor.propose

    def fails(edits, regularizer=None):
        chosen = [edits] if isinstance(edits, Edit) else list(edits)
        if any(edit.subject == NAMES[2] for edit in chosen):
            raise NonFiniteError("The loss is not finite.")
        return propose(edits, regularizer)

    monkeypatch.setattr(editor, "propose", fails)
    report = evaluate(model, tok, make_cases(), editor)
    assert report.failures == {"case 2": "The loss is not finite."}
    assert report.records[2].before == report.records[2].after
    assert report.records[1].before != report.records[1].after
    assert "1 edits failed" in report.to_markdown()


def test_a_wrong_configuration_is_no_failing_edit():
    model, tok, _ = make()
    with pytest.raises(ConfigError, match="regularizer"):
        evaluate(model, tok, make_cases(), "ft", "sadr", config={"layers": (1,)}, chunk=2)


def test_a_case_of_several_edits_writes_them_all():
    model, tok, editor = make()
    before = weights(model)
    more = (Edit("{} is the capital of", "Paris", "Spain"),)
    case = dataclasses.replace(make_cases(1)[0], more=more)
    alone, both = (evaluate(model, tok, [one], editor) for one in (make_cases(1)[0], case))
    assert alone.records[0].before == both.records[0].before
    assert alone.records[0].after != both.records[0].after
    assert "Spain" in both.records[0].prompt
    assert same(model, before)


def test_patches_that_the_model_carries_stay(tmp_path):
    model, tok, editor = make()
    earlier = editor.apply(Edit("{} sings", "Zoe", "loudly"))
    carried = weights(model)
    for mode in ("single", "batch", "sequential"):
        evaluate(model, tok, make_cases(3), editor, mode=mode, out=tmp_path / mode)
        assert same(model, carried)
    earlier.revert()


def test_a_joint_run_leaves_out_probes_of_edited_facts():
    model, tok, editor = make()
    cases = make_cases(2)
    asks = Probe(kind=Kind.NEIGHBOUR, prompt=cases[1].edit.text, right="Madrid", wrong="Oslo")
    cases[0] = dataclasses.replace(cases[0], probes=(*cases[0].probes, asks))
    assert evaluate(model, tok, cases, editor).meta["dropped_probes"] == 0
    report = evaluate(model, tok, cases, editor, mode="batch")
    assert report.meta["dropped_probes"] == 1
    assert "1 probes left out" in report.to_markdown()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mode": "parallel"}, ConfigError, "mode is"),
        ({"chunk": 0}, ConfigError, "chunk must be a whole number of at least 1, not 0"),
        ({"chunk": "8"}, ConfigError, "chunk must be .* not '8'"),
        ({"batch_size": True}, ConfigError, "batch_size must be"),
        ({"generation": 3}, ConfigError, "does not know generation"),
        ({"generate": -3}, ConfigError, "generate must be a whole number of at least 0, not -3"),
        ({"generate": "3"}, ConfigError, "generate must be"),
        ({"generate": 3, "top_k": 0}, ConfigError, "top_k must be a whole number of at least 1"),
        ({"seed": None}, ConfigError, "seed must be a whole number, not None"),
        ({"exact": "no"}, ConfigError, "exact is True or False"),
        ({"texts": (3,)}, ConfigError, "each a string; found a int: 3"),
        ({"texts": 3}, ConfigError, "a text or a list of texts"),
        ({"texts": "Ada lives in Paris.", "text_tokens": 0}, ConfigError, "text_tokens must be .* at least 2"),
        ({"editor": None, "regularizer": "sadr"}, ConfigError, "nothing to regularize"),
        ({"editor": "rime"}, UnknownNameError, "rome"),
        ({"metrics": ["rss"]}, UnknownNameError, "rs"),
        ({"config": {"steps": 3}}, ConfigError, "its own"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(options, error, message):
    model, tok, editor = make()
    with pytest.raises(error, match=message):
        evaluate(model, tok, make_cases(2), **{"editor": editor, **options})
    other, _, _ = make()
    with pytest.raises(ConfigError, match="another model"):
        evaluate(other, tok, make_cases(2), editor)


@pytest.mark.parametrize("cases", [None, 3, make_cases(1)[0], ["case"]])
def test_what_is_no_list_of_cases_is_refused(cases):
    model, tok, editor = make()
    with pytest.raises(EditError, match=r"Expected .*EditCase"):
        evaluate(model, tok, cases, editor)


def test_a_folder_that_cannot_hold_a_run_is_refused_in_a_sentence(tmp_path):
    model, tok, editor = make()
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "deeper", "/proc/x/y", "nul\0", 3):
        with pytest.raises(EditError, match=r"cannot be made: .*Give another one"):
            evaluate(model, tok, make_cases(1), editor, out=place)
    for name, content in (("json", "not json"), ("list", "[]"), ("bytes", "\udcff")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_bytes(content.encode("utf-8", "surrogateescape"))
        with pytest.raises(EditError, match=r"run\.json is damaged"):
            evaluate(model, tok, make_cases(1), editor, out=tmp_path / name)
    report = evaluate(model, tok, make_cases(1), editor, exact=False)
    with pytest.raises(EditError, match="cannot be made"):
        report.save(tmp_path / "file")
    (tmp_path / "taken" / "summary.json").mkdir(parents=True)
    with pytest.raises(EditError, match="Cannot write"):
        report.save(tmp_path / "taken")
    for damage in ("[]", "{}", '{"run": 3}'):
        report.save(tmp_path / "report")
        (tmp_path / "report/summary.json").write_text(damage)
        with pytest.raises(EditError, match="no finished evaluation"):
            EvalReport.load(tmp_path / "report")


def test_records_or_steps_that_are_damaged_are_named(tmp_path):
    model, tok, editor = make()
    evaluate(model, tok, make_cases(2), editor, None, "sequential", out=tmp_path, exact=False)
    for path, damage in (
        (tmp_path / "patches/steps.jsonl", '{"step": 1, "failure": null, "seconds": 1}\n'),
        (tmp_path / "patches/steps.jsonl", '{"step": 0}\n'),
        (tmp_path / "records.jsonl", "[]\n"),
    ):
        (tmp_path / "records.jsonl").write_text("")
        path.write_text(damage)
        with pytest.raises(EditError, match=rf"{path.name} is damaged .*Remove it"):
            evaluate(model, tok, make_cases(2), editor, None, "sequential", out=tmp_path, exact=False)
    assert not Ledger.of(model).touched


def test_a_full_disk_is_reported_in_a_sentence(tmp_path, monkeypatch):
    model, tok, editor = make()

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("kedit.evaluation.journal.os.fsync", full)
    with pytest.raises(EditError, match="No space left"):
        evaluate(model, tok, make_cases(1), editor, out=tmp_path)
    assert not Ledger.of(model).touched


def test_a_probe_that_does_not_fit_names_its_case():
    model, tok, editor = make()
    long = Probe(kind=Kind.ALIAS, prompt="word " * 300, right="Paris")
    case = dataclasses.replace(make_cases(1)[0], probes=(long,))
    with pytest.raises(EditError, match=r"Case 'case 0': .*context window"):
        evaluate(model, tok, [case], editor)


def test_the_report_in_all_its_forms(tmp_path):
    model, tok, editor = make()
    report = evaluate(model, tok, make_cases(), editor, out=tmp_path, metrics=["es", "rs", "rewrite_exact"])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary["metrics"]) == ["es", "rs", "rewrite_exact"]
    assert summary["metrics"]["rs"]["after"]["n"] == 5
    assert torch.__version__.startswith(summary["run"]["environment"]["torch"].split("+")[0])
    table = (tmp_path / "summary.md").read_text()
    assert "| RS ↑ | " in table
    assert "EasyEdit" not in table
    html = (tmp_path / "report.html").read_text()
    assert html.count('src="data:image/svg+xml') == 1
    assert not re.findall(r'(?:src|href)="http', html)
    assert "<script" not in html
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == 5
    for text in (table, html, json.dumps(summary)):
        assert str(tmp_path) not in text
    assert "ES" in repr(report)


def test_html_escapes_what_comes_from_data():
    model, tok, editor = make()
    edit = Edit("{} lives in", "<b>Ada</b>", "<script>x</script>", "Rome")
    html = evaluate(model, tok, [EditCase.of("<i>", edit)], editor).to_html()
    assert "<script>" not in html
    assert "<b>" not in html


def test_two_runs_are_compared_case_by_case():
    model, tok, editor = make()
    cases = make_cases()
    plain, long = evaluate(model, tok, cases, editor), evaluate(model, tok, cases, make_again(editor, steps=8))
    found = long.compare(plain, ["em", "rs"])
    assert found["em"].value == pytest.approx(long["em"].value - plain["em"].value)
    assert found["em"].value > 0
    assert plain.compare(plain, ["em"])["em"].high == 0.0
    with pytest.raises(EditError, match="different cases"):
        plain.compare(evaluate(model, tok, cases[:3], editor))


def make_again(editor, **fields):
    config = editor.config.replace(**fields)
    return type(editor)(editor.model, editor.tokenizer, config, moments=editor.moments, contexts=editor.contexts)
