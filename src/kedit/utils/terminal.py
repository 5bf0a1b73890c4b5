"""Makes text from files and models safe to print on a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    r"""A text with every character that is not visible as its escape (``\x1b``, ``\n``, ``\ud800``): no colours, no lines."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def printable_lines(text: str) -> str:
    """The same, with its line breaks."""
    return "\n".join(map(printable, text.split("\n")))
