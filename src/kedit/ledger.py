"""Which patches a model carries: the only place that writes weights.

A weight is always ``cast(W₀ + Σ deltas)``, summed in the order of application in float32 (float64 for float64
weights). W₀ is kept once per touched weight, so any patch can be taken back, in any order, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kedit.arch import ModelArch, Weight
from kedit.delta import Delta, check_finite
from kedit.errors import NonFiniteError, PatchMismatchError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class _Entry:
    """One touched weight: its original, the deltas it carries by owner, and their running sum."""

    weight: Weight
    original: Tensor  # as stored
    version: int
    rounded: Tensor | None = None  # [O, I], the sum before the cast, where the cast loses something
    deltas: dict[Hashable, Delta] = field(default_factory=dict)

    @property
    def total(self) -> Tensor:
        """W₀ + Σ deltas [O, I] in the dtype of the sum."""
        return self.rounded if self.rounded is not None else self.as_sum(self.weight.parameter.detach())

    def as_sum(self, stored: Tensor) -> Tensor:
        """A stored tensor as [O, I] in the dtype in which deltas are summed."""
        matrix = stored.T if self.weight.transposed else stored
        return matrix.to(torch.promote_types(stored.dtype, torch.float32))


class Ledger:
    """The patches on one model. Get it with :meth:`of`; editors and :class:`~kedit.EditPatch` use it for you."""

    _all: WeakKeyDictionary[PreTrainedModel, Ledger] = WeakKeyDictionary()

    def __init__(self, arch: ModelArch) -> None:
        self._lookup: Callable[[str], Weight] = arch.weight_of
        self._entries: dict[str, _Entry] = {}

    @classmethod
    def of(cls, model: PreTrainedModel) -> Ledger:
        """The ledger of ``model``, made on first use and dropped with the model."""
        if model not in cls._all:
            cls._all[model] = cls(ModelArch(model))
        return cls._all[model]

    @property
    def touched(self) -> list[str]:
        """Names of the weights that differ from their originals."""
        return list(self._entries)

    def carries(self, owner: Hashable) -> bool:
        """Whether deltas of ``owner`` are applied."""
        return any(owner in entry.deltas for entry in self._entries.values())

    def apply(self, owner: Hashable, deltas: Mapping[str, Delta]) -> None:
        """Add deltas under the key ``owner``: all of them, or none where anything fails.

        Raises:
            NonFiniteError: a delta, or the weight it would give, is not finite.
            PatchMismatchError: a shape does not fit, or a weight was changed by someone else.
        """
        entries = {name: self._entry(name, delta) for name, delta in deltas.items()}
        totals = {}
        for name, delta in deltas.items():
            totals[name] = _add(entries[name].total, check_finite(name, delta))
            _check_total(name, totals[name], entries[name].original.dtype)
        with self._restoring(entries):
            for name, entry in entries.items():
                self._write(entry, totals[name])
                entry.deltas[owner] = deltas[name]
                self._entries[name] = entry

    def revert(self, owner: Hashable) -> None:
        """Take the deltas of ``owner`` away; a weight without deltas is its original again, bit for bit."""
        entries = {name: entry for name, entry in self._entries.items() if owner in entry.deltas}
        for entry in entries.values():
            _check_unchanged(entry)
        with self._restoring(entries):
            for name, entry in entries.items():
                del entry.deltas[owner]
                if entry.deltas:
                    total = entry.as_sum(entry.original)
                    for delta in entry.deltas.values():
                        total = _add(total, delta)
                    self._write(entry, total)
                else:
                    _store(entry.weight, entry.original)
                    del self._entries[name]

    def revert_all(self) -> None:
        """Give every touched weight its original back, also where it was changed by someone else."""
        for name in list(self._entries):
            _store(self._entries[name].weight, self._entries[name].original)
            del self._entries[name]

    @contextmanager
    def scratch(self, weights: list[Weight]) -> Iterator[None]:
        """Weights that may be overwritten inside and are as before afterwards, also after an exception."""
        copies = [weight.parameter.detach().clone() for weight in weights]
        try:
            yield
        finally:
            for weight, copy in zip(weights, copies, strict=True):
                _store(weight, copy)
                if weight.name in self._entries:
                    self._entries[weight.name].version = weight.parameter._version

    def _entry(self, name: str, delta: Delta) -> _Entry:
        entry = self._entries.get(name)
        if entry is None:
            weight = self._lookup(name)
            original = weight.parameter.detach().clone()
            entry = _Entry(weight, original, weight.parameter._version)
        _check_unchanged(entry)
        if delta.shape != tuple(entry.weight.matrix.shape):
            raise PatchMismatchError(
                f"The update of {name} has shape {delta.shape}; the weight has {tuple(entry.weight.matrix.shape)} [O, I]. "
                "It was made for another model."
            )
        return entry

    @staticmethod
    def _write(entry: _Entry, total: Tensor) -> None:
        stored = total.T if entry.weight.transposed else total
        _store(entry.weight, stored)
        entry.rounded = None if entry.original.dtype == total.dtype else total
        entry.version = entry.weight.parameter._version

    @contextmanager
    def _restoring(self, entries: Mapping[str, _Entry]) -> Iterator[None]:
        """Undo weights and bookkeeping where anything, Ctrl-C included, breaks in."""
        known = dict(self._entries)
        kept = {
            name: (dict(entry.deltas), entry.rounded, entry.weight.parameter.detach().clone())
            for name, entry in entries.items()
        }
        try:
            yield
        except BaseException:
            self._entries = known
            for name, entry in entries.items():
                entry.deltas, entry.rounded, stored = kept[name]
                _store(entry.weight, stored)
                entry.version = entry.weight.parameter._version
            raise


def _add(total: Tensor, delta: Delta) -> Tensor:
    return total + delta.to(total.device, total.dtype).dense


@torch.no_grad()
def _store(weight: Weight, stored: Tensor) -> None:
    weight.parameter.copy_(stored)


def _check_total(name: str, total: Tensor, dtype: torch.dtype) -> None:
    if not torch.isfinite(total.to(dtype)).all():
        raise NonFiniteError(
            f"{name} would hold NaN or infinite numbers in {dtype} after the update; nothing is written."
        )


def _check_unchanged(entry: _Entry) -> None:
    parameter = entry.weight.parameter
    if parameter.shape != entry.original.shape or parameter.dtype != entry.original.dtype:
        raise PatchMismatchError(
            f"{entry.weight.name} changed its shape or dtype since kedit edited it (now {parameter.dtype}, then "
            f"{entry.original.dtype}). Revert edits before converting the model."
        )
    if parameter._version != entry.version:
        raise PatchMismatchError(
            f"{entry.weight.name} was written by something else since kedit edited it, so the edit cannot be added to or "
            "taken back exactly. Reload the model, or call revert_all() to return to the weights before the first edit."
        )
