"""SADR's penalty on attention drift (arXiv:2502.14838), as its authors' code computes it.

    γ/N · Σ_j Σ_l Σ_h 1[ q_lh(s) > max_h' p_lh'(s) ] · Σ_i (p_i+ε) log((p_i+ε)/(q_i+ε)),   ε = 1e-8

p is the row of the model without δ, q the row with δ, both of the last token before the target; s is the subject's
last token; j runs over the N contexts (the KL prompt is not among them), l over all blocks, h over all heads.

Conventions: KL(original ‖ edited), the original without gradient; sum over blocks and heads, mean over contexts; ε is
added to both rows before anything else, without normalising again; p is fixed at δ = 0 (so the first step pays
nothing), the mask is judged anew at every step, per head against the largest p of *its block*; the sum runs over the
whole row, positions behind the last prompt token included, where p = q = 0.
"""

from torch import Tensor

from .common import Pass, Prompt

EPS = 1e-8


def penalty(
    prompts: list[Prompt], now: list[Pass], before: list[Pass], gamma: float, *, masked: bool = True, eps: float = EPS
) -> Tensor:
    """Give the penalty, γ included; with masked=False every head counts (the ablation ADR)."""
    total = 0.0
    for prompt, edited, original in zip(prompts, now, before, strict=True):
        for q_block, p_block in zip(edited.attentions, original.attentions, strict=True):
            p_rows = p_block[:, prompt.last].detach() + eps  # [A, T]
            q_rows = q_block[:, prompt.last] + eps  # [A, T]
            highest = p_rows[:, prompt.subject_last].max()
            for p, q in zip(p_rows, q_rows, strict=True):
                if not masked or q[prompt.subject_last] > highest:
                    total = total + (p * (p / q).log()).sum()
    return gamma * total / len(prompts)
