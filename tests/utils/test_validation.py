"""Checks of numbers and choices, and warnings that point at the user's line."""

import math
import types

import pytest

from kedit.errors import ConfigError, KEditWarning
from kedit.utils.validation import check_choice, check_number, check_whole, is_number, is_whole
from kedit.utils.warning import warn_user


@pytest.mark.parametrize(
    ("value", "whole", "number"),
    [
        (0, True, True),
        (-3, True, True),
        (1.0, False, True),
        (True, False, False),
        ("1", False, False),
        (None, False, False),
    ]
    + [(value, False, False) for value in (math.nan, math.inf, 1j)],
)
def test_kinds_of_numbers(value, whole, number):
    assert is_whole(value) is whole
    assert is_number(value) is number


def test_whole_numbers_within_bounds():
    assert [check_whole("n", 3, 3, 3), check_whole("n", -5)] == [3, -5]
    for value, least, most, words in (
        (2, 3, None, "of at least 3, not 2"),
        (4, 1, 3, "at least 1 and at most 3, not 4"),
    ):
        with pytest.raises(ConfigError, match=f"n must be a whole number {'' if least == 3 else 'of '}{words}"):
            check_whole("n", value, least, most)


@pytest.mark.parametrize(
    ("value", "bounds", "words"),
    [
        (-0.1, {}, "of at least 0"),
        (0, {"above": 0}, "above 0"),
        (1, {"below": 1}, "of at least 0 and below 1"),
        (math.nan, {"least": -1}, "of at least -1"),
        (True, {}, "not True"),
    ],
)
def test_numbers_out_of_bounds(value, bounds, words):
    with pytest.raises(ConfigError, match=words):
        check_number("x", value, **bounds)


def test_numbers_within_bounds():
    assert [check_number("x", 0), check_number("x", -1, above=-2), check_number("x", 0.5, below=1)] == [0, -1, 0.5]


def test_choices():
    check_choice("c", None, ("a", None))
    with pytest.raises(ConfigError, match="c is 'a', 'b' or None, not 'd'"):
        check_choice("c", "d", ("a", "b", None))


def test_a_warning_points_at_the_line_outside_kedit():
    inner = types.ModuleType("kedit.deep.inside")
    exec("def call(warn):\n    return [warn('look') for _ in 'x']", inner.__dict__)
    with pytest.warns(KEditWarning, match="look") as caught:
        inner.call(warn_user)
    assert caught[0].filename == __file__
