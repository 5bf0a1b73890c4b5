"""Several threads and one model: edits follow one another, other forward passes wait, and nothing stays behind."""

import threading
import time

import pytest
import torch

import kedit
from kedit.models.lock import editing
from tiny_models import tiny_model, tokenizer

from .common import ADA, FRENCH, state

IDS = torch.tensor([[5, 6, 7, 8, 9]])


def hooks_and_methods(model):
    """Everything that could be left on a model's modules."""
    return [
        (name, len(part._forward_hooks), len(part._forward_pre_hooks), "forward" in vars(part))
        for name, part in model.named_modules()
    ]


def in_threads(*calls):
    """Run calls at once; what they raise."""
    errors, barrier = [], threading.Barrier(len(calls))

    def run(call):
        barrier.wait()
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert not any(thread.is_alive() for thread in threads)
    return errors


@pytest.mark.filterwarnings("ignore::kedit.IneffectiveEditWarning")
@pytest.mark.parametrize("shared", [True, False], ids=["one editor", "two editors"])
def test_edits_of_several_threads_follow_one_another(shared):
    model, tok = tiny_model("llama"), tokenizer()
    before, clean = state(model), hooks_and_methods(model)
    editors = [kedit.FT(model, tok, layers=2, steps=4), kedit.FT(model, tok, layers=2, steps=4)]
    if shared:
        editors[1] = editors[0]
    results = []

    def work(editor, edit):
        for _ in range(2):
            editor.propose(edit)
            results.append(editor.apply(edit))

    assert in_threads(lambda: work(editors[0], ADA), lambda: work(editors[1], FRENCH)) == []
    assert hooks_and_methods(model) == clean
    assert state(model) != before
    assert in_threads(*(result.revert for result in results)) == []
    assert state(model) == before


@pytest.mark.filterwarnings("ignore::kedit.IneffectiveEditWarning")
def test_values_are_optimised_by_one_thread_at_a_time():
    model, tok = kedit.load()
    clean, before = hooks_and_methods(model), model(IDS).logits
    edits = [
        kedit.Edit("{} works as a", name, job) for name, job in (("Hulqui Gossam", "pilot"), ("Nil Macor", "baker"))
    ]
    alone = [kedit.ROME(model, tok, steps=5).propose(edit)[0] for edit in edits]
    found = {}

    def work(number):
        for _ in range(3):
            [found[number]] = kedit.ROME(model, tok, steps=5).propose(edits[number])

    assert in_threads(lambda: work(0), lambda: work(1)) == []
    assert hooks_and_methods(model) == clean
    assert torch.equal(model(IDS).logits, before)
    for number, patch in enumerate(alone):
        for name, delta in patch.deltas.items():
            assert torch.equal(found[number].deltas[name].dense, delta.dense)


@pytest.mark.filterwarnings("ignore::kedit.IneffectiveEditWarning")
def test_a_model_that_generates_beside_an_edit_gives_what_it_gives_before_or_after():
    model, tok = kedit.load()
    clean = hooks_and_methods(model)
    edit = kedit.Edit("{} works as a", "Hulqui Gossam", "pilot")
    editor = kedit.ROME(model, tok, steps=6)
    before = model(IDS).logits
    seen, done = [], threading.Event()

    def ask():
        while not done.is_set():
            with torch.no_grad():
                seen.append(model(IDS).logits)
                model.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)

    def work():
        try:
            editor.apply(edit)
        finally:
            done.set()

    assert in_threads(ask, work) == []
    after = model(IDS).logits
    assert hooks_and_methods(model) == clean
    assert seen
    # a pass that was under way when the weights were written may have read some of both
    assert sum(not torch.equal(found, before) and not torch.equal(found, after) for found in seen) <= 1


def test_passes_of_others_wait_and_those_of_the_editing_thread_do_not():
    model = tiny_model("llama")
    times = []

    def ask():
        model(IDS)
        times.append(time.perf_counter())

    with editing(model):
        model(IDS)
        other = threading.Thread(target=ask)
        other.start()
        other.join(0.3)
        assert not times
        with editing(model):  # one inside the other
            model(IDS)
    other.join(60)
    assert times
    assert not model._forward_pre_hooks


def test_an_error_gives_the_model_free():
    model = tiny_model("llama")
    with pytest.raises(ZeroDivisionError), editing(model):
        raise ZeroDivisionError
    assert not model._forward_pre_hooks
    assert in_threads(lambda: model(IDS)) == []


@pytest.mark.filterwarnings("ignore::kedit.errors.KEditWarning")
@pytest.mark.parametrize(
    "call",
    [
        lambda model, tok, patch: patch.attach(model).detach(),
        lambda model, tok, patch: kedit.evaluate(
            model=model, tokenizer=tok, cases=[kedit.EditCase.of("ada", ADA)], editor=None
        ),
        lambda model, tok, patch: kedit.trace(model, tok, ADA, samples=1, known_only=False),
        lambda model, tok, patch: kedit.ROME(model, tok, layers=2).contexts,
        lambda model, tok, patch: kedit.second_moments(model, tok, [1], ["A text.", "Another one."], cache=False),
    ],
    ids=["attach", "evaluate", "trace", "contexts", "moments"],
)
def test_calls_wait_while_another_thread_edits(call):
    model, tok = tiny_model("llama"), tokenizer()
    patch = kedit.FT(model, tok, layers=2, steps=1, contexts=["{}"]).propose(ADA)[0]
    wanted = [parameter.requires_grad for parameter in model.parameters()]
    errors, done = [], threading.Event()

    def work():
        try:
            call(model, tok, patch)
        except BaseException as error:
            errors.append(error)
        done.set()

    with editing(model):
        hooks = hooks_and_methods(model)
        other = threading.Thread(target=work)
        other.start()
        assert not done.wait(0.3)
        assert hooks_and_methods(model) == hooks
        assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    other.join(60)
    assert errors == []
