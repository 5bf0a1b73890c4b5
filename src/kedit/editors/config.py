"""Hyper-parameters of editors, and what holds for one call: those of the user, the preset and the rules."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kedit.editors import presets
from kedit.editors.solve_layers import needs_of
from kedit.errors import ConfigError
from kedit.models import ModelArch, Site
from kedit.regularizers.base import Needs, Regularizer
from kedit.utils.progress import logger
from kedit.values.optimize import Objective

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from typing_extensions import Self


@dataclass(frozen=True, kw_only=True)
class EditorConfig:
    """Hyper-parameters, checked when made.

    Attributes:
        layers: blocks whose down-projection is changed, ascending; the value is optimised at the last.
        steps: forward passes of the optimisation at most.
        lr: Adam's step size.
        lr_relative: whether ``lr`` counts in units of ‖v₀‖ / √H, so that a step has a length of about ``lr`` · ‖v₀‖ in every
            model; the published step sizes are absolute.
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
    lr_relative: bool = False

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

    def check_range(self, name: str, *, above: float | None = None, below: float | None = None) -> None:
        """Raise unless the field is a finite number of at least 0 (or above ``above``), and below ``below``."""
        value = getattr(self, name)
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or value < 0 or (above is not None and value <= above) or (below is not None and value >= below):
            expected = f"above {above:g}" if above is not None else "of at least 0"
            expected += "" if below is None else f" and below {below:g}"
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
            lr_relative=self.lr_relative,
            weight_decay=self.weight_decay,
            kl_factor=self.kl_factor,
            clamp=self.clamp,
            stop_loss=self.stop_loss,
            settle=bool(getattr(self, "settle", False)),
            dtype=None if self.dtype is None else getattr(torch, self.dtype),
        )


@dataclass(frozen=True)
class Settings:
    """What holds for one call: hyper-parameters, regularizers with all their fields, names of edited weights, sites of values."""

    config: Any
    regularizers: Sequence[Regularizer]
    names: tuple[str, ...]
    sites: tuple[Site, ...] = ()

    @property
    def needs(self) -> Needs:
        """What the regularizers want to see."""
        return needs_of(self.regularizers, self.sites)


def adapted(name: str, arch: ModelArch, regularizers: Sequence[str]) -> dict[str, Any]:
    """What the preset of an editor changes in its hyper-parameters where these regularizers are used."""
    preset = presets.find(name, arch)
    changes: dict[str, Any] = {}
    for regularizer in regularizers:
        found = {} if preset is None else preset.regularized.get(regularizer, {})
        changes |= {key: value for key, value in found.items() if key != "self"}
    return changes


def filled(name: str, arch: ModelArch, regularizer: Regularizer) -> Regularizer:
    """A regularizer with its missing fields from the preset of an editor."""
    preset = presets.find(name, arch)
    values = {} if preset is None else preset.regularized.get(regularizer.name, {}).get("self", {})
    missing = {key: value for key, value in values.items() if getattr(regularizer, key, 0) is None}
    if missing and dataclasses.is_dataclass(regularizer) and not isinstance(regularizer, type):
        found = dataclasses.replace(regularizer, **missing)
        logger.info("%s: %s from the preset.", found.name, missing)
        return found
    return regularizer


def check_fields(owner: str, config: type[EditorConfig], overrides: Mapping[str, Any]) -> None:
    """Raise :class:`ConfigError` where a hyper-parameter is not one of the editor's."""
    known = config.field_names()
    for name in overrides:
        if name not in known:
            raise ConfigError(f"{owner} has no hyper-parameter {name!r}. It has {', '.join(sorted(known))}.")


def check_sites(owner: str, sites: object) -> tuple[Site, ...]:
    """The sites of an editor; :class:`ConfigError` where they are none or something else."""
    if isinstance(sites, tuple) and all(isinstance(site, Site) for site in sites) and sites:
        return sites
    raise ConfigError(f"{owner}.sites() must return a tuple of kedit.models.Site, at least one; it returned {sites!r}.")


def describe_model(model: PreTrainedModel, arch: ModelArch) -> dict[str, Any]:
    """The model as a patch's provenance names it: no path of this machine."""
    source = str(getattr(model.config, "_name_or_path", "") or "")
    return {
        "name": Path(source).name if Path(source).exists() else source,
        "type": arch.model_type,
        "num_layers": arch.num_layers,
        "hidden": arch.hidden,
        "dtype": str(arch.dtype).removeprefix("torch."),
    }
