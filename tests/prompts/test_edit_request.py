"""Edit requests: accepted input, normalisation, error messages."""

import json

import pytest

from kedit import Edit
from kedit.edit import as_edits
from kedit.errors import EditError, KEditError


def test_subject_once_becomes_slot():
    edit = Edit("The mother tongue of Ada is", "Ada", "English")
    assert edit.prompt == "The mother tongue of {} is"
    assert edit == Edit("The mother tongue of {} is", "Ada", "English")
    assert edit.text == "The mother tongue of Ada is"


def test_white_space_around_subject_and_targets_goes_but_prompt_keeps_its_own():
    edit = Edit("  {} is ", " Ada\n", " English ", "\tFrench ")
    assert (edit.prompt, edit.subject, edit.target_new, edit.target_true) == ("  {} is ", "Ada", "English", "French")


def test_slot_wins_over_a_subject_that_also_stands_in_the_prompt():
    edit = Edit("Paris fans love {}, the city of", "Paris", "light")
    assert edit.text == "Paris fans love Paris, the city of"


def test_subject_that_holds_a_slot_is_filled_once():
    assert Edit("I like {}", "a {} b", "c").text == "I like a {} b"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (("The capital is", "France", "Rome"), ["neither", "'France'", "Put '{}'"]),
        (("Anna met Anna in", "Anna", "Rome"), ["'Anna'", "2 times"]),
        (("{} and {} are in", "Anna", "Rome"), ["2 '{}'", "Leave one"]),
        (("{} is", "Anna", ""), ["target_new", "empty"]),
        (("{} is", "Anna", " \n"), ["target_new", "empty"]),
        (("{} is", "  ", "x"), ["subject", "empty"]),
        (("", "Anna", "x"), ["prompt", "empty"]),
        (("{} is", "Anna", None), ["target_new", "NoneType"]),
        (("{} is", 7, "x"), ["subject", "int"]),
        (("{} is", "Anna", "x", 3), ["target_true", "int"]),
        (("{} is", "Anna\ud800", "x"), ["subject", "surrogate"]),
        (("{} is", "Anna", "x", "\udfff"), ["target_true", "surrogate"]),
    ],
)
def test_bad_fields_are_refused_in_words(fields, words):
    with pytest.raises(EditError) as caught:
        Edit(*fields)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert isinstance(caught.value, KEditError)
    assert isinstance(caught.value, ValueError)


def test_frozen_and_hashable():
    edit = Edit("{} is", "Ada", "here")
    with pytest.raises(AttributeError):
        edit.subject = "Bob"
    assert len({edit, Edit("Ada is", "Ada", "here")}) == 1


def test_blank_target_true_is_none():
    assert Edit("{} is", "Ada", "here", "  ").target_true is None


def test_dict_round_trip():
    edit = Edit("{} is", "Ada", "here", "there")
    assert Edit.from_dict(edit.to_dict()) == edit
    assert Edit.from_dict(json.loads(json.dumps(edit.to_dict()))) == edit


def test_jsonl_skips_blank_lines_and_reads_any_script(tmp_path):
    path = tmp_path / "edits.jsonl"
    first = Edit("Wo liegt {}?", "Köln", "in Rußland")
    second = Edit("{} is\u2028a\x85place in", "北京", "日本")  # U+2028 ends no JSON line
    lines = [json.dumps(edit.to_dict(), ensure_ascii=False) for edit in (first, second)]
    path.write_bytes("\ufeff".encode() + f"\n{lines[0]}\r\n   \n{lines[1]}".encode())
    assert Edit.from_jsonl(path) == [first, second]
    assert Edit.from_jsonl(str(path)) == [first, second]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": ', ["line 3"]),
        ('["a list"]', ["line 3", "must be an object", "a list"]),
        ('{"prompt": "{} is", "subject": "A"}', ["line 3", "missing ['target_new']"]),
        ('{"prompt": "{} is", "subject": "A", "target_new": "b", "tarqet": 1}', ["line 3", "unknown ['tarqet']"]),
        ('{"prompt": "x is", "subject": "A", "target_new": "b"}', ["line 3", "neither"]),
        ('{"prompt": "{} is", "subject": "A", "target_new": "\\ud800"}', ["line 3", "surrogate"]),
    ],
)
def test_jsonl_errors_name_file_and_line(tmp_path, line, words):
    path = tmp_path / "edits.jsonl"
    good = json.dumps(Edit("{} is", "A", "b").to_dict())
    path.write_text(f"{good}\n\n{line}\n{good}\n", encoding="utf-8")
    with pytest.raises(EditError) as caught:
        Edit.from_jsonl(path)
    assert all(word in str(caught.value) for word in [str(path), *words]), str(caught.value)


def test_jsonl_missing_empty_or_binary(tmp_path):
    with pytest.raises(EditError, match="There is no file"):
        Edit.from_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(EditError, match="is a folder"):
        Edit.from_jsonl(tmp_path)
    empty, binary = tmp_path / "empty.jsonl", tmp_path / "binary.jsonl"
    empty.write_text("\n\n")
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(EditError, match="holds no edits"):
        Edit.from_jsonl(empty)
    with pytest.raises(EditError, match="is not text in UTF-8"):
        Edit.from_jsonl(binary)


def test_as_edits():
    edit = Edit("{} is", "Ada", "here")
    assert as_edits(edit) == [edit]
    assert as_edits(iter([edit, edit])) == [edit, edit]
    with pytest.raises(EditError, match="empty"):
        as_edits([])
    for wrong, kind in [(None, "NoneType"), (5, "int"), ("text", "str"), ([edit, {}], "dict"), ({"prompt": 1}, "str")]:
        with pytest.raises(EditError, match=kind):
            as_edits(wrong)
