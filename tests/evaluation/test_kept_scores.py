"""Scores before the edit are kept by content: in memory, and on disk where a cache folder is."""

import dataclasses
import json

import pytest
import torch

import kedit.evaluation.kept as kept
import kedit.evaluation.probing as probing
from kedit.edit import Edit
from kedit.editors import get_editor
from kedit.evaluation import EditCase, Kind, Probe, evaluate
from kedit.keys.estimate import cache_folder
from tiny_models import moments, tiny_model, tokenizer


def cases(count=3):
    return [
        EditCase.of(
            str(i),
            Edit(f"In {i} years {{}} lives in", "Ada", "Rome and London", "Oslo"),
            [
                Probe(kind=Kind.NEIGHBOUR, prompt="Quentin stays in", right="Oslo", wrong="Rome and London"),
                Probe(kind=Kind.GENERATION, prompt="Ada often"),
            ],
            references=("Rome is a town.",),
        )
        for i in range(count)
    ]


@pytest.fixture
def asked(monkeypatch):
    """Chunks that were asked of a model."""
    seen, score = [], probing.ProbeScorer.before
    monkeypatch.setattr(
        probing.ProbeScorer, "before", lambda self, group: seen.append(len(group)) or score(self, group)
    )
    return seen


@pytest.fixture
def on_disk(monkeypatch, tmp_path):
    """A cache folder that is there."""
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path))
    monkeypatch.setattr(kept, "disk_folder", lambda: tmp_path / "before")
    return tmp_path / "before"


def scores(report):
    return [dataclasses.replace(record, seconds={}) for record in report.records]


def test_runs_of_one_model_and_cases_ask_once_whatever_the_editor(asked):
    model, tok = tiny_model("gpt2"), tokenizer()
    editor = get_editor("rome", model, tok, layers=1, steps=2, moments={1: moments(112, 1)}, contexts=["{}"])
    first = evaluate(model, tok, cases(), None, chunk=2, generate=3, texts="Ada lives in Rome. " * 5)
    second = evaluate(model, tok, cases(), editor, chunk=2, generate=3, texts="Ada lives in Rome. " * 5)
    third = evaluate(model, tok, cases(), editor, mode="batch", chunk=2, generate=3, texts="Ada lives in Rome. " * 5)
    assert asked == [2, 1]
    for report in (second, third):
        assert [record.before for record in report.records] == [record.before for record in first.records]
        assert any(record.before != record.after for record in report.records)
    assert evaluate(model, tok, cases(), None, chunk=2, generate=3, cache=False, texts="Ada lives in Rome. " * 5)
    assert asked == [2, 1, 2, 1]


def change_weights(model, tok, options):
    with torch.no_grad():
        model.transformer.ln_f.bias[3] += 1e-3


def change_ends(model, tok, options):
    tok.eos_token = None
    model.generation_config.eos_token_id = None


CHANGES = {
    "weights": change_weights,
    "ends": change_ends,
    "options": lambda model, tok, options: options.update(exact=False),
    "cases": lambda model, tok, options: options.update(count=2),
    "chunk": lambda model, tok, options: options.update(chunk=1),
    "hook": lambda model, tok, options: model.transformer.h[0].register_forward_hook(lambda *_: None),
    "attention": lambda model, tok, options: options.update(attention=True),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("disk", [False, True])
def test_what_changes_the_scores_is_asked_again(name, disk, asked, request):
    if disk:
        request.getfixturevalue("on_disk")
    model, tok, options = tiny_model("gpt2"), tokenizer(), {"count": 3}

    def run():
        count = options.pop("count", 3)
        evaluate(model, tok, cases(count), None, **options)
        return len(asked)

    once = run()
    assert run() == once
    CHANGES[name](model, tok, options)
    assert run() > once


def test_another_process_reads_them_from_the_cache_folder(asked, on_disk, caplog):
    tok = tokenizer()
    first = evaluate(tiny_model("llama"), tok, cases(), None)
    assert asked == [3]
    again = evaluate(tiny_model("llama"), tok, cases(), None)
    assert asked == [3]
    assert scores(again) == scores(first)
    [file] = on_disk.iterdir()
    for damaged in ("{", "[]", json.dumps([{"probes": 3}])):
        file.write_text(damaged)
        assert scores(evaluate(tiny_model("llama"), tok, cases(), None)) == scores(first)
    assert asked == [3] * 4
    assert caplog.text.count("damaged") == 3


def test_a_folder_that_cannot_be_written_loses_nothing(on_disk, caplog):
    on_disk.write_text("a file where the folder would be")
    assert evaluate(tiny_model("gpt2"), tokenizer(), cases(), None).records
    assert "could not be kept" in caplog.text


def test_no_folder_is_made_for_scores_alone(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path / "none"))
    assert kept.disk_folder() is None
    (tmp_path / "none").mkdir()
    assert kept.disk_folder() == cache_folder() / "before"
