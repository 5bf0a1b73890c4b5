"""Texts that begin alike: what they share runs once, with the numbers of whole texts."""

import logging

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import zoo
from kedit.models import ModelArch
from kedit.prompts import likelihood
from kedit.prompts.likelihood import score_rows
from kedit.prompts.prefixes import PackedRunner, PrefixTree, can_share
from kedit.prompts.tokenize import TokenizedPrompt
from kedit.utils.device_memory import LivePeak
from kedit.utils.packing import cut_by_length
from tiny_models import tiny_model

PACKED = ("gpt2", "gpt_neox", "llama", "opt", "mixtral", "gptj", "qwen2", "falcon")
CACHED = ("mistral-window", "gemma3", "gpt_oss-sinks", "falcon-alibi")  # windows that are shorter than the texts, ALiBi
ROUNDED = ("bloom", "mpt", "gemma2-softcap", "gpt_neo")  # parts of them compute in float32 whatever the weights are


def texts(rows):
    return sorted({row.ids[:-1] for row in rows}, reverse=True)


def probes():
    """Three cases: a sentence, four neighbours after it, three continuations of one to three tokens each."""
    generator = torch.Generator().manual_seed(0)

    def draw(count):
        return tuple(torch.randint(3, zoo.VOCAB, (count,), generator=generator).tolist())

    rows = []
    for _ in range(3):
        sentence = draw(9)
        for number in range(4):
            prompt = sentence + draw(3 + number)
            if number == 3:  # begins as the neighbour before it does
                prompt = rows[-1].ids[:13] + draw(2)
            rows += [TokenizedPrompt(prompt + draw(count), 0, len(prompt), 0) for count in (1, 2, 3)]
    return rows


def tokens_run(model, call):
    """What a call returns, and how many tokens it ran, padding included."""
    seen = []
    handle = model.register_forward_pre_hook(
        lambda _module, _args, named: seen.append(named["input_ids"].numel()), with_kwargs=True
    )
    try:
        return call(), sum(seen)
    finally:
        handle.remove()


@torch.no_grad()
def whole(model, rows):
    """The answers' likelihoods and first choices, one text after the other."""
    found = []
    for row in rows:
        log_probs = model(torch.tensor([row.ids[:-1]])).logits[0, row.prompt_last :].double().log_softmax(-1)
        nll = -log_probs[torch.arange(len(row.labels)), torch.tensor(row.labels)].mean()
        found.append((float(nll), tuple(log_probs.argmax(-1).tolist())))
    return found


def check(answers, expected, tolerance=1e-12):
    for answer, (nll, argmax) in zip(answers, expected, strict=True):
        assert answer.nll == pytest.approx(nll, abs=tolerance)
        assert answer.argmax == argmax


def only_cached(monkeypatch):
    monkeypatch.setattr(
        likelihood, "can_share", lambda arch, tree, packed: not packed and can_share(arch, tree, packed=False)
    )


@pytest.mark.parametrize("name", [*PACKED, *CACHED, *ROUNDED])
@pytest.mark.parametrize("way", ["best", "cached"])
def test_answers_are_those_of_whole_texts(name, way, monkeypatch):
    if way == "cached":
        only_cached(monkeypatch)
    model = zoo.make(name, torch.float32 if name in ROUNDED else torch.float64)
    arch, rows = ModelArch(model), probes()
    check(score_rows(arch, rows, fixed=0), whole(model, rows), 2e-5 if name in ROUNDED else 1e-12)
    _, few = tokens_run(model, lambda: score_rows(arch, rows, fixed=0))  # without the check, done once per model
    assert few < len({row.ids[:-1] for row in rows}) * 16 / 3
    assert sum(PackedRunner(arch, texts(rows), [1] * 36).widths) < 200
    if name in PACKED and way == "best":
        assert can_share(arch, PrefixTree(texts(rows)), packed=True)


@pytest.mark.parametrize("tokens", [1, 40, 100])
@pytest.mark.parametrize("places", [1, 4, 1000])
@pytest.mark.parametrize("way", ["packed", "cached"])
def test_budgets_change_the_batches_and_nothing_else(tokens, places, way, monkeypatch):
    if way == "cached":
        only_cached(monkeypatch)
    model = tiny_model("llama", dtype=torch.float64)
    rows = [row for row in probes() if max(row.ids) < 400]
    found = score_rows(ModelArch(model), rows, tokens=tokens, logits=400 * places, fixed=0)
    check(found, whole(model, rows))


@pytest.mark.parametrize("fault", ["state", "error"])
def test_a_model_that_cannot_share_runs_whole_texts(fault, caplog):
    model = tiny_model("gpt2", dtype=torch.float64)

    def recur(_module, _args, output):
        """A state that is carried from token to token, beside the cache."""
        return output + output.cumsum(1) / 100

    def refuse(_module, _args, named):
        if named.get("use_cache") or named.get("attention_mask", torch.empty(1)).ndim > 2:
            raise ValueError("neither a cache nor a mask")

    if fault == "state":
        model.transformer.h[1].mlp.register_forward_hook(recur)
    else:
        model.register_forward_pre_hook(refuse, with_kwargs=True)
    arch, rows = ModelArch(model), probes()
    with caplog.at_level(logging.WARNING, "kedit"):
        found = [score_rows(arch, rows, fixed=0) for _ in range(2)]
    assert caplog.text.count("runs every probe as a whole text") == 1
    for answers in found:
        check(answers, whole(model, rows))


def test_a_window_is_told_by_texts_that_are_longer():
    model = zoo.make("mistral-window", torch.float64)  # of 5 tokens
    arch = ModelArch(model)
    short = [TokenizedPrompt((5, 6, 7, last, 9), 0, 3, 0) for last in (8, 9, 10)]
    check(score_rows(arch, short, fixed=0), whole(model, short))
    assert can_share(arch, PrefixTree(texts(short), 2, 1), packed=True)
    long = probes()
    check(score_rows(arch, long, fixed=0), whole(model, long))
    assert not can_share(arch, PrefixTree(texts(long)), packed=True)
    assert can_share(arch, PrefixTree(texts(short), 2, 1), packed=True)


@pytest.mark.parametrize("way", ["packed", "cached"])
def test_sharing_takes_no_more_memory(way, monkeypatch):
    if way == "cached":
        only_cached(monkeypatch)
    config = LlamaConfig(
        vocab_size=zoo.VOCAB, hidden_size=128, intermediate_size=352, num_hidden_layers=6, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).eval()
    arch, rows = ModelArch(model), probes()
    rows += [
        TokenizedPrompt((*row.ids[:9], i % 90 + 3, *row.ids[9:]), 0, row.target + 1, 0) for i, row in enumerate(rows)
    ]
    score_rows(arch, rows, fixed=0)
    with LivePeak(model) as shared:
        score_rows(arch, rows)
    monkeypatch.setattr(likelihood, "can_share", lambda *_, **__: False)
    with LivePeak(model) as apart:
        score_rows(arch, rows)
    assert shared.peak <= apart.peak


def test_a_tree_by_hand():
    texts = [(1, 2, 3, 4, 9), (1, 2, 3, 4, 5, 6, 7, 8), (1, 2, 3, 4, 5, 6, 7, 1), (1, 2, 3, 4, 5, 3), (8, 8, 8, 8, 8)]
    tree = PrefixTree(texts)
    assert [(branch.parent, branch.start, branch.depth) for branch in tree.branches] == [
        (-1, 0, 0),
        (0, 4, 1),
        (1, 7, 2),
        (1, 5, 2),
        (-1, 0, 0),
    ]
    assert tree.parents == {0, 1}
    assert [tree.owner(2, place) for place in (0, 3, 4, 6, 7)] == [0, 0, 1, 1, 2]
    assert tree.levels(range(5)) == [[0, 4], [1], [2, 3]]
    assert list(tree.families(100)) == [[0, 1, 2, 3, 4]]
    assert list(tree.families(5)) == [[0, 1, 2, 3], [4]]
    flat = PrefixTree(texts, 1)
    assert [(branch.parent, branch.start) for branch in flat.branches] == [(-1, 0), (0, 4), (0, 4), (0, 4), (-1, 0)]
    assert not PrefixTree(texts, 0).shares
    assert PrefixTree.cheapest(texts, 0).cost(0) == PrefixTree(texts).cost(0) == 16
    assert not PrefixTree.cheapest(texts, 100).shares


def test_batches_are_cut_where_padding_costs_more_than_a_pass():
    assert cut_by_length([9, 1, 8, 1], [1] * 4, 0) == [[1, 3], [2], [0]]
    assert cut_by_length([9, 1, 8, 1], [1] * 4, 5) == [[1, 3], [2, 0]]
    assert cut_by_length([9, 1, 8, 1], [1] * 4, 50) == [[1, 3, 2, 0]]
    assert cut_by_length([9, 1], [1, 100], 50) == [[1], [0]]
