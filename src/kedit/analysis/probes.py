"""Probes of one case in as few prompts as they need, asked many times over in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kedit.errors import EditError
from kedit.evaluation.cases import EditCase, Kind, Probe
from kedit.evaluation.probing import WATCHED, probe_text
from kedit.evaluation.statistics import Floats
from kedit.models import ModelArch
from kedit.prompts.likelihood import last_logits
from kedit.prompts.tokenize import TokenizedPrompt, context_limit, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ProbeTokens:
    """A probe in whose context the edited subject stands, in tokens.

    Attributes:
        case: id of its case.
        probe: the question.
        right: prompt and right answer; ``right.subject_last`` is the last token of the subject's last mention.
        wrong: prompt and wrong answer, if there is one.
    """

    case: str
    probe: Probe
    right: TokenizedPrompt
    wrong: TokenizedPrompt | None


def probe_tokens_by_case(
    arch: ModelArch,
    tokenizer: PreTrainedTokenizerBase,
    cases: Sequence[EditCase],
    kinds: Sequence[Kind | str] = WATCHED,
) -> dict[str, list[ProbeTokens]]:
    """Tokens of the probes that :func:`drift` asks, by case.

    Raises:
        EditError: no case has a probe of these kinds that mentions the edited subject.
    """
    asked = {case.id: probe_tokens(arch, tokenizer, case, kinds) for case in cases}
    if not any(asked.values()):
        raise EditError(
            f"None of the {len(asked)} cases has a probe of kind {', '.join(map(str, kinds))} that mentions the edited "
            "subject. Give cases with such probes."
        )
    return asked


def probe_tokens(
    arch: ModelArch, tokenizer: PreTrainedTokenizerBase, case: EditCase, kinds: Sequence[Kind | str]
) -> list[ProbeTokens]:
    """The probes of some kinds that have a right answer and mention the edited subject."""
    chosen, texts = [], []
    for probe in case.probes:
        start = probe.prompt.rfind(case.edit.subject)
        if probe.kind in tuple(Kind(kind) for kind in kinds) and probe.right is not None and start >= 0:
            span = (start, start + len(case.edit.subject))
            chosen.append(probe)
            texts += [
                probe_text(tokenizer, probe, answer, span) for answer in (probe.right, probe.wrong or probe.right)
            ]
    rows = encode(tokenizer, texts, limit=context_limit(arch.model))
    return [
        ProbeTokens(case.id, probe, rows[2 * i], None if probe.wrong is None else rows[2 * i + 1])
        for i, probe in enumerate(chosen)
    ]


@dataclass(frozen=True)
class Questions:
    """The probes of one case as the model reads them.

    Attributes:
        inputs: different token rows, [N].
        answers: per probe its right, then its wrong answer: input, first place that is read, labels.
    """

    inputs: list[tuple[int, ...]]
    answers: list[tuple[int, int, tuple[int, ...]]]

    @classmethod
    def of(cls, probes: Sequence[ProbeTokens]) -> Questions:
        """Answers of one token share their probe's prompt."""
        numbers: dict[tuple[int, ...], int] = {}
        answers = []
        for probe in probes:
            assert probe.wrong is not None
            for row in (probe.right, probe.wrong):
                answers.append(_answer(row, numbers))
        return cls(list(numbers), answers)

    @property
    def positions(self) -> Tensor:
        """The tokens that predict an answer's, [N, R]; -1 where an input has fewer."""
        places: list[set[int]] = [set() for _ in self.inputs]
        for number, start, labels in self.answers:
            places[number].update(range(start, start + len(labels)))
        width = max(len(tokens) for tokens in places)
        return torch.tensor([sorted(tokens) + [-1] * (width - len(tokens)) for tokens in places])

    @torch.no_grad()
    def score(self, arch: ModelArch, ids: Tensor, mask: Tensor, count: int) -> Floats:
        """Probability of every answer (geometric mean over its tokens) in ``count`` copies of the inputs.

        Args:
            arch: the model, as it is.
            ids: the padded inputs, one copy after the other, [C·N, T].
            mask: which of them are tokens.
            count: C.

        Returns:
            [C, probes, 2]: of the right and of the wrong answer.
        """
        rows: list[int] = []
        columns: list[int] = []
        labels: list[int] = []
        owners: list[int] = []
        for copy in range(count):
            for owner, (number, start, answer) in enumerate(self.answers):
                rows += [copy * len(self.inputs) + number] * len(answer)
                columns += range(start, start + len(answer))
                labels += answer
                owners += [copy * len(self.answers) + owner] * len(answer)
        keep = torch.zeros(ids.shape, dtype=torch.bool)
        keep[rows, columns] = True
        places = (keep.flatten().cumsum(0) - 1).view(keep.shape)[rows, columns]
        logits = last_logits(arch, ids, mask, keep)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        picked = wide[places.to(wide.device), torch.tensor(labels, device=wide.device)].double().cpu().numpy()
        answers = count * len(self.answers)
        means = np.bincount(owners, picked, answers) / np.bincount(owners, minlength=answers)
        return np.exp(means).reshape(count, -1, 2)


def _answer(row: TokenizedPrompt, numbers: dict[tuple[int, ...], int]) -> tuple[int, int, tuple[int, ...]]:
    number = numbers.setdefault(row.ids[:-1], len(numbers))
    return number, row.prompt_last, row.labels
