"""The table: every editor on every model type. What each method states holds, and nothing else has changed."""

import copy
import functools
import json
import sys

import pytest
import torch

import kedit
import zoo
from kedit.keys import read
from kedit.models import ARCHITECTURES, ModelArch
from kedit.patch.ledger import Ledger
from kedit.prompts.encode import encode_edits
from kedit.prompts.tokenize import encode, rewrite_texts
from kedit.regularizers.base import ForwardRecord, needs_of
from kedit.values.cached_forward import CachedRunner
from kedit.values.forward import Runner, Wave
from reference import common
from reference.float64 import TrueFloat64
from reference.sadr import penalty
from tiny_models import CONTEXTS, tokenizer
from tiny_models import moments as dense_moments

from .common import ADA, FRENCH, digest, zoo_model

EDITORS = ("rome", "rrome", "memit", "pmet", "emmet", "alphaedit", "ft")
TOKENIZER = tokenizer("bos")
LAYERS = (0, 1)
TOP = LAYERS[-1]
# Without a ridge and with the bare prompt alone, the whole family writes its values exactly.
OWN = {
    "rome": {"layers": TOP, "contexts": CONTEXTS},
    "rrome": {"layers": TOP, "contexts": CONTEXTS},
    "memit": {"layers": LAYERS, "moment_weight": 0.0},
    "pmet": {"layers": LAYERS, "moment_weight": 0.0},
    "emmet": {"layers": TOP, "ridge": 0.0},
    "alphaedit": {"layers": LAYERS, "l2": 1e-9, "threshold": 0.5, "threshold_rule": "mean"},
    "ft": {"layers": TOP, "steps": 3, "lr": 1e-3, "clamp": 5e-4, "contexts": CONTEXTS},
}


# What another cell of the table covers up to a detail runs with the slow tests.
VARIANTS = ("gpt2-inverse", "falcon-alibi", "falcon-new", "stablelm-parallel")
ALIKE = ("qwen2", "qwen3", "mistral-window", "phi3", "smollm3", "stablelm", "starcoder2", "cohere", "gemma", "codegen")
ALIKE += ("gpt_bigcode", "gemma3", "glm4", "qwen3_moe", "olmoe")


def types(*slow):
    """Every type, those named in ``slow`` marked so."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name in slow)) for name in zoo.EDITABLE]


@functools.cache
def _made(name, dtype):
    return zoo_model(name, dtype)


def model_of(name, dtype=torch.float32):
    return copy.deepcopy(_made(name, dtype))


def moments_of(arch, layer):
    """One second moment, or one per expert, all different."""
    weights = arch.weights(layer)
    each = [dense_moments(weights[0].matrix.shape[1], 10 * layer + i) for i in range(len(weights))]
    return each[0] if arch.experts(layer) is None else torch.stack(each)


def editor_of(name, model):
    given = {"steps": 2, "contexts": ["{}"]} | OWN[name]
    if name != "ft":
        arch = ModelArch(model)
        given |= {
            "lr": 0.5,
            "clamp": 4.0,
            "kl_factor": 0.1,
            "stop_loss": 0.0,
            "moments": {i: moments_of(arch, i) for i in LAYERS},
        }
    return kedit.get_editor(name, model, TOKENIZER, **given)


def output_at(model, edit, site):
    """The site's output at the subject's last token of the bare prompt, by a whole forward pass."""
    prompt = common.request(TOKENIZER, edit.prompt, edit.subject, edit.target_new, ["{}"]).rewriting[0]
    module, seen = ModelArch(model).site(site), []
    # Cloned: Falcon's block adds the attention's output into the MLP's in place.
    handle = module.register_forward_hook(
        lambda _m, _a, out: seen.append((out[0] if isinstance(out, tuple) else out) + 0)
    )
    with torch.no_grad():
        model(torch.tensor([prompt.ids]))
    handle.remove()
    return seen[0].reshape(len(prompt.ids), -1)[prompt.subject_last]


def keys_of(arch, edit, contexts=("{}",)):
    return read.keys(arch, encode(TOKENIZER, rewrite_texts(edit, contexts)), TOP)


def side_by_side(arch, layer=TOP):
    """W of a block as one matrix, experts side by side."""
    return torch.cat([weight.matrix for weight in arch.weights(layer)], 1).clone()


def check_identity(name, model, editor, edits, values, result, original):
    """Check the method's equation on the edited model."""
    if name == "ft":
        for delta in result.patch.deltas.values():
            assert 0 < delta.dense.abs().max() <= 5e-4 * (1 + 1e-6)
        assert result.log[0][-1]["nll"] < result.log[0][0]["nll"]
        return
    [found] = values
    assert found.delta.norm(dim=-1).min() > 1e-3
    if name == "rrome":
        keys = keys_of(editor.arch, edits[0], CONTEXTS)
        wanted = original @ keys[0] + found.delta[0, 0]
        torch.testing.assert_close(side_by_side(editor.arch) @ keys.mean(0), wanted, atol=2e-4, rtol=2e-4)
        return
    site = editor.sites()[0]
    for number, edit in enumerate(edits):
        torch.testing.assert_close(output_at(model, edit, site), found.value[number, 0], atol=2e-4, rtol=2e-4)
    if name == "alphaedit":
        check_null_space(editor, result)


def check_null_space(editor, result):
    """Keys in the directions of ordinary text are answered as before."""
    for layer in LAYERS:
        for number, weight in enumerate(editor.arch.weights(layer)):
            delta = result.patch.deltas.get(weight.name)
            used = editor.null_space.used(layer, number)
            assert 0 < used.shape[1] < used.shape[0]
            assert delta is None or (delta.dense.double() @ used).norm() <= 1e-6 * delta.norm


@pytest.mark.parametrize("name", EDITORS)
@pytest.mark.parametrize("model_type", types(*VARIANTS))
def test_every_editor_on_every_model_type(model_type, name, values, tmp_path):
    model = model_of(model_type)
    editor = editor_of(name, model)
    before = {key: digest(tensor) for key, tensor in model.state_dict().items()}
    original = side_by_side(editor.arch)
    edits = [FRENCH, ADA] if editor.batched else [FRENCH]
    experts = {weight.name: weight.stored.clone() for i in LAYERS for weight in editor.arch.weights(i)}

    result = editor.apply(edits, None if name == "ft" else kedit.SADR(gamma=0.3))
    check_identity(name, model, editor, edits, values, result, original)

    after = {key: digest(tensor) for key, tensor in model.state_dict().items()}
    targets = {key.partition("[")[0] for key in result.patch.deltas}
    assert {key for key in before if before[key] != after[key]} == targets
    for key, stored in experts.items():  # of a mixture, only the experts that the patch names
        now = editor.arch.weight_of(key).stored
        assert torch.equal(now, stored) != (key in result.patch.deltas), key
    assert all(route.reached == pytest.approx(1) for route in result.routes)

    loaded = kedit.EditPatch.load(result.patch.save(tmp_path / "edit.safetensors"))
    assert loaded.deltas.keys() == result.patch.deltas.keys()
    for key, delta in loaded.deltas.items():
        for suffix, tensor in delta.tensors().items():
            assert torch.equal(tensor, result.patch.deltas[key].tensors()[suffix])
    result.revert()
    assert {key: digest(tensor) for key, tensor in model.state_dict().items()} == before
    loaded.apply(model)
    assert {key: digest(tensor) for key, tensor in model.state_dict().items()} == after
    Ledger.of(model).revert_all()


def reference_penalty(model, site, delta):
    """Both forms of SADR's penalty by eager attention and whole prompts, one at a time; γ = 1."""
    request = common.request(TOKENIZER, FRENCH.prompt, FRENCH.subject, FRENCH.target_new, CONTEXTS)
    twin = zoo.eager_twin(model)
    before = [common.forward(twin, prompt, {}) for prompt in request.rewriting]
    now = [common.forward(twin, prompt, {ModelArch(twin).site(site): delta}) for prompt in request.rewriting]
    return sum(penalty(request.rewriting, now, before, 1.0, masked=masked) for masked in (True, False))


def engine_penalty(kind, model, site, delta):
    """The same by the engine."""
    arch, forms = ModelArch(model), [kedit.SADR(gamma=1.0), kedit.SADR(gamma=1.0, select="all")]
    needs = needs_of(forms, [site])
    [request] = encode_edits(arch, TOKENIZER, [FRENCH], CONTEXTS, needs)
    runner = kind(arch, [site], Wave(tuple(request.prompts(0)), 1), needs)
    captured = []
    with runner.installed():
        for step, value in enumerate((torch.zeros_like(delta), delta)):
            found = runner.run(value[None, None])
            captured.append(
                ForwardRecord(step=step, delta=value, initial=found.initial, rewrite=found.rewrite, extra=found.extra)
            )
    before, now = captured
    return sum(form.drift(now.rewrite, before.detach().rewrite, 1).sum() for form in forms)


@pytest.mark.parametrize("model_type", types(*VARIANTS, *ALIKE))
def test_sadrs_gradient(model_type):
    model = model_of(model_type, torch.float64)
    site = ModelArch(model).output_site(0)
    generator = torch.Generator().manual_seed(5)
    delta = torch.randn(32, generator=generator, dtype=torch.float64).requires_grad_()
    with TrueFloat64():
        expected = reference_penalty(model, site, delta)
        [gradient] = torch.autograd.grad(expected, delta)
        assert gradient.norm() > 1e-6
        for kind in (CachedRunner, Runner):
            found = engine_penalty(kind, model, site, delta)
            [own] = torch.autograd.grad(found, delta)
            # The penalty is summed in float32, and the mean over the contexts has a factor of that precision.
            assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
            assert (own - gradient).norm() <= 1e-7 * gradient.norm()


def test_the_table_is_complete(capsys):
    kinds = {zoo.ZOO[name][0] for name in zoo.EDITABLE}
    elsewhere = {kind for kind, _ in zoo.NEWER.values()} | {"qwen3_5", "qwen3_5_moe"}  # models/test_newer_families.py
    assert kinds | elsewhere == set(ARCHITECTURES)
    size = {"editors": len(EDITORS), "model types": len(kinds), "variants": len(zoo.EDITABLE)}
    with capsys.disabled():
        sys.stdout.write(f"\ncontract table: {len(EDITORS) * len(zoo.EDITABLE)} cells {json.dumps(size)}\n")
