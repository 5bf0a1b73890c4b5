"""One writer: a key of an upper layer is read from the very bits that the patch leaves in the layers below."""

import pytest
import torch

import kedit
from kedit.errors import NonFiniteError
from kedit.keys import read
from kedit.models import ModelArch
from kedit.patch.delta import DenseDelta, LowRankDelta
from kedit.patch.ledger import Ledger
from tiny_models import CONTEXTS, EDITS, moments, tiny_model, tokenizer

ONE = [kedit.Edit(*EDITS["start"])]
MANY = [kedit.Edit("{} works in", f"Number {n} of the house", "Rome") for n in range(40)]


def weights(model, layers):
    arch = ModelArch(model)
    return {layer: arch.weights(layer)[0].stored.clone() for layer in layers}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("edits", [ONE, MANY], ids=["factors", "dense"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_upper_keys_are_read_from_the_final_bits(kind, dtype, edits, monkeypatch):
    model = tiny_model(kind).to(dtype)
    layers = (1, 2, 3)
    given = {layer: moments(ModelArch(model).shape(layer)[1], layer).float() for layer in layers}
    editor = kedit.MEMIT(
        model, tokenizer(), layers=layers, steps=2, stop_loss=0.0, contexts=CONTEXTS, moments=given, moment_weight=1.0
    )
    earlier = editor.apply(kedit.Edit(*EDITS["end"]))  # in bfloat16 the sum is kept unrounded
    seen = {}
    keys = read.keys
    monkeypatch.setattr(
        read, "keys", lambda a, rows, layer: seen.update({layer: weights(model, layers)}) or keys(a, rows, layer)
    )
    before = weights(model, layers)
    result = editor.apply(edits)
    final = weights(model, layers)
    forms = {type(delta) for delta in result.patch.deltas.values()}
    assert forms == {LowRankDelta if len(edits) == 1 else DenseDelta}
    for upper in layers[1:]:
        for layer in layers:
            assert torch.equal(seen[upper][layer], final[layer] if layer < upper else before[layer])
            assert not torch.equal(before[layer], final[layer])
    result.revert()
    earlier.revert()


def test_later_edits_see_the_final_bits_of_earlier_ones(monkeypatch):
    model = tiny_model("llama").to(torch.bfloat16)
    given = {2: moments(ModelArch(model).shape(2)[1], 2).float()}
    editor = kedit.ROME(model, tokenizer(), layers=2, steps=2, stop_loss=0.0, contexts=CONTEXTS, moments=given)
    seen = []
    updates = editor.updates
    monkeypatch.setattr(editor, "updates", lambda *args: (seen.append(weights(model, [2])[2]), updates(*args))[1])
    edits = [kedit.Edit(*EDITS[name]) for name in ("start", "middle", "end")]
    for number in (1, 2):
        result = editor.apply(edits[:number])
        final = weights(model, [2])[2]
        result.revert()
        seen.clear()
        editor.apply(edits).revert()
        assert torch.equal(seen[number], final)


@pytest.fixture
def ledger():
    model = tiny_model("gpt2").to(torch.bfloat16)
    return model, Ledger.of(model), ModelArch(model).weights(1)[0]


def interrupted():
    raise KeyboardInterrupt


def low_rank(weight, seed):
    generator = torch.Generator().manual_seed(seed)
    rows, columns = weight.matrix.shape
    return {
        weight.name: LowRankDelta(
            torch.randn(rows, 2, generator=generator), torch.randn(columns, 2, generator=generator)
        )
    }


def test_provisional_updates_add_up_as_applied_ones_and_go(ledger):
    model, ledger, weight = ledger
    before = weight.stored.clone()
    first, second = low_rank(weight, 0), low_rank(weight, 1)
    with ledger.provisional() as provisional:
        provisional.add(first)
        provisional.add(second)
        both = weight.stored.clone()
        provisional.add(second, anew=True)
        alone = weight.stored.clone()
    assert torch.equal(weight.stored, before)
    assert ledger.touched == []
    ledger.apply("second", second)
    assert torch.equal(weight.stored, alone)
    ledger.revert("second")
    ledger.apply("first", first)
    with ledger.provisional() as provisional:
        provisional.add(first)
        provisional.add(second, anew=True)
        assert torch.equal(weight.stored, both)
    ledger.apply("second", second)
    assert torch.equal(weight.stored, both)
    ledger.revert("first")
    assert torch.equal(weight.stored, alone)
    ledger.revert_all()


def test_provisional_updates_go_where_something_breaks(ledger):
    _, ledger, weight = ledger
    before = weight.stored.clone()
    bad = {weight.name: DenseDelta(torch.full(tuple(weight.matrix.shape), torch.nan))}
    with ledger.provisional() as provisional:
        provisional.add(low_rank(weight, 0))
        with pytest.raises(NonFiniteError):
            provisional.add(bad)
    assert torch.equal(weight.stored, before)
    with pytest.raises(KeyboardInterrupt), ledger.provisional() as provisional:
        provisional.add(low_rank(weight, 0)) or interrupted()
    assert torch.equal(weight.stored, before)
