"""Finished patches and models are measured as they are; runs are compared; reports as tables."""

import copy
import csv
import io
import json
import sys
import types

import pytest
import torch
from test_eval_runner import make, make_cases, weights

import kedit
from kedit.cli import main
from kedit.errors import ConfigError, DependencyError, EditError, PatchMismatchError
from kedit.evaluation import EvalReport, evaluate

EXTENT = {"texts": ["It was a cold day."], "attention": True}


def scores(report):
    return [(record.before.to_dict(), record.after.to_dict()) for record in report.records]


def test_a_patch_is_measured_as_its_editor_was():
    model, tok, editor = make()
    case = make_cases(1)
    wanted = evaluate(model, tok, case, editor, mode="batch", **EXTENT)
    result = editor.apply(case[0].edit)
    result.revert()
    held = weights(model)
    report = evaluate(model, tok, case, result.patch, **EXTENT)
    assert scores(report) == scores(wanted)
    assert (report.meta["editor"], report.meta["mode"], report.meta["weights_restored"]) == ("rome", "patch", True)
    assert report.meta["config"]["steps"] == 3
    assert all(torch.equal(held[name], value) for name, value in model.state_dict().items())
    other = copy.deepcopy(model)
    result.patch.apply(other)
    beside = evaluate(other, tok, case, None, base=model, **EXTENT)
    assert scores(beside) == scores(wanted)
    assert beside.title.startswith("edited model on ")
    assert beside.records[0].after.texts["kl"] > 0


def test_cases_that_the_patch_does_not_name_are_told(caplog):
    model, tok, editor = make()
    cases = make_cases(2)
    (patch,) = editor.propose(cases[0].edit)
    with caplog.at_level("WARNING", logger="kedit"):
        report = evaluate(model, tok, cases, patch)
    assert "1 of 2 cases are about edits that the patch does not name" in caplog.text
    assert "1 cases are about edits that the patch does not name" in report.to_markdown()


def test_what_does_not_go_with_a_finished_patch():
    model, tok, editor = make()
    cases = make_cases(1)
    (patch,) = editor.propose(cases[0].edit)
    for options in ({"regularizer": "sadr"}, {"mode": "batch"}, {"config": {"steps": 3}}):
        with pytest.raises(ConfigError, match="is finished"):
            evaluate(model, tok, cases, patch, **options)
    with pytest.raises(ConfigError, match="editor=None"):
        evaluate(model, tok, cases, "rome", base=model)
    with torch.no_grad():
        next(iter(editor.edited_weights)).stored.mul_(2)
    with pytest.raises(PatchMismatchError):
        evaluate(model, tok, cases, patch)


def test_a_run_of_a_patch_resumes_and_refuses_another_patch(tmp_path):
    model, tok, editor = make()
    cases = make_cases(3)
    one, other = editor.propose([cases[0].edit, cases[1].edit])
    report = evaluate(model, tok, cases, one, out=tmp_path / "run", chunk=1)
    lines = (tmp_path / "run/records.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run/records.jsonl").write_text(lines[0])
    again = evaluate(model, tok, cases, one, out=tmp_path / "run", chunk=1)
    assert scores(again) == scores(report)
    with pytest.raises(kedit.errors.EditError, match="another run"):
        evaluate(model, tok, cases, other, out=tmp_path / "run", chunk=1)


def test_metrics_that_the_data_cannot_give_are_named():
    model, tok, editor = make()
    names = ["es", "alias_success", "fluency", "perplexity"]
    report = evaluate(model, tok, make_cases(1), None, metrics=names)
    assert list(report.estimates) == ["es"]
    assert report.missing["alias_success"] == "no case has alias probes"
    assert "generate=100" in report.missing["fluency"]
    assert "--texts" in report.missing["perplexity"]
    assert report.summary()["missing"] == report.missing
    assert "- Alias (`alias_success`): no case has alias probes." in report.to_markdown()
    assert "no case has alias probes" in report.to_html()
    assert not evaluate(model, tok, make_cases(1), None).missing


def test_rows_hold_prompts_answers_and_scores(tmp_path, monkeypatch):
    model, tok, editor = make()
    cases = make_cases(2)
    report = evaluate(model, tok, cases, editor, out=tmp_path / "run", generate=2, attention=True)
    rows = report.rows()
    assert len(rows) == sum(len(case.probes) for case in cases)
    first, probe, score = rows[0], cases[0].probes[0], report.records[0].after.probes[0]
    assert (first["case"], first["prompt"], first["right"], first["wrong"]) == (
        "case 0",
        probe.prompt,
        probe.right,
        probe.wrong,
    )
    assert first["nll_right_after"] == score.right.nll
    assert first["text_after"] == score.text
    assert any(row.get("entropy_after") is not None for row in rows)
    read = list(csv.DictReader(io.StringIO((tmp_path / "run/probes.csv").read_text())))
    assert [row["prompt"] for row in read] == [row["prompt"] for row in rows]
    assert float(read[0]["nll_right_after"]) == score.right.nll
    assert EvalReport.load(tmp_path / "run").rows() == rows
    (es,) = [row for row in report.rows("metrics") if row["metric"] == "es"]
    assert (es["after"], es["n"]) == (report["es"].value, 2)
    monkeypatch.setitem(sys.modules, "pandas", types.SimpleNamespace(DataFrame=lambda rows: ("frame", rows)))
    assert report.to_frame() == ("frame", rows)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(DependencyError, match="pip install pandas"):
        report.to_frame()
    with pytest.raises(ConfigError, match="of is 'probes' or 'metrics'"):
        report.rows("cases")


def test_parquet_files_hold_the_rows(tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    model, tok, editor = make()
    report = evaluate(model, tok, make_cases(2), editor, generate=2, attention=True)
    for of in ("probes", "metrics"):
        path = report.to_parquet(tmp_path / f"{of}.parquet", of)
        table, rows = parquet.read_table(path), report.rows(of)
        assert table.column_names == list(dict.fromkeys(name for row in rows for name in row))
        assert table.to_pylist() == [{**dict.fromkeys(table.column_names), **row} for row in rows]
    assert str(parquet.read_schema(tmp_path / "probes.parquet").field("failure").type) == "string"
    with pytest.raises(EditError, match="it is a folder"):
        report.to_parquet(tmp_path)
    with pytest.raises(ConfigError, match="of is 'probes' or 'metrics'"):
        report.to_parquet(tmp_path / "x.parquet", "cases")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.parquet", "probes.parquet"]


def test_parquet_on_the_command_line(tmp_path, capsys, monkeypatch):
    words = ["eval", "--cases", "1", "--editor", "ft", "--set", "steps=1", "--no-exact", "--parquet"]
    assert main(words) == 1
    assert "Give --out DIR" in capsys.readouterr().err
    monkeypatch.setattr(kedit.evaluation.report, "find_spec", lambda name: None)
    assert main([*words, "--out", str(tmp_path / "run")]) == 1
    assert "kedit[tables]" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    monkeypatch.undo()
    parquet = pytest.importorskip("pyarrow.parquet")
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    assert parquet.read_table(tmp_path / "run" / "metrics.parquet").num_rows > 3
    assert parquet.read_table(tmp_path / "run" / "probes.parquet").num_rows > 3


def test_records_of_older_versions_are_read(tmp_path):
    model, tok, _ = make()
    report = evaluate(model, tok, make_cases(1), None, out=tmp_path)
    record = json.loads((tmp_path / "records.jsonl").read_text())
    del record["asked"]
    (tmp_path / "records.jsonl").write_text(json.dumps(record) + "\n")
    old = EvalReport.load(tmp_path)
    assert scores(old) == scores(report)
    assert old.rows()[0]["prompt"] is None


@pytest.fixture
def edit(tmp_path, monkeypatch, capsys):
    """A patch of the embedded model, and cases with the same edit."""
    monkeypatch.chdir(tmp_path)
    fact = {"prompt": "{} works as a", "subject": "Hulqui Gossam", "target_new": "pilot", "target_true": "tailor"}
    (tmp_path / "cases.json").write_text(
        json.dumps([{**fact, "rephrase_prompt": "The profession of Hulqui Gossam is"}])
    )
    words = ["edit", "--edits", "cases.json", "--editor", "ft", "--set", "steps=3", "--out", "p.safetensors"]
    assert main([*words, "--save-model", "edited"]) in (0, 3), capsys.readouterr().err
    capsys.readouterr()


def test_the_command_line_measures_finished_things_and_compares(edit, capsys, tmp_path):
    assert main(["eval", "--patch", "p.safetensors"]) == 0, capsys.readouterr().err
    assert "# ft on kedit-embedded, patch" in capsys.readouterr().out
    runs = {
        "plain": ["--unedited"],
        "patched": ["--patch", "p.safetensors"],
    }
    for name, words in runs.items():
        assert main(["eval", "--data", "cases.json", "--out", name, *words]) == 0, capsys.readouterr().err
    model, tok = kedit.load()
    model.save_pretrained("base")
    tok.save_pretrained("base")
    words = [
        "eval",
        "--base",
        "base",
        "--model",
        "edited",
        "--data",
        "cases.json",
        "--out",
        "model",
        "--dtype",
        "float32",
    ]
    assert main(words) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert main(["compare", "plain", "patched", "--metric", "em", "--csv", "d.csv"]) == 0
    out = capsys.readouterr().out
    first, second = (EvalReport.load(name)["em"].value for name in ("plain", "patched"))
    assert f"+{second - first:.2f}" in out
    assert "above 0, the second run has the larger value" in out
    (row,) = csv.DictReader((tmp_path / "d.csv").open())
    assert float(row["difference"]) == pytest.approx(second - first)
    assert main(["compare", "patched", "model", "--metric", "em"]) == 0
    assert " 0.00 " in capsys.readouterr().out
    assert main(["compare", "patched", "nowhere"]) == 1
    assert "holds no finished evaluation" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--patch", "p", "--editor", "rome", "--mode", "batch"], "Drop --editor, --mode"),
        (["--patch", "p", "--base", "b"], "Give one of them"),
        (["--base", "b"], "Give --model, the edited one, too"),
        (["--base", "b", "--model", "m", "--set", "steps=2"], "--base measures what is finished. Drop --set"),
    ],
)
def test_options_that_do_not_go_together(words, message, capsys, monkeypatch):
    monkeypatch.setattr("kedit.cli.common.load_model", None)
    assert main(["eval", *words]) == 1
    assert message in capsys.readouterr().err
