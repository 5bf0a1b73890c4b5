"""Asks a model for the targets of edits: how likely each is, and what the model says on its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kedit.edit import Edit
from kedit.models import ModelArch
from kedit.models.hooks import inference_state
from kedit.prompts.contexts import BARE
from kedit.prompts.decode import continue_rows
from kedit.prompts.likelihood import Answer, score_rows
from kedit.prompts.tokenize import TokenizedPrompt, context_limit, encode, rewrite_texts
from kedit.utils.progress import Progress
from kedit.utils.validation import is_number

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXTS_UP_TO = 100  # edits; of a larger batch no continuations are generated
_BEYOND = 3  # tokens of a continuation beyond the target's number; each costs a forward pass, before and after
_CHUNK = 512  # edits between two steps of the progress bar
_LOGITS = 1 << 24  # numbers from the head per forward pass: less than the optimisation holds


@dataclass(frozen=True)
class Prediction:
    """The prediction of a model after the prompt of an edit.

    Attributes:
        probability: of the whole target: the product over its tokens.
        nll: mean negative log-likelihood of the target's tokens, in nats.
        said: whether the model, decoding greedily, says the target: every token of it is the likeliest one.
        first_choice: what the model says first, as far as it tells: its likeliest tokens up to the first one that is not the
            target's.
        text: the greedy continuation of the prompt, by 3 tokens more than the target has or until the model ends it; ``None``
            where more than 100 edits were asked at once.
    """

    probability: float
    nll: float
    said: bool
    first_choice: str
    text: str | None = None

    @property
    def shown(self) -> str:
        """The continuation, or the first choice where there is none."""
        return self.first_choice if self.text is None else self.text

    def describe(self, target: str) -> str:
        """One phrase for people."""
        return f"{self.shown!r} (probability of {target!r}: {percent(self.probability)})"

    def to_dict(self) -> dict[str, Any]:
        """JSON values; a number that is none is left out."""
        fields = {"probability": self.probability, "nll": self.nll}
        finite = {name: value for name, value in fields.items() if math.isfinite(value)}
        record = {**finite, "said": self.said, "first_choice": self.first_choice}
        return record if self.text is None else {**record, "text": self.text}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Prediction:
        """The inverse of :meth:`to_dict`; of a foreign record, what can be read."""
        first, text = record.get("first_choice"), record.get("text")
        return cls(
            _number(record.get("probability")),
            _number(record.get("nll")),
            record.get("said") is True,
            first if isinstance(first, str) else "",
            text if isinstance(text, str) else None,
        )


@dataclass(frozen=True)
class EditCheck:
    """The predictions for one edit, before anything was written and after everything was.

    Attributes:
        edit: the edit.
        before: of the model as it was; ``None`` where it is not known.
        after: of the edited model, with all other edits of the same call.
    """

    edit: Edit
    before: Prediction | None
    after: Prediction

    def lines(self) -> list[str]:
        """Before and after, a line each."""
        verdict = "" if self.after.said else "; NOT what was asked for"
        lines = [] if self.before is None else [f"before: {self.before.describe(self.edit.target_new)}"]
        return [*lines, f"after:  {self.after.describe(self.edit.target_new)}{verdict}"]


def predict(
    arch: ModelArch, tokenizer: PreTrainedTokenizerBase, edits: Sequence[Edit], *, tokens: int, texts: bool = True
) -> list[Prediction]:
    """Read what the model, as it is, predicts after each edit's bare prompt.

    The prompts run together, in evaluation mode and without gradient; nothing of the model is changed.

    Args:
        arch: the model.
        tokenizer: its tokenizer.
        edits: what to ask for.
        tokens: padded tokens per forward pass at most. Running out of memory halves it.
        texts: whether to generate continuations, of at most 100 edits.

    Raises:
        torch.OutOfMemoryError: not even one prompt fits.
    """
    rows = encode(
        tokenizer, [rewrite_texts(edit, (BARE,), tokenizer)[0] for edit in edits], limit=context_limit(arch.model)
    )
    continued = texts and len(edits) <= TEXTS_UP_TO
    with inference_state(arch.model), Progress(len(edits), "checking") as progress:
        while True:
            try:
                predictions: list[Prediction] = []
                for chunk in _chunks(rows):
                    answers = score_rows(arch, chunk, tokens=tokens, logits=_LOGITS)
                    said = _continued(arch, tokenizer, chunk, tokens) if continued else [None] * len(chunk)
                    predictions += [_prediction(tokenizer, *pair) for pair in zip(answers, said, strict=True)]
                    progress.advance(len(chunk))
                return predictions
            except torch.OutOfMemoryError:
                if tokens <= max(len(row.ids) for row in rows):
                    raise
            tokens //= 2
            torch.cuda.empty_cache()


def percent(probability: float) -> str:
    """A probability for people: small ones keep their digits."""
    if not math.isfinite(probability):
        return "not a number"
    return f"{probability:.1%}" if probability >= 0.001 else f"{100 * probability:.1g}%"


def _chunks(rows: Sequence[TokenizedPrompt]) -> Iterator[Sequence[TokenizedPrompt]]:
    return (rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK))


def _continued(
    arch: ModelArch, tokenizer: PreTrainedTokenizerBase, rows: Sequence[TokenizedPrompt], tokens: int
) -> list[str]:
    prompts = [row.ids[: row.target] for row in rows]
    lengths = [len(row.labels) + _BEYOND for row in rows]
    return [text for text, _ in continue_rows(arch, tokenizer, prompts, lengths, tokens=tokens)]


def _prediction(tokenizer: PreTrainedTokenizerBase, answer: Answer, text: str | None) -> Prediction:
    pairs = zip(answer.labels, answer.argmax, strict=True)
    same = next((i for i, (label, token) in enumerate(pairs) if label != token), len(answer.labels))
    first = str(tokenizer.decode(list(answer.argmax[: same + 1])))
    return Prediction(
        probability=math.exp(-answer.nll * len(answer.labels)),
        nll=answer.nll,
        said=same == len(answer.labels),
        first_choice=_trimmed(first),
        text=None if text is None else _trimmed(text),
    )


def _trimmed(text: str) -> str:
    return text.strip() or text


def _number(value: Any) -> float:
    return float(value) if is_number(value) else math.nan
