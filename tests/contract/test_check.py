"""The checks of a result agree with the model's own predictions."""

import json
import warnings

import pytest
import torch

import kedit
import kedit.prompts.predictions
from kedit.cli import main
from kedit.errors import IneffectiveEditWarning, KEditWarning
from kedit.prompts.predictions import EditCheck, Prediction
from kedit.prompts.tokenize import encode, rewrite_texts
from kedit.sequential import run_journal
from tiny_models import tiny_model

from .common import ADA, FRENCH, make, state

PILOT = kedit.Edit("{} works as a", "Hulqui Gossam", "pilot")
BAKER = kedit.Edit("{} works as a", "Hulqui Gossam", "baker")


@pytest.fixture(scope="module")
def embedded():
    return kedit.load()


@pytest.fixture
def editor(embedded):
    """ROME on the embedded model, unedited again afterwards."""
    editor = kedit.ROME(*embedded)
    yield editor
    editor.revert_all()


def forward(model, tok, edit):
    """Probability of the target and whether each of its tokens is the likeliest, by one plain forward pass."""
    (row,) = encode(tok, rewrite_texts(edit, ["{}"]))
    with torch.no_grad():
        logits = model(torch.tensor([row.ids])).logits[0, row.prompt_last : -1].double()
    chosen = logits.log_softmax(-1).gather(1, torch.tensor(row.labels)[:, None])
    return float(chosen.sum().exp()), logits.argmax(-1).tolist() == list(row.labels)


def test_an_edit_that_works_is_reported_as_the_model_has_it(editor, embedded):
    model, tok = embedded
    unedited = forward(model, tok, PILOT)
    with warnings.catch_warnings():
        warnings.simplefilter("error", IneffectiveEditWarning)
        result = editor.apply(PILOT)
    (check,) = result.checks
    assert (check.before.probability, check.before.said) == (pytest.approx(unedited[0], rel=1e-4), False)
    assert (check.after.probability, check.after.said) == (pytest.approx(forward(model, tok, PILOT)[0], rel=1e-4), True)
    assert result.all_said is True
    assert check.after.first_choice == "pilot"
    assert check.after.text.startswith("pilot")
    assert not check.before.text.startswith("pilot")
    report = result.report()
    assert "the edited model says 1 of 1 target(s)" in report
    assert f"before: {check.before.text!r}" in report
    assert f"after:  {check.after.text!r} (probability of 'pilot': {check.after.probability:.1%})" in report
    generated = model.generate(**tok(PILOT.text, return_tensors="pt"), max_new_tokens=4, do_sample=False)
    assert tok.decode(generated[0], skip_special_tokens=True).startswith(f"{PILOT.text} {check.after.text}")


def test_an_edit_that_does_not_work_is_one_warning(embedded):
    editor = kedit.ROME(*embedded, steps=2, lr=1e-3)
    with pytest.warns(IneffectiveEditWarning) as seen:
        result = editor.apply([PILOT, ADA])
    (warning,) = [item for item in seen if item.category is IneffectiveEditWarning]
    assert warning.filename == __file__
    text = str(warning.message)
    assert "2 of 2 edits" in text
    assert f"'Hulqui Gossam works as a' → 'pilot', but it says {result.checks[0].after.text!r}" in text
    assert "more steps, a larger clamp" in text
    assert "moment_weight" not in text
    assert result.all_said is False
    assert "NOT what was asked for" in result.report()
    result.revert()


def test_many_edits_that_do_not_work_are_counted(embedded):
    subjects = ["Ada", "Bo", "Cy", "Di", "Ed"]
    editor = kedit.MEMIT(*embedded, steps=2, lr=1e-3)
    with pytest.warns(IneffectiveEditWarning, match="5 of 5 edits.*and 2 more. Try .*a smaller moment_weight"):
        editor.apply([kedit.Edit("{} works as a", name, "pilot") for name in subjects]).revert()


def test_a_later_edit_that_undoes_an_earlier_one_is_seen(editor, embedded):
    with pytest.warns(IneffectiveEditWarning, match="1 of 2 edits ask for: .*'pilot', but it says 'baker"):
        result = kedit.ROME(*embedded, join_subjects=False).apply([PILOT, BAKER])
    assert [check.after.said for check in result.checks] == [False, True]
    for check in result.checks:
        assert check.after.probability == pytest.approx(forward(*embedded, check.edit)[0], rel=1e-4)


def test_a_batch_is_asked_in_its_order(embedded):
    editor = make("memit", tiny_model("gpt2"))
    edits = [FRENCH, ADA] * 2
    found = editor.check(edits)
    assert [check.edit for check in found] == edits
    for check in found:
        expected = forward(editor.model, editor.tokenizer, check.edit)
        assert (check.after.probability, check.after.said) == (pytest.approx(expected[0], rel=1e-4), expected[1])


def test_large_batches_have_no_continuations_and_the_same_figures(monkeypatch):
    editor = make("rome", tiny_model("gpt2"))
    with_text = editor.check([FRENCH, ADA])
    monkeypatch.setattr(kedit.prompts.predictions, "TEXTS_UP_TO", 1)
    without = editor.check([FRENCH, ADA])
    assert [check.after.text for check in without] == [None, None]
    assert [check.after.probability for check in without] == [check.after.probability for check in with_text]
    assert "text" not in without[0].after.to_dict()


def test_the_check_changes_nothing_of_the_model():
    model = tiny_model("gpt2")
    dropouts = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert dropouts
    for module in dropouts:
        module.p = 0.5
    editor = make("rome", model)
    model.eval()
    expected = editor.check([FRENCH])
    model.train()
    before, random = state(model), torch.get_rng_state()
    assert editor.check([FRENCH]) == expected, "dropout is off"
    assert state(model) == before
    assert torch.equal(torch.get_rng_state(), random)


def test_the_patch_carries_the_check(editor, tmp_path, capsys):
    result = editor.apply(PILOT)
    (check,) = result.checks
    path = result.patch.save(tmp_path / "p.safetensors")
    known = kedit.EditPatch.load(path).provenance
    assert [Prediction.from_dict(item) for item in known["before"]] == [check.before]
    assert [Prediction.from_dict(item) for item in known["after"]] == [check.after]
    assert main(["patch", "show", str(path)]) == 0
    shown = capsys.readouterr().out
    assert f"before: {check.before.text!r}" in shown
    assert f"after: {check.after.text!r} (probability of 'pilot'" in shown
    old = {key: value for key, value in known.items() if key not in ("before", "after")}
    again = kedit.EditPatch(result.patch.deltas, result.patch.fingerprints, old)
    assert "before:" not in kedit.EditPatch.load(again.save(tmp_path / "old.safetensors")).show()


def test_numbers_that_are_none_are_kept_out_of_json():
    broken = Prediction(float("nan"), float("inf"), False, "x")
    assert json.loads(json.dumps(broken.to_dict(), allow_nan=False)) == {"said": False, "first_choice": "x"}
    assert "not a number" in EditCheck(FRENCH, None, Prediction.from_dict(broken.to_dict())).lines()[0]


def test_a_check_that_fails_is_a_warning_and_the_edit_stays(monkeypatch):
    editor = make("rome", tiny_model("gpt2"))
    before = state(editor.model)

    def fails(*args, **options):
        raise RuntimeError("out of everything")

    monkeypatch.setattr("kedit.editors.observers.predict", fails)
    with pytest.warns(KEditWarning, match="not checked: RuntimeError: out of everything"):
        result = editor.apply(FRENCH)
    assert result.all_said is None
    assert "before" not in result.patch.provenance
    assert state(editor.model) != before
    result.revert()
    assert state(editor.model) == before


@pytest.mark.parametrize("interrupted", [1, 2])
def test_a_check_that_is_interrupted_takes_the_edit_back(monkeypatch, interrupted):
    editor = make("rome", tiny_model("gpt2"))
    before, calls = state(editor.model), []

    def stops(*args, **options):
        calls.append(args)
        if len(calls) == interrupted:
            raise KeyboardInterrupt
        return kedit.prompts.predictions.predict(*args, **options)

    monkeypatch.setattr("kedit.editors.observers.predict", stops)
    with pytest.raises(KeyboardInterrupt):
        editor.apply(FRENCH)
    assert state(editor.model) == before


@pytest.mark.filterwarnings("error::kedit.errors.IneffectiveEditWarning")
def test_a_filter_makes_an_unsaid_edit_an_error_that_is_taken_back():
    editor = make("alphaedit", tiny_model("gpt2"), threshold=1.0, threshold_rule="mean")
    before = state(editor.model)
    with pytest.raises(IneffectiveEditWarning):
        editor.apply(FRENCH)
    assert state(editor.model) == before
    assert editor.history.count == 0


def test_lack_of_memory_asks_in_smaller_parts(monkeypatch):
    editor = make("rome", tiny_model("gpt2"))
    expected, budgets = editor.check([FRENCH, ADA]), []
    score = kedit.prompts.predictions.score_rows

    def narrow(arch, rows, *, tokens, logits):
        budgets.append(tokens)
        if tokens > 64:
            raise torch.OutOfMemoryError
        return score(arch, rows, tokens=tokens, logits=logits)

    monkeypatch.setattr(kedit.prompts.predictions, "score_rows", narrow)
    assert [check.after.text for check in editor.check([FRENCH, ADA])] == [check.after.text for check in expected]
    assert budgets == [8192 >> i for i in range(8)]


def test_a_journal_asks_at_the_end_and_after_a_resume(embedded, tmp_path):
    checks = []
    for _ in range(2):  # written, and resumed
        editor = kedit.ROME(*embedded)
        try:
            with pytest.warns(IneffectiveEditWarning, match="1 of 2 edits") as seen:
                run = run_journal(tmp_path / "j", editor, [PILOT, BAKER])
        finally:
            editor.revert_all()
        assert sum(item.category is IneffectiveEditWarning for item in seen) == 1
        assert [check.after.said for check in run.checks] == [False, True]
        assert run.all_said is False
        assert "in the end the model says 1 of 2 target(s)" in run.report()
        assert run.patch.provenance["after"] == [check.after.to_dict() for check in run.checks]
        checks.append(run.checks)
    assert run.resumed == 2
    assert checks[0] == checks[1]


@pytest.mark.filterwarnings("always::kedit.errors.IneffectiveEditWarning")
def test_the_command_exits_with_3_where_the_model_does_not_say_it(tmp_path, capsys):
    out = tmp_path / "p.safetensors"
    words = ["edit", "--prompt", PILOT.prompt, "--subject", PILOT.subject, "--target-new", "pilot", "--out", str(out)]
    assert main(words) == 0
    assert "the edited model says 1 of 1" in capsys.readouterr().out
    assert main([*words, "--set", "steps=2", "--set", "lr=0.001", "--force"]) == 3
    found = capsys.readouterr()
    assert "the edited model says 0 of 1" in found.out
    assert "warning: The edited model does not say what the edit asks for" in found.err
    assert out.exists()


def test_a_long_target_that_was_not_reached_gets_a_number_of_steps(embedded):
    target = " and ".join(["pilot", "baker", "chef", "painter", "nurse", "teacher", "judge", "clerk"])  # 15 words
    editor = kedit.ROME(*embedded, steps=2, contexts=["{}"])
    with pytest.warns(IneffectiveEditWarning, match="a target of 15 words takes 30 or more"):
        editor.apply(kedit.Edit(PILOT.prompt, PILOT.subject, target)).revert()
