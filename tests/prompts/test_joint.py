"""The joint of prompt and target, and tokenizers that belong to another model."""

import unicodedata
import warnings

import pytest
import torch

import kedit
from kedit.errors import EditError, KEditWarning
from kedit.models import ModelArch
from kedit.prompts.encode import encode_edits
from kedit.prompts.tokenize import vocabulary_size
from kedit.regularizers.base import Needs
from tiny_models import tiny_model


@pytest.fixture(scope="module")
def embedded():
    return kedit.load()


def _encode(embedded, *edits):
    model, tok = embedded
    return encode_edits(ModelArch(model), tok, edits, ["{}"], Needs())


def test_a_space_at_the_end_is_noticed(embedded):
    edit = kedit.Edit("{} works as a ", "Hulqui Gossam", "pilot")
    with pytest.warns(KEditWarning, match="It ends with a space: leave that out"):
        _encode(embedded, edit)


def test_a_mark_that_joins_the_prompt_is_noticed(embedded):
    mark = unicodedata.normalize("NFD", "é")[1]
    tok = embedded[1]
    edit = kedit.Edit("{} works as a caf", "Hulqui Gossam", "e" + mark)
    alone, whole = (tok(text)["input_ids"] for text in (edit.text, edit.text + " " + edit.target_new))
    expected = whole[: len(alone)] != alone
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _encode(embedded, edit)
    assert any("has other tokens when it stands alone" in str(item.message) for item in caught) == expected


def test_no_notice_where_nothing_differs(embedded):
    _encode(embedded, kedit.Edit("{} works as a", "Hulqui Gossam", "pilot"))


@pytest.mark.parametrize("contexts", [None, ["{}"]])
def test_a_tokenizer_of_a_larger_vocabulary_is_refused_whichever_way(embedded, contexts):
    model = tiny_model("gpt2")
    model.resize_token_embeddings(7)
    assert vocabulary_size(model) == 7 < len(embedded[1])
    editor = kedit.ROME(
        model, embedded[1], layers=1, moments={1: torch.eye(ModelArch(model).shape(1)[1])}, contexts=contexts
    )
    with pytest.raises(EditError, match=r"The tokenizer gives token \d+, and the model knows 7 tokens"):
        editor.apply(kedit.Edit("{} works as a", "Hulqui Gossam", "pilot"))
