"""SADR: selective attention drift restriction (Wang et al., ICLR 2025, arXiv:2502.14838)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from kedit.capture.divergence import row_divergence
from kedit.errors import ConfigError
from kedit.models import Site
from kedit.regularizers.base import Activations, ForwardRecord, Needs, WithGamma, blocks_from
from kedit.utils.validation import check_choice, check_number

_Select = Literal["max", "all"]
_Divergence = Literal["kl", "js", "l2"]


@dataclass(frozen=True, kw_only=True)
class SADR(WithGamma):
    """Keep the last prompt token's attention where it was, for the heads that come to over-attend the subject.

    With p the original and q the current attention row of the last prompt token, per context j, block l and head h,
    and s the column of the subject's last token::

        penalty = γ · mean_j Σ_l Σ_h 1[q_lh(s) > max_h' p_lh'(s)] · D(p_lh, q_lh)

    The original rows are those of step 0; the mask is evaluated anew at every step.

    Attributes:
        gamma: γ; ``None`` takes the preset of the editor and model, and without one, as ``"auto"``, the optimisation finds the
            least drift among the values that say the target, which needs no γ (:class:`WithGamma`).
        select: ``"max"`` is the mask above; ``"all"`` restrains all heads (the ablation "ADR").
        divergence: D: ``"kl"`` (original ‖ current), ``"js"``, or ``"l2"``, the squared distance.
        exact: use the exact KL instead of the published form, which adds ε to both rows; its gradient does not
            vanish where q < ε.
        eps: ε of the published form; also in ``"js"``.
        layers: first and last block to restrain, as far as they are above the edit; ``None``: all above the edit.

    Raises:
        ConfigError: a field is out of range.
    """

    select: _Select = "max"
    divergence: _Divergence = "kl"
    exact: bool = False
    eps: float = 1e-8
    layers: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """``"sadr"``."""
        return "sadr"

    def __post_init__(self) -> None:
        """Check the fields."""
        super().__post_init__()
        check_choice("SADR.select", self.select, get_args(_Select))
        check_choice("SADR.divergence", self.divergence, get_args(_Divergence))
        if self.exact and self.divergence != "kl":
            raise ConfigError(
                f"SADR.exact is a form of the divergence 'kl'; with {self.divergence!r} it has no meaning."
            )
        check_number("SADR.eps", self.eps, above=0)
        if self.layers is not None:
            layers = tuple(self.layers) if isinstance(self.layers, Iterable) else ()
            if len(layers) != 2 or not all(type(i) is int for i in layers) or not 0 <= layers[0] <= layers[1]:
                raise ConfigError(f"SADR.layers is (first, last) with 0 <= first <= last, not {self.layers!r}.")
            object.__setattr__(self, "layers", layers)

    def needs(self, site: Site) -> Needs:
        """Attention rows of the blocks above the edit, within ``layers``.

        Raises:
            ConfigError: ``layers`` end below the edit.
        """
        above = site.layer if site.kind == "attention" else site.layer + 1
        first, last = self.layers if self.layers is not None else (above, None)
        if last is not None and last < above:
            raise ConfigError(
                f"SADR.layers {self.layers} end below the edit: attention changes from block {above} on. Choose later blocks."
            )
        return Needs(attention=blocks_from(max(first, above), last))

    def penalty(self, now: ForwardRecord, before: ForwardRecord) -> Tensor:
        """γ · mean over contexts of the (selected) drift, [E]."""
        return self.factor * self.drift(now.rewrite, before.rewrite, now.num_edits)

    def drift(self, now: Activations, before: Activations, num_edits: int) -> Tensor:
        """The penalty without γ: mean over contexts, sum over blocks and heads, [E]."""
        if self.layers is not None and not now.attention:
            raise ConfigError(f"SADR.layers {self.layers} lie above the model's last block. Choose lower blocks.")
        total = now.subject.new_zeros(num_edits, dtype=torch.float32)
        alike: dict[tuple[object, ...], list[int]] = {}
        for layer, rows in now.attention.items():
            alike.setdefault((rows.shape, rows.dtype), []).append(layer)
        # All blocks of one shape at once: many small operations cost more than the arithmetic.
        for layers in alike.values():
            per_head = row_divergence(
                torch.stack([now.attention[layer] for layer in layers], 2),
                torch.stack([before.attention[layer] for layer in layers], 2),
                divergence=self.divergence,
                exact=self.exact,
                eps=self.eps,
                subject_column=now.subject if self.select == "max" else None,
            )
            total = total + now.mean_per_edit(per_head.sum((1, 2)), num_edits)
        return total
