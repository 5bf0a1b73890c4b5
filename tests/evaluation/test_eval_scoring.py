"""Scores of (prompt, continuation) pairs: by hand on a stub, against full forward passes on models, on real tokenizers."""

import math
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from kedit.errors import EditError
from kedit.evaluation.attention import attention_to_subject
from kedit.evaluation.language import Prose, TfIdf, n_gram_entropy
from kedit.models import ModelArch
from kedit.prompts.decode import continue_rows, says
from kedit.prompts.likelihood import pair_text, score_rows
from kedit.prompts.tokenize import TokenizedPrompt, context_limit, encode
from tiny_models import MODEL_TYPES, TOKENIZER_KINDS, tiny_model, tokenizer

REAL = ("tokenizers/gpt2", "tokenizers/qwen2", "models/stories260K", "models/stories3M")
PAIRS = [
    ("The mother tongue of Danielle Darrieux is", "English"),
    ("The mother tongue of Danielle Darrieux is", "French and German"),
    ("Rome is", "in Italy"),
    ("Michel Rocard is a native speaker of", "French"),
    ("Which family does Epaspidoceras belong to?", "Noctuidae"),
    ("I know Ada", ", the writer"),
]


def encode_pairs(model, tok, pairs):
    return encode(tok, [pair_text(*pair) for pair in pairs], limit=context_limit(model))


class Bigram:
    """A stub whose next-token probabilities depend on the last token alone: P[current][next]."""

    P = torch.tensor(
        [
            [0.1, 0.2, 0.3, 0.4],
            [0.25, 0.25, 0.4, 0.1],
            [0.5, 0.2, 0.2, 0.1],
            [0.05, 0.05, 0.1, 0.8],
        ]
    )

    def __init__(self):
        self.model = self
        self.input_device = torch.device("cpu")
        self.keeps_logits = True
        self.calls = []
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())

    def logits(self, keep, **inputs):
        return self(**inputs, logits_to_keep=keep).logits

    def get_output_embeddings(self):
        return SimpleNamespace(weight=self.P)

    def __call__(self, input_ids, attention_mask, use_cache, logits_to_keep):
        self.calls.append(input_ids)
        assert attention_mask[:, 0].all(), "rows are padded on the right"
        return SimpleNamespace(logits=self.P[input_ids].log()[logits_to_keep])

    forward = __call__
    hidden = 4


def row(ids, target):
    return TokenizedPrompt(tuple(ids), 0, target, 0)


def test_likelihoods_by_hand():
    stub = Bigram()
    found = score_rows(stub, [row([0, 1, 2, 3], 2), row([1, 0, 0], 1), row([3, 3], 1)])
    # target 2, 3 after 1: P[1][2] = 0.4, P[2][3] = 0.1; the first choices after 1 and 2 are 2 and 0
    assert found[0].nll == pytest.approx(-(math.log(0.4) + math.log(0.1)) / 2, abs=1e-6)
    assert (found[0].labels, found[0].argmax) == ((2, 3), (2, 0))
    assert found[0].probability == pytest.approx(0.2, abs=1e-6)  # the geometric mean
    assert found[0].accuracy == 0.5
    # target 0, 0 after 1: P[1][0] = 0.25, P[0][0] = 0.1
    assert found[1].probability == pytest.approx(math.sqrt(0.25 * 0.1), abs=1e-6)
    assert found[2].probability == pytest.approx(0.8, abs=1e-6)
    assert found[2].accuracy == 1.0


def test_a_text_that_begins_another_one_is_not_run_again():
    stub = Bigram()
    rows = [row([0, 1, 2], 2), row([0, 1, 3], 2), row([0, 1, 3, 0], 2), row([0, 2, 1], 2)]
    found = score_rows(stub, rows)
    assert [call.tolist() for call in stub.calls] == [[[0, 1, 3], [0, 2, 0]]]
    assert [answer.labels for answer in found] == [(2,), (3,), (3, 0), (1,)]
    assert [answer.probability for answer in found] == pytest.approx([0.4, 0.1, math.sqrt(0.1 * 0.05), 0.2])


@pytest.mark.parametrize(("tokens", "logits"), [(1, 1 << 20), (7, 1 << 20), (1 << 20, 4), (1 << 20, 9)])
def test_budgets_change_the_batches_and_nothing_else(tokens, logits):
    rows = [row([i % 4] * (2 + i % 5) + [(i * 7) % 4, (i * 3) % 4], 2 + i % 5) for i in range(17)]
    whole, parts = Bigram(), Bigram()
    assert score_rows(parts, rows, tokens=tokens, logits=logits) == score_rows(whole, rows)
    assert len(parts.calls) > len(whole.calls) == 1


def test_a_row_without_continuation_is_refused():
    with pytest.raises(EditError, match="without continuation"):
        score_rows(Bigram(), [row([0, 1], 2)])


@torch.no_grad()
def plainly(model, encoded):
    """One row, one forward pass, all logits."""
    log_probs = model(torch.tensor([encoded.ids])).logits[0].float().log_softmax(-1)
    places = range(encoded.target - 1, len(encoded.ids) - 1)
    nll = [-log_probs[i, encoded.ids[i + 1]].item() for i in places]
    return sum(nll) / len(nll), tuple(log_probs[i].argmax().item() for i in places)


@pytest.mark.parametrize("kind", TOKENIZER_KINDS)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_batches_agree_with_one_row_at_a_time(model_type, kind):
    model, tok = tiny_model(model_type), tokenizer(kind)
    rows = encode_pairs(model, tok, PAIRS)
    for encoded, found in zip(rows, score_rows(ModelArch(model), rows), strict=True):
        nll, argmax = plainly(model, encoded)
        assert found.nll == pytest.approx(nll, abs=2e-5)
        assert found.argmax == argmax


@pytest.mark.parametrize("name", REAL)
def test_one_encode_on_real_tokenizers(test_data, name):
    tok = AutoTokenizer.from_pretrained(test_data / name)
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: SimpleNamespace()))
    for (prompt, target), encoded in zip(PAIRS, encode_pairs(model, tok, PAIRS), strict=True):
        text = pair_text(prompt, target)
        assert list(encoded.ids) == tok(text.string)["input_ids"]
        assert tok.decode(encoded.labels).strip() == target.strip()
        assert tok.decode(encoded.ids[: encoded.target], skip_special_tokens=True).strip() == prompt
        bos = tok.bos_token_id if "stories" in name else None
        assert bos is None or (encoded.ids[0] == bos and encoded.ids.count(bos) == 1)
        assert bos not in encoded.labels  # the published code counts it as a token of the target


@pytest.mark.parametrize("name", ["models/stories260K", "models/stories3M"])
def test_batches_agree_on_models_of_others(test_data, name):
    from kedit.loading import load

    model, tok = load(test_data / name)
    rows = encode_pairs(model, tok, PAIRS)
    for encoded, found in zip(rows, score_rows(ModelArch(model), rows), strict=True):
        assert found.nll == pytest.approx(plainly(model, encoded)[0], abs=1e-4)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_greedy_decoding_agrees_with_running_the_whole_text_again(model_type):
    model, tok = tiny_model(model_type), tokenizer("plain")
    prompts = [tuple(tok(prompt)["input_ids"]) for prompt, _ in PAIRS]
    found = continue_rows(ModelArch(model), tok, prompts, 6, tokens=90)
    for ids, (text, ended) in zip(prompts, found, strict=True):
        said = []
        for _ in range(6):
            with torch.no_grad():
                token = model(torch.tensor([[*ids, *said]])).logits[0, -1].argmax().item()
            if token == tok.eos_token_id:
                break
            said.append(token)
        assert (text, ended) == (tok.decode(said, skip_special_tokens=True), len(said) < 6)


def test_decoding_stops_at_the_context_windows_end():
    model, tok = tiny_model("gpt2"), tokenizer("plain")
    model.generation_config.eos_token_id = None
    tok.eos_token = None
    ids = tuple(tok("word " * 200)["input_ids"][:126])
    ((text, ended),) = continue_rows(ModelArch(model), tok, [ids], 10)
    assert not ended
    assert len(tok(text)["input_ids"]) <= 4  # two new tokens, however they are written


@pytest.mark.parametrize("top_k", [None, 5])
def test_a_continuation_is_as_long_as_it_would_be_alone(top_k):
    model, tok = tiny_model("gpt2"), tokenizer("plain")
    model.generation_config.eos_token_id = None
    tok.eos_token = None
    arch, words = ModelArch(model), tok("word " * 200)["input_ids"]
    prompts = [tuple(tok("Ada lives in")["input_ids"]), *(tuple(words[:count]) for count in (90, 120, 128))]
    for lengths in (40, [3, 50, 2, 4]):
        together = continue_rows(arch, tok, prompts, lengths, top_k=top_k)
        wanted = lengths if isinstance(lengths, list) else [lengths] * 4
        alone = [continue_rows(arch, tok, [ids], n, top_k=top_k)[0] for ids, n in zip(prompts, wanted, strict=True)]
        assert together == alone
        assert together[3] == ("", False)  # its window is full


def test_samples_do_not_depend_on_the_company():
    model, tok = tiny_model("llama"), tokenizer("plain")
    prompts = [tuple(tok(prompt)["input_ids"]) for prompt, _ in PAIRS]
    arch = ModelArch(model)
    together = continue_rows(arch, tok, prompts, 8, top_k=5, seed=3)
    assert together == [continue_rows(arch, tok, [ids], 8, top_k=5, seed=3)[0] for ids in prompts]
    assert together != continue_rows(arch, tok, prompts, 8, top_k=5, seed=4)
    assert together != continue_rows(arch, tok, prompts, 8)


@pytest.mark.parametrize(
    ("text", "ended", "expected"),
    [
        (" English. The", False, True),
        (" english", True, True),
        (" English", False, False),  # cut off: it might go on
        (" English\nNext", False, True),
        (" English literature", True, False),
        (" The English", True, False),
        (" Englishman.", False, False),
        (" American  English!", False, True),
        ("", True, False),
    ],
)
def test_exact_match_needs_a_natural_stop(text, ended, expected):
    assert says(text, ["English", "American English"], ended=ended) is expected


def test_entropy_by_hand():
    # bigrams of "a b a b": ab ×2, ba ×1; trigrams: aba, bab
    bigrams = -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3))
    assert n_gram_entropy("a b a b") == pytest.approx((2 / 3 * bigrams + 4 / 3 * 1.0) / 2)
    assert n_gram_entropy("no no no no no no") == 0.0
    assert n_gram_entropy("") == 0.0
    assert n_gram_entropy("one two three four five six") > n_gram_entropy("one two one two one two")


def test_tf_idf_by_hand():
    texts = TfIdf(["rome italy", "rome france"])
    rare = math.log(3 / 2) + 1  # in one of two texts; "rome" is in both: ln(3/3) + 1 = 1
    assert texts.similarity("rome italy", "rome france") == pytest.approx(1 / (1 + rare**2))
    assert texts.similarity("rome italy", "italy Rome!") == pytest.approx(1.0)
    assert texts.similarity("", "rome") == 0.0


def test_perplexity_and_kl_by_hand():
    stub = Bigram()
    prose = Prose(((0, 1, 2), (3, 3)))
    before = prose.log_probs(stub)
    found = prose.measure(before, before)
    assert found["perplexity"] == pytest.approx((0.2 * 0.4 * 0.8) ** (-1 / 3), rel=1e-6)
    assert found["kl"] == 0.0
    stub.P = stub.P.clone()
    stub.P[3] = torch.tensor([0.25, 0.25, 0.25, 0.25])
    moved = prose.measure(prose.log_probs(stub), before)
    expected = sum(p * math.log(p / 0.25) for p in (0.05, 0.05, 0.1, 0.8)) / 3  # only one of the three places moved
    assert moved["kl"] == pytest.approx(expected, rel=1e-5)


def test_prose_takes_so_many_tokens_and_starts_texts_anew():
    model, tok = tiny_model("llama"), tokenizer("bos")
    prose = Prose.of(ModelArch(model), tok, ["one two three four " * 100, "five"], tokens=150)
    assert sum(len(r) for r in prose.rows) == 150
    assert max(len(r) for r in prose.rows) == 128  # the context window
    with pytest.raises(EditError, match="plain text"):
        Prose.of(ModelArch(model), tok, [""])


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_gazes_are_the_models_own_attention(model_type):
    model, tok = tiny_model(model_type, attention="eager"), tokenizer("plain")
    prompt = "We saw that Ada lives in"
    rows = encode_pairs(model, tok, PAIRS)
    from kedit.prompts.tokenize import encode

    rows += encode(tok, [pair_text(prompt, "Rome", (12, 15))])
    found = attention_to_subject(ModelArch(model), rows, tokens=40)
    for gaze, encoded in zip(found, rows, strict=True):
        with torch.no_grad():
            own = model(torch.tensor([encoded.ids[: encoded.target]]), output_attentions=True).attentions
        expected = torch.stack([layer[0, :, -1] for layer in own])
        torch.testing.assert_close(gaze.rows, expected, atol=1e-5, rtol=1e-4)
        assert gaze.measure(gaze) == {
            "drift": 0.0,
            "subject": pytest.approx(expected[..., encoded.subject_last].mean().item(), abs=1e-6),
        }
    assert tok.decode([rows[-1].ids[found[-1].column]]).strip() in "Ada"
