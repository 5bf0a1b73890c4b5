"""Weights that several layers share."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from kedit.models import Weight
from kedit.utils.warning import warn_user


def warn_of_shared(model: nn.Module, weights: Sequence[Weight]) -> None:
    """Warn where an edited weight is that of another layer too, which the edit changes as well."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for weight in weights:
        known = names.get(id(weight.parameter), [])
        if len(known) > 1:
            warn_user(f"{' and '.join(known)} are one weight, so the edit changes all of them.")
