"""Warnings that fail a test: kedit's own and those that its code causes, not deprecations inside dependencies."""

import types
import warnings

import pytest
from torch import nn

from kedit.errors import KEditWarning

CALLER = """
def call(module):
    return module(1)

def warn():
    import warnings
    warnings.warn("old", FutureWarning)
"""


class Renamed(nn.Module):
    """A module that has renamed an argument, and says so as transformers does: to the caller of ``forward``."""

    def forward(self, value):
        warnings.warn("`past_key_values` is deprecated", FutureWarning, stacklevel=2)
        return value


class Outer(nn.Module):
    """A dependency's module that calls another as it should not."""

    def __init__(self):
        super().__init__()
        self.inner = Renamed()

    def forward(self, value):
        return self.inner(value)


def caller(name):
    module = types.ModuleType(name)
    exec(CALLER, module.__dict__)
    return module


@pytest.mark.parametrize("name", ["kedit", "kedit.partial", "kedit.evaluation.decode"])
def test_what_kedit_calls_wrongly_is_an_error(name):
    with pytest.raises(FutureWarning, match="past_key_values"):
        caller(name).call(Renamed())
    with pytest.raises(FutureWarning, match="old"):
        caller(name).warn()


@pytest.mark.filterwarnings("default::FutureWarning:(peft|keditor|unit|test_warnings)")
def test_what_a_dependency_calls_wrongly_is_none():
    for name in ("peft.made", "keditor"):
        with pytest.warns(FutureWarning):
            assert caller(name).call(Renamed()) == 1
        with pytest.warns(FutureWarning):
            caller(name).warn()
    with pytest.warns(FutureWarning):
        assert caller("kedit.runner").call(Outer()) == 1


def test_kedits_own_warnings_are_errors_whoever_is_blamed():
    with pytest.raises(KEditWarning):
        warnings.warn("look", KEditWarning, stacklevel=2)
