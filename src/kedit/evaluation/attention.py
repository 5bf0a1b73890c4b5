"""Measure where the last token looks: attention to the edited subject, and how far its rows have moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kedit.models import ModelArch
from kedit.prompts.tokenize import TokenizedPrompt, pad

EPS = 1e-8


@dataclass(frozen=True)
class AttentionToSubject:
    """The attention rows of one prompt's last token, [L, A, T], and the subject's column."""

    rows: Tensor
    column: int

    def measure(self, before: AttentionToSubject) -> dict[str, float]:
        """``subject``: mean weight on the subject's last token; ``drift``: KL(before ‖ now), summed over blocks and heads."""
        p, q = before.rows + EPS, self.rows + EPS
        drift = float((p * (p / q).log()).sum())
        return {"subject": float(self.rows[..., self.column].mean()), "drift": max(0.0, drift)}


@torch.no_grad()
def attention_to_subject(
    arch: ModelArch, rows: Sequence[TokenizedPrompt], *, tokens: int = 8192
) -> list[AttentionToSubject]:
    """The rows of the token before each target; ``row.subject_last`` is the subject's last token."""
    from kedit.capture import capture_attention

    fed = [row.ids[: row.target] for row in rows]
    order = sorted(range(len(rows)), key=lambda i: -len(fed[i]))
    measured: dict[int, AttentionToSubject] = {}
    while order:
        size = max(1, tokens // len(fed[order[0]]))
        batch, order = order[:size], order[size:]
        ids, mask = pad([fed[i] for i in batch])
        device = arch.input_device
        last = torch.tensor([[len(fed[i]) - 1] for i in batch], device=device)
        with capture_attention(arch.model, last, detach=True) as capture:
            fewer = {"logits_to_keep": 1} if arch.keeps_logits else {}
            arch.model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False, **fewer)
            stacked = torch.stack([capture.rows[layer][:, :, 0].cpu() for layer in sorted(capture.rows)], 1)
        for place, i in enumerate(batch):
            measured[i] = AttentionToSubject(stacked[place, :, :, : len(fed[i])].clone(), rows[i].subject_last)
    return [measured[i] for i in range(len(rows))]
