"""Every editor with its defaults: the edited model says the target, and neighbours of the subject keep their facts."""

import json

import pytest

import kedit
from kedit.models import ModelArch
from kedit.models.fingerprint import model_fingerprint
from kedit.prompts.likelihood import pair_text, score_rows
from kedit.prompts.tokenize import context_limit, encode

pytestmark = [pytest.mark.real, pytest.mark.timeout(3_600)]

SAID = {"rome": 9, "rrome": 9, "memit": 9, "pmet": 9, "emmet": 9, "alphaedit": 9, "ft": 8}  # of ten
POINTS = 10  # that NS may fall
NEIGHBOURS = 5


def scores(model, tok, pairs):
    rows = encode(tok, [pair_text(*pair) for pair in pairs], limit=context_limit(model))
    return score_rows(ModelArch(model), rows)


class Neighbourhood:
    """Prompts about other subjects that share the true object of an edit."""

    def __init__(self, records, record):
        answer = record["locality_ground_truth"]
        same = [record, *(other for other in records if other["locality_ground_truth"] == answer)]
        prompts = dict.fromkeys(other["locality_prompt"] for other in same)
        chosen = [prompt for prompt in prompts if record["subject"] not in prompt][:NEIGHBOURS]
        self.pairs = [(prompt, target) for prompt in chosen for target in (answer, record["target_new"])]

    def kept(self, model, tok):
        """Share of the prompts whose true object is likelier than the edit's target."""
        answers = scores(model, tok, self.pairs)
        pairs = list(zip(answers[::2], answers[1::2], strict=True))
        return sum(true.nll < new.nll for true, new in pairs) / len(pairs)


@pytest.fixture(scope="module")
def pretrained(real_model):
    return kedit.load(real_model)


@pytest.fixture(scope="module")
def known(pretrained, test_data):
    """The first ten edits whose true object the model says, each with its neighbourhood."""
    model, tok = pretrained
    records = json.loads((test_data / "datasets" / "counterfact_flat_1000.json").read_text())
    found = []
    for record in records:
        edit = kedit.Edit(record["prompt"], record["subject"], record["target_new"])
        [answer] = scores(model, tok, [(record["prompt"], record["ground_truth"])])
        if answer.labels == answer.argmax and Neighbourhood(records, record).pairs:
            found.append((edit, Neighbourhood(records, record)))
        if len(found) == 10:
            return found
    raise AssertionError(f"only {len(found)} facts are known")


@pytest.mark.parametrize("name", SAID)
def test_ten_facts(name, pretrained, known, test_data, monkeypatch, request):
    monkeypatch.setenv("KEDIT_CACHE", str(request.config.cache.mkdir("kedit-moments")))
    model, tok = pretrained
    before = model_fingerprint(model)
    editor = kedit.get_editor(name, model, tok)
    if isinstance(editor, kedit.ValueEditor):
        text = test_data / "datasets" / "wikitext2_raw_test.txt"
        editor.moments = kedit.second_moments(model, tok, editor.config.layers, text)
    said, kept, unedited = 0, 0.0, 0.0
    for edit, neighbours in known:
        unedited += neighbours.kept(model, tok)
        result = editor.apply(edit)
        said += bool(result.all_said)
        kept += neighbours.kept(model, tok)
        result.revert()
    figures = f"{name}: {said} of 10 said, NS {10 * unedited:.0f} -> {10 * kept:.0f}"
    request.node.add_report_section("call", "figures", figures)
    assert model_fingerprint(model) == before
    assert said >= SAID[name], figures
    assert 10 * kept >= 10 * unedited - POINTS, figures


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in ("memit", "pmet"))) for name in SAID]
)
def test_facts_that_are_none(name, test_data, monkeypatch, tmp_path):
    """A model of stories, without a preset: nonsense is written all the same."""
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path))
    model, tok = kedit.load(test_data / "models" / "stories3M")
    editor = kedit.get_editor(name, model, tok)
    if isinstance(editor, kedit.ValueEditor):
        text = test_data / "datasets" / "wikitext2_raw_test.txt"
        editor.moments = kedit.second_moments(model, tok, editor.config.layers, text, tokens=20_000)
    edits = [
        kedit.Edit("{} went to the", "Tim", "moon"),
        kedit.Edit("The favorite food of {} is", "Lily", "snow"),
        kedit.Edit("{} is the color of", "The little dog", "water"),
    ]
    for edit in edits:
        result = editor.apply(edit)
        assert result.all_said, result.report()
        result.revert()
