"""Probes of one case in as few prompts as they need, asked many times over in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kedit.analysis.drifting import Watched
from kedit.analysis.intervals import Floats
from kedit.arch import ModelArch
from kedit.batch import Row
from kedit.scoring import last_logits


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
    def of(cls, probes: Sequence[Watched]) -> Questions:
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
        width = max(len(found) for found in places)
        return torch.tensor([sorted(found) + [-1] * (width - len(found)) for found in places])

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


def _answer(row: Row, numbers: dict[tuple[int, ...], int]) -> tuple[int, int, tuple[int, ...]]:
    number = numbers.setdefault(row.ids[:-1], len(numbers))
    return number, row.prompt_last, row.labels
