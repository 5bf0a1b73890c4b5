"""The stated footprint of a wave is what it takes, and the budget follows it."""

import gc
import logging
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import kedit
from kedit.models import ModelArch, Site
from kedit.prompts.encode import encode_edits
from kedit.regularizers.base import Needs, blocks_from
from kedit.utils.device_memory import LivePeak
from kedit.values.forward import Wave
from kedit.values.optimize import Objective, optimize
from kedit.values.scheduler import Engine
from tiny_models import CONTEXTS, EDITS, moments, tiny_model, tokenizer

ALL = [kedit.Edit(*EDITS[name]) for name in ("start", "middle", "end")]


def build(kind):
    size = {"vocab_size": 6_000}
    torch.manual_seed(0)
    if kind == "gpt2":
        config = GPT2Config(**size, n_embd=128, n_layer=6, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
        return GPT2LMHeadModel(config).eval()
    config = LlamaConfig(
        **size,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def measured(engine, wave, sadr):
    """Return a wave's runner, its estimated memory, and its measured peak over two steps."""
    needs = Needs(attention=blocks_from(2)) if sadr else Needs()
    stated = engine.footprint([Site(1)], wave, needs)
    objective = Objective(steps=2, lr=0.1, weight_decay=0.1, kl_factor=0.1, clamp=4.0, stop_loss=0.0)
    runner = engine.runner([Site(1)], wave, needs)
    with LivePeak(engine.arch.model) as seen:
        optimize(runner, objective, [kedit.SADR(gamma=0.1)] if sadr else [])
    return runner, stated, seen.peak


@pytest.mark.parametrize("sadr", [False, True])
@pytest.mark.parametrize("mode", ["cached", "full"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_stated_footprint_is_within_a_fifth_of_the_measured_peak(kind, mode, sadr):
    arch = ModelArch(build(kind))
    edits = [kedit.Edit(e.prompt, e.subject, e.target_new) for e in ALL for _ in range(6)]
    requests = encode_edits(arch, tokenizer(), edits, CONTEXTS, Needs())
    wave = Wave(tuple(p for i, request in enumerate(requests) for p in request.prompts(i)), len(requests))
    _, stated, peak = measured(Engine(arch, mode=mode), wave, sadr)
    assert 0.8 < stated.total / peak < 1.2, (stated, peak / 2**20)


def test_the_budget_shrinks_to_what_is_free_and_says_so(monkeypatch, caplog):
    caplog.set_level(logging.WARNING, logger="kedit")
    model = tiny_model("gpt2")
    width = ModelArch(model).weight(0).matrix.shape[1]
    made = kedit.ROME(model, tokenizer(), layers=1, moments={1: moments(width, 1)}, contexts=CONTEXTS, steps=2)
    monkeypatch.setattr("kedit.values.scheduler.free_memory", lambda device: 1 << 20)
    made.propose(ALL * 4)
    assert made.engine.used < 8_192
    assert "MiB that are free" in caplog.text
    monkeypatch.undo()
    made.propose(ALL)
    assert made.engine.used == made.engine.budget == 8_192  # a lean moment does not last


@pytest.mark.slow
def test_many_applies_leave_the_process_as_large_as_it_was():
    """200 edits in a row keep their factors and nothing else; freed memory goes back to the system."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("Needs /proc to read the process's memory.")

    def resident():
        gc.collect()
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmRSS")) / 1024

    model = tiny_model("gpt2")
    width = ModelArch(model).weight(1).matrix.shape[1]
    made = kedit.AlphaEdit(model, tokenizer(), layers=1, moments={1: moments(width, 1)}, contexts=["{}"], steps=2)
    sizes = []
    for number in range(224):
        made.apply(ALL[number % len(ALL)])
        if number >= 32 and number % 16 == 15:
            sizes.append(resident())
    assert sizes[-1] - sizes[0] < 24, sizes
