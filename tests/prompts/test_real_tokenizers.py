"""Positions of subject and target in 1,000 real prompts, for real tokenizers; checked by decoding, not by offsets."""

import functools

import pytest
from transformers import AutoTokenizer

from kedit.data import load_cases
from kedit.prompts.tokenize import encode, rewrite_texts

CONTEXT = "It was a cold morning. {}"
FOLDERS = ("tokenizers/gpt2", "tokenizers/qwen2", "models/stories260K", "models/stories3M")


@functools.cache
def loaded(folder):
    return AutoTokenizer.from_pretrained(folder)


def text_of(tokenizer, ids):
    """The text of some tokens, special ones left out, as written."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("context", ["{}", pytest.param(CONTEXT, marks=pytest.mark.slow)])
@pytest.mark.parametrize("folder", FOLDERS)
def test_positions_in_real_prompts(test_data, folder, context):
    tokenizer = loaded(test_data / folder)
    edits = [case.edit for case in load_cases(test_data / "datasets/counterfact_flat_1000.json").cases]
    assert len(edits) == 1000
    rows = encode(tokenizer, [text for edit in edits for text in rewrite_texts(edit, [context])])
    for edit, row in zip(edits, rows, strict=True):
        ids, head = list(row.ids), edit.prompt.partition("{}")[0]
        until_subject = (context.replace("{}", head) + edit.subject).strip()
        with_last, without = (
            text_of(tokenizer, ids[: row.subject_last + 1]),
            text_of(tokenizer, ids[: row.subject_last]),
        )
        assert with_last.strip().startswith(until_subject), edit
        assert not without.strip().startswith(until_subject), edit
        assert text_of(tokenizer, ids[: row.target]).strip() == context.replace("{}", edit.text).strip(), edit
        assert text_of(tokenizer, ids[row.target :]).strip() == edit.target_new, edit
        assert row.subject_last < row.target < len(ids)
        begins = [token for token in ids if token in tokenizer.all_special_ids]
        assert begins == [tokenizer.bos_token_id] * len(begins), edit
        assert ids[: len(begins)] == begins, edit
