"""What holds for one call of an editor: hyper-parameters and regularizers from the user, the preset and the rules."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedit import presets
from kedit.arch import ModelArch, Site
from kedit.editors.config import EditorConfig
from kedit.errors import ConfigError
from kedit.pipeline import needs_of
from kedit.progress import logger
from kedit.regularizers.base import Needs, Regularizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Settings:
    """What holds for one call: hyper-parameters, regularizers with all their fields, sites, names of edited weights."""

    config: Any
    regularizers: Sequence[Regularizer]
    sites: tuple[Site, ...]
    names: tuple[str, ...]

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


def check_sites(owner: str, sites: object, *, optional: bool = False) -> tuple[Site, ...]:
    """The sites of an editor; :class:`ConfigError` where they are none (unless ``optional``) or something else."""
    if isinstance(sites, tuple) and all(isinstance(site, Site) for site in sites) and (sites or optional):
        return sites
    raise ConfigError(f"{owner}.sites() must return a tuple of kedit.arch.Site, at least one; it returned {sites!r}.")


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
