"""The rows of a table: which regularizers, and where their γ comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kedit.errors import ConfigError
from kedit.regularizers import make, takes_gamma
from kedit.regularizers.base import Regularizer
from kedit.utils.validation import is_number

BEST, AUTO, NONE = "best", "auto", "none"
ALL_HEADS = "adr"  # SADR on all heads, the paper's ablation


@dataclass(frozen=True)
class Part:
    """One regularizer of a row.

    Attributes:
        name: by which it is made.
        gamma: γ as a number or ``"auto"``; ``"best"``: chosen on development cases; ``None``: its default.
    """

    name: str
    gamma: float | str | None = None

    @classmethod
    def of(cls, text: str) -> Part:
        """``NAME``, ``NAME:auto``, ``NAME:best`` or ``NAME:0.5``; a regularizer whose γ has no default gets the best one."""
        name, colon, tail = text.rpartition(":")
        gamma = _gamma(tail) if colon else None
        if gamma is None:
            name = text
        if not name:
            raise ConfigError(f"{text!r} names no regularizer. Give names like sadr, sadr:auto, sadr:0.1 or relations.")
        made = cls(name, gamma)
        if gamma is None and made.takes_gamma and not is_number(_default(made)):
            return cls(name, BEST) if getattr(made.make(AUTO), "gamma", None) == AUTO else made
        if gamma is not None and not made.takes_gamma:
            raise ConfigError(f"The regularizer {name!r} has no γ. Leave out :{tail}.")
        if gamma != BEST:
            made.make()  # raises where it has no use for this γ, or cannot be made by its name
        return made

    @property
    def takes_gamma(self) -> bool:
        """Whether it can be made with a γ."""
        return self.name == ALL_HEADS or takes_gamma(self.name)

    def make(self, gamma: Any = None) -> Any:
        """The regularizer, with this γ in place of its own."""
        chosen = self.gamma if gamma is None else gamma
        fields: dict[str, Any] = {} if chosen is None else {"gamma": chosen}
        if self.name == ALL_HEADS:
            return make("sadr", select="all", **fields)
        return make(self.name, **fields)


@dataclass(frozen=True)
class Row:
    """A row: its label, and the regularizers; none of them for the plain editor.

    Attributes:
        label: as it was asked for, such as ``"sadr:auto"``.
        parts: the regularizers.
    """

    label: str
    parts: tuple[Part, ...] = ()

    @classmethod
    def of(cls, text: str) -> Row:
        """``"none"``, or one or several parts (:meth:`Part.of`) with ``+`` between them.

        Raises:
            ConfigError: a part is malformed or cannot be made, or two of them shall be given the best γ.
            UnknownNameError: there is no such regularizer.
        """
        label = text.strip()
        if label.lower() == NONE:
            return cls(NONE)
        row = cls(label, tuple(Part.of(part.strip()) for part in label.split("+")))
        if sum(part.gamma == BEST for part in row.parts) > 1:
            raise ConfigError(
                f"In {label!r} more than one γ would be chosen on development cases. Give all but one a number, or :auto."
            )
        return row

    @property
    def chooses_gamma(self) -> bool:
        """Whether a γ is chosen on development cases."""
        return any(part.gamma == BEST for part in self.parts)

    def regularizers(self, gamma: float | None = None) -> list[Regularizer]:
        """The regularizers, with ``gamma`` where one is to be chosen."""
        return [part.make(gamma if part.gamma == BEST else None) for part in self.parts]


def rows_of(texts: Sequence[str]) -> list[Row]:
    """The rows of a table in the given order, each once; raises as :meth:`Row.of`."""
    rows = {row.label: row for row in map(Row.of, texts)}
    if not rows:
        raise ConfigError("There is no row to run. Name regularizers, such as none,sadr,sadr:auto,relations.")
    return list(rows.values())


def _gamma(text: str) -> float | str | None:
    if text.lower() in (AUTO, BEST):
        return text.lower()
    try:
        return float(text)
    except ValueError:  # part of the name, as in my_file.py:MyClass
        return None


def _default(part: Part) -> Any:
    """γ of a regularizer that is made with its defaults; ``None`` where it cannot be."""
    try:
        made = part.make()
    except ConfigError:
        return None
    given = getattr(made, "gamma", None)
    return getattr(made, "usual_gamma", None) if given is None else given
