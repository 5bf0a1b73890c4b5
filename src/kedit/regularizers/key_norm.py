"""Holding the norm of the subject's attention keys: what SADR is compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kedit.models import Site
from kedit.regularizers.base import ForwardRecord, Needs, WithGamma, blocks_from


@dataclass(frozen=True, kw_only=True)
class KeyNorm(WithGamma):
    """Keep the attention keys of the subject's last token as long as they were.

    A head attends more to a token whose key has grown, whoever asks. With k the current and k⁰ the original key of the
    subject's last token, per context j, block l and key head h::

        penalty = γ · mean_j Σ_l Σ_h (‖k_lh‖ / ‖k⁰_lh‖ - 1)²

    SADR's published code computes an attention-key norm term beside its own (arXiv:2502.14838); this is the relative form
    of the idea, so that one γ serves blocks with keys of different length. It restrains every head, and says nothing of
    where keys point.

    Attributes:
        gamma: γ, or ``"auto"`` (:class:`WithGamma`); there is no preset.

    Raises:
        ConfigError: γ is negative or not finite.
    """

    @property
    def name(self) -> str:
        """``"key_norm"``."""
        return "key_norm"

    def needs(self, site: Site) -> Needs:
        """The subject's attention keys in the blocks above the edit."""
        return Needs(keys=blocks_from(site.layer if site.kind == "attention" else site.layer + 1))

    def penalty(self, now: ForwardRecord, before: ForwardRecord) -> Tensor:
        """γ · mean over contexts of the squared relative change of the norms, [E]."""
        total = now.rewrite.subject.new_zeros(now.num_edits, dtype=torch.float32)
        for layer, keys in now.rewrite.keys.items():
            growth = keys.norm(dim=-1) / before.rewrite.keys[layer].norm(dim=-1).clamp(min=1e-12) - 1
            total = total + now.rewrite.mean_per_edit(growth.square().sum(1), now.num_edits)
        return self.factor * total
