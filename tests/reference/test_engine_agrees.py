"""The engine against the plain reference, in true float64: same losses, same δ, same updates.

All edits go through the engine together, stop on their own, and share stored keys and values; the reference takes
one edit and one whole prompt at a time.
"""

import itertools

import pytest
import torch

import kedit
from kedit.prompts.encode import encode_edits
from kedit.regularizers.base import Needs, needs_of
from tiny_models import CONTEXTS, EDITS, MODEL_TYPES, TOKENIZER_KINDS, moments, tiny_model, tokenizer

from . import alphaedit, common, emmet, memit, pmet, rome
from .float64 import TrueFloat64
from .inner import Hyper

BLOCKS = 5
SPREAD = (0, 2)  # places in the list count for the shares, not block numbers
GAMMA = 0.5
COLUMNS = ("total", "nll", "kl", "weight_decay", "sadr")

# Chosen so that δ is clamped, the mask of SADR opens, and edits stop at different steps.
CONFIG = {"steps": 5, "lr": 0.5, "weight_decay": 0.5, "kl_factor": 0.0625, "clamp": 1.0, "stop_loss": 5.75}


EVERY = tuple(EDITS.values())
FEW = (EDITS["start"], EDITS["end"])


class Case:
    """A tiny model, a few edits, and both ways of editing."""

    def __init__(self, model_type: str, kind: str = "plain", edits=EVERY):
        self.model = tiny_model(model_type, layers=BLOCKS, dtype=torch.float64)
        self.tokenizer = tokenizer(kind)
        self.edits = [kedit.Edit(*edit) for edit in edits]
        self.requests = [common.request(self.tokenizer, *edit, CONTEXTS) for edit in edits]
        width = common.weight(self.model, 0).shape[1]
        self.moments = {layer: moments(width, layer) for layer in range(BLOCKS)}

    def editor(self, name: str, layers, mode: str = "cached", **config):
        editor = kedit.get_editor(
            name,
            self.model,
            self.tokenizer,
            moments=self.moments,
            contexts=CONTEXTS,
            layers=layers,
            **(CONFIG | config),
        )
        editor.engine.mode = mode
        return editor

    def values(self, editor, regularizers):
        sites = editor.sites()
        needs = needs_of(regularizers, sites)
        requests = encode_edits(editor.arch, self.tokenizer, self.edits, CONTEXTS, needs)
        return editor.engine.optimize(sites, requests, editor.config.objective, regularizers, needs)


def hyper(gamma: float = 0.0, masked: bool = True, **changes) -> Hyper:
    fields = dict(
        steps=CONFIG["steps"],
        lr=CONFIG["lr"],
        weight_decay=CONFIG["weight_decay"],
        kl=CONFIG["kl_factor"],
        clamp=CONFIG["clamp"],
        stop=CONFIG["stop_loss"],
        gamma=gamma,
        masked=masked,
    )
    return Hyper(**(fields | changes))


def assert_close(found, expected, bound, what):
    error, size = (found - expected).norm(), expected.norm()
    assert error <= bound * size, (
        f"{what}: differs by {error:.1e}, its norm is {size:.1e}, allowed {bound:.0e} relative"
    )


def assert_values(values, references, site=0):
    """Compare losses, t0 and δ of every edit."""
    for i, reference in enumerate(references):
        found = torch.tensor([[row.get(c, 0.0) for c in COLUMNS] for row in values.log[i]], dtype=torch.float64)
        torch.testing.assert_close(found, torch.tensor(reference.losses, dtype=torch.float64), rtol=1e-10, atol=1e-12)
        assert_close(values.initial[i, site], reference.initial, 1e-12, f"t0 of edit {i}")
        assert_close(values.delta[i, site], reference.delta, 1e-10, f"δ of edit {i}")


def assert_exercised(references, gamma):
    """Some edit must be clamped, some must stop early and some not, some must drift: else a test proves little."""
    assert any(abs(d.norm() / r.initial.norm() - CONFIG["clamp"]) < 1e-9 for r in references for d in r.trajectory)
    assert len({len(r.losses) for r in references}) > 1
    assert not gamma or any(row[-1] > 0 for r in references for row in r.losses)


def dense(patch, layer):
    (name,) = [name for name in patch.deltas if f".{layer}." in name]
    return patch.deltas[name].dense


def some(quick, *others):
    """Mark all combinations slow but a few."""
    every = list(itertools.product(MODEL_TYPES, *others))
    return [pytest.param(*item, marks=() if quick(*item) else pytest.mark.slow) for item in every]


def sadr(gamma):
    return [kedit.SADR(gamma=gamma)] if gamma else []


GAMMAS = (0.0, GAMMA)


@pytest.mark.parametrize(("model_type", "gamma"), some(lambda kind, gamma: gamma, GAMMAS))
def test_rome(model_type, gamma):
    case = Case(model_type)
    with TrueFloat64():
        references = [rome.rome(case.model, r, 1, case.moments[1], hyper(gamma)) for r in case.requests]
        assert_exercised([r.value for r in references], gamma)
        for mode in ("cached", "full"):
            editor = case.editor("rome", (1,), mode)
            assert_values(case.values(editor, sadr(gamma)), [r.value for r in references])
        patches = editor.propose(case.edits, sadr(gamma))
    for patch, reference in zip(patches, references, strict=True):
        assert_close(dense(patch, 1), reference.update, 1e-8, "ΔW")


@pytest.mark.parametrize("kind", [kind for kind in TOKENIZER_KINDS if kind != "plain"])
def test_rome_with_other_tokenizers(kind):
    case = Case("llama", kind, FEW)
    with TrueFloat64():
        references = [rome.rome(case.model, r, 1, case.moments[1], hyper(GAMMA)) for r in case.requests]
        editor = case.editor("rome", (1,))
        assert_values(case.values(editor, sadr(GAMMA)), [r.value for r in references])
        patches = editor.propose(case.edits, sadr(GAMMA))
    for patch, reference in zip(patches, references, strict=True):
        assert_close(dense(patch, 1), reference.update, 1e-8, "ΔW")


def test_adr_restrains_every_head():
    case = Case("gpt2", edits=FEW)
    with TrueFloat64():
        references = [rome.rome(case.model, r, 1, case.moments[1], hyper(GAMMA, masked=False)) for r in case.requests]
        values = case.values(case.editor("rome", (1,)), [kedit.SADR(gamma=GAMMA, select="all")])
    assert_values(values, [r.value for r in references])


@pytest.mark.parametrize("model_type", some(lambda kind: kind == "gpt_neox"))
def test_rrome(model_type):
    case = Case(model_type, edits=FEW)
    with TrueFloat64():
        references = [rome.r_rome(case.model, r, 1, case.moments[1], hyper()) for r in case.requests]
        patches = case.editor("rrome", (1,)).propose(case.edits)
    for patch, reference in zip(patches, references, strict=True):
        assert_close(dense(patch, 1), reference.update, 1e-8, "ΔW")


def apply(case, editor, regularizers=None):
    """Write all edits as one batch, and take them back."""
    before = [p.detach().clone() for p in case.model.parameters()]
    result = editor.apply(case.edits, regularizers)
    result.revert()
    assert all(torch.equal(a, b) for a, b in zip(before, case.model.parameters(), strict=True))
    return result.patch


def assert_updates(patch, updates, bound=1e-8):
    assert len(patch.deltas) == len(updates)
    for layer, update in updates.items():
        assert_close(dense(patch, layer), update, bound, f"ΔW of block {layer}")


@pytest.mark.parametrize(
    ("model_type", "gamma"), some(lambda kind, gamma: gamma and kind in ("gpt2", "mistral"), GAMMAS)
)
def test_memit(model_type, gamma):
    case = Case(model_type)
    with TrueFloat64():
        expected = memit.memit(case.model, case.requests, list(SPREAD), case.moments, 3.0, hyper(gamma))
        editor = case.editor("memit", SPREAD, moment_weight=3.0)
        assert_values(case.values(editor, sadr(gamma)), expected.values)
        patch = apply(case, editor, sadr(gamma))
    assert_updates(patch, expected.updates)


@pytest.mark.parametrize(("model_type", "gamma"), some(lambda kind, gamma: gamma and kind in ("gptj", "qwen2"), GAMMAS))
def test_pmet(model_type, gamma):
    case = Case(model_type)
    with TrueFloat64():
        values = [pmet.optimise_two(case.model, r, SPREAD[-1], hyper(gamma)) for r in case.requests]
        expected = pmet.write(case.model, case.requests, list(SPREAD), case.moments, 3.0, [v.mlp for v in values])
        for mode in ("cached", "full"):
            editor = case.editor("pmet", SPREAD, mode, moment_weight=3.0)
            found = case.values(editor, sadr(gamma))
            assert_values(found, [v.mlp for v in values], site=0)
            assert_values(found, [v.attention for v in values], site=1)
        patch = apply(case, editor, sadr(gamma))
    assert_updates(patch, expected.updates)


@pytest.mark.parametrize("kl_factor", [1.0, 0.02])
def test_pmet_settles(kl_factor):
    """Every target is the first choice soon: the NLL then counts a tenth, or, where the KL is small, that is the end."""
    case = Case("gptj", edits=[(*EDITS["end"][:2], "town"), (*EDITS["end"][:2], "language"), EDITS["one_token"]])
    changes = {"lr": 1.0, "clamp": 8.0, "weight_decay": 0.05, "stop_loss": 0.05}
    settings = hyper(lr=1.0, clamp=8.0, weight_decay=0.05, stop=0.05, kl=kl_factor)
    with TrueFloat64():
        values = [pmet.optimise_two(case.model, r, 2, settings) for r in case.requests]
        found = case.values(case.editor("pmet", (2,), kl_factor=kl_factor, **changes), [])
    steps = [len(v.mlp.losses) for v in values]
    assert min(steps) < CONFIG["steps"] if kl_factor < 1 else values[0].mlp.losses[-1][1] < 0.5
    assert_values(found, [v.mlp for v in values], site=0)
    assert_values(found, [v.attention for v in values], site=1)


@pytest.mark.parametrize("model_type", some(lambda kind: kind == "llama"))
def test_emmet(model_type):
    case = Case(model_type, edits=FEW)
    with TrueFloat64():
        arguments = ([1], case.moments, 2.0, 0.1, hyper(stop=0.0))
        batch = emmet.emmet(case.model, case.requests, *arguments)
        single = emmet.emmet(case.model, case.requests[:1], *arguments)  # without λ
        editor = case.editor("emmet", (1,), alpha=2.0, ridge=0.1, stop_loss=0.0)
        patch = apply(case, editor)
        (first,) = editor.propose(case.edits[:1])
    assert_updates(patch, batch.updates)
    assert_updates(first, single.updates)


@pytest.mark.parametrize("model_type", some(lambda kind: kind == "gpt2"))
def test_alphaedit(model_type):
    """Two batches, the second beside the keys of the first."""
    case = Case(model_type, edits=EVERY[:3])
    threshold = 0.5  # of these eigenvalues: about half of the directions are free
    halves = [(case.requests[:2], case.edits[:2]), (case.requests[2:], case.edits[2:])]
    expected, past, results = [], None, []
    with TrueFloat64():
        with memit.weights_kept(case.model, list(SPREAD)):
            for requests, _ in halves:
                arguments = (case.moments, 2.0, hyper(stop=0.0), past, threshold)
                step = alphaedit.alphaedit(case.model, requests, list(SPREAD), *arguments)
                memit.write_updates(case.model, step.spread.updates)
                expected.append(step.spread.updates)
                past = step.past
        editor = case.editor(
            "alphaedit",
            SPREAD,
            l2=2.0,
            threshold=threshold,
            threshold_rule="absolute",
            l2_relative=False,
            stop_loss=0.0,
        )
        for _, edits in halves:
            results.append(editor.apply(edits))
    assert_updates(results[0].patch, expected[0])
    assert_updates(results[1].patch, expected[1], 1e-6)  # past keys are kept in float32
    for result in reversed(results):
        result.revert()


def test_a_space_that_is_a_token_belongs_to_the_target():
    case = Case("gpt2")
    edit = ("{} works in", "Ada Lovelace", "Paris")  # " Paris" is "Ġ", "Par", "is" here
    reference = common.request(case.tokenizer, *edit, ["{}"]).rewriting[0]
    request = encode_edits(
        kedit.ROME(case.model, case.tokenizer).arch, case.tokenizer, [kedit.Edit(*edit)], ["{}"], Needs()
    )
    assert list(request[0].rewrite[0].labels) == reference.targets
