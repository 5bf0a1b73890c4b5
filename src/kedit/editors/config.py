"""Hyper-parameters that all value-optimising editors share."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kedit.errors import ConfigError
from kedit.optimise import Objective

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, kw_only=True)
class EditorConfig:
    """Hyper-parameters, checked when made.

    Attributes:
        layers: blocks whose down-projection is changed, ascending; the value is optimised at the last.
        steps: forward passes of the optimisation at most.
        lr: Adam's step size.
        weight_decay: factor of ‖δ‖ / ‖v₀‖².
        kl_factor: factor of the KL divergence on "{subject} is a".
        clamp: bound of ‖δ‖ / ‖v₀‖.
        stop_loss: an edit whose loss falls below is finished.
        dtype: ``"float32"`` or ``"float64"`` for δ and its Adam state; ``None``: float64 for a float64 model, else float32.
    """

    layers: tuple[int, ...]
    steps: int = 25
    lr: float = 0.5
    weight_decay: float = 1e-3
    kl_factor: float = 0.0625
    clamp: float = 4.0
    stop_loss: float = 0.05
    dtype: str | None = None

    def __post_init__(self) -> None:
        """Check every field."""
        given: object = self.layers
        layers = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str | Mapping) else (given,)
        for layer in layers:
            if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
                raise ConfigError(f"A layer must be a whole number from 0, not {layer!r}.")
        if not layers or list(layers) != sorted(set(layers)):
            raise ConfigError(f"layers must be ascending block numbers without repeats, found {layers!r}.")
        object.__setattr__(self, "layers", layers)
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise ConfigError(f"steps must be a whole number of at least 1, not {self.steps!r}.")
        self.check_range("lr", above=0.0)
        self.check_range("clamp", above=0.0)
        for name in ("weight_decay", "kl_factor", "stop_loss"):
            self.check_range(name)
        if self.dtype not in (None, "float32", "float64"):
            raise ConfigError(f"dtype is 'float32', 'float64' or None, not {self.dtype!r}.")

    def check_range(self, name: str, *, above: float | None = None) -> None:
        """Raise unless the field is a finite number of at least 0 (or above ``above``)."""
        value = getattr(self, name)
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value < 0 or (above is not None and value <= above):
            expected = f"above {above:g}" if above is not None else "of at least 0"
            raise ConfigError(f"{name} must be a finite number {expected}, not {value!r}.")

    @classmethod
    def field_names(cls) -> set[str]:
        """Names of all hyper-parameters."""
        return {field.name for field in dataclasses.fields(cls)}

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}

    @property
    def objective(self) -> Objective:
        """The part that the optimisation needs."""
        return Objective(
            steps=self.steps,
            lr=self.lr,
            weight_decay=self.weight_decay,
            kl_factor=self.kl_factor,
            clamp=self.clamp,
            stop_loss=self.stop_loss,
            settle=bool(getattr(self, "settle", False)),
            dtype=None if self.dtype is None else getattr(torch, self.dtype),
        )
