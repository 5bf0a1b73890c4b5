"""One encode, places by offsets: checked by decoding what the tokens say, on tiny and on real tokenizers."""

import functools
import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE, WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

from kedit import Edit
from kedit.errors import ContextLengthError, EditError, TokenizerError
from kedit.prompts.tokenize import Text, context_limit, encode, pad, rewrite_texts
from tiny_models import tokenizer

REAL = ("tokenizers/gpt2", "tokenizers/qwen2", "models/stories260K", "models/stories3M")

SHAPES = {
    "start": Text.fill("{} lives in", "Ada Lovelace", "Paris"),
    "middle": Text.fill("The town of {} is called", "Ada", "Rome"),
    "end": Text.fill("The house of {}", "Ada Lovelace", "Paris"),
    "two tokens and more": Text.fill("{} speaks", "Danielle Darrieux", "English and French"),
    "prompt ends with a space": Text.fill("{} lives in ", "Ada", "Paris"),
    "prompt ends with two spaces": Text.fill("{} lives in  ", "Ada", "Paris"),
    "prompt ends with a quote": Text.fill('{} said "', "Ada", "Paris"),
    "prompt ends with a newline": Text.fill("{} lives in\n", "Ada", "Paris"),
    "target closes": Text.fill("I know {}", "Ada", ", the writer"),
    "cjk": Text.fill("{}的首都是", "法国", "巴黎"),
    "cjk subject in latin": Text.fill("The city of {} is in", "北京", "日本 now"),
    "accents": Text.fill("{} vient de", "Zoë Élodie Çelik", "Orléans"),
    "emoji": Text.fill("{} likes", "Ada 👩‍👩‍👧", "🎉 parties"),
    "no space after the subject": Text.fill("I saw {}'s house in", "Ada", "Rome"),
    "subject inside a word": Text.fill("The anti{}ist says", "Lovelace", "no"),
    "digits": Text.fill("{} was born in", "Number 1984", "1815"),
    "repeated words": Text.fill("Rome Rome {} Rome", "Rome", "Rome"),
}


def spelled(tok, row, first, last):
    """The text of some tokens, spaces at the ends dropped."""
    return tok.decode(row.ids[first:last], clean_up_tokenization_spaces=False).strip()


@functools.cache
def _loaded(folder):
    return AutoTokenizer.from_pretrained(folder)


def real(test_data, name):
    return _loaded(test_data / name)


def check_by_decoding(tok, text, row):
    """Compare the decoded tokens before and after each position with the characters, piece by piece."""
    encoded = tok(text.string)["input_ids"]
    assert list(row.ids) == encoded[: len(row.ids)], "the text was encoded once and whole"
    target = text.string[text.target :]
    assert spelled(tok, row, row.target, None) == target.strip()
    assert row.labels == row.ids[row.target :]
    prompt = text.string[: text.target]
    special = set(tok.all_special_ids)
    before = [i for i in row.ids[: row.target] if i not in special]
    assert tok.decode(before, clean_up_tokenization_spaces=False).strip() == prompt.strip()
    assert row.prompt_last == row.target - 1
    if text.separator:
        assert tok.convert_ids_to_tokens(row.ids[row.prompt_last]) not in ("Ġ", "▁")
    # Up to the lookup token the subject is complete; one token earlier it is not.
    upto = [i for i in row.ids[: row.subject_last + 1] if i not in special]
    reached = tok.decode(upto, clean_up_tokenization_spaces=False)
    head = text.string[: text.subject[1]]
    assert reached.strip().startswith(head.strip()), (reached, head)
    earlier = tok.decode(upto[:-1], clean_up_tokenization_spaces=False).strip()
    assert not earlier.startswith(head.strip()), (earlier, head)


@pytest.mark.parametrize("kind", ["plain", "bos", "left", "nopad"])
@pytest.mark.parametrize("shape", SHAPES)
def test_places_on_tiny_tokenizers(kind, shape):
    tok, text = tokenizer(kind), SHAPES[shape]
    [row] = encode(tok, [text])
    check_by_decoding(tok, text, row)
    assert (row.ids[0] == tok.bos_token_id) == (kind == "bos")


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("shape", SHAPES)
def test_places_on_real_tokenizers(test_data, name, shape):
    tok, text = real(test_data, name), SHAPES[shape]
    [row] = encode(tok, [text])
    check_by_decoding(tok, text, row)


@pytest.mark.parametrize("name", REAL)
def test_counterfact_prompts_decode_to_their_parts(test_data, name):
    records = json.loads((test_data / "datasets/counterfact_flat_1000.json").read_text(encoding="utf-8"))[:400]
    tok = real(test_data, name)
    edits = [Edit(r["prompt"], r["subject"], r["target_new"]) for r in records]
    texts = [text for edit in edits for text in rewrite_texts(edit, ["{}", "The weather is nice. {}"])]
    rows = encode(tok, texts)
    assert len(rows) == 800
    for text, row in zip(texts, rows, strict=True):
        check_by_decoding(tok, text, row)


@pytest.mark.parametrize("name", REAL)
def test_separator_that_is_a_token_of_its_own_is_the_targets_first(test_data, name):
    """Nothing stands between a subject at the prompt's end and the target, whatever the tokenizer makes of the space."""
    tok = real(test_data, name)
    own = 0
    for target in ("Paris", "1815", "東京", "Quentin"):
        [row] = encode(tok, [Text.fill("The house of {}", "Ada Lovelace", target)])
        assert row.subject_last == row.prompt_last
        own += tok.convert_ids_to_tokens(row.labels[0]) in ("Ġ", "▁")
    assert own >= (name != "tokenizers/gpt2")


def test_space_of_the_prompt_stays_with_the_prompt(test_data):
    tok = real(test_data, "tokenizers/qwen2")
    [row] = encode(tok, [Text.fill("{} was born in ", "Ada", "1815")])
    assert tok.decode(row.labels) == "1815"
    assert tok.decode(row.ids[: row.target]) == "Ada was born in "
    [row] = encode(tok, [Text.fill("{} was born in", "Ada", "1815")])
    assert tok.decode(row.labels) == " 1815"


def straddling():
    """A tokenizer with one token across a word's end: "ab cd" is [a, "b c", d]."""
    vocabulary = {c: i for i, c in enumerate(["a", "b", " ", "c", "d", "e", "b ", "b c"])}
    raw = Tokenizer(BPE(vocabulary, [("b", " "), ("b ", "c")]))
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def test_token_across_the_subjects_end_is_the_subjects_last():
    tok = straddling()
    [row] = encode(tok, [Text.fill("{}cde", "ab ", "e")])
    assert tok.convert_ids_to_tokens(list(row.ids)) == ["a", "b c", "d", "e", " ", "e"]
    assert row.subject_last == 1
    # and one across the subject's beginning belongs to it too
    [row] = encode(tok, [Text.fill("ab {}", "c", "e")])
    assert tok.convert_ids_to_tokens([row.ids[row.subject_last]]) == ["b c"]


def test_token_across_the_targets_beginning_is_the_targets_first():
    tok = straddling()
    [row] = encode(tok, [Text.fill("{}deb ", "a", "cd")])
    assert tok.convert_ids_to_tokens(list(row.labels)) == ["b c", "d"]


def test_token_across_subject_and_target_is_refused():
    with pytest.raises(EditError, match="One token covers both the subject's end and the target's beginning"):
        encode(straddling(), [Text.fill("a{}", "b ", "c")])


def test_decomposed_accents_are_found_after_normalisation(test_data):
    tok = real(test_data, "tokenizers/qwen2")  # its normaliser composes e + accent into one character
    [row] = encode(tok, [Text.fill("{} vient de", "Zoe\u0301", "Caen")])
    assert spelled(tok, row, 0, row.subject_last + 1) == "Zoé"
    assert spelled(tok, row, row.target, None) == "Caen"


def with_template(single, **special):
    """The tiny tokenizer with other tokens around every text."""
    tok = tokenizer("bos")
    pairs = [(token, tok.convert_tokens_to_ids(token)) for token in special.values()]
    tok.backend_tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=True), processors.TemplateProcessing(single=single, special_tokens=pairs)]
    )
    return tok


@pytest.mark.parametrize("single", ["$A <|endoftext|>", "<s> $A <|endoftext|>", "$A <|endoftext|> <|endoftext|>"])
def test_closing_tokens_are_dropped(single):
    tok = with_template(single, eos="<|endoftext|>", bos="<s>")
    eos = tok.convert_tokens_to_ids("<|endoftext|>")
    text = SHAPES["middle"]
    assert tok(text.string)["input_ids"][-1] == eos
    [row, bare] = encode(tok, [text, Text.fill("The town of {}", "Ada")])
    assert row.ids[-1] != eos
    check_by_decoding(tok, text, row)
    assert bare.target == len(bare.ids) == bare.subject_last + 1


def test_end_token_inside_the_text_stays():
    tok = tokenizer("plain")
    [row] = encode(tok, [Text.fill("{} is<|endoftext|> in", "Ada", "Rome")])
    assert 0 in row.ids
    assert spelled(tok, row, row.target, None) == "Rome"


def test_offsets_that_keep_the_space():
    tok = tokenizer("plain")
    tok.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    for text in SHAPES.values():
        [row] = encode(tok, [text])
        check_by_decoding(tok, text, row)


def test_target_as_the_very_first_token_is_refused():
    with pytest.raises(EditError, match="begins in the text's first token"):
        encode(straddling(), [Text("b c", (0, 1), 2)])


def test_subject_without_a_token_is_refused():
    raw = Tokenizer(WordLevel({"is": 0, "it": 1, "[UNK]": 2}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Split("~", behavior="removed")
    tok = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]")
    with pytest.raises(EditError, match="No token covers the subject"):
        encode(tok, [Text("it~is", (2, 3), 3)])
    with pytest.raises(EditError, match="No token covers the target"):
        encode(tok, [Text("it~~", (0, 2), 3)])


class Slow(PreTrainedTokenizer):
    """A tokenizer written in Python: it has no offsets."""

    vocab_size = 3

    def get_vocab(self):
        return {"a": 0, "b": 1, "c": 2}

    def _tokenize(self, text, **_):
        return list(text)

    def _convert_token_to_id(self, token):
        return 0

    def _convert_id_to_token(self, index):
        return "a"


def test_slow_tokenizer_is_refused():
    with pytest.raises(TokenizerError, match="Slow does not report character offsets.*fast tokenizer"):
        encode(Slow(), [SHAPES["start"]])
    with pytest.raises(TokenizerError, match="NoneType"):
        encode(None, [SHAPES["start"]])


def test_nothing_to_encode():
    assert encode(tokenizer(), []) == []


def test_limit_counts_tokens_of_the_longest():
    tok, text = tokenizer("bos"), SHAPES["middle"]
    length = len(tok(text.string)["input_ids"])
    assert len(encode(tok, [text], limit=length)[0].ids) == length
    with pytest.raises(ContextLengthError, match=f"has {length} tokens; the model's context window holds {length - 1}"):
        encode(tok, [SHAPES["start"], text], limit=length - 1)


def test_a_batch_gives_what_one_by_one_gives():
    tok = tokenizer("left")
    texts = list(SHAPES.values())
    assert encode(tok, texts) == [encode(tok, [text])[0] for text in texts]


def test_tokenizers_own_padding_and_truncation_do_not_matter():
    tok, texts = tokenizer("plain"), list(SHAPES.values())
    plain = encode(tok, texts)
    tok.backend_tokenizer.enable_padding(length=64)
    tok.backend_tokenizer.enable_truncation(3)
    assert encode(tok, texts) == plain


def test_pad_is_on_the_right_with_any_id():
    ids, mask = pad([(5, 6, 7), (8,)], fill=3)
    assert ids.tolist() == [[5, 6, 7], [8, 3, 3]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert ids.dtype == mask.dtype == torch.int64


def test_context_limit_reads_the_config():
    from tiny_models import tiny_model

    assert context_limit(tiny_model("gpt2")) == 128
    assert context_limit(tiny_model("llama")) == 128


def test_rewrite_texts_keep_order_and_contexts():
    edit = Edit("{} is in", "Ada", "Rome")
    texts = rewrite_texts(edit, ["{}", "It rains. {}"])
    assert [text.string for text in texts] == ["Ada is in Rome", "It rains. Ada is in Rome"]
    assert [text.string[slice(*text.subject)] for text in texts] == ["Ada", "Ada"]
