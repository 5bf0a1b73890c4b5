"""Hyper-parameters of editors."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from kedit.errors import ConfigError
from kedit.models.compute_copy import COMPUTE_DTYPES
from kedit.utils.validation import check_choice, check_number, check_whole, is_whole
from kedit.values.optimize import Objective

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")

# What a preset or rule says beside its own value of a hyper-parameter does not hold for a user's value: a step size that is
# given is absolute, steps that are given are not cut short, a weight that is given is not lowered.
_BELONGING = {"lr": "lr_relative", "steps": "patience", "moment_weight": "min_share", "l2": "min_share"}


def hyper(
    default: T,
    *,
    least: int = 0,
    above: float | None = None,
    below: float | None = None,
    choices: Collection[object] = (),
) -> T:
    """A field of an editor's ``Config``: its default, and the values that it may have.

    Args:
        default: also says the type: a whole number where it is an ``int``, else any number; or one of ``choices``.
        least: the smallest value, unless ``above`` is given.
        above: every value must be above this.
        below: every value must be below this.
        choices: all values, where they are few.
    """
    if choices:
        check: Any = partial(check_choice, choices=choices)
    elif is_whole(default):
        check = partial(check_whole, least=least)
    else:
        check = partial(check_number, least=least, above=above, below=below)
    return dataclasses.field(default=default, metadata={"check": check})


@dataclass(frozen=True, kw_only=True)
class EditorConfig:
    """Hyper-parameters, checked when made.

    Attributes:
        layers: blocks whose down-projection is changed, ascending; the value is optimised at the last.
        steps: forward passes of the optimisation at most, times the number of facts where several of one subject are joined.
        lr: Adam's step size.
        lr_relative: whether ``lr`` counts in units of ‖v₀‖ / √H, so that a step has a length of about ``lr`` · ‖v₀‖ in every
            model; the published step sizes are absolute.
        weight_decay: factor of ‖δ‖ / ‖v₀‖².
        kl_factor: factor of the KL divergence on "{subject} is a".
        clamp: bound of ‖δ‖ / ‖v₀‖.
        stop_loss: an edit whose loss falls below is finished.
        join_subjects: whether several facts of one subject become one value that has to say all of them; the published methods
            give each fact a value of its own, of which the last one written prevails.
        patience: with a regularizer, an edit that says its target (NLL at most ``stop_loss``) is also finished after so many
            steps in which its loss did not fall by 1%; 0: never (the published form).
        dtype: ``"float32"`` or ``"float64"`` for δ and its Adam state; ``None``: float64 for a float64 model, else float32.
        compute_dtype: of the forward and backward passes of the optimisation: ``"bfloat16"``, ``"float16"``, ``"float32"``, or
            ``"auto"``, which is bfloat16 where this device computes it clearly faster; ``None``: the model's own. Another
            dtype than the model's takes a copy of the model.
    """

    layers: tuple[int, ...]
    steps: int = hyper(25, least=1)
    lr: float = hyper(0.5, above=0)
    weight_decay: float = hyper(1e-3)
    kl_factor: float = hyper(0.0625)
    clamp: float = hyper(4.0, above=0)
    stop_loss: float = hyper(0.05)
    patience: int = hyper(0)
    dtype: str | None = hyper(None, choices=("float32", "float64", None))
    compute_dtype: str | None = hyper(None, choices=(*COMPUTE_DTYPES, None))
    lr_relative: bool = False
    join_subjects: bool = True

    def __post_init__(self) -> None:
        """Check every field that :func:`hyper` made, also where a child gives it another default."""
        given: object = self.layers
        layers = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str | Mapping) else (given,)
        for layer in layers:
            if not is_whole(layer) or layer < 0:
                raise ConfigError(f"A layer must be a whole number from 0, not {layer!r}.")
        if not layers or list(layers) != sorted(set(layers)):
            raise ConfigError(f"layers must be ascending block numbers without repeats, found {layers!r}.")
        object.__setattr__(self, "layers", layers)
        checked: set[str] = set()
        for kind in type(self).__mro__:
            for name, field in vars(kind).get("__dataclass_fields__", {}).items():
                if name not in checked and "check" in field.metadata:
                    field.metadata["check"](name, getattr(self, name))
                    checked.add(name)

    @classmethod
    def field_names(cls) -> set[str]:
        """Names of all hyper-parameters."""
        return {field.name for field in dataclasses.fields(cls)}

    @classmethod
    def check_names(cls, owner: str, names: Iterable[str]) -> None:
        """Raise :class:`ConfigError` where a name is no hyper-parameter of the editor ``owner``."""
        known = cls.field_names()
        for name in names:
            if name not in known:
                raise ConfigError(f"{owner} has no hyper-parameter {name!r}. It has {', '.join(sorted(known))}.")

    def replace(self, **changes: Any) -> Self:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in vars(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The configuration that :meth:`to_dict` described; missing fields have their defaults.

        Raises:
            ConfigError: a field is unknown or out of range.
        """
        cls.check_names(cls.__qualname__, values)
        fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        return cls(**fields)

    @classmethod
    def over(cls, values: Mapping[str, Any], given: Mapping[str, Any]) -> Self:
        """The hyper-parameters ``values`` of a preset or rule, with those that are ``given`` in their place."""
        replaced = {belonging for name, belonging in _BELONGING.items() if name in given}
        return cls.from_dict({**{key: value for key, value in values.items() if key not in replaced}, **given})

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
            patience=self.patience,
            settle=bool(getattr(self, "settle", False)),
            dtype=None if self.dtype is None else getattr(torch, self.dtype),
            compute_dtype=self.compute_dtype,
        )
