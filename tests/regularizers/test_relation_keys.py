"""Keys that are held: every closed form against the plain formula, what reaches it, and what an edit then leaves alone."""

from types import SimpleNamespace

import pytest
import torch

import kedit
import zoo
from kedit.editors.closed_forms import null_space
from kedit.editors.solve_layers import LayerProblem
from kedit.errors import ConfigError
from kedit.keys import read
from kedit.keys.second_moment import SecondMoments
from kedit.models import ModelArch, Site
from kedit.prompts.encode import encode_edits, join_subjects
from kedit.prompts.tokenize import Text, encode
from kedit.regularizers import Needs, RelationKeys, make
from tiny_models import CONTEXTS, EDITS, moments, tiny_model, tokenizer

EDIT = kedit.Edit(*EDITS["middle"])
OTHER = kedit.Edit(*EDITS["start"])
LAST = kedit.Edit(*EDITS["end"])
HELD = ("The birthplace of {}", "We read the book of {}", "The house of {}")
EDITORS = ("rome", "rrome", "memit", "pmet", "emmet", "alphaedit")
WIDTH, OUT = 12, 7


def problem(edits, *, held=5, contexts=3):
    """A layer with random keys, in float64."""
    draw = torch.Generator().manual_seed(edits)

    def rand(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    text = rand(5 * WIDTH, WIDTH) * torch.linspace(0.05, 2, WIDTH, dtype=torch.float64)
    keys = rand(edits, contexts, WIDTH)
    return LayerProblem(
        layer=0,
        keys=keys,
        residual=rand(edits, OUT),
        weights=(SimpleNamespace(name="w", matrix=rand(OUT, WIDTH)),),
        moments=SecondMoments({0: text.T @ text / len(text)}),
        subjects=tuple(map(str, range(edits))),
        held=rand(edits * held, WIDTH) / held**0.5,
        also=torch.cat([keys[:, 1:], rand(edits, contexts, WIDTH)], 1),
    )


def plain(given, key, weight, exact):
    """argmin Σ‖Δ k − r‖² + Σ Σ‖Δ p − r‖² + λ tr Δ (C + Hᵀ H) Δᵀ by its normal equations; ``exact``: Δ k = r, and λ = 1."""
    big = 1e9 if exact else 1.0
    system = weight * (given.moments[0].matrix + given.held.T @ given.held) + big * key.T @ key
    right = big * key.T @ given.residual
    for further in given.also.unbind(1):
        system, right = system + further.T @ further, right + further.T @ given.residual
    return torch.linalg.solve(system, right).T


def editor_like(name, **config):
    """An editor's closed form without its model."""
    kind = kedit.editors.editor_class(name)
    made = object.__new__(kind)
    made.config = kind.Config(layers=(0,), **config)
    return made


@pytest.mark.parametrize("name", ["rome", "rrome", "emmet"])
def test_one_edit_is_written_exactly_and_the_rest_is_least(name):
    given = problem(1)
    key = given.keys[:, 0]  # the bare prompt's, for R-ROME too
    found = editor_like(name).solve(given).dense
    torch.testing.assert_close(key @ found.T, given.residual, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found, plain(given, key, 1.0, exact=True), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "edits"),  # a system in the number of keys, and one in the width; EMMET has no ridge for a single edit
    [("memit", 1), ("memit", 3), ("memit", 40), ("pmet", 1), ("pmet", 40), ("emmet", 3), ("emmet", 40)],
)
def test_batches_are_the_normal_equations(name, edits):
    given = problem(edits)
    options = {"alpha": 2.0, "ridge": 1.5} if name == "emmet" else {"moment_weight": 3.0}
    found = editor_like(name, **options).solve(given)
    assert found.rank == edits
    torch.testing.assert_close(found.dense, plain(given, given.keys[:, 0], 3.0, exact=False), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("edits", [1, 3, 40])
def test_alphaedit_holds_them_in_its_null_space(edits):
    given = problem(edits)
    made = editor_like("alphaedit", l2=0.7)
    made._moments, made._null_space, made.history = given.moments, None, SimpleNamespace(parts=lambda *a, **k: [])
    used, energy = null_space(given.moments[0].matrix, 0.5)
    projection = torch.eye(WIDTH, dtype=torch.float64) - used @ used.T
    weight = 0.7 * energy
    held = given.held @ projection * (WIDTH / energy) ** 0.5
    keys = torch.cat([given.keys[:, 0], *given.also.unbind(1)]) @ projection
    residual = torch.cat([given.residual, *[given.residual] * given.also.shape[1]])
    system = keys.T @ keys + weight * (torch.eye(WIDTH, dtype=torch.float64) + held.T @ held)
    expected = torch.linalg.solve(system, keys.T @ residual).T
    found = made.solve(given)
    assert found.rank == edits
    torch.testing.assert_close(found.dense, expected, rtol=1e-7, atol=1e-8)
    assert float((found.dense @ used).abs().max()) < 1e-10


def test_what_the_closed_form_is_given():
    arch = ModelArch(tiny_model("llama"))
    needs = Needs(held=HELD, prompts=("{} is",), neighbours=("Paris",))
    [request] = encode_edits(arch, tokenizer(), [EDIT], CONTEXTS, needs)
    assert len(request.extra) == len(request.neighbours) == 1
    texts = [Text.fill(prompt, EDIT.subject) for prompt in HELD]
    expected = read.keys(arch, encode(tokenizer(), texts), 1) / 3**0.5
    torch.testing.assert_close(read.held_keys(arch, [request], 1), expected)
    alone = [Text.fill(context, EDIT.subject) for context in CONTEXTS]
    torch.testing.assert_close(read.alone_keys(arch, [request], 1)[0], read.keys(arch, encode(tokenizer(), alone), 1))
    begins = kedit.Edit("{} is", EDIT.subject, "a")  # its key is that of the subject alone
    [request] = encode_edits(arch, tokenizer(), [begins], CONTEXTS, Needs(held=HELD))
    assert (len(request.held), len(request.alone)) == (0, 3)
    joined = join_subjects(encode_edits(arch, tokenizer(), [begins, EDIT], CONTEXTS, Needs(held=HELD)))
    assert [len(one.held) for one in joined] == [3]


@pytest.mark.parametrize("name", ["rome", "memit", "alphaedit"])
def test_an_edit_that_begins_with_its_subject_is_written_as_without(name):
    model = tiny_model("gpt2")
    patches = [editor(name, model).propose(OTHER, regularizer)[0] for regularizer in (None, RelationKeys(prompts=HELD))]
    assert OTHER.prompt.startswith("{}")
    for key, delta in patches[0].deltas.items():
        assert torch.equal(delta.dense, patches[1].deltas[key].dense)


def editor(name, model, **options):
    arch = ModelArch(model)
    layers = (1,) if name in ("rome", "rrome", "emmet") else (0, 1)
    defaults = {
        "layers": layers,
        "steps": 4,
        "contexts": CONTEXTS,
        "moments": {i: moments(arch.shape(i)[1], i) for i in layers},
        "clamp": 1.0,
    }
    defaults |= {"memit": {"moment_weight": 1.0}, "pmet": {"moment_weight": 1.0}}.get(name, {})
    return kedit.get_editor(name, model, tokenizer(), **{**defaults, **options})


def change(patch, model, edit, prompts, layer=1):
    """How far the update moves the MLP's output at the subject of some prompts, on average, over that at the edit's own."""
    arch = ModelArch(model)
    [name] = [weight.name for weight in arch.weights(layer)]
    matrix = patch.deltas[name].dense.double()

    def size(texts):
        return (read.keys(arch, encode(tokenizer(), texts), layer).double() @ matrix.T).norm(dim=-1).mean()

    own = size([Text.fill(edit.prompt, edit.subject)])
    return float(size([Text.fill(prompt, edit.subject) for prompt in prompts]) / own)


@pytest.mark.parametrize("name", EDITORS)
def test_less_reaches_the_held_keys_and_the_values_stay(name):
    model = tiny_model("gpt2")
    results = []
    for regularizer in (None, RelationKeys(gamma=1.0, prompts=HELD)):
        results.append(editor(name, model).apply(EDIT, regularizer))
        results[-1].revert()
    without, held = (result.patch for result in results)
    assert change(held, model, EDIT, HELD) < 0.5 * change(without, model, EDIT, HELD)
    first, second = ([step | {"written": 0} for step in result.log[0]] for result in results)
    assert first == second  # the same values, and no column of its own


def test_gamma_is_how_firmly_they_are_held():
    model = tiny_model("gpt2")
    moved = [
        change(editor("rome", model).propose(EDIT, RelationKeys(gamma=gamma, prompts=HELD))[0], model, EDIT, HELD)
        for gamma in (0.0, 0.1, 100.0)
    ]
    assert moved[0] > 1.5 * moved[1] > 2 * moved[2]


@pytest.mark.parametrize("name", ["rome", "memit", "alphaedit"])
def test_together_as_one_by_one(name):
    model = tiny_model("gpt2")
    edits = [EDIT, LAST, OTHER]
    together = editor(name, model).propose(edits, RelationKeys(prompts=HELD))
    alone = [editor(name, model).propose(edit, RelationKeys(prompts=HELD))[0] for edit in edits]
    for one, other in zip(together, alone, strict=True):
        for key, delta in one.deltas.items():
            torch.testing.assert_close(delta.dense, other.deltas[key].dense, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["rome", "memit", "alphaedit"])
def test_a_mixture_of_experts(name):
    model = zoo.make("olmoe", vocab_size=400, num_experts=4, num_experts_per_tok=2, intermediate_size=32)
    arch = ModelArch(model)
    layers = (1,) if name == "rome" else (0, 1)
    one = moments(arch.shape(1)[1], 1)
    kept = {i: torch.stack([one] * arch.experts(i).count) for i in layers}
    patches = {}
    for regularizer in (None, RelationKeys(gamma=1.0, prompts=HELD)):
        made = kedit.get_editor(
            name, model, tokenizer(), layers=layers, steps=4, contexts=CONTEXTS, moments=kept, clamp=1.0
        )
        result = made.apply(EDIT, regularizer)
        patches[regularizer is None] = {key: delta.dense for key, delta in result.patch.deltas.items()}
        result.revert()
    assert any(
        not torch.equal(delta, patches[True][key]) for key, delta in patches[False].items() if key in patches[True]
    )


def test_chats_hold_the_prompts_in_the_chat():
    words = tokenizer()
    words.chat_template = (
        "{% for m in messages %}user: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}bot:{% endif %}"
    )
    arch = ModelArch(tiny_model("llama"))
    edit = kedit.Edit.chat("The mother tongue of {} is", "Ada", "English")
    [request] = encode_edits(arch, words, [edit], CONTEXTS, Needs(held=HELD))
    assert all(words.decode(row.ids).startswith("user:") for row in (*request.held, *request.alone))


def test_needs_come_together():
    both = Needs(held=HELD[:2], hold=0.5) | Needs(held=HELD[1:], hold=2.0) | Needs(hold=9.0)
    assert (both.held, both.hold) == (HELD, 2.0)
    assert (Needs() | Needs()) == Needs()
    assert RelationKeys().needs(Site(0, "mlp")).hold == 0.1
    assert len(set(RelationKeys().needs(Site(0, "mlp")).held)) == 48


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"gamma": "auto"}, "no optimisation can weigh it"),
        ({"gamma": -1.0}, "gamma"),
        ({"prompts": "The father of {}"}, "tuple of texts"),
        ({"prompts": ()}, "at least"),
        ({"prompts": ("The father of",)}, "one '{}' each"),
    ],
)
def test_what_is_wrong_is_said(fields, words):
    with pytest.raises(ConfigError, match=words):
        make("relation_keys", **fields)


def test_it_is_kept_in_the_patch_and_made_again():
    model = tiny_model("gpt2")
    patch = editor("rome", model).propose(EDIT, ["relation_keys"])[0]
    [described] = patch.provenance["regularizers"]
    assert described["gamma"] == 0.1
    assert kedit.regularizers.from_description(described) == RelationKeys(gamma=0.1)
