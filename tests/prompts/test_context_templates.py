"""Context templates: seeded, repeatable, and no trace left in the model or in other random states."""

import random

import numpy
import pytest
import torch

from kedit.errors import ConfigError, NonFiniteError
from kedit.prompts.contexts import check_contexts, generate_contexts
from tiny_models import tiny_model, tokenizer

LENGTHS = ((3, 6), (6, 4))


def test_same_seed_same_contexts_and_another_seed_others():
    model, tok = tiny_model("gpt2"), tokenizer()
    first = generate_contexts(model, tok, LENGTHS, seed=3)
    assert first == generate_contexts(model, tok, LENGTHS, seed=3)
    assert first == generate_contexts(tiny_model("gpt2"), tokenizer("nopad"), LENGTHS, seed=3)
    assert first != generate_contexts(model, tok, LENGTHS, seed=4)


def test_each_is_a_template_and_the_first_is_bare():
    found = generate_contexts(tiny_model("llama"), tokenizer(), LENGTHS)
    assert found[0] == "{}"
    assert 8 <= len(found) <= 11  # what is sampled twice stands once
    assert len(set(found)) == len(found)
    assert all(context.endswith(" {}") and context.count("{}") == 1 for context in found[1:])
    assert check_contexts(found) == found


def test_special_tokens_do_not_show():
    found = generate_contexts(tiny_model("gpt2"), tokenizer("bos"), LENGTHS)
    assert not any("<s>" in context or "<|endoftext|>" in context for context in found)


def test_without_a_beginning_token_plain_words_begin():
    tok = tokenizer()
    tok.bos_token = None
    found = generate_contexts(tiny_model("gpt2"), tok, ((2, 5),))
    words = ("The", "Therefore", "Because", "I", "You")
    assert len(found) == 6
    for context, word in zip(found[1:], words, strict=True):
        assert context.startswith(word)


def test_without_a_beginning_token_a_closing_one_is_not_continued():
    from tokenizers import processors

    tok = tokenizer()
    plain = tokenizer()
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
    )
    tok.bos_token = plain.bos_token = None
    model = tiny_model("gpt2")
    assert generate_contexts(model, tok, ((3, 5),)) == generate_contexts(model, plain, ((3, 5),))


def test_other_random_states_and_the_model_are_untouched():
    model = tiny_model("gpt2")
    model.train()
    model.transformer.h[2].eval()
    flags = [module.training for module in model.modules()]
    torch.manual_seed(11)
    random.seed(11)
    numpy.random.seed(11)
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()
    generate_contexts(model, tokenizer(), LENGTHS)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert (numpy.random.get_state()[1] == states[2]).all()
    assert [module.training for module in model.modules()] == flags
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_dropout_is_off_while_sampling():
    model = tiny_model("gpt2")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.9
    calm = generate_contexts(model, tokenizer(), LENGTHS)
    model.train()
    assert generate_contexts(model, tokenizer(), LENGTHS) == calm


def test_braces_of_the_model_are_no_slots(monkeypatch):
    tok = tokenizer()
    monkeypatch.setattr(type(tok), "batch_decode", lambda self, rows, **_: ["a {} b", "{", "  ", "ends!", "plain"])
    found = generate_contexts(tiny_model("gpt2"), tok, ((1, 5),))
    assert found == ("{}", "a b. {}", "ends! {}", "plain. {}")


def test_broken_model_is_named_as_such():
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="no contexts can be sampled"):
        generate_contexts(model, tokenizer(), LENGTHS)


@pytest.mark.parametrize(
    "wrong",
    [[], ["It rains. {}"], ["{}", "no slot"], ["{}", "{} and {}"], ["{} "], "{}", "{} It rains.", ["{}", None], [3]],
)
def test_bad_contexts_are_refused(wrong):
    with pytest.raises(ConfigError):
        check_contexts(wrong)


def test_a_list_becomes_a_tuple():
    assert check_contexts(["{}", "It rains. {}"]) == ("{}", "It rains. {}")
