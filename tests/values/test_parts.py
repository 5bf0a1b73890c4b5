"""One edit that is too large to run at once: in parts, with the same result, at the memory of a part."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from test_batching import ALL, editor, relative
from test_memory import build, measured

import kedit
from kedit.models import ModelArch
from kedit.prompts.encode import encode_edits
from kedit.regularizers.base import Needs, blocks_from
from kedit.regularizers.key_norm import KeyNorm
from kedit.values import scheduler as engines
from kedit.values.chunked_forward import ChunkedForward
from kedit.values.forward import Wave
from kedit.values.scheduler import Engine
from pretend import devices, spread
from reference.float64 import TrueFloat64
from tiny_models import CONTEXTS, tokenizer


@dataclass
class Apart:
    """Keeps what the prompts of an edit say alike: no sum over prompts."""

    name: ClassVar[str] = "apart"

    def needs(self, site):
        return Needs(hidden=blocks_from(site.layer + 1), logits=True)

    def penalty(self, now, before):
        rows = now.rewrite
        total = 0.0
        for values in (rows.logits.log_softmax(-1), *rows.hidden.values()):
            mean = torch.zeros(now.num_edits, values.shape[1], dtype=values.dtype).index_add(0, rows.edit, values)
            mean = mean / torch.bincount(rows.edit)[:, None]
            total = total + rows.mean_per_edit((values - mean[rows.edit]).square().mean(-1), now.num_edits)
        return 0.1 * total


REGULARIZERS = {"none": None, "sadr": kedit.SADR(gamma=0.3), "key_norm": KeyNorm(gamma=0.3), "apart": Apart()}


CASES = [("rome", "gpt2", mode, regularizer) for mode in ("cached", "full") for regularizer in REGULARIZERS]
CASES += [("memit", "mistral", "cached", "apart"), ("memit", "mistral", "full", "sadr")]
CASES += [("pmet", "llama", "cached", "sadr"), ("pmet", "llama", "full", "apart")]


@pytest.mark.parametrize(("name", "model_type", "mode", "regularizer"), CASES)
def test_in_parts_is_at_once(name, model_type, mode, regularizer, monkeypatch):
    made = editor(name, model_type, "left")
    made.engine.mode = mode
    found, ran, original = [], [], engines.optimize

    def noting(runner, *args, **kwargs):
        ran.append(len(runner.parts) if isinstance(runner, ChunkedForward) else 1)
        return original(runner, *args, **kwargs)

    monkeypatch.setattr(engines, "optimize", noting)
    with TrueFloat64():
        for budget in (8_192, 16, 1):  # all prompts at once; two and two; one by one
            made.engine.budget = budget
            found.append(made.propose(ALL[1], REGULARIZERS[regularizer])[0])
    prompts = len(CONTEXTS) + 1  # the subject does not stand first
    assert ran[0] == 1 < ran[1] <= ran[2] == prompts
    for other in found[1:]:
        for weight, delta in found[0].deltas.items():
            assert relative(other.deltas[weight].dense, delta.dense) < 1e-10


def test_a_large_edit_among_small_ones():
    long = kedit.Edit("{} works in the old city of the old city of the old city of the old city of", "Ada", "Berlin")
    made = editor("memit", "llama")
    with TrueFloat64():
        wanted = made.apply([ALL[0], long, ALL[2]])
        wanted.revert()
        made.engine.budget = 40
        found = made.apply([ALL[0], long, ALL[2]])
    for weight, delta in wanted.patch.deltas.items():
        assert relative(found.patch.deltas[weight].dense, delta.dense) < 1e-8


@pytest.mark.parametrize("mode", ["cached", "full"])
def test_an_edit_that_runs_out_of_memory_alone_goes_on_in_parts(mode, monkeypatch, caplog):
    made = editor("rome", "gpt2", steps=3)
    made.engine.mode = mode
    wanted = made.propose(ALL[0])[0]
    original, largest = engines.optimize, []

    def scarce(runner, *args, **kwargs):
        parts = runner.parts if isinstance(runner, ChunkedForward) else [runner]
        largest.append(max(len(part.wave.prompts) for part in parts))
        if largest[-1] > 1:
            raise torch.OutOfMemoryError("out of memory")
        return original(runner, *args, **kwargs)

    monkeypatch.setattr(engines, "optimize", scarce)
    found = made.propose(ALL[0])[0]
    assert largest[0] == len(CONTEXTS) > largest[-1] == 1
    assert "Out of memory" in caplog.text
    for weight, delta in wanted.deltas.items():
        assert relative(found.deltas[weight].dense, delta.dense) < 1e-6


def test_little_memory_is_seen_before_it_runs_out(monkeypatch, caplog):
    made = editor("rome", "gpt2", steps=3)
    wanted = made.propose(ALL[0])[0]
    monkeypatch.setattr(engines, "free_memory", lambda device: 1 << 19)
    found = made.propose(ALL[0])[0]
    assert "MiB that are free" in caplog.text
    assert found.provenance["budget"] < 3 * ALL[0].text.count(" ")
    for weight, delta in wanted.deltas.items():
        assert relative(found.deltas[weight].dense, delta.dense) < 1e-6


@pytest.mark.parametrize("sadr", [False, True])
@pytest.mark.parametrize("mode", ["cached", "full"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_part_takes_what_was_stated_and_less_than_the_whole(kind, mode, sadr):
    arch = ModelArch(build(kind))
    contexts = [f"{'It was a cold morning in the old city near the river. ' * (1 + i % 3)}{{}}" for i in range(12)]
    edit = kedit.Edit(
        ALL[0].prompt + " the old city near the river, and in the evening they play in", ALL[0].subject, "Berlin"
    )
    [request] = encode_edits(arch, tokenizer(), [edit], ["{}", *contexts], Needs())
    wave = Wave(tuple(request.prompts(0)), 1)
    peaks = []
    for budget in (8_192, 3 * request.span):
        runner, stated, peak = measured(Engine(arch, mode=mode, budget=budget, used=budget), wave, sadr)
        assert isinstance(runner, ChunkedForward) == (budget < 8_192)
        assert 0.75 < stated.total / peak < 1.25, (budget, stated, peak / 2**20)
        peaks.append(peak)
    assert peaks[1] < 0.6 * peaks[0]


def test_in_parts_over_two_devices():
    made = editor("rome", "llama")
    wanted = made.propose(ALL[0], kedit.SADR(gamma=0.3))[0]
    with devices():
        other = editor("rome", "llama")
        other = type(other)(spread(other.model), other.tokenizer, other.config, moments=made.moments, contexts=CONTEXTS)
        other.engine.budget = 1
        found = other.propose(ALL[0], kedit.SADR(gamma=0.3))[0]
    for weight, delta in wanted.deltas.items():
        assert relative(found.deltas[weight].dense.cpu(), delta.dense) < 1e-8
