"""Bad input: a sentence that helps, and a model that nobody touched."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification

import kedit
from kedit.editors import solve_layers, value_editor
from kedit.errors import (
    ArchitectureError,
    ConfigError,
    ContextLengthError,
    EditError,
    IneffectiveEditWarning,
    KEditWarning,
    NonFiniteError,
    PatchError,
    PatchMismatchError,
    SingularMomentError,
    TokenizerError,
    UnknownNameError,
    UnsupportedError,
)
from kedit.models import ModelArch
from kedit.patch.ledger import Ledger, Provisional
from kedit.regularizers import Needs
from tiny_models import CONTEXTS, MODEL_TYPES, tiny_model, tokenizer

from .common import ADA, FRENCH, LAYER, make, state, zoo_model

WEIGHT = "transformer.h.2.mlp.c_proj.weight"


class Term:
    """A regularizer of one line."""

    name = "term"

    def __init__(self, penalty, needs=None):
        self._penalty = penalty
        self._needs = needs or Needs()

    def needs(self, site):
        return self._needs

    def penalty(self, now, before):
        return self._penalty(now)


@pytest.fixture
def model():
    """A model that must be the same after the test as before."""
    made = tiny_model("gpt2")
    made.train()
    before = state(made)
    yield made
    assert state(made) == before
    assert Ledger.of(made).touched == []


@pytest.mark.parametrize("action", ["apply", "propose"])
@pytest.mark.parametrize(
    ("edits", "words"),
    [
        ([], "list of edits is empty"),
        (None, "NoneType"),
        ("The capital", "found str"),
        ([FRENCH, {"prompt": "{} is"}], "found dict"),
    ],
)
def test_no_edits(model, action, edits, words):
    with pytest.raises(EditError, match=words):
        getattr(make("rome", model), action)(edits)


def test_requests_that_are_none_never_reach_the_model(model):
    for fields, words in [
        (("The capital is", "France", "Rome"), "neither"),
        (("Anna met Anna in", "Anna", "Rome"), "2 times"),
        (("{} is", "Anna", ""), "empty"),
    ]:
        with pytest.raises(EditError, match=words):
            make("rome", model).apply(kedit.Edit(*fields))


@pytest.mark.parametrize("number", [None, 1])
def test_prompt_longer_than_the_context_window(model, number):
    long = kedit.Edit("river " * 128 + "{} is", "Ada", "Rome")
    edits = long if number is None else [FRENCH, long]
    with pytest.raises(ContextLengthError, match="context window holds 128") as caught:
        make("rome", model).apply(edits)
    assert ("Edit 1" in str(caught.value)) == (number == 1)


def test_prompt_that_only_fits_without_contexts(model):
    room = "river " * 30
    edit = kedit.Edit(room + "{} is", "Ada", "Rome")
    long = ["{}", "The river is long. " * 30 + "{}"]
    make("rome", model, contexts=["{}"], steps=1).propose(edit)
    with pytest.raises(ContextLengthError, match="Shorten the prompt or its contexts"):
        make("rome", model, contexts=long).propose(edit)


@pytest.mark.parametrize("layer", [5, 99, -1])
def test_layer_out_of_range(model, layer):
    with pytest.raises(ConfigError, match=r"out of range: this gpt2 has 5 blocks|whole number from 0"):
        make("rome", model, layer=layer)


@pytest.mark.parametrize("name", ["rome", "rrome"])
def test_several_layers_where_one_is_written(model, name):
    with pytest.raises(ConfigError, match=r"one layer, not \(1, 2\)"):
        make(name, model, layers=(1, 2))


@pytest.mark.parametrize("name", ["rom", "memt", "alfaedit"])
def test_unknown_editor(model, name):
    with pytest.raises(UnknownNameError, match="Did you mean"):
        kedit.get_editor(name, model, tokenizer())


def test_unknown_regularizer(model):
    with pytest.raises(UnknownNameError, match="no regularizer called 'sdar'. Did you mean 'sadr'"):
        make("rome", model).apply(FRENCH, regularizer="sdar")


def test_unknown_hyper_parameter(model):
    with pytest.raises(ConfigError, match="ROME has no hyper-parameter 'step'. It has clamp, .*steps"):
        make("rome", model, step=3)


def test_config_of_another_kind(model):
    with pytest.raises(ConfigError, match="config must be a ROME.Config, not dict"):
        kedit.ROME(model, tokenizer(), {"steps": 3})


def test_sadr_needs_no_gamma(model):
    result = make("rome", model).apply(FRENCH, regularizer="sadr")
    result.revert()
    assert "weight" in result.log[0][0]


def test_moments_that_do_not_fit(model):
    with pytest.raises(ConfigError, match=r"layer 2 is \(5, 5\)"):
        make("rome", model, moments={2: torch.eye(5)})
    with pytest.raises(ConfigError, match=r"no second moment for layer 2; given are layers \[1\]"):
        make("rome", model, moments={1: torch.eye(112)})


@pytest.mark.parametrize("moment", ["zero", "rank one"])
@pytest.mark.parametrize("name", ["rome", "rrome"])
def test_singular_second_moment(model, moment, name):
    matrices = {
        "zero": torch.zeros(112, 112),
        "rank one": torch.ones(112, 112),
    }
    with pytest.raises(SingularMomentError, match="of layer 2 is not positive definite"):
        make(name, model, moments={2: matrices[moment]}).apply([FRENCH, ADA])


@pytest.mark.parametrize("name", ["rome", "memit", "emmet", "alphaedit"])
def test_second_moments_of_no_real_keys(model, name):
    eye, one = torch.eye(112), torch.eye(112)
    one[3, 3] = torch.nan
    for matrix in (one, eye * torch.inf, torch.eye(112, dtype=torch.int64), torch.eye(112, dtype=torch.complex64)):
        with pytest.raises(ConfigError, match="layer 2 .* is not made of finite real numbers"):
            make(name, model, moments={2: matrix}).apply(FRENCH)
    experts = torch.eye(64).repeat(4, 1, 1)
    experts[3, 5, 5] = torch.nan  # an expert that need not serve the subject
    mixture = zoo_model("mixtral")
    with pytest.raises(ConfigError, match="layer 1 .* is not made of finite real numbers"):
        make(name, mixture, layer=1, moments={1: experts}).apply(FRENCH)
    with pytest.raises(SingularMomentError, match="negative eigenvalue|not positive definite"):
        make(name, model, moments={2: -eye}).apply(FRENCH)


def test_an_update_of_nothing_is_said_and_taken_back():
    for kind, eye in (("llama", torch.eye(80)), ("mixtral", torch.eye(64).repeat(4, 1, 1))):
        model = tiny_model("llama") if kind == "llama" else zoo_model("mixtral")
        with pytest.warns(KEditWarning, match="update is 0.*ordinary keys use every direction") as seen:
            result = make("alphaedit", model, layer=1, moments={1: eye}, threshold=0.02, threshold_rule="mean").apply(
                FRENCH
            )
        kinds = [warning.category for warning in seen if warning.category is not FutureWarning]
        assert kinds == [KEditWarning, IneffectiveEditWarning], "no word of the router"
        assert not result.routes
        assert all(delta.norm == 0.0 for delta in result.patch.deltas.values()), "rounding noise is not written"
        result.revert()
        assert not kedit.Ledger.of(model).touched


def test_an_edit_above_which_no_attention_reads_the_subject_is_said(model):
    editor = make("rome", model, layer=4, kl_factor=0.0)
    with pytest.warns(KEditWarning, match="above the last block no attention carries the subject on"):
        result = editor.apply(FRENCH)
    result.revert()


def test_blocks_that_share_their_weights_are_refused():
    model = tiny_model("gpt2")
    model.transformer.h[1].mlp = model.transformer.h[2].mlp
    for name in ("rome", "memit", "ft"):
        editor = make(name, model, **({"kl_factor": 0.0} if name == "ft" else {}))
        with pytest.raises(UnsupportedError, match="Blocks 1, 2 of this gpt2 share one down-projection"):
            editor.apply(FRENCH)
    make("rome", model, layer=3).apply(FRENCH)


def test_a_model_without_numbers_is_refused_in_one_sentence(tmp_path):
    patch = make("rome", tiny_model("llama")).propose(FRENCH)[0]
    empty = tiny_model("llama").to("meta")
    for do in (
        lambda: make("rome", empty),
        lambda: patch.apply(empty),
        lambda: patch.attach(empty),
        lambda: kedit.EditPatch.diff(empty, tiny_model("llama")),
    ):
        with pytest.raises(ArchitectureError, match="on the meta device and holds no numbers"):
            do()


def test_what_is_no_causal_language_model():
    with pytest.raises(ArchitectureError, match="found NoneType"):
        kedit.ROME(None, tokenizer())
    judge = AutoModelForSequenceClassification.from_config(tiny_model("llama").config)
    with pytest.raises(ArchitectureError, match="no module 'lm_head'"):
        kedit.ROME(judge, tokenizer(), layers=1)


def test_a_tokenizer_larger_than_the_model():
    model = tiny_model("llama")
    model.resize_token_embeddings(97)
    with pytest.raises(EditError, match=r"The tokenizer gives token \d+, and the model knows 97 tokens"):
        make("rome", model).apply(FRENCH)


def test_target_that_the_model_says_already_is_a_warning_only():
    model = tiny_model("gpt2")
    editor = make("rome", model, contexts=["{}"], steps=30, lr=0.5, kl_factor=0.0, weight_decay=0.0, clamp=100.0)
    said = kedit.Edit("The house of {}", "Ada Lovelace", "the")  # subject last: it decides the next token
    first = editor.apply(said)  # from now on the model says it; a warning here would be an error
    before = state(model)
    with pytest.warns(KEditWarning, match="already continues 'The house of Ada Lovelace' with 'the'") as caught:
        second = editor.apply([said, FRENCH])
    assert sum(warning.category is KEditWarning for warning in caught) == 1
    assert state(model) != before, "it is written all the same"
    second.revert()
    assert state(model) == before
    with pytest.warns(KEditWarning, match="already continues"):
        editor.propose(said)
    first.revert()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("step", [0, 2])
def test_regularizer_that_is_not_finite(model, value, step):
    term = Term(lambda now: now.delta.sum((1, 2)) * 0 + (value if now.step == step else 0.0))
    with pytest.raises(NonFiniteError, match=f"loss of edit 0 is not finite at step {step} .*term {value}"):
        make("rome", model).apply([ADA, FRENCH], term)


def test_weight_that_is_nan():
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.transformer.h[3].mlp.c_fc.weight[0, 0] = torch.nan
    before = state(model)
    for contexts in (CONTEXTS, None):
        with pytest.raises(NonFiniteError):
            make("rome", model, contexts=contexts).apply(FRENCH)
        assert state(model) == before


def test_penalty_of_a_wrong_shape(model):
    with pytest.raises(ConfigError, match="penalty of 'term' must be one number per edit"):
        make("rome", model).apply(FRENCH, Term(lambda now: now.delta.sum()))


def test_update_too_large_for_the_weights_dtype():
    model = tiny_model("gpt2", dtype=torch.float16)
    before = state(model)
    proposal = make("rome", model).propose(FRENCH)[0]
    [delta] = proposal.deltas.values()
    delta.left.mul_(1e6 / delta.dense.abs().max())
    with pytest.raises(NonFiniteError, match=r"would hold NaN or infinite numbers in torch.float16"):
        proposal.apply(model)
    assert state(model) == before


def test_slow_tokenizer(model):
    from prompts.test_encoding import Slow

    with pytest.raises(TokenizerError, match="fast tokenizer"):
        make("rome", model, Slow()).apply(FRENCH)


def test_other_model_type():
    with pytest.raises(ArchitectureError, match="Linear"):
        kedit.ROME(torch.nn.Linear(2, 2), tokenizer())


# Interruptions. The model fixture checks that nothing stays behind.


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, RuntimeError])
@pytest.mark.parametrize("edits", [FRENCH, [ADA, FRENCH]], ids=["one", "two"])
@pytest.mark.parametrize("mode", ["cached", "full"])
def test_interrupted_in_a_penalty(model, error, edits, mode):
    def penalty(now):
        if now.step == 2 and (edits is FRENCH or len(seen) >= 5):
            raise error("here")
        seen.append(now.step)
        return now.delta.sum((1, 2)) * 0

    seen = []
    editor = make("rome", model)
    editor.engine.mode = mode
    term = Term(penalty, Needs(attention=range(3, 5), hidden=range(3, 5), logits=True, prompts=("{} is",)))
    with pytest.raises(error):
        editor.apply(edits, term)
    assert len(seen) == (2 if edits is FRENCH else 6)


@pytest.mark.parametrize("edits", [FRENCH, [ADA, FRENCH]], ids=["one", "two"])
def test_interrupted_while_the_update_is_solved(model, edits, monkeypatch):
    editor = make("rome", model)
    calls = []
    solve = editor.solve

    def interrupted(problem):
        calls.append(1)
        if len(calls) == (1 if edits is FRENCH else 2):
            raise KeyboardInterrupt
        return solve(problem)

    monkeypatch.setattr(editor, "solve", interrupted)
    with pytest.raises(KeyboardInterrupt):
        editor.apply(edits)


@pytest.mark.parametrize(
    "where", ["kedit.patch.ledger.Ledger.rounding", "kedit.utils.device_memory.HeapTrim.after_apply"]
)
def test_interrupted_after_the_weights_are_written(model, where, monkeypatch):
    """Whoever gets no result keeps the old weights."""
    editor = make("rome", model)

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        editor.apply(FRENCH)


def test_interrupted_while_a_method_of_several_layers_is_spread(model, monkeypatch):
    """The lower layers are already overwritten when the upper one fails."""
    layers = (1, 2, 3)
    editor = make("memit", model, layers=layers, moments={i: torch.eye(112) for i in layers})
    overwritten = []
    add, solve = Provisional.add, editor.solve

    def interrupted(problem):
        if problem.layer == 3:
            raise KeyboardInterrupt
        return solve(problem)

    monkeypatch.setattr(editor, "solve", interrupted)
    monkeypatch.setattr(Provisional, "add", lambda *a: (overwritten.append(1), add(*a))[1])
    with pytest.raises(KeyboardInterrupt):
        editor.apply([FRENCH, ADA])
    assert len(overwritten) == 2


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("layers", [1, 3])
def test_interrupted_in_the_final_write(model, moment, layers, monkeypatch):
    """In the middle of several weights, and with one half of them written."""
    from kedit.patch import ledger

    chosen = (1, 2, 3)[:layers]
    moments = {i: torch.eye(112) for i in chosen}
    editor = make("rome" if layers == 1 else "memit", model, layers=chosen, moments=moments)
    patch = editor.propose(FRENCH)[0]
    assert len(patch.deltas) == layers
    name = "_store" if hasattr(ledger, "_store") else "store"
    store, calls = getattr(ledger, name), []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == layers:
            if moment == "after":
                store(*args)
            raise KeyboardInterrupt
        return store(*args)

    monkeypatch.setattr(ledger, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        patch.apply(model)
    assert len(calls) > layers, "what was written was put back"
    monkeypatch.undo()
    patch.apply(model)
    patch.revert(model)


def test_interrupted_while_earlier_edits_stand():
    """An interruption leaves the model with exactly the edits it had, and they can still be reverted."""
    model = tiny_model("llama")
    before = state(model)
    editor = make("rome", model)
    first = editor.apply(FRENCH)
    held = state(model)

    def stop(now):
        raise KeyboardInterrupt

    for edits in (ADA, [ADA, FRENCH]):
        with pytest.raises(KeyboardInterrupt):
            editor.apply(edits, Term(stop))
        assert state(model) == held
    first.revert()
    assert state(model) == before


# Patches


@pytest.fixture
def saved(tmp_path):
    """A patch for the tiny gpt2, saved."""
    return make("rome", tiny_model("gpt2"), steps=2).propose(FRENCH)[0].save(tmp_path / "edit.safetensors")


@pytest.mark.parametrize("model_type", [t for t in MODEL_TYPES if t != "gpt2"])
def test_patch_for_another_type(saved, model_type):
    model = tiny_model(model_type)
    before = state(model)
    with pytest.raises(PatchMismatchError, match=WEIGHT if model_type != "gptj" else "mlp"):
        kedit.EditPatch.load(saved).apply(model)
    assert state(model) == before


@pytest.mark.parametrize("other", [{"seed": 1}, {"dtype": torch.bfloat16}])
def test_patch_for_other_weights(saved, other):
    model = tiny_model("gpt2", **other)
    before = state(model)
    with pytest.raises(PatchMismatchError, match="is not the weight that this patch was made for"):
        kedit.EditPatch.load(saved).apply(model)
    assert state(model) == before


def test_patch_applied_twice(saved):
    model = tiny_model("gpt2")
    patch = kedit.EditPatch.load(saved)
    patch.apply(model)
    once = state(model)
    for again in (patch, kedit.EditPatch.load(saved)):
        with pytest.raises(PatchMismatchError):
            again.apply(model)
        assert state(model) == once


@pytest.mark.parametrize("length", [0, 4, 8, 100, -1, -40])
def test_truncated_file(saved, model, length):
    content = saved.read_bytes()
    saved.write_bytes(content[:length])
    with pytest.raises(PatchError, match="edit.safetensors"):
        kedit.EditPatch.load(saved).apply(model)


def test_foreign_files(tmp_path, model):
    files = {name: tmp_path / name for name in ("weights", "text", "pickle", "folder", "none")}
    save_file({"a.weight": torch.ones(2, 2)}, files["weights"])
    files["text"].write_text(json.dumps({"format": "kedit-patch"}))
    torch.save({"a": torch.ones(2)}, files["pickle"])
    files["folder"].mkdir()
    for path in files.values():
        with pytest.raises(PatchError, match=path.name):
            kedit.EditPatch.load(path).apply(model)


def test_value_editor_is_the_one_that_is_patched_here():
    """The interruption tests replace functions by name: they must be the ones in use."""
    assert value_editor.solve_layers is solve_layers.solve_layers
    assert ModelArch(tiny_model("gpt2")).weight(LAYER).name == WEIGHT


def test_numbers_that_share_memory_are_refused():
    model = tiny_model("llama")
    weight = model.model.layers[LAYER].mlp.down_proj.weight
    weight.data = torch.ones(1).expand(weight.shape)
    with pytest.raises(PatchMismatchError, match="share one place in memory"):
        make("ft", model, kl_factor=0).apply(ADA)


@pytest.mark.filterwarnings("ignore::kedit.errors.KEditWarning")
def test_a_weight_of_two_blocks_is_noticed():
    model = tiny_model("llama")
    layers = model.model.layers
    layers[LAYER].mlp.down_proj.weight = layers[0].mlp.down_proj.weight
    with pytest.warns(KEditWarning, match="are one weight, so the edit changes all of them"):
        make("ft", model, kl_factor=0).apply(ADA).revert()


@pytest.mark.parametrize("target", ["\u200b", " \ufeff\n"])
def test_a_target_that_is_not_seen_is_refused(target):
    with pytest.raises(EditError, match="Edit.target_new is empty"):
        kedit.Edit("{} is", "Ada", target)
