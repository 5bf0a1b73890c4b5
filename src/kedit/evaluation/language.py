"""Is it still a language model: n-gram entropy, tf-idf similarity, perplexity and KL drift on plain text."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kedit.errors import EditError
from kedit.models import ModelArch
from kedit.prompts.likelihood import last_logits
from kedit.prompts.tokenize import context_limit, pad

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXT_TOKENS = 512  # of plain text, where the user sets no other number
WINDOW = 256


def words(text: str) -> list[str]:
    """Words and punctuation marks, one by one (close to NLTK's word_tokenize, which the published code uses)."""
    return re.findall(r"\w+(?:'\w+)?|[^\w\s]", text)


def n_gram_entropy(text: str) -> float:
    """½ (⅔ H₂ + 4⁄3 H₃) in bits, Hₙ the entropy of the text's word n-grams; low where a text repeats itself."""
    tokens = words(text)
    entropies = []
    for n in (2, 3):
        counts = Counter(zip(*(tokens[i:] for i in range(n)), strict=False))
        total = sum(counts.values())
        entropies.append(-sum(c / total * math.log2(c / total) for c in counts.values()) if total else 0.0)
    return (2 / 3 * entropies[0] + 4 / 3 * entropies[1]) / 2


class TfIdf:
    """Term weights from a collection of texts: tf · (ln((1 + N)/(1 + df)) + 1), vectors of length one."""

    def __init__(self, texts: Sequence[str]) -> None:
        self.total = len(texts)
        self.document_frequency = Counter(term for text in texts for term in set(_terms(text)))

    def vector(self, text: str) -> dict[str, float]:
        """The text's weights by term."""
        counts = Counter(_terms(text))
        weights = {
            term: count * (math.log((1 + self.total) / (1 + self.document_frequency[term])) + 1)
            for term, count in counts.items()
        }
        norm = math.sqrt(sum(value * value for value in weights.values()))
        return {term: value / norm for term, value in weights.items()} if norm else {}

    def similarity(self, one: str, other: str) -> float:
        """Cosine of two texts."""
        first, second = self.vector(one), self.vector(other)
        return sum(value * second.get(term, 0.0) for term, value in first.items())


def _terms(text: str) -> list[str]:
    return re.findall(r"\b\w\w+\b", text.lower())


@dataclass(frozen=True)
class Prose:
    """Plain text as token rows, each at most a window long."""

    rows: tuple[tuple[int, ...], ...]

    @classmethod
    def of(
        cls, arch: ModelArch, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], tokens: int = TEXT_TOKENS
    ) -> Prose:
        """The first ``tokens`` tokens of the texts, in windows; each text starts a window of its own."""
        width = min(WINDOW, context_limit(arch.model) or WINDOW)
        rows: list[tuple[int, ...]] = []
        left = tokens
        for text in texts:
            ids = tokenizer(text, verbose=False)["input_ids"]
            for start in range(0, len(ids), width):
                row = tuple(ids[start : start + width][:left])
                if len(row) > 1:
                    rows.append(row)
                    left -= len(row)
        if not rows:
            raise EditError("The plain text holds less than two tokens. Give more text, or none.")
        return cls(tuple(rows))

    @torch.no_grad()
    def log_probs(self, arch: ModelArch) -> Tensor:
        """Next-token log-probabilities at every place that has a next token, [N, V], on the model's output device."""
        parts = []
        for row in self.rows:
            ids, mask = pad([row[:-1]])
            logits = last_logits(arch, ids, mask, mask.bool())
            parts.append(logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1))
        return torch.cat(parts)

    def measure(self, now: Tensor, before: Tensor) -> dict[str, float]:
        """Perplexity, and mean over tokens of KL(before ‖ now)."""
        labels = torch.tensor([label for row in self.rows for label in row[1:]], device=now.device)
        nll = -now.gather(1, labels[:, None]).mean()
        kl = (before.exp() * (before - now)).sum(-1).mean()
        return {"perplexity": math.exp(float(nll)), "kl": max(0.0, float(kl))}
