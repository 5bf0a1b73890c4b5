"""What long work says where there is no terminal."""

import logging

import pytest

from kedit.utils.progress import Progress, duration


@pytest.fixture
def lines(caplog, monkeypatch):
    """Every step may log a line; the clock is set by hand."""
    now = [0.0]
    monkeypatch.setattr("kedit.utils.progress.time.monotonic", lambda: now[0])
    caplog.set_level(logging.INFO, logger="kedit")

    def step(progress, seconds, steps=1):
        now[0] += seconds
        progress.advance(steps)
        return [record.getMessage() for record in caplog.records]

    return step


def test_a_line_a_minute_with_the_time_that_is_left(lines):
    with Progress(10, "evaluating", unit="case") as progress:
        assert lines(progress, 59.0) == []
        assert lines(progress, 61.0) == ["evaluating: 2 of 10 cases done, about 8 min left."]
        assert len(lines(progress, 30.0)) == 1
    with Progress(10, "optimising") as progress:
        assert lines(progress, 60.0, steps=0)[1:] == ["optimising: 0 of 10 edits done."]
    with Progress(None, "reading", unit="token") as progress:
        assert lines(progress, 60.0, steps=2000)[2:] == ["reading: 2,000 tokens done."]


def test_silence_where_bars_are_hidden(lines, monkeypatch):
    monkeypatch.setattr(Progress, "shown", False)
    with Progress(10, "evaluating") as progress:
        assert lines(progress, 600.0) == []


@pytest.mark.parametrize(("seconds", "text"), [(40, "40 s"), (720, "12 min"), (7500, "2 h 5 min")])
def test_durations(seconds, text):
    assert duration(seconds) == text
