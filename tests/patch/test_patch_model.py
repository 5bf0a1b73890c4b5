"""Patches on models in memory: apply, revert in any order, bit for bit, also when something breaks in."""

import gc
import itertools
import os
import signal
import weakref

import pytest
import torch

from kedit.errors import KEditError, NonFiniteError, PatchMismatchError
from kedit.models.fingerprint import bit_sum, has_fingerprint, model_fingerprint, tensor_fingerprint
from kedit.patch import EditPatch
from kedit.patch import ledger as ledger_module
from kedit.patch.delta import DenseDelta, LowRankDelta, _add_columns, add_delta
from kedit.patch.ledger import Ledger
from kedit.utils.linalg import is_finite
from patch_common import TYPES, bytes_of, patch_for, random_delta
from tiny_models import tiny_model as model

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", TYPES)
def test_apply_changes_what_it_names_and_revert_restores_every_bit(kind, dtype):
    subject = model(kind, dtype=dtype)
    before = bytes_of(subject)
    patch = patch_for(subject, {1: 2, 3: None})
    patch.apply(subject)
    assert {name for name, data in bytes_of(subject).items() if data != before[name]} == set(patch.deltas)
    patch.revert(subject)
    assert bytes_of(subject) == before
    assert Ledger.of(subject).touched == []


def test_the_weight_is_the_sum_in_the_mathematical_orientation():
    subject = model("gpt2")  # Conv1D: stored [I, O]
    patch = patch_for(subject, {2: 3})
    (name,) = patch.deltas
    weight = dict(subject.named_parameters())[name]
    expected = weight.detach().double() + patch.deltas[name].dense.double().T
    patch.apply(subject)
    assert torch.allclose(weight.detach().double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_order_of_reverting_leaves_what_the_others_alone_give(dtype):
    for order in itertools.permutations(range(3)):
        subject = model("llama", dtype=dtype)
        before = bytes_of(subject)
        patches = [patch_for(subject, {2: 2, 1: 1}, seed=10 * i) for i in range(3)]
        for patch in patches:
            patch.apply(subject, force=True)
        left = list(range(3))
        for number in order:
            patches[number].revert(subject)
            left.remove(number)
            fresh = model("llama", dtype=dtype)
            for other in left:
                patches[other].apply(fresh, force=True)
            assert bytes_of(subject) == bytes_of(fresh)
        assert bytes_of(subject) == before


def test_columns_side_by_side_give_the_same_bits_as_one_after_another():
    start = torch.randn(33, 70)
    parts = [random_delta((33, 70), rank, seed) for seed, rank in enumerate((1, 5, 2))]
    one_by_one = start.clone()
    for part in parts:
        add_delta(one_by_one, part, transposed=False)
    joint = LowRankDelta(torch.cat([p.left for p in parts], 1), torch.cat([p.right for p in parts], 1))
    assert torch.equal(add_delta(start.clone(), joint, transposed=False), one_by_one)
    assert torch.equal(add_delta(start.T.contiguous(), joint, transposed=True), one_by_one.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_blocks_and_threads_and_libraries_do_not_change_a_bit(monkeypatch, dtype, transposed):
    """On the CPU NumPy adds, elsewhere torch: both round each product and each sum once, tiny numbers included."""
    start, delta = torch.randn(50, 31, dtype=dtype), random_delta((50, 31), 7)
    start[:9] *= torch.finfo(dtype).tiny
    delta.left[:9] *= 1e-38
    start = start.T.contiguous() if transposed else start
    rows, columns = (delta.right, delta.left) if transposed else (delta.left, delta.right)
    expected = start.clone()
    for i in range(delta.rank):
        expected = expected + rows[:, i : i + 1].to(dtype) * columns[:, i].to(dtype)
    threads = torch.get_num_threads()
    for size, count in ((1, 1), (31, 2), (100, 3), (10_000, 2)):
        monkeypatch.setattr("kedit.patch.delta._BLOCK", size)
        torch.set_num_threads(count)
        try:
            assert torch.equal(add_delta(start.clone(), delta, transposed=transposed), expected)
        finally:
            torch.set_num_threads(threads)
        by_torch = start.clone()
        _add_columns(torch, by_torch, rows.to(dtype), columns.T.to(dtype), size)
        assert torch.equal(by_torch, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_number_that_is_none_is_found_anywhere(dtype, value):
    numbers = torch.randn(37, 29).to(dtype)
    assert is_finite(numbers)
    assert is_finite(numbers[:0])
    for place in ((0, 0), (36, 28), (17, 3)):
        broken = numbers.clone()
        broken[place] = value
        assert not is_finite(broken)
        assert not is_finite(broken.T)


def test_norms_come_from_the_factors():
    delta = random_delta((20, 30), 4)
    assert delta.norm == pytest.approx(float(delta.dense.double().norm()), rel=1e-6)
    assert delta.spectral_norm == pytest.approx(float(torch.linalg.matrix_norm(delta.dense.double(), 2)), rel=1e-6)
    dense = DenseDelta(delta.dense)
    assert dense.norm == pytest.approx(delta.norm, rel=1e-6)
    assert dense.spectral_norm == pytest.approx(delta.spectral_norm, rel=1e-6)


def test_applying_twice_is_refused_by_patch_and_ledger():
    subject = model("llama")
    patch = patch_for(subject, {1: 1})
    patch.apply(subject)
    edited = bytes_of(subject)
    with pytest.raises(PatchMismatchError, match="already"):
        patch.apply(subject, force=True)
    with pytest.raises(PatchMismatchError, match="already"):
        Ledger.of(subject).apply(patch, patch.deltas)
    assert bytes_of(subject) == edited


def test_reverting_twice_or_elsewhere_is_refused():
    subject, other = model("llama"), model("llama")
    patch = patch_for(subject, {1: 1})
    patch.apply(subject)
    with pytest.raises(PatchMismatchError, match="not applied"):
        patch.revert(other)
    patch.revert(subject)
    with pytest.raises(PatchMismatchError, match="not applied"):
        patch.revert(subject)


def test_another_models_weights_are_refused_unless_forced():
    patch = patch_for(model("llama", seed=0), {1: 1})
    other = model("llama", seed=1)
    before = bytes_of(other)
    with pytest.raises(PatchMismatchError, match="not the weight that this patch was made for"):
        patch.apply(other)
    assert bytes_of(other) == before
    patch.apply(other, force=True)
    assert bytes_of(other) != before


@pytest.mark.parametrize("force", [False, True])
def test_another_architecture_is_refused_even_when_forced(force):
    patch = patch_for(model("llama"), {1: 1})
    other = model("gpt2")
    before = bytes_of(other)
    with pytest.raises(KEditError, match=r"model\.layers\.1"):
        patch.apply(other, force=force)
    assert bytes_of(other) == before


@pytest.mark.parametrize("force", [False, True])
def test_a_wrong_shape_leaves_every_weight_alone(force):
    subject = model("llama")
    before = bytes_of(subject)
    patch = patch_for(subject, {1: 1, 2: 1})
    last = list(patch.deltas)[-1]
    patch.deltas[last] = random_delta((7, 5), 1)
    with pytest.raises(PatchMismatchError, match="shape"):
        patch.apply(subject, force=force)
    assert bytes_of(subject) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_leave_every_weight_alone(value):
    subject = model("llama")
    before = bytes_of(subject)
    patch = patch_for(subject, {1: 1, 2: 1})
    list(patch.deltas.values())[-1].left[0, 0] = value
    with pytest.raises(NonFiniteError):
        patch.apply(subject)
    assert bytes_of(subject) == before


def test_a_sum_that_overflows_the_weights_dtype_is_refused():
    subject = model("llama", dtype=torch.float16)
    before = bytes_of(subject)
    with pytest.raises(NonFiniteError, match="float16"):
        patch_for(subject, {1: 1}, scale=1e6).apply(subject)
    assert bytes_of(subject) == before


def test_the_same_weights_in_a_wider_dtype_are_the_same_weights():
    stored = model("llama", dtype=torch.bfloat16)
    patch = patch_for(stored, {1: 1})
    patch.apply(model("llama", dtype=torch.bfloat16).float())
    wide = patch_for(model("llama", dtype=torch.bfloat16).float(), {1: 1})
    wide.apply(stored)
    narrowed = patch_for(model("llama", dtype=torch.float32), {1: 1})
    with pytest.raises(PatchMismatchError):
        narrowed.apply(model("llama", dtype=torch.bfloat16))


def test_a_fingerprint_sees_every_bit_shape_and_dtype():
    weight = torch.zeros(4, 6)
    known = tensor_fingerprint(weight)
    flipped = weight.clone()
    flipped[3, 5] = -0.0
    assert has_fingerprint(weight, known)
    assert not has_fingerprint(flipped, known)
    assert not has_fingerprint(weight.view(6, 4), known)
    assert not has_fingerprint(weight, None)


def test_a_models_fingerprint_sees_weights_buffers_and_what_its_configuration_computes():
    subject = model("llama")
    known = model_fingerprint(subject)
    subject.config._name_or_path, subject.config.use_cache, subject.config.output_attentions = "elsewhere", False, False
    assert model_fingerprint(subject) == known
    subject.config.rms_norm_eps *= 2
    assert model_fingerprint(subject) != known
    subject.config.rms_norm_eps /= 2
    assert model_fingerprint(subject) == known
    subject.register_buffer("bias_of_experts", torch.zeros(3))
    with_buffer = model_fingerprint(subject)
    assert with_buffer != known
    subject.bias_of_experts[1] = 1.0
    assert model_fingerprint(subject) not in (known, with_buffer)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8], ids=str)
@pytest.mark.parametrize("shape", [(48, 80), (7, 5), (3, 2, 6), (1, 9)], ids=str)
def test_a_checksum_sees_every_bit_and_every_place(shape, dtype):
    weight = (50 * torch.randn(shape, generator=torch.Generator().manual_seed(3))).to(dtype)
    others = [weight.flip(axis) for axis in range(len(shape)) if shape[axis] > 1]
    others += [weight.roll(1, axis) for axis in range(len(shape)) if shape[axis] > 1]
    for place in (0, weight.numel() - 1, weight.numel() // 2):
        flipped = weight.clone()
        flipped.view(-1).view(torch.uint8)[place * weight.element_size()] ^= 1
        others.append(flipped)
    known = bit_sum(weight)
    assert bit_sum(weight.clone()) == known
    assert all(bit_sum(other) != known for other in others)
    apart = torch.empty(weight.numel() + 3, dtype=dtype)[3:].view(shape).copy_(weight)  # not where its storage begins
    assert bit_sum(apart) == known
    assert bit_sum(weight[:0]) == bit_sum(torch.empty(0)) == 0
    assert bit_sum(weight.sum(dtype=torch.float32)) == bit_sum(weight.sum(dtype=torch.float32).clone())


@pytest.mark.parametrize(
    "how",
    ["in place", "through .data", "rows through .data", "columns through .data", "another parameter", "another dtype"],
)
def test_a_weight_that_others_wrote_is_noticed(how):
    subject = model("llama")
    patch = patch_for(subject, {1: 1})
    before = bytes_of(subject)
    patch.apply(subject)
    layer = subject.model.layers[1].mlp.down_proj
    if how == "in place":
        with torch.no_grad():
            layer.weight.mul_(1.5)
    elif how == "through .data":
        layer.weight.data[0, 0] += 1
    elif how == "rows through .data":
        layer.weight.data.copy_(layer.weight.data.flip(0))
    elif how == "columns through .data":
        layer.weight.data.copy_(layer.weight.data.roll(8, 1))
    elif how == "another parameter":
        layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
    else:
        subject.to(torch.bfloat16)
    with pytest.raises(PatchMismatchError, match="since kedit edited it"):
        patch.revert(subject)
    if "in place" in how or ".data" in how:
        Ledger.of(subject).revert_all()
        assert bytes_of(subject) == before


def test_quantized_and_offloaded_weights_are_pointed_to_attach():
    subject = model("llama")
    patch = patch_for(subject, {1: 1})
    layer = subject.model.layers[1].mlp.down_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(PatchMismatchError, match="Attach"):
        patch.apply(subject, force=True)
    layer.weight = torch.nn.Parameter(torch.empty(layer.weight.shape, device="meta"))
    with pytest.raises(PatchMismatchError, match="Attach"):
        patch.apply(subject, force=True)


@pytest.fixture
def ctrl_c():
    """Python's own handler of Ctrl-C: a shell's background jobs start with the signal ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("moment", [0, 1, 2])
@pytest.mark.parametrize("reverting", [False, True])
def test_ctrl_c_while_weights_are_written_restores_all(monkeypatch, moment, reverting):
    subject = model("llama", dtype=torch.bfloat16)
    first, second = patch_for(subject, {1: 1, 2: 1, 3: 1}), patch_for(subject, {1: 2, 2: 2, 3: 2}, seed=5)
    first.apply(subject)
    if reverting:
        second.apply(subject, force=True)
    before = bytes_of(subject)
    calls = itertools.count()
    store = ledger_module._store

    def interrupted(weight, stored):
        store(weight, stored)
        if next(calls) == moment:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(ledger_module, "_store", interrupted)
    with pytest.raises(KeyboardInterrupt):
        first.revert(subject) if reverting else second.apply(subject, force=True)
    monkeypatch.undo()
    assert bytes_of(subject) == before
    assert Ledger.of(subject).carries(first)
    assert Ledger.of(subject).carries(second) == reverting
    first.revert(subject)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_exception_while_weights_are_written_restores_all(monkeypatch):
    subject = model("llama")
    before = bytes_of(subject)
    patch = patch_for(subject, {1: 1, 2: 1})
    store, calls = ledger_module._store, itertools.count()

    def broken(weight, stored):
        store(weight, stored)
        if next(calls) == 1:
            raise MemoryError

    monkeypatch.setattr(ledger_module, "_store", broken)
    with pytest.raises(MemoryError):
        patch.apply(subject)
    monkeypatch.undo()
    assert bytes_of(subject) == before
    patch.apply(subject)


def test_a_ledger_does_not_keep_its_model_alive():
    subject = model("llama")
    patch_for(subject, {1: 1}).apply(subject)
    gone = weakref.ref(subject)
    del subject
    gc.collect()
    assert gone() is None


def test_patches_are_told_apart_by_identity():
    subject = model("llama")
    patch = patch_for(subject, {1: 1})
    twin = EditPatch(patch.deltas, patch.fingerprints, patch.provenance)
    patch.apply(subject)
    assert not Ledger.of(subject).carries(twin)
