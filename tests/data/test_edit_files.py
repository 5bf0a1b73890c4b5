"""Files of edits: the same edits in every form, what is no edit, and what stands beside one."""

import io
import json

import pytest

import kedit
from kedit.cli import main
from kedit.data import load_cases, load_edits
from kedit.edit import Edit
from kedit.errors import EditError
from kedit.evaluation.cases import Kind

ROWS = [
    {"prompt": "{} works as a", "subject": "Ada", "target_new": "pilot", "source": "a, b"},
    {"prompt": "{} lives in", "subject": "Nil", "target_new": "Łódź", "target_true": "Rome"},
]
EDITS = [Edit("{} works as a", "Ada", "pilot"), Edit("{} lives in", "Nil", "Łódź", "Rome")]


def as_table(delimiter):
    names = ["prompt", "subject", "target_new", "target_true", "source"]
    rows = [[row.get(name, "") for name in names] for row in ROWS]
    quoted = [[f'"{cell}"' if delimiter in cell else cell for cell in row] for row in rows]
    return "\n".join(delimiter.join(row) for row in [names, *quoted]) + "\n"


def easyedit(row):
    renamed = {"ground_truth" if key == "target_true" else key: value for key, value in row.items()}
    return {**renamed, "prompt": row["prompt"].replace("{}", row["subject"])}


FORMS = {
    "edits.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
    "lines.json": "".join(json.dumps(row) + "\n\n" for row in ROWS),
    "edits.json": json.dumps(ROWS),
    "list.jsonl": json.dumps(ROWS, indent=1),
    "edits.csv": as_table(","),
    "excel.csv": "\ufeff" + as_table(";"),
    "edits.tsv": as_table("\t"),
    "table.txt": as_table(","),
    "requests.json": json.dumps([{**row, "target_new": {"str": row["target_new"], "id": None}} for row in ROWS]),
    "easyedit.json": json.dumps([easyedit(row) for row in ROWS]),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_same_edits_in_every_form(tmp_path, name, monkeypatch):
    (tmp_path / name).write_text(FORMS[name], encoding="utf-8")
    edits = load_edits(tmp_path / name)
    assert edits == EDITS
    assert [dict(edit.notes) for edit in edits] == [{"source": "a, b"}, {}]
    if not name.startswith(("list", "excel")):  # as standard input has no name, its form is told by the text alone
        monkeypatch.setattr("sys.stdin", io.StringIO(FORMS[name]))
        assert load_edits("-") == EDITS


def test_easyedits_probes_and_what_is_missing_there(tmp_path):
    row = {**easyedit(ROWS[1]), "rephrase_prompt": "Nil's home is", "locality_prompt": "Bo lives in"}
    path = tmp_path / "edits.json"
    path.write_text(json.dumps([row]))
    with pytest.raises(EditError, match="each prompt needs its answer"):
        load_edits(path)
    path.write_text(json.dumps([{**row, "locality_ground_truth": "Oslo", "ground_truth": ["Rome"], "why": 3}]))
    (case,) = load_cases(path).cases
    assert case.edit == EDITS[1]
    assert case.edit.notes == {"why": 3}
    asked = [(probe.kind, probe.prompt, probe.right, probe.wrong) for probe in case.probes[1:3]]
    assert asked == [
        (Kind.PARAPHRASE, "Nil's home is", "Łódź", "Rome"),
        (Kind.NEIGHBOUR, "Bo lives in", "Oslo", "Łódź"),
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prompt,subject,target_new\n{} is,Ada,red,blue\n", "line 2 has more cells"),
        ("prompt,subject,target_new\n{} is,Ada\n", "field 'target_new' is missing"),
        ('prompt,subject,target_new\n{} is,Ada,"red\n', "is no row of a table"),
        ("prompt,subject,target\n{} is,Ada,red\n", "An edit has the fields prompt, subject, target_new"),
        ("prompt,subject,target_new\nAda and Ada,Ada,red\n", "stands 2 times"),
    ],
)
def test_rows_that_are_no_edits(tmp_path, text, words):
    (tmp_path / "edits.csv").write_text(text)
    with pytest.raises(EditError) as error:
        load_edits(tmp_path / "edits.csv")
    assert words in str(error.value)
    assert "edits.csv" in str(error.value)


def test_facts_are_traced_and_not_edited(tmp_path, monkeypatch, capsys):
    record = {"known_id": 3, "subject": "Ada", "attribute": "pilot", "prompt": "Ada works as a", "prediction": " x"}
    path = tmp_path / "known.json"
    path.write_text(json.dumps([record]))
    (case,) = load_cases(path).cases
    assert (case.id, case.edit, case.edit.notes) == (
        "3",
        Edit("{} works as a", "Ada", "pilot", "pilot"),
        {"prediction": " x"},
    )
    with pytest.raises(EditError, match="without a new target"):
        load_edits(path)
    monkeypatch.setattr("kedit.cli.common.load_model", None)
    for command in (["edit", "--edits", str(path), "--out", str(tmp_path / "x")], ["eval", "--data", str(path)]):
        assert main(command) == 1
        assert "without a new target" in capsys.readouterr().err


def test_notes_go_with_the_edit(tmp_path):
    edit = Edit("{} is", "Ada", "red", notes={"source": "a book"})
    assert edit == Edit("{} is", "Ada", "red")
    assert len({edit, Edit("{} is", "Ada", "red")}) == 1
    assert Edit.from_dict(edit.to_dict()).notes == edit.notes
    assert "notes" not in Edit("{} is", "Ada", "red").to_dict()
    with pytest.raises(EditError, match="Edit.notes is a mapping"):
        Edit("{} is", "Ada", "red", notes="a book")


def test_one_file_serves_edit_eval_and_trace(tmp_path, capsys, caplog, monkeypatch):
    fact = {
        "prompt": "{} works as a",
        "subject": "Hulqui Gossam",
        "target_new": "pilot",
        "target_true": "tailor",
        "page": 4,
    }
    text = json.dumps([{**fact, "rephrase_prompt": "The profession of Hulqui Gossam is"}])
    (tmp_path / "edits.json").write_text(text)
    out = tmp_path / "edit.safetensors"
    quick = ["--set", "steps=1", "--editor", "ft"]
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert main(["edit", "--edits", "-", *quick, "--out", str(out)]) in (0, 3), capsys.readouterr().err
    said = capsys.readouterr().out.splitlines()
    assert said[0].split() == ["prompt", "wanted", "before", "after", "paraphrase"]
    assert said[1].startswith("Hulqui Gossam works as a  pilot ")
    assert kedit.EditPatch.load(out).provenance["edits"][0]["notes"] == {"page": 4}
    assert "Kept as notes of the edits: page." in caplog.text
    assert main(["eval", "--data", str(tmp_path / "edits.json"), *quick]) == 0, capsys.readouterr().err
    assert "| PS ↑ |" in capsys.readouterr().out
    assert main(["trace", "--data", str(tmp_path / "edits.json"), "--samples", "1"]) == 0, capsys.readouterr().err
