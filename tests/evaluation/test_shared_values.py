"""Values that several editors share: which are the same, and that nobody changes another's."""

import pytest

import kedit
from kedit.bench import Suite
from kedit.evaluation.shared_values import RememberingEngine
from kedit.models import ModelArch
from kedit.values.scheduler import Engine
from tiny_models import CONTEXTS, EDITS, moments, tiny_model, tokenizer

EDIT = kedit.Edit(*EDITS["middle"])
OTHER = kedit.Edit(*EDITS["start"])


@pytest.fixture
def optimised(monkeypatch):
    """The edits that were optimised, call by call."""
    seen, plain = [], Engine.optimize

    def counting(self, sites, requests, *rest):
        seen.append([request.edit for request in requests])
        return plain(self, sites, requests, *rest)

    monkeypatch.setattr(Engine, "optimize", counting)
    return seen


def editor(name, model, engine=None, **options):
    arch = ModelArch(model)
    layers = (1,) if name in ("rome", "rrome") else (0, 1)
    defaults = {
        "layers": layers,
        "steps": 3,
        "contexts": CONTEXTS,
        "moments": {i: moments(arch.shape(i)[1], i) for i in layers},
    }
    made = kedit.get_editor(name, model, tokenizer(), **{**defaults, **options})
    made.engine = engine or made.engine
    return made


def same(one, other):
    return all(delta.dense.equal(other.deltas[name].dense) for name, delta in one.deltas.items())


@pytest.mark.parametrize("pair", [("rome", "rrome"), ("memit", "alphaedit")])
def test_editors_with_the_same_values_share_them_and_give_what_they_give_alone(pair, optimised):
    model = tiny_model("gpt2")
    engine = RememberingEngine(ModelArch(model))
    shared = [editor(name, model, engine).propose(EDIT)[0] for name in pair]
    assert len(optimised) == 1
    alone = [editor(name, model).propose(EDIT)[0] for name in pair]
    assert len(optimised) == 3
    assert all(map(same, shared, alone))


def test_whatever_changes_a_value_makes_another(optimised):
    model = tiny_model("gpt2")
    engine = RememberingEngine(ModelArch(model))
    makes = [
        lambda: editor("rome", model, engine).propose(EDIT),
        lambda: editor("rome", model, engine).propose(OTHER),
        lambda: editor("rome", model, engine, lr=0.1).propose(EDIT),
        lambda: editor("rome", model, engine, contexts=CONTEXTS[:2]).propose(EDIT),
        lambda: editor("rome", model, engine).propose(EDIT, kedit.SADR(gamma=0.1)),
        lambda: editor("rome", model, engine).propose(EDIT, kedit.SADR(gamma=0.2)),
        lambda: editor("memit", model, engine).propose(EDIT),
    ]
    for number, make in enumerate(makes, 1):
        make()
        make()
        assert len(optimised) == number


def test_an_edited_model_has_other_values_and_the_restored_one_the_old_ones(optimised):
    model = tiny_model("gpt2")
    engine = RememberingEngine(ModelArch(model))
    before = editor("rome", model, engine).propose(EDIT)[0]
    result = editor("rome", model).apply(OTHER)
    count = len(optimised)
    editor("rome", model, engine).propose(EDIT)
    assert len(optimised) == count + 1
    result.revert()
    assert same(editor("rome", model, engine).propose(EDIT)[0], before)
    assert len(optimised) == count + 1


def test_a_closed_form_leaves_what_is_kept_as_it_was():
    model = tiny_model("gpt2")
    made = editor("rome", model, RememberingEngine(ModelArch(model)))
    logs = []
    for _ in range(2):
        result = made.apply(EDIT)
        logs.append(result.log)
        result.revert()
    [kept] = made.engine.kept.values()
    assert logs[0] == logs[1]
    assert "written" in logs[0][0][-1]
    assert "written" not in kept.log[0][-1]


def test_a_suite_shares_them(tmp_path, optimised):
    suite = Suite(
        tiny_model("gpt2"), tokenizer(), tmp_path, contexts=2, config={"steps": 2, "rome.layers": 1, "rrome.layers": 1}
    )
    for name in ("rome", "rrome"):
        made = suite.editor(name)
        made.moments = {1: moments(made.arch.shape(1)[1], 1)}
        made.propose(EDIT)
    assert len(optimised) == 1
