"""Printing to a terminal: texts of others cannot control it, and output that it cannot take loses no work."""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import TextIO

_ERRORS = "kedit.printable"
_ASCII = {
    "→": "->",
    "↑": "^",
    "↓": "v",
    "✓": "*",
    "…": "...",
    "–": "-",
    "─": "-",
    "·": "*",
    "±": "+/-",
    "×": "x",
    "‖": "||",
    "≤": "<=",
    "≥": ">=",
    "γ": "gamma",
    "δ": "delta",
    "Δ": "Delta",
    "λ": "lambda",
    "ε": "epsilon",
}


def printable(text: str) -> str:
    r"""A text with every character that is not visible as its escape (``\x1b``, ``\n``, ``\ud800``): no colours, no lines."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def printable_lines(text: str) -> str:
    """The same, with its line breaks."""
    return "\n".join(map(printable, text.split("\n")))


def _replace(error: UnicodeError) -> tuple[str, int]:
    """The codec error handler: kedit's own symbols in ASCII, other characters as escapes."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(_ASCII.get(char) or char.encode("ascii", "backslashreplace").decode() for char in text), error.end


codecs.register_error(_ERRORS, _replace)


class Output(io.TextIOBase):
    """A text stream that never fails: what goes wrong is kept in ``error``, and what comes after it is dropped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.error: OSError | ValueError | None = None

    def write(self, text: str) -> int:
        """Write a text, or drop it after an error."""
        if self.error is None:
            try:
                self._stream.write(text)
            except (OSError, ValueError) as error:  # ValueError: the file is closed
                self.error = error
        return len(text)

    def flush(self) -> None:
        """Write what is buffered."""
        if self.error is None:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self.error = error

    def isatty(self) -> bool:
        """Return whether a terminal reads the stream."""
        return self.error is None and self._stream.isatty()

    def fileno(self) -> int:
        """The number of the file."""
        return self._stream.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The encoding of the stream."""
        return self._stream.encoding

    @property
    def failure(self) -> str | None:
        """The reason why output was lost; ``None`` where none was, or where the reader did not want more (``| head``)."""
        if self.error is None or (isinstance(self.error, OSError) and self.error.errno == errno.EPIPE):
            return None
        return str(self.error)


@contextlib.contextmanager
def lenient_output() -> Iterator[Output]:
    """Inside, printing to standard output and standard error never fails; yields standard output.

    Characters that an encoding lacks are replaced. Errors while writing, and streams that the caller closed, are survived.
    """
    before = sys.stdout, sys.stderr
    with contextlib.ExitStack() as stack:
        for stream in before:
            if isinstance(stream, io.TextIOWrapper):
                stack.callback(stream.reconfigure, errors=stream.errors)
                stream.reconfigure(errors=_ERRORS)
        out, err = (stack.enter_context(open(os.devnull, "w")) if stream is None else stream for stream in before)
        sys.stdout, sys.stderr = Output(out), Output(err)
        try:
            yield sys.stdout
        finally:
            made = sys.stdout, sys.stderr
            for output in made:
                output.flush()
            sys.stdout, sys.stderr = before
            if isinstance(made[0], Output) and made[0].error is not None:
                _drop_buffer(out)


def _drop_buffer(stream: TextIO) -> None:
    """Let a broken stream end quietly: the interpreter flushes it once more when it exits."""
    with contextlib.suppress(OSError, ValueError):
        number = os.open(os.devnull, os.O_WRONLY)
        os.dup2(number, stream.fileno())
        os.close(number)
