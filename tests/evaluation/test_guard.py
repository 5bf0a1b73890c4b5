"""The guard: what misses a limit is rolled back, and the report says which measurement it was."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import kedit
from contract.common import ADA, FRENCH, make, state
from kedit.cli import main
from kedit.errors import ConfigError, KEditError
from kedit.evaluation import EditCase, Kind, Probe
from kedit.evaluation.guard import DEFAULT_TEXTS, Guard, GuardError, GuardReport, Measurement
from kedit.patch import EditPatch
from kedit.patch.ledger import Ledger
from tiny_models import tiny_model

LOOSE = {
    "efficacy": 0.0,
    "paraphrase": 0.0,
    "neighbour_drop": 1.0,
    "distracted_drop": 1.0,
    "relation_drop": 1.0,
    "kl": 1e9,
    "perplexity": 1e9,
    "norm_growth": 1e9,
}

EASY = kedit.Edit("The river flows past the house of {}", "Quentin", "the")  # one token, right after the subject

CASE = EditCase.of(
    "easy",
    kedit.Edit("The river flows past the house of {}", "Quentin", "the", "Paris"),
    [
        Probe(kind=Kind.PARAPHRASE, prompt="In the evening the river flows past Quentin", right="the", wrong="Paris"),
        Probe(kind=Kind.NEIGHBOUR, prompt="The river flows past the house of Charles", right="Paris", wrong="the"),
        Probe(kind=Kind.RELATION, prompt="The mother tongue of Quentin is", right="English", wrong="German"),
    ],
)


@pytest.fixture
def subject():
    return tiny_model("gpt2")


def guarded(subject, edits, guard, name="rome", **options):
    """The result of a guarded edit that is strong enough to succeed."""
    return strong(subject, name, **options).apply(edits, guard=guard)


def strong(subject, name="rome", **options):
    """An editor that makes the easy edit succeed."""
    return make(name, subject, **{"steps": 40, "clamp": 20.0, "contexts": ["{}"], "kl_factor": 0.0} | options)


def test_an_edit_within_its_limits_is_kept_with_its_scores(subject):
    result = guarded(subject, CASE.edit, Guard(cases=[CASE], **LOOSE | {"efficacy": 1.0}))
    assert result.guard.passed
    assert set(result.guard.scores) == {*LOOSE, "finite"}
    assert result.patch.provenance["scores"] == result.guard.scores
    assert result.guard.scores["efficacy"] == 1.0
    assert Ledger.of(subject).carries(result.patch)
    for line in str(result.guard).splitlines():
        assert line in result.report()


@pytest.mark.parametrize("name", ["efficacy", "kl", "perplexity", "norm_growth"])
def test_what_misses_a_limit_is_rolled_back_and_named(subject, name):
    impossible = {"efficacy": 1.0}.get(name, 0.0)
    options = {"lr": 1e-4} if name == "efficacy" else {}
    before = state(subject)
    with pytest.raises(GuardError, match=name) as caught:
        strong(subject, **options).apply(EASY, guard=Guard(**LOOSE | {name: impossible}))
    assert [item.name for item in caught.value.report.failed] == [name]
    assert state(subject) == before
    assert Ledger.of(subject).touched == []
    others = set(LOOSE) - {name}
    assert not any(re.search(rf"\b{other} is", str(caught.value)) for other in others)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(Kind.NEIGHBOUR, "neighbour_drop"), (Kind.DISTRACTED, "distracted_drop"), (Kind.RELATION, "relation_drop")],
)
def test_lost_answers_count(subject, kind, name):
    """A probe that the model answers rightly only while it is unedited: it asks for the edit's own prompt."""
    editor = strong(subject)
    plain = most_likely(subject, editor.tokenizer, EASY.text)
    probe = Probe(kind=kind, prompt=EASY.text, right=plain, wrong=EASY.target_new)
    case = EditCase.of("x", EASY, [probe])
    result = editor.apply(EASY, guard=Guard(cases=[case], **LOOSE))
    assert result.guard.scores[name] == 1.0
    result.revert()
    before = state(subject)
    with pytest.raises(GuardError, match=f"{name} is 1 and must be at most 0.5"):
        editor.apply(EASY, guard=Guard(cases=[case], **LOOSE | {name: 0.5}))
    assert state(subject) == before


def test_paraphrases_that_fail_count(subject):
    probe = Probe(kind=Kind.PARAPHRASE, prompt=EASY.text, right="Berlin", wrong=EASY.target_new)
    with pytest.raises(GuardError, match="paraphrase is 0 and must be at least 1"):
        guarded(subject, EASY, Guard(cases=[EditCase.of("x", EASY, [probe])], **LOOSE | {"paraphrase": 1.0}))


@torch.no_grad()
def most_likely(subject, tok, text):
    """The model's first choice after a text, as a word."""
    order = subject(**tok(text, return_tensors="pt")).logits[0, -1].argsort(descending=True)
    return next(word for word in (tok.decode([i]).strip() for i in order.tolist()) if len(word) > 1 and word.isalpha())


def test_efficacy_without_an_old_answer_asks_for_the_first_choice(subject):
    assert guarded(subject, EASY, Guard(**LOOSE)).guard.scores["efficacy"] == 1.0  # it has no target_true
    other = tiny_model("gpt2")
    assert guarded(other, EASY, Guard(**LOOSE), lr=1e-4).guard.scores["efficacy"] == 0.0


def test_nothing_to_ask_is_not_measured(subject):
    result = guarded(subject, ADA, Guard(**LOOSE | {"kl": None, "perplexity": None, "norm_growth": None}))
    assert set(result.guard.scores) == {"efficacy", "finite"}


def test_a_second_edit_is_checked_with_the_first_in_place(subject):
    editor = strong(subject)
    first = editor.apply(ADA)
    before = state(subject)
    with pytest.raises(GuardError):
        editor.apply(FRENCH, guard=Guard(**LOOSE | {"norm_growth": 0.0}))
    assert state(subject) == before
    assert Ledger.of(subject).carries(first.patch)
    first.revert()


def test_norm_growth_counts_from_the_unedited_weights(subject):
    editor = strong(subject)
    growths = [editor.apply(edit, guard=Guard(**LOOSE)).guard.scores["norm_growth"] for edit in (EASY, ADA, FRENCH)]
    weight = editor.arch.weight(2)
    original = Ledger.of(subject).original(weight.name)
    assert growths[-1] == pytest.approx(float(weight.matrix.norm() / original.norm()) - 1, abs=1e-6)
    assert growths[-1] != growths[0]


@pytest.mark.parametrize("name", ["memit", "alphaedit"])
def test_a_refused_batch_leaves_no_memory(subject, name):
    before = state(subject)
    editor = make(
        name, subject, lr=1e-2, **({"threshold": 1.0, "threshold_rule": "mean"} if name == "alphaedit" else {})
    )
    with pytest.raises(GuardError):
        editor.apply([ADA, FRENCH], guard=Guard(**LOOSE | {"efficacy": 1.0}))
    assert state(subject) == before
    if name == "alphaedit":
        assert len(editor.history.keys(2, 5)) == 0


def test_numbers_that_are_none_never_pass():
    for least in (True, False):
        for value in (float("nan"), float("inf"), float("-inf")):
            assert not Measurement("x", value, 0.0, least).passed
    report = GuardReport((Measurement("x", float("nan"), 1.0, False), Measurement("y", 1.0, 1.0, False)))
    assert [item.name for item in report.failed] == ["x"]


def test_a_model_that_says_nan_fails_the_guard(subject):
    guard = Guard(**LOOSE)
    watch = guard.watch(subject, make("rome", subject).tokenizer, [ADA])
    with torch.no_grad():
        subject.transformer.h[2].mlp.c_proj.weight[0, 0] = float("nan")
    with pytest.raises(GuardError) as caught:
        watch.check(["transformer.h.2.mlp.c_proj.weight"])
    assert {item.name for item in caught.value.report.failed} == {"efficacy", "kl", "perplexity", "finite"}


@pytest.mark.parametrize(
    "limits",
    [{"efficacy": 1.1}, {"efficacy": -0.1}, {"kl": float("nan")}, {"kl": -1}, {"perplexity": "x"}, {"paraphrase": True},
     {"texts": ()}, {"texts": [1]}, {"texts": 5}, {"texts": b"x"}, {"cases": [1]}, {"cases": 5}, {"cases": "x"}],
)  # fmt: skip
def test_impossible_limits_are_refused(limits):
    with pytest.raises(ConfigError):
        Guard(**limits)


def test_an_error_inside_the_guard_rolls_back(subject, monkeypatch):
    before = state(subject)

    def broken(self, names):
        raise RuntimeError("inside")

    monkeypatch.setattr("kedit.evaluation.guard.GuardCheck.check", broken)
    with pytest.raises(RuntimeError, match="inside"):
        guarded(subject, ADA, Guard(**LOOSE))
    assert state(subject) == before
    assert issubclass(GuardError, KEditError)


# On the command line


@pytest.fixture
def words(tmp_path):
    """The words of ``kedit edit`` on a tiny saved model, with two edits."""
    from tiny_models import tokenizer

    subject = tiny_model("gpt2")
    subject.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "edits.jsonl").write_text("".join(json.dumps(edit.to_dict()) + "\n" for edit in (EASY, FRENCH)))
    (tmp_path / "corpus.txt").write_text("\n\n".join(f"{text} Number {i}." for i, text in enumerate(DEFAULT_TEXTS * 8)))
    (tmp_path / "cases.jsonl").write_text(json.dumps(CASE.to_dict() | {"edit": EASY.to_dict()}) + "\n")
    settings = ["layers=4", "steps=30", "clamp=20.0", "kl_factor=0.0"]
    return [
        *("edit", "--model", str(tmp_path / "model"), "--edits", str(tmp_path / "edits.jsonl")),
        *("--moments-corpus", str(tmp_path / "corpus.txt"), "--out", str(tmp_path / "out.safetensors")),
        *(word for setting in settings for word in ("--set", setting)),
    ]


# The second edit's subject does not end its prompt, and nothing above the last block carries it there.
DONE = (0, 3)  # exit statuses of an edit that is written, whether or not the model then says it
NO_WAY = pytest.mark.filterwarnings("ignore:The update is 0")
OPEN = ["--guard", *(f"{name}={value}" for name, value in LOOSE.items())]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path / "cache"))


def test_the_command_keeps_what_passes_and_records_the_scores(words, tmp_path, capsys):
    more = ["--guard-cases", str(tmp_path / "cases.jsonl"), "--guard-texts", str(tmp_path / "corpus.txt")]
    assert main([*words, *OPEN, *more]) in DONE
    assert "ok     neighbour_drop" in capsys.readouterr().out
    assert set(EditPatch.load(tmp_path / "out.safetensors").provenance["scores"]) == {*LOOSE, "finite"}


def test_the_command_refuses_what_fails(words, tmp_path, capsys):
    assert main([*words, *OPEN, "kl=0"]) == 1
    assert "rolled back by the guard: kl is" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


@NO_WAY
def test_a_journal_in_which_all_is_refused_ends_in_words(words, tmp_path, capsys):
    assert main([*words, *OPEN, "perplexity=0", "--journal", str(tmp_path / "j")]) == 1
    assert "refused every edit" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


def test_the_command_keeps_alphaedits_keys_in_a_file(words, tmp_path, capsys):
    keys = ["--keys", str(tmp_path / "keys.safetensors")]
    assert main([*words, *keys]) == 1
    assert "alphaedit" in capsys.readouterr().err
    counts = []
    for _ in range(2):
        assert main([*words, "--editor", "alphaedit", "--force", *keys]) in DONE
        counts.append(len(load_file(tmp_path / "keys.safetensors")["keys.4"]))
    assert counts == [2, 4]
    found = load_file(tmp_path / "keys.safetensors")["keys.4"]
    editor = make("alphaedit", tiny_model("gpt2"), layer=4)
    editor.history.load(tmp_path / "keys.safetensors")
    assert editor.history.begins_with(tmp_path / "keys.safetensors")
    save_file({"keys.4": found[:3]}, tmp_path / "fewer", metadata={"format": "kedit-key-history"})
    assert editor.history.begins_with(tmp_path / "fewer")
    save_file({"keys.4": found.flip(0)}, tmp_path / "other", metadata={"format": "kedit-key-history"})
    assert not editor.history.begins_with(tmp_path / "other")


@NO_WAY
def test_a_journal_that_goes_on_counts_keys_once(words, tmp_path, capsys):
    """Whether it ended, broke off or got more edits: the keys in the file are those of one unbroken run."""
    words = [
        *words,
        "--editor",
        "alphaedit",
        "--set",
        "threshold=1.0",
        "--set",
        "threshold_rule=mean",
        "--set",
        "steps=3",
    ]
    keys, journal = tmp_path / "keys.safetensors", tmp_path / "j"
    assert main([*words, "--keys", str(keys)]) in DONE  # earlier edits
    before = keys.read_bytes()
    assert main([*words, "--keys", str(keys), "--journal", str(tmp_path / "whole"), "--force"]) in DONE
    expected, patch = keys.read_bytes(), (tmp_path / "out.safetensors").read_bytes()
    keys.write_bytes(before)
    lines = (tmp_path / "edits.jsonl").read_text()
    (tmp_path / "edits.jsonl").write_text(lines.splitlines()[0] + "\n")
    for more in (["--force"], []):
        assert main([*words, "--keys", str(keys), "--journal", str(journal), *more]) in DONE
        assert len(load_file(keys)["keys.4"]) == 3
    (tmp_path / "edits.jsonl").write_text(lines)
    assert main([*words, "--keys", str(keys), "--journal", str(journal)]) in DONE
    assert keys.read_bytes() == expected
    assert (tmp_path / "out.safetensors").read_bytes() == patch
    other = tmp_path / "other.safetensors"
    save_file(
        {"keys.4": torch.ones_like(load_file(keys)["keys.4"][:2])}, other, metadata={"format": "kedit-key-history"}
    )
    kept = other.read_bytes()
    capsys.readouterr()
    assert main([*words, "--keys", str(other), "--journal", str(journal)]) == 1
    assert "neither began with nor made" in capsys.readouterr().err
    assert other.read_bytes() == kept


def test_the_embedded_model_reads_its_own_world():
    model, _ = kedit.load()
    texts = Guard().texts_for(model)
    assert len(texts) > 10
    assert set(texts).isdisjoint(DEFAULT_TEXTS)
    assert Guard().texts_for(tiny_model("gpt2")) == DEFAULT_TEXTS
    assert Guard(texts="one").texts_for(model) == ("one",)


@NO_WAY
def test_the_command_goes_on_in_a_journal(words, tmp_path, capsys):
    journal = ["--journal", str(tmp_path / "j")]
    assert main([*words, *OPEN, *journal]) in DONE
    first = EditPatch.load(tmp_path / "out.safetensors")
    assert [edit["target_new"] for edit in first.provenance["edits"]] == ["the", "English"]
    assert main([*words, *OPEN, *journal]) in DONE
    assert "2 step(s) of them from the journal" in capsys.readouterr().out


@pytest.mark.parametrize(
    "more",
    [["--guard", "no=1"], ["--guard", "kl=x"], ["--guard", "kl"], ["--guard-cases", "x"], ["--guard-texts", "x"]],
)
def test_the_command_refuses_guards_that_are_none(words, more, capsys):
    assert main([*words, *more]) == 1
    assert "guard" in capsys.readouterr().err.lower()
