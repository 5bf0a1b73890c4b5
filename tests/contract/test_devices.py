"""Models on a device and on several: pretended ones (:mod:`pretend`), where a tensor that stays behind is an error."""

import contextlib
import copy
import warnings
from unittest import mock

import peft
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import kedit
import zoo
from kedit.analysis.activation_patching import patch_activations
from kedit.embedded import load_world
from kedit.embedded.cases import world_cases
from kedit.models import ModelArch
from kedit.models.fingerprint import model_fingerprint
from kedit.patch.ledger import Ledger
from kedit.regularizers.base import Needs, blocks_from
from kedit.regularizers.key_norm import KeyNorm
from kedit.values.forward import Layout
from pretend import Away, devices, spread
from tiny_models import tiny_model, tokenizer

from .common import ADA, EDITS, FRENCH, LAYER, RIVER
from .common import make as make_editor
from .test_model_types import EDITORS, editor_of, model_of

QUICK = {
    ("gpt2", "rome"),
    ("gpt_neox", "rome"),
    ("mixtral", "memit"),
    ("opt-normalised", "rome"),
    ("gemma2-softcap", "rome"),
}
FAR = 5e-4  # FT's Adam takes steps of one size however small a gradient is, so its rounding shows
NEAR = 5e-6


def make(name, model, *arguments, **options):
    """An editor with the published step size and weight, for which the bounds here are stated."""
    published = {} if name == "ft" else {"lr": 0.5, "clamp": 4.0}
    if name in ("memit", "pmet"):
        published["moment_weight"] = 15_000.0
    return make_editor(name, model, *arguments, **(published | options))


def cells():
    """Every type with every editor; what another cell covers up to a detail runs with the slow tests."""
    for name in zoo.EDITABLE:
        for editor in EDITORS:
            quick = name == "llama" or (name, editor) in QUICK
            yield pytest.param(name, editor, marks=[pytest.mark.slow] * (not quick))


def edited(model, name):
    editor = editor_of(name, model)
    edits = [FRENCH, ADA] if editor.batched else [FRENCH]
    return editor, editor.apply(edits, None if name == "ft" else kedit.SADR(gamma=0.3))


def apart(found, wanted):
    """The largest difference of two results' updates, relative to the largest entry."""
    assert found.patch.deltas.keys() == wanted.patch.deltas.keys()
    pairs = [(found.patch.deltas[key].dense.cpu(), delta.dense.cpu()) for key, delta in wanted.patch.deltas.items()]
    return max(float((got - known).abs().max() / known.abs().max()) for got, known in pairs)


@pytest.mark.parametrize(("model_type", "name"), list(cells()))
def test_every_editor_on_one_device_and_on_two(model_type, name):
    plain = model_of(model_type)
    with sdpa_kernel(SDPBackend.MATH):  # what a pretended device has
        _, wanted = edited(plain, name)
    for model, bound in ((model_of(model_type), 0.0), (model_of(model_type), FAR if name == "ft" else NEAR)):
        before = model_fingerprint(model)
        with devices():
            placed = spread(model) if bound else model.to("cuda:0")
            editor, found = edited(placed, name)
            homes = {layer: ModelArch(placed).device(layer) for layer in range(2)}
            assert {str(home) for home in homes.values()} == ({"cuda:0", "cuda:1"} if bound else {"cuda:0"})
            for key, delta in found.patch.deltas.items():
                layer = next(i for i in homes if f".{i}." in key)
                assert {tensor.device for tensor in delta.tensors().values()} == {homes[layer]}
            assert name == "ft" or all(editor.engine._verdicts.values()), (
                "prefix-cached forward passes pass their check"
            )
            assert apart(found, wanted) <= bound
            assert found.patch.fingerprints == wanted.patch.fingerprints
            found.revert()
            assert model_fingerprint(placed) == before


@pytest.mark.parametrize("first", [0, 9])  # all blocks on the second device; all on the first, the last norm apart
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "opt-normalised"])
def test_wherever_a_model_is_cut(model_type, first):
    _, wanted = edited(model_of(model_type), "memit")
    with devices():
        placed = spread(model_of(model_type), first)
        assert apart(edited(placed, "memit")[1], wanted) <= NEAR


class Still:
    """Holds the hidden states of the last token."""

    name = "still"

    def needs(self, site):
        return Needs(hidden=blocks_from(site.layer + 1), logits=True)

    def penalty(self, now, before):
        moved = sum((rows - before.rewrite.hidden[i]).square().mean(-1) for i, rows in now.rewrite.hidden.items())
        return 0.1 * now.rewrite.mean_per_edit(moved + now.rewrite.logits.var(-1), now.num_edits)


@pytest.mark.parametrize(
    "regularizer", [kedit.SADR(gamma=0.3), KeyNorm(gamma=0.3), Still()], ids=lambda each: each.name
)
def test_full_passes_and_every_regularizer_on_two_devices(regularizer):
    wanted = make("memit", tiny_model("llama")).apply(EDITS, regularizer)
    with devices():
        editor = make("memit", spread(tiny_model("llama"), 2))
        editor.engine.mode = "full"
        assert apart(editor.apply(EDITS, regularizer), wanted) <= NEAR


@pytest.mark.slow
def test_what_follows_an_edit_on_two_devices(tmp_path, monkeypatch):
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path / "cache"))
    texts = ["The capital of France is Paris, and the capital of Italy is Rome."] * 8
    plain = tiny_model("llama")
    known = kedit.second_moments(plain, tokenizer(), layers=[LAYER], corpus=texts)
    options = {"threshold": 0.5, "threshold_rule": "mean", "l2": 1e-2}
    wanted = [make("alphaedit", plain, moments=known, **options)]
    wanted += [wanted[0].apply(edit) for edit in EDITS]
    with devices():
        model = spread(tiny_model("llama"), LAYER)
        found = kedit.second_moments(model, tokenizer(), layers=[LAYER], corpus=texts, cache=False)
        torch.testing.assert_close(found[LAYER].matrix.cpu(), known[LAYER].matrix)
        editor = make("alphaedit", model, moments=known, **options)
        results = [editor.apply(edit) for edit in EDITS]  # with the keys of the earlier ones
        assert apart(results[-1], wanted[-1]) <= 1e-4
        patch = kedit.EditPatch.merge([result.patch for result in results])
        loaded = kedit.EditPatch.load(patch.save(tmp_path / "edits.safetensors"))
        Ledger.of(model).revert_all()
        ids = torch.tensor([[5, 17, 90, 3, 44]])
        loaded.apply(model)
        written = model(ids.to("cuda:0")).logits.cpu()
        torch.testing.assert_close(written, plain(ids).logits, atol=1e-4, rtol=1e-4)
        loaded.revert(model)
        with loaded.attach(model):
            torch.testing.assert_close(model(ids.to("cuda:0")).logits.cpu(), written, atol=1e-5, rtol=1e-5)
        limits = kedit.Guard(**dict.fromkeys(kedit.Guard.limits()) | {"kl": 1e3})
        run = kedit.run_journal(tmp_path / "run", make("rome", model), EDITS, guard=limits)
        assert len(run.patches) == len(EDITS)


def test_an_edit_is_judged_and_looked_into_on_two_devices():
    model, tok = kedit.load()
    cases = world_cases(load_world(), "test", 1)

    def look(model):
        editor = kedit.ROME(model, tok, contexts=["{}"], steps=4)
        sadr = kedit.SADR(gamma=2.0)
        report = kedit.evaluate(model, tok, cases, editor, sadr, generate=4, attention=True, texts=("Ada is here.",))
        patch = editor.propose(cases[0].edit, sadr)[0]
        drift = kedit.drift(model, tok, cases[:1], patch)
        patched = patch_activations(model, tok, cases[0], patch)
        traced = kedit.trace(model, tok, cases[0], samples=1, known_only=False)
        return report, drift, patched, traced

    wanted = look(model)
    with devices():
        found = look(spread(copy.deepcopy(model), 2))
    assert [record.failure for record in found[0].records] == [None]
    for got, known in zip(found[0].records, wanted[0].records, strict=True):
        for probe, other in zip(got.after.probes, known.after.probes, strict=True):
            assert probe.text == other.text
            assert [answer and answer.nll for answer in (probe.right, probe.wrong)] == [
                answer and pytest.approx(answer.nll, abs=1e-3) for answer in (other.right, other.wrong)
            ]
    assert found[1].probes[0].kl == pytest.approx(wanted[1].probes[0].kl, abs=1e-3)
    assert found[2].probabilities == pytest.approx(wanted[2].probabilities, abs=1e-3)
    for kind, effects in wanted[3].facts[0].effects.items():
        assert found[3].facts[0].effects[kind] == pytest.approx(effects, abs=1e-3)


CLOSED = ("rome", "rrome", "memit", "emmet", "alphaedit")


def solved_on(editor):
    """Return the devices on which an editor keeps its decompositions."""
    used = editor.null_space._used if isinstance(editor, kedit.AlphaEdit) else {}
    kept = [*editor.moments._factors.values(), *used.values()]
    return {str(tensor.device) for tensor in kept}


@pytest.mark.parametrize(
    ("name", "model_type"),
    [
        *((name, "llama") for name in ("rome", "memit", "alphaedit")),
        *(pytest.param(name, "llama", marks=pytest.mark.slow) for name in ("rrome", "emmet")),
        *(pytest.param(name, "mixtral", marks=pytest.mark.slow) for name in ("memit", "alphaedit")),
    ],
)
def test_closed_forms_are_solved_on_the_layers_device_if_it_has_room(name, model_type):
    with sdpa_kernel(SDPBackend.MATH):
        _, wanted = edited(model_of(model_type), name)
    for room, place in ((1 << 34, "cuda:0"), (1 << 10, "cpu")):
        for at_home in (True, False):  # second moments in main memory, or on the device
            with devices(), mock.patch("kedit.utils.device_memory.free_memory", return_value=room):
                editor = editor_of(name, model_of(model_type).to("cuda:0"))
                if not at_home:
                    moved = {layer: moment.matrix.to("cuda:0") for layer, moment in editor.moments.items()}
                    editor.moments = kedit.SecondMoments(moved)
                edits = [FRENCH, ADA] if editor.batched else [FRENCH]
                found = editor.apply(edits, kedit.SADR(gamma=0.3))
                assert apart(found, wanted) == 0.0
                assert solved_on(editor) == {place}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "memit")) for name in CLOSED])
def test_a_device_that_runs_out_of_memory_leaves_the_solve_to_main_memory(name, caplog):
    def scarce(function):
        def wrapped(matrix, *args, **kwargs):
            if isinstance(matrix, Away):
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return function(matrix, *args, **kwargs)

        return wrapped

    results = []
    for full in (False, True):
        with devices(), contextlib.ExitStack() as stack:
            editor = editor_of(name, model_of("llama").to("cuda:0"))
            editor.apply(FRENCH)
            for each in ("cholesky_ex", "solve_triangular", "eigh") * full:
                stack.enter_context(mock.patch.object(torch.linalg, each, scarce(getattr(torch.linalg, each))))
            results.append(
                editor.apply(RIVER, "relation_keys")
            )  # these, and AlphaEdit's earlier keys, are on the device
            assert ("has no room to solve" in caplog.text) == full
    assert apart(*results) == 0.0


@pytest.mark.slow
def test_the_fullest_device_decides_how_large_waves_are(monkeypatch, caplog):
    with devices():
        model = spread(tiny_model("llama"), 9)  # only the last norm and the head are on the second device
        assert [str(device) for device in ModelArch(model).devices] == ["cuda:0", "cuda:1"]
        monkeypatch.setattr(
            "kedit.values.scheduler.free_memory", lambda device: 1 << 20 if str(device) == "cuda:1" else 1 << 34
        )
        editor = make("memit", model, join_subjects=False)
        editor.apply(EDITS * 4)
    assert editor.engine.used < editor.engine.budget
    assert "MiB that are free" in caplog.text


@pytest.mark.parametrize("outside", [False, True])
def test_a_model_with_adapters_over_two_devices(outside):
    def wrapped(model):  # in float64: the rounding of this edit depends on the processor
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT asks transformers for what it renamed
            config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
            return peft.get_peft_model(model, config).eval().double()

    wanted = make("rome", wrapped(tiny_model("llama"))).apply(FRENCH, kedit.SADR(gamma=0.3))
    with devices():
        model = wrapped(tiny_model("llama"))
        placed = spread(model, 2) if outside else (spread(model.get_base_model(), 2), model)[1]
        assert apart(make("rome", placed).apply(FRENCH, kedit.SADR(gamma=0.3)), wanted) <= 1e-9


PLACES = [["cuda:0", "cpu", "cuda:1"], ["cuda:0", "disk", "cuda:1"], ["cpu", "cuda:1", "disk"]]


@pytest.mark.parametrize("places", PLACES, ids=", ".join)
@pytest.mark.parametrize("model_type", ["gpt2", "llama", pytest.param("mixtral", marks=pytest.mark.slow)])
def test_devices_memory_and_disk_together(model_type, places, tmp_path):
    plain = model_of(model_type)
    _, wanted = edited(plain, "memit")
    wanted.revert()
    count = ModelArch(plain).num_layers
    with devices():
        placed = spread(model_of(model_type), (places * count)[:count], tmp_path)
        assert model_fingerprint(placed) == model_fingerprint(plain)
        editor, found = edited(placed, "memit")
        assert all(editor.engine._verdicts.values())
        assert apart(found, wanted) <= NEAR
        found.revert()
        assert model_fingerprint(placed) == model_fingerprint(plain)


def test_patches_of_experts_on_two_devices():
    plain = model_of("mixtral")
    _, wanted = edited(plain, "memit")
    ids = torch.tensor([[5, 17, 90, 3, 44]])
    known = plain(ids).logits
    with devices():
        placed = spread(model_of("mixtral"))
        with wanted.patch.attach(placed):
            torch.testing.assert_close(placed(ids.to("cuda:0")).logits.cpu(), known, atol=1e-4, rtol=1e-4)
        difference = kedit.EditPatch.diff(placed, plain)
    assert difference.deltas.keys() == wanted.patch.deltas.keys()


# The devices themselves


def test_a_pretended_device_refuses_what_a_real_one_refuses():
    with devices():
        here, there, away = torch.ones(3), torch.ones(3, device="cuda:0"), torch.ones(3).to("cuda:1")
        for left, right in ((here, there), (there, away)):
            for operation in (torch.add, torch.dot, lambda a, b: torch.cat([a, b]), lambda a, b: a.add_(b)):
                with pytest.raises(RuntimeError, match="same device"):
                    operation(left, right)
        with pytest.raises(RuntimeError, match="same device"):
            there[torch.tensor([1], device="cuda:1")]
        with pytest.raises(RuntimeError, match="device type for generator"):
            torch.randn(3, generator=torch.Generator(), device="cuda:0")
        with pytest.raises(TypeError, match="can't convert cuda:0"):
            there.numpy()
        assert there[torch.tensor([1])].device == (there * torch.tensor(2.0)).device == there.device
        view = there.view(3, 1)[1:]
        view += 4
        weight = away.clone().requires_grad_(True)
        (weight * 3).to("cuda:0").sum().backward()
        assert isinstance(weight.grad, Away)
        assert (there.tolist(), weight.grad.tolist(), str(weight.grad.device)) == ([1, 5, 5], [3, 3, 3], "cuda:1")
        assert float(there.sum()) == 11


def test_a_tensor_left_behind_is_found():
    with devices(), mock.patch.object(Layout, "on", lambda self, device: self):
        with pytest.raises(RuntimeError, match="found cuda:0 and cuda:1"):
            make("rome", spread(tiny_model("llama"))).apply(FRENCH)
