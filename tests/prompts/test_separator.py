"""The rule for what stands between a prompt and its continuation."""

import pytest

from kedit.prompts.tokenize import Text, separator


@pytest.mark.parametrize(
    ("prompt", "target", "expected"),
    [
        ("The capital is", "Paris", " "),
        ("The capital is ", "Paris", ""),
        ("The capital is\n", "Paris", ""),
        ("The capital is\u00a0", "Paris", ""),
        ("The capital is", " Paris", ""),
        ("The capital is:", "Paris", " "),
        ("He said,", "Paris", " "),
        # what opens belongs to what follows
        ("The capital (", "Paris", ""),
        ('He said "', "Paris", ""),
        ('"', "Paris", ""),
        ('("', "Paris", ""),
        ("He said '", "Paris", ""),
        ("Er sagte «", "Paris", ""),
        ("Il dit “", "Paris", ""),
        ("It costs $", "5", ""),
        ("either/", "or", ""),
        ("twenty-", "five", ""),
        # what closes does not
        ('The book "Emma"', "is", " "),
        ("The boys'", "school", " "),
        ("The boys' book is '", "Emma", ""),
        ("The capital of France -", "Paris", " "),
        ("The capital of France —", "Paris", " "),
        ("The capital of France—", "Paris", ""),
        # a target may close too
        ("Paris", ".", ""),
        ("Paris", ", the capital", ""),
        ("Paris", "'s river", ""),
        ("Paris", "-based", ""),
        ("(Paris", ")", ""),
        ("100", "%", ""),
        # but numbers and quotations begin something
        ("It is", "-5 degrees", " "),
        ("It is", ".5", " "),
        ("The book is", "'Emma'", " "),
        ("The book is", '"Emma"', " "),
        ("The film is", "(untitled)", " "),
        # scripts without spaces
        ("法国的首都是", "巴黎", ""),
        ("日本の首都は「", "東京", ""),
        ("「東京", "」です", ""),
        ("首都は、", "東京", ""),
        ("ไทย", "กรุงเทพ", ""),
        ("首都是", "Paris", " "),
        ("The capital is", "東京", " "),
        ("한국의 수도는", "서울", " "),  # Korean has spaces
        ("", "Paris", ""),
        ("The capital is", "", ""),
    ],
)
def test_rule(prompt, target, expected):
    assert separator(prompt, target) == expected


def test_fill_puts_the_spans_where_the_characters_are():
    text = Text.fill("Ask {} about", "Zoë", "food")
    assert text.string == "Ask Zoë about food"
    assert text.string[slice(*text.subject)] == "Zoë"
    assert text.string[text.target :] == "food"
    assert Text.fill("Ask {}", "Zoë").target is None


def test_fill_takes_the_slot_of_the_template_not_of_the_subject():
    text = Text.fill("Ask {} now", "a {} b", "x")
    assert text.string == "Ask a {} b now x"
    assert text.string[slice(*text.subject)] == "a {} b"
