"""The updates of one call, one after the other, and the joined facts that they do not write yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from kedit.editors.result import Timer
from kedit.patch.delta import Delta, append, concatenate
from kedit.patch.ledger import Provisional
from kedit.prompts.encode import Request
from kedit.prompts.predictions import predict
from kedit.utils.distributed import current_group
from kedit.utils.warning import warn_user
from kedit.values.scheduler import Engine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Parts:
    """Updates of the same weights that follow one another, each made on the model as those before it left it."""

    def __init__(self, provisional: Provisional) -> None:
        self._provisional = provisional
        self._parts: dict[str, list[Delta]] = {}
        self._hidden: list[Mapping[str, Delta]] = []

    def add(self, deltas: Mapping[str, Delta]) -> None:
        """Put updates behind the others; the model carries them from :meth:`show` on."""
        for name, delta in deltas.items():
            append(self._parts.setdefault(name, []), delta)
        self._hidden.append(deltas)

    def show(self) -> None:
        """Let the model carry all updates so far."""
        while self._hidden:
            self._provisional.add(self._hidden.pop(0))

    def together(self) -> dict[str, Delta]:
        """The sum of the updates, by weight."""
        return {name: concatenate(each) for name, each in self._parts.items()}


def missed(engine: Engine, tokenizer: PreTrainedTokenizerBase, requests: Sequence[Request], timer: Timer) -> list[int]:
    """The numbers of the requests of which the model, as it is, does not say every fact.

    None, with a warning, where the model cannot be asked.
    """
    edits = [edit for request in requests for edit in request.edits]
    numbers: list[int] = []
    try:
        with timer.stage("check"):
            said = iter(predict(engine.arch, tokenizer, edits, tokens=engine.used, texts=False))
        numbers = [i for i, request in enumerate(requests) if not all([next(said).said for _ in request.edits])]
    except Exception as error:
        warn_user(f"Whether the model says all facts of each subject was not checked: {type(error).__name__}: {error}.")
    return current_group().broadcast(numbers)
