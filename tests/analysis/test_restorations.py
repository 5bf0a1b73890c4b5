"""Tracing runs what a restoration can change: the numbers of whole prompts, an early stop, and an interrupt."""

import logging

import numpy as np
import pytest
import torch

import kedit
import zoo
from analysis_common import FACTS, TOKENIZER, cases, embedded
from kedit.analysis import causal_tracing
from kedit.analysis.causal_tracing import KINDS, draw_noise
from kedit.analysis.facts import as_facts
from kedit.analysis.restorations import SharedRuns, WholePrompts, restorations, runs_of
from kedit.cli import main
from kedit.errors import ConfigError
from kedit.models import ModelArch
from tiny_models import tiny_model

EXACT = (
    "gpt2",
    "llama",
    "mistral-window",
    "gemma3",
    "gpt_oss-sinks",
    "opt",
    "mixtral",
    "gptj",
    "falcon-alibi",
    "olmo2",
)
ROUNDED = ("bloom", "mpt", "gemma2-softcap", "gpt_neo")  # parts of them compute in float32 whatever the weights are
EDIT = kedit.Edit("The mother of {} is", "Ada Lovelace", "x", "English and French")


def ready(model, edit=EDIT, samples=3):
    arch = ModelArch(model)
    [fact] = as_facts(arch, TOKENIZER, edit)
    return arch, fact, draw_noise(arch, fact, samples, 0.5, 0)


def tokens_of_mlps(arch, call):
    """How many tokens run through all MLPs in a call."""
    seen = []
    handles = [
        arch.mlp(layer).register_forward_pre_hook(lambda _module, args: seen.append(args[0][..., 0].numel()))
        for layer in range(arch.num_layers)
    ]
    try:
        return call(), sum(seen)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", [*EXACT, *ROUNDED])
def test_every_score_is_that_of_a_whole_prompt(name, caplog):
    rounded = name in ROUNDED
    model = zoo.make(name, torch.float32 if rounded else torch.float64, vocab_size=len(TOKENIZER))
    arch, fact, noise = ready(model)
    items = [(sample, item) for item in restorations(fact, KINDS, arch.num_layers) for sample in range(3)]
    with torch.no_grad():
        whole = WholePrompts(arch, fact, 2, noise, 16_384)
        shared = runs_of(arch, fact, KINDS, 2, noise, 16_384)
        assert isinstance(shared, SharedRuns), caplog.text
        for one, other in zip(shared.unrestored(), whole.unrestored(), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4 if rounded else 1e-10, rtol=0)
        expected, many = tokens_of_mlps(arch, lambda: whole.scores(items, lambda _: None))
        for tokens in (16_384, 60):
            done = []
            shared = SharedRuns(arch, fact, 2, noise, tokens)
            found, few = tokens_of_mlps(arch, lambda runs=shared, told=done: runs.scores(items, told.append))
            np.testing.assert_allclose(found, expected, atol=1e-4 if rounded else 1e-10, rtol=0)
            assert few < 0.6 * many
            assert sum(done) == len(items)


@pytest.mark.parametrize("fault", ["state", "error"])
def test_a_model_that_fails_the_check_runs_whole_prompts(fault, caplog):
    model = tiny_model("gpt2", layers=3, dtype=torch.float64)

    def recur(_module, _args, output):
        """A state that is carried from token to token, beside the cache."""
        return output + output.cumsum(1) / 10

    def refuse(_module, _args, named):
        if named.get("use_cache"):
            raise ValueError("no cache")

    if fault == "state":
        model.transformer.h[1].mlp.register_forward_hook(recur)
    else:
        model.register_forward_pre_hook(refuse, with_kwargs=True)
    with caplog.at_level(logging.WARNING, "kedit"):
        found = kedit.trace(model, TOKENIZER, [EDIT, *FACTS[:1]], samples=2, known_only=False)
    assert caplog.text.count("traces with whole prompts") == 1
    monkeypatch = pytest.MonkeyPatch()
    with monkeypatch.context() as patch:
        patch.setattr(causal_tracing, "runs_of", lambda arch, fact, kinds, *rest: WholePrompts(arch, fact, *rest))
        expected = kedit.trace(model, TOKENIZER, [EDIT, *FACTS[:1]], samples=2, known_only=False)
    for one, other in zip(found.facts, expected.facts, strict=True):
        for kind in KINDS:
            np.testing.assert_allclose(one.effects[kind], other.effects[kind], atol=1e-9, rtol=0)


def test_precision_stops_early_and_keeps_effects_within_it(monkeypatch):
    model, tokenizer = embedded()
    asked = []
    scores = SharedRuns.scores
    monkeypatch.setattr(
        SharedRuns, "scores", lambda self, items, done: asked.append(len(items)) or scores(self, items, done)
    )
    fact = cases(1)[0]
    whole = kedit.trace(model, tokenizer, fact, samples=12)
    every = max(asked)
    asked.clear()
    early = kedit.trace(model, tokenizer, fact, samples=12, precision=0.05)
    assert sum(asked[-5:]) < 0.8 * every
    assert early.settings["precision"] == 0.05
    for kind in KINDS:
        assert np.abs(early.facts[0].effects[kind] - whole.facts[0].effects[kind]).max() < 0.15
    exact = kedit.trace(model, tokenizer, fact, samples=12, precision=1e-12)
    for kind in KINDS:
        np.testing.assert_allclose(exact.facts[0].effects[kind], whole.facts[0].effects[kind], atol=1e-6, rtol=0)
    with pytest.raises(ConfigError, match="precision must be a finite number above 0"):
        kedit.trace(model, tokenizer, fact, precision=0.0)


def interrupted(monkeypatch, after):
    """Tracing that is interrupted in the fact after so many."""
    done, one = [], causal_tracing._trace_fact

    def stops(*args):
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(1)
        return one(*args)

    monkeypatch.setattr(causal_tracing, "_trace_fact", stops)


def test_an_interrupt_keeps_the_facts_that_are_done(monkeypatch, caplog):
    model, tokenizer = embedded()
    whole = kedit.trace(model, tokenizer, cases(3), samples=1)
    interrupted(monkeypatch, 2)
    part = kedit.trace(model, tokenizer, cases(3), samples=1)
    assert "2 of 3 facts" in caplog.text
    assert [fact.prompt for fact in part.facts] == [fact.prompt for fact in whole.facts[:2]]
    np.testing.assert_array_equal(part.facts[1].effects["mlp"], whole.facts[1].effects["mlp"])
    assert part.unfinished == (whole.facts[2].prompt,)
    assert "1 not finished" in part.summary()
    assert part.to_dict()["unfinished"] == list(part.unfinished)
    assert whole.unfinished == ()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    monkeypatch.undo()
    interrupted(monkeypatch, 0)
    with pytest.raises(KeyboardInterrupt):
        kedit.trace(model, tokenizer, cases(3), samples=1)


def test_an_interrupted_command_writes_what_is_done_and_says_so(monkeypatch, tmp_path, capsys):
    interrupted(monkeypatch, 1)
    out = tmp_path / "trace.json"
    assert main(["trace", "--cases", "3", "--samples", "4", "--precision", "0.1", "--out", str(out)]) == 130
    assert "1 fact traced" in capsys.readouterr().out
    assert '"unfinished"' in out.read_text()
