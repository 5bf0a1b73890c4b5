"""Whole paths: real data on a model of others, the command line, a regularizer that only its user knows."""

import json
import math
import sys
from importlib.metadata import EntryPoint

import pytest
import torch

import kedit
import kedit.utils.registry
from kedit.cli import main
from kedit.data import load_cases
from kedit.evaluation import evaluate
from tiny_models import moments, tiny_model, tokenizer

FILES = ("counterfact_flat_1000", "counterfact_schema_100", "sadr_merged_counterfact_half", "knowedit_zsre_200")


@pytest.fixture(scope="module")
def stories(test_data):
    return kedit.load(test_data / "models/stories3M", dtype=torch.float32)


def rome(model, tok, **fields):
    width = kedit.ROME.preset(model).layers[0]
    size = model.config.intermediate_size
    options = {"steps": 3, "lr": 0.3, "clamp": 2.0, **fields}
    return kedit.ROME(model, tok, moments={width: torch.eye(size)}, contexts=["{}"], **options)


@pytest.mark.parametrize("name", FILES)
def test_real_data_through_the_whole_path(test_data, stories, name):
    model, tok = stories
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    cases = load_cases(test_data / "datasets" / f"{name}.json", limit=6).cases
    report = evaluate(model, tok, cases, rome(model, tok), kedit.SADR(gamma=0.1), exact=False)
    assert len(report.records) == len(cases) == 6
    assert not report.failures
    for case, record in zip(cases, report.records, strict=True):
        for state in (record.before, record.after):
            assert [score.kind for score in state.probes] == [probe.kind for probe in case.probes]
            for probe, score in zip(case.probes, state.probes, strict=True):
                assert (score.right is None) == (probe.right is None)
                assert (score.wrong is None) == (probe.wrong is None)
                for answer in (score.right, score.wrong):
                    assert answer is None or math.isfinite(answer.nll)
        assert record.before != record.after
    assert report["em"].value > -100
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_real_data_all_of_it(test_data, stories, name):
    model, tok = stories
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    cases = load_cases(test_data / "datasets" / f"{name}.json").cases
    report = evaluate(model, tok, cases, rome(model, tok), exact=False)
    assert len(report.records) == len(cases)
    assert math.isfinite(report["em"].value)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_the_command_line(test_data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"Once upon a time there were {i} little birds in a big tree." for i in range(300)))
    command = [
        "-q", "eval", "--model", str(test_data / "models/stories260K"), "--dtype", "float32",
        "--data", str(test_data / "datasets/counterfact_flat_1000.json"), "--cases", "4",
        "--set", "steps=2", "--moments-corpus", str(text), "--texts", str(text), "--out", str(tmp_path / "run"),
        "--metric", "es", "--metric", "kl_drift",
    ]  # fmt: skip
    assert main(command) == 0
    printed = capsys.readouterr()
    assert "| ES ↑ |" in printed.out
    assert "| KL drift ↓ |" in printed.out
    assert "4 cases (counterfact-flat)" in printed.err
    first = json.loads((tmp_path / "run/summary.json").read_text())
    assert first["run"]["cases"] == 4
    assert main(command) == 0  # nothing is left to do
    assert json.loads((tmp_path / "run/summary.json").read_text())["metrics"] == first["metrics"]
    assert main([*command, "--mode", "batch"]) == 1
    assert "another run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cases", "0"], "at least 1"),
        (["--unedited", "--regularizer", "sadr"], "nothing to regularize"),
        (["--model", "somewhere"], "--data with --model"),
        (["--data", "no/such/file.json"], "There is no file"),
    ],
)
def test_wrong_commands_are_answered_in_a_sentence(arguments, message, capsys):
    assert main(["-q", "eval", *arguments]) == 1
    assert message in capsys.readouterr().err


class Quiet:
    """A regularizer that its user wrote: it keeps δ small."""

    name = "quiet"
    calls = 0

    def needs(self, site):
        return kedit.regularizers.Needs()

    def penalty(self, now, before):
        Quiet.calls += 1
        return 50.0 * now.delta.square().sum((1, 2))


def test_a_regularizer_of_ones_own_by_its_entry_point(monkeypatch, capsys):
    from test_eval_runner import make_cases

    import kedit.regularizers

    own = EntryPoint("quiet", f"{__name__}:Quiet", "kedit.regularizers")
    monkeypatch.setitem(sys.modules, __name__, sys.modules[__name__])
    known = kedit.utils.registry.entry_points
    monkeypatch.setattr(
        kedit.utils.registry,
        "entry_points",
        lambda group: (*known(group=group), own) if group == "kedit.regularizers" else known(group=group),
    )
    model, tok = tiny_model("gpt2"), tokenizer("plain")
    editor = kedit.ROME(model, tok, layers=1, steps=4, lr=0.3, moments={1: moments(112, 1)}, contexts=["{}"])
    plain = evaluate(model, tok, make_cases(), editor)
    quiet = evaluate(model, tok, make_cases(), editor, "quiet")
    assert Quiet.calls > 0
    assert quiet.meta["regularizers"][0]["name"] == "quiet"
    assert "quiet" in quiet.title
    assert quiet["em"].value < plain["em"].value
