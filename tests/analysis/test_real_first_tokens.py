"""The subject's first token and the answer's tokens, with real tokenizers."""

import functools

import pytest
from transformers import AutoTokenizer

import kedit
from kedit.data import load_cases
from kedit.prompts.likelihood import pair_text
from kedit.prompts.tokenize import Text, encode, rewrite_texts

FOLDERS = ("tokenizers/gpt2", "tokenizers/qwen2", "models/stories260K", "models/stories3M")
SUBJECTS = ("Łódź", "東京", "Übach", "Étienne Ghys", "ƔƔ", "鬱蒼", "Paris")


@functools.cache
def loaded(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("prompt", ["The capital of {} is", "{} is"])
@pytest.mark.parametrize("folder", FOLDERS)
def test_the_first_token_holds_the_first_byte_of_the_subject(test_data, folder, prompt):
    """Checked by decoding: the tokens before it are the text before the subject, those up to it are more."""
    tokenizer = loaded(test_data / folder)
    texts = [Text.fill(prompt, subject) for subject in SUBJECTS]
    for text, row in zip(texts, encode(tokenizer, texts), strict=True):
        first = row.first
        before = text.string[: text.subject[0]].strip()
        ids = [token for token in row.ids if token not in tokenizer.all_special_ids]
        own = first - (len(row.ids) - len(ids))
        assert tokenizer.decode(ids[:own]).strip() == before, text
        assert tokenizer.decode(ids[: own + 1]).strip() != before or tokenizer.decode(ids[own : own + 1]).strip() == ""
        assert first <= row.subject_last


def test_a_character_of_several_tokens_begins_with_the_first_of_them(test_data):
    tokenizer = loaded(test_data / "tokenizers/gpt2")
    texts = [Text.fill("The capital of {} is", subject) for subject in ("Łódź", "東京")]
    ids = [tokenizer(text.string)["input_ids"] for text in texts]
    assert [tokenizer.decode(row[:3]) for row in ids] == ["The capital of"] * 2
    assert tokenizer.convert_ids_to_tokens(ids[0][3:5]) == ["ĠÅ", "ģ"]  # the two bytes of Ł
    assert [row.first for row in encode(tokenizer, texts)] == [3, 3]


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_answers_tokens_are_those_that_editors_write(test_data, folder):
    """Also where a space is a token of its own, as before numbers: the model has to say it."""
    tokenizer = loaded(test_data / folder)
    edits = [case.edit for case in load_cases(test_data / "datasets/counterfact_flat_1000.json").cases[:200]]
    edits += [kedit.Edit("{} was born in", "Ada Lovelace", year) for year in ("1815", "7", "0.5")]
    written = encode(tokenizer, [rewrite_texts(edit, ["{}"])[0] for edit in edits])
    asked = encode(tokenizer, [pair_text(edit.text, edit.target_new) for edit in edits])
    assert [(row.ids, row.target) for row in asked] == [(row.ids, row.target) for row in written]
    if folder == "tokenizers/qwen2":
        assert tokenizer.decode(asked[-3].labels) == " 1815"
