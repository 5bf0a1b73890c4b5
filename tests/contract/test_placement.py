"""Models as they come: in half precision, offloaded, wrapped, quantized; what cannot be edited says so before it starts."""

import copy
import itertools
import warnings

import accelerate
import peft
import pytest
import torch
from torch import nn

import kedit
from kedit.models import ModelArch
from kedit.models.fingerprint import model_fingerprint
from kedit.patch.ledger import Ledger
from tiny_models import CONTEXTS, moments, tiny_model, tokenizer

from .common import ADA, EDITS, FRENCH, LAYER, bare_output, digest, make, zoo_model

SADR = kedit.SADR(gamma=0.3)


# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_the_rounding_of_an_update_is_measured(model_type, dtype):
    model = tiny_model(model_type, dtype=dtype)
    weight = ModelArch(model).weight(LAYER)
    editor = make("rome", model)
    for edit in (FRENCH, ADA):  # the second on top of the first: its own share of the rounding counts
        before = weight.matrix.double().clone()
        total = Ledger.of(model)._entries[weight.name].rounded if edit is ADA else None
        wanted = before if total is None else (total.T if weight.transposed else total).double()
        result = editor.apply(edit)
        [(name, delta)] = result.patch.deltas.items()
        assert delta.left.dtype == torch.float32
        lost = float((weight.matrix.double() - wanted - delta.dense.double()).norm() / delta.dense.double().norm())
        if dtype == torch.float32:
            assert result.rounding == {name: 0.0}
            assert "rounding" not in result.report()
        else:
            assert 0 < lost < 0.5
            assert result.rounding[name] == pytest.approx(lost, rel=1e-3)
            assert f"{lost:.1%} of it lost to rounding" in result.report()


# Offloading


def offload(model, where, folder):
    if where == "cpu":
        return accelerate.cpu_offload(model, execution_device="cpu")
    return accelerate.disk_offload(model, folder, execution_device="cpu")


CASES = list(itertools.product(("gpt2", "llama", "mixtral"), ("rome", "memit"), ("cpu", "disk")))
QUICK = [("gpt2", "memit", "cpu"), ("llama", "memit", "disk"), ("mixtral", "rome", "disk")]  # GPT-2's head is tied


@pytest.mark.parametrize(
    ("model_type", "name", "where"),
    [pytest.param(*case, marks=[pytest.mark.slow] * (case not in QUICK)) for case in CASES],
)
def test_an_offloaded_model_is_edited_as_it_would_be_on_the_device(model_type, name, where, tmp_path):
    plain = zoo_model(model_type) if model_type == "mixtral" else tiny_model(model_type)
    away = offload(copy.deepcopy(plain), where, tmp_path)
    arch = ModelArch(plain)
    width = arch.shape(1)[1]
    eye = torch.eye(width, dtype=torch.float64)
    moments = eye if arch.experts(1) is None else eye.repeat(arch.experts(1).count, 1, 1)
    layers = (0, 1) if name == "memit" else (1,)
    given = {"layers": layers, "moments": {i: moments for i in layers}}
    given |= {"moment_weight": 0.01} if name == "memit" else {}
    ids = torch.tensor([[5, 17, 90, 3, 44]])
    before = away(ids).logits
    torch.testing.assert_close(before, plain(ids).logits)
    flags = [parameter.requires_grad for parameter in away.parameters()]

    wanted = make(name, plain, **given).apply(FRENCH, SADR)
    result = make(name, away, **given).apply(FRENCH, SADR)
    assert result.patch.deltas.keys() == wanted.patch.deltas.keys()
    assert result.patch.fingerprints == wanted.patch.fingerprints
    for key, delta in wanted.patch.deltas.items():
        torch.testing.assert_close(result.patch.deltas[key].dense, delta.dense, atol=1e-5, rtol=1e-4)
    assert all(parameter.is_meta for parameter in away.parameters())
    assert [parameter.requires_grad for parameter in away.parameters()] == flags
    after = away(ids).logits
    torch.testing.assert_close(after, plain(ids).logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(after, before, atol=1e-3)
    result.revert()
    assert torch.equal(away(ids).logits, before)


@pytest.mark.parametrize("where", ["cpu", "disk"])
@pytest.mark.parametrize("model_type", ["gpt2", "llama"])  # GPT-2's head is tied
def test_an_offloaded_models_fingerprint_is_that_of_the_model_and_sees_every_weight(model_type, where, tmp_path):
    model, other = tiny_model(model_type), tiny_model(model_type)
    with torch.no_grad():
        next(weight for name, weight in other.named_parameters() if "norm" in name or "ln_" in name)[3] += 1e-3
    known = [model_fingerprint(model), model_fingerprint(other)]
    assert known[0] != known[1]
    away = [offload(model, where, tmp_path / "a"), offload(other, where, tmp_path / "b")]
    assert [model_fingerprint(each) for each in away] == known
    with pytest.raises(kedit.errors.ArchitectureError, match="is on the meta device and holds no numbers"):
        model_fingerprint(tiny_model(model_type).to("meta"))


def test_second_moments_and_runs_of_an_offloaded_model(tmp_path, monkeypatch):
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path / "cache"))
    texts = ["The capital of France is Paris, and the capital of Italy is Rome."] * 8
    plain, away = tiny_model("llama"), offload(tiny_model("llama"), "disk", tmp_path / "weights")
    found = [kedit.second_moments(model, tokenizer(), layers=[LAYER], corpus=texts) for model in (away, plain)]
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 1, "the same weights: read from the cache"
    assert torch.equal(found[0][LAYER].matrix, found[1][LAYER].matrix)
    results = [
        make("rome", model, moments=moments).apply(FRENCH) for model, moments in zip((away, plain), found, strict=True)
    ]
    wanted, got = ([*result.patch.deltas.values()][0].dense for result in results[::-1])
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
    Ledger.of(away).revert_all()
    run = kedit.run_journal(tmp_path / "run", make("rome", away), EDITS)
    assert len(run.patches) == len(EDITS)
    Ledger.of(away).revert_all()
    assert kedit.run_journal(tmp_path / "run", make("rome", away), EDITS).resumed == len(EDITS)


def test_what_offloading_rules_out_is_refused(tmp_path):
    away = accelerate.disk_offload(tiny_model("gpt2"), tmp_path, execution_device="cpu")
    with pytest.raises(kedit.errors.UnsupportedError, match="FT trains .*offloaded"):
        kedit.FT(away, tokenizer(), layers=1).apply(FRENCH)
    empty = tiny_model("llama")
    empty.model.layers[LAYER].mlp.down_proj.to("meta")
    with pytest.raises(kedit.KEditError, match="is on the meta device and holds no numbers"):
        make("rome", empty).apply(FRENCH)


# Wrappers


def adapted(model, targets):
    """The model with LoRA adapters that do something."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT asks transformers for what it renamed
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    return wrapped.eval()


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "down_proj"]])
def test_a_model_with_adapters_is_edited_with_them(targets, values, tmp_path):
    model = tiny_model("llama")
    plain = copy.deepcopy(model)
    torch.manual_seed(0)
    wrapped = adapted(model, targets)
    before = {key: digest(tensor) for key, tensor in wrapped.state_dict().items()}
    old = bare_output(wrapped)
    assert not torch.allclose(old, bare_output(plain), atol=1e-3)  # the adapters count
    result = make("rome", wrapped).apply(FRENCH, SADR)
    torch.testing.assert_close(values[0].initial[0, 0], old, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(bare_output(wrapped), values[0].value[0, 0], atol=2e-4, rtol=1e-3)
    assert set(result.patch.deltas) == {f"model.layers.{LAYER}.mlp.down_proj.weight"}
    after = {key: digest(tensor) for key, tensor in wrapped.state_dict().items()}
    assert len([key for key in before if before[key] != after[key]]) == 1
    kedit.EditPatch.load(result.patch.save(tmp_path / "edit.safetensors")).apply(plain)  # the same weight without them
    result.revert()
    assert {key: digest(tensor) for key, tensor in wrapped.state_dict().items()} == before


ADAPTERS = {
    "lora": peft.LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False),
    "loha": peft.LoHaConfig(r=2, target_modules=["down_proj"], init_weights=False),
    "vera": peft.VeraConfig(r=2, target_modules=["down_proj"], init_weights=False),
    "dora": peft.LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False, use_dora=True),
    "ia3 in": peft.IA3Config(
        target_modules=["down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False, task_type="CAUSAL_LM"
    ),
    "ia3 out": peft.IA3Config(
        target_modules=["down_proj"], feedforward_modules=[], init_ia3_weights=False, task_type="CAUSAL_LM"
    ),
    "oft": peft.OFTConfig(target_modules=["down_proj"], oft_block_size=4, init_weights=False),
}


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_that_do_more_than_add_are_refused(kind, dtype):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(tiny_model("llama", dtype=dtype), ADAPTERS[kind]).eval()
    editor = make("rome", wrapped)
    if kind in ("lora", "loha", "vera"):
        editor.propose(FRENCH)
    else:
        with pytest.raises(kedit.errors.UnsupportedError, match="does more than add to what the layer gives"):
            editor.apply(FRENCH)
        make("rome", wrapped.merge_and_unload()).propose(FRENCH)


def test_prompt_learning_is_refused():
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(tiny_model("llama"), config)
    with pytest.raises(kedit.errors.UnsupportedError, match="virtual tokens in front of every prompt"):
        make("rome", wrapped)


@pytest.mark.parametrize("way", ["wrapper", "in place"])
def test_a_compiled_model_is_edited_and_sees_it(way, values):
    model = tiny_model("gpt2")
    ids = torch.tensor([[5, 17, 90, 3, 44]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if way == "wrapper":
            compiled = torch.compile(model, backend="eager")
        else:
            model.compile(backend="eager")
            compiled = model
        before = compiled(ids).logits
        result = make("rome", compiled).apply(FRENCH, SADR)
        torch.testing.assert_close(bare_output(model), values[0].value[0, 0], atol=2e-4, rtol=1e-3)
        after = compiled(ids).logits
        fresh = tiny_model("gpt2")
        fresh.load_state_dict(model.state_dict())
        torch.testing.assert_close(after, fresh(ids).logits, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(after, before, atol=1e-3)
        result.revert()
        torch.testing.assert_close(compiled(ids).logits, before)


# Quantized weights


class Int8(nn.Linear):
    """A linear layer whose weight is stored in 8 bits, row by row, as quantization libraries do."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x) * self.scale)


class Packed(nn.Module):
    """One that is no ``nn.Linear``: two rows of 4 bits in a byte, under another name."""

    def __init__(self, linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 7
        whole = (linear.weight.detach() / scale).round().to(torch.int16) + 8
        self.register_buffer("qweight", (whole[0::2] + 16 * whole[1::2]).to(torch.uint8))
        self.register_buffer("scale", scale)

    def forward(self, x):
        rows = torch.stack([self.qweight % 16, self.qweight // 16], 1).flatten(0, 1)
        return nn.functional.linear(x, (rows.to(x) - 8) * self.scale)


class Bytes(Int8):
    """One whose weight has another shape than the matrix, as 4-bit layers have."""

    def __init__(self, linear):
        super().__init__(linear)
        self.shape = self.weight.shape
        self.weight = nn.Parameter(self.weight.detach().view(-1, 1), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.view(self.shape).to(x) * self.scale)


def quantized(kind=Int8):
    model = tiny_model("llama")
    for block in model.model.layers:
        block.mlp.down_proj = kind(block.mlp.down_proj)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


KINDS = pytest.mark.parametrize("kind", [Int8, Packed, Bytes])


@KINDS
def test_a_quantized_model_gets_its_edit_beside_the_weight(kind, values, tmp_path):
    model = quantized(kind)
    before = {key: digest(tensor) for key, tensor in model.state_dict().items()}
    editor = make("rome", model)
    [patch] = editor.propose(FRENCH, SADR)
    with pytest.warns(kedit.errors.KEditWarning, match="cannot check"), patch.attach(model):
        torch.testing.assert_close(bare_output(model), values[0].value[0, 0], atol=2e-4, rtol=1e-3)
    assert {key: digest(tensor) for key, tensor in model.state_dict().items()} == before
    loaded = kedit.EditPatch.load(patch.save(tmp_path / "edit.safetensors"))
    assert loaded.fingerprints == patch.fingerprints
    other = quantized(kind)
    with torch.no_grad():
        other.model.layers[LAYER].mlp.down_proj.scale *= 1.01
    assert (make("rome", other).propose(FRENCH)[0].fingerprints == patch.fingerprints) == (kind is Int8)
    assert editor.estimate_memory(FRENCH).total > 0
    found = kedit.second_moments(
        model, tokenizer(), layers=[LAYER], corpus=["The old river flows past."] * 20, cache=False
    )
    assert found[LAYER].matrix.shape == (80, 80)
    with pytest.raises(kedit.KEditError, match="cannot be written in place"):
        make("memit", model, layers=(1, 2), moments={1: moments(80, 1), 2: moments(80, 2)}).propose(FRENCH)


@KINDS
def test_writing_into_quantized_weights_is_refused_before_anything_runs(kind, monkeypatch):
    model = quantized(kind)
    editor = make("rome", model)
    monkeypatch.setattr(editor.engine, "optimize", lambda *_: pytest.fail("it ran"))
    with pytest.raises(
        kedit.KEditError, match=r"(torch.int8|packed).* and? ?cannot be written in place.*propose.*attach"
    ):
        editor.apply(FRENCH)
    spread = make("memit", model, layers=(1, 2), moments={i: torch.eye(80) for i in (1, 2)}, contexts=CONTEXTS)
    with pytest.raises(kedit.KEditError, match="cannot be written in place"):
        spread.propose(FRENCH)
