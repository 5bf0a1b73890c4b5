"""Keep the list of the patches that a model carries: the only place that writes weights.

A weight is always ``cast(W₀ + Σ deltas)``, summed in the order of application in float32 (float64 for float64
weights; :func:`kedit.patch.delta.add_delta`). W₀ is kept once per touched weight, so any patch can be taken back, in any
order, bit for bit.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor

from kedit.errors import ArchitectureError, NonFiniteError, PatchMismatchError
from kedit.models import ModelArch, Weight, unwrap
from kedit.models.fingerprint import bit_sum
from kedit.patch.delta import Delta, add_delta, check_finite, sum_dtype
from kedit.utils.linalg import is_finite

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WRITABLE = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass
class _Entry:
    """One touched weight: its original, the deltas it carries by owner, and their running sum."""

    weight: Weight
    original: Tensor  # as stored
    version: int = 0
    bit_sum: int = 0
    rounded: Tensor | None = None  # as stored, the sum before the cast, where the cast loses something
    unrounded: Tensor | None = None  # the original before it was rounded, where that lost something
    deltas: dict[Hashable, Delta] = field(default_factory=dict)

    def start(self) -> Tensor:
        """The original as stored, in the dtype of the sum; a new tensor."""
        start = self.unrounded if self.unrounded is not None else self.original
        return start.to(self.weight.stored.device, sum_dtype(start.dtype), copy=True)

    def total(self) -> Tensor:
        """W₀ + Σ deltas as stored, in the dtype of the sum; a new tensor."""
        now = self.rounded if self.rounded is not None else self.weight.stored
        return now.to(self.weight.stored.device, sum_dtype(now.dtype), copy=True)

    def store(self, stored: Tensor, rounded: Tensor | None = None) -> None:
        """Write the weight and remember how it looks now."""
        _store(self.weight, stored)
        self.rounded = rounded
        self.mark()

    def mark(self) -> None:
        """Remember how the weight looks now."""
        self.version = self.weight.stored._version
        self.bit_sum = bit_sum(self.weight.stored)


class Ledger:
    """The patches on one model. Get it with :meth:`of`; editors and :class:`~kedit.EditPatch` use it for you."""

    _all: WeakKeyDictionary[PreTrainedModel, Ledger] = WeakKeyDictionary()

    def __init__(self, arch: ModelArch) -> None:
        self._model = ref(arch.model)  # a strong reference would keep every model alive for ever
        self._spec = arch.spec
        self._entries: dict[str, _Entry] = {}

    @classmethod
    def of(cls, model: PreTrainedModel) -> Ledger:
        """The ledger of ``model``, made on first use and dropped with the model."""
        model = unwrap(model)
        if model not in cls._all:
            cls._all[model] = cls(ModelArch(model))
        return cls._all[model]

    @property
    def touched(self) -> list[str]:
        """Names of the weights that differ from their originals."""
        return list(self._entries)

    @property
    def owners(self) -> list[Hashable]:
        """The owners of the applied deltas, in the order of application."""
        return list(dict.fromkeys(owner for entry in self._entries.values() for owner in entry.deltas))

    def carries(self, owner: Hashable) -> bool:
        """Return whether deltas of ``owner`` are applied."""
        return any(owner in entry.deltas for entry in self._entries.values())

    def original(self, name: str) -> Tensor | None:
        """The weight as it was before the first edit, as stored; ``None`` where it is untouched."""
        entry = self._entries.get(name)
        return None if entry is None else entry.original

    def rounding(self, name: str) -> float:
        """‖what was lost when the sum of a weight and its updates was rounded to the weight's dtype‖ (Frobenius)."""
        entry = self._entries.get(name)
        if entry is None or entry.rounded is None:
            return 0.0
        return float(torch.linalg.vector_norm(entry.rounded - entry.weight.stored.to(entry.rounded)))

    def apply(self, owner: Hashable, deltas: Mapping[str, Delta]) -> None:
        """Add deltas under the key ``owner``: all of them, or none where anything fails.

        Raises:
            NonFiniteError: a delta, or the weight it would give, is not finite.
            PatchMismatchError: a shape does not fit, a weight was changed by someone else, or ``owner`` is applied.
        """
        if self.carries(owner):
            raise PatchMismatchError("The model carries this patch already. Revert it before applying it again.")
        entries = {name: self._entry(name, delta) for name, delta in deltas.items()}
        totals = {}
        for name, delta in deltas.items():
            total = add_delta(
                entries[name].total(), check_finite(name, delta), transposed=entries[name].weight.transposed
            )
            totals[name] = total, cast_checked(name, total, entries[name].original.dtype)
        with self._restoring(entries):
            for name, entry in entries.items():
                total, stored = totals[name]
                self._entries[name] = entry
                entry.deltas[owner] = deltas[name]
                entry.store(stored, None if stored is total else total)
            self._note_siblings(entries)

    def revert(self, owner: Hashable) -> None:
        """Take the deltas of ``owner`` away; a weight without deltas is its original again, bit for bit."""
        entries = {name: entry for name, entry in self._entries.items() if owner in entry.deltas}
        for entry in entries.values():
            self._check_unchanged(entry)
        totals = {}
        for name, entry in entries.items():
            total = entry.start()
            for other, delta in entry.deltas.items():
                if other != owner:
                    add_delta(total, delta, transposed=entry.weight.transposed)
            totals[name] = total
        with self._restoring(entries):
            for name, entry in entries.items():
                del entry.deltas[owner]
                if entry.deltas:
                    stored = cast_checked(name, totals[name], entry.original.dtype)
                    entry.store(stored, None if stored is totals[name] else totals[name])
                else:
                    entry.store(entry.original)
                    del self._entries[name]
            self._note_siblings(entries)

    def revert_all(self) -> None:
        """Give every touched weight its original back, also where it was changed by someone else."""
        for name in list(self._entries):
            _store(self._entries[name].weight, self._entries[name].original)
            del self._entries[name]

    @contextmanager
    def provisional(self) -> Iterator[Provisional]:
        """Updates that hold inside the block and are gone afterwards, also after an exception."""
        changes = Provisional(self)
        try:
            yield changes
        finally:
            with _interrupts_held():
                for entry in changes.entries.values():
                    _store(entry.weight, entry.original)
                self._note_siblings(changes.entries)

    def _note_siblings(self, entries: Mapping[str, _Entry]) -> None:
        """Experts of one fused tensor share its version: what was written to one is no surprise to the others."""
        parameters = {id(entry.weight.parameter) for entry in entries.values()}
        for entry in self._entries.values():
            if id(entry.weight.parameter) in parameters:
                entry.version = entry.weight.stored._version

    def _copied(self, name: str) -> _Entry:
        """The weight as it is now."""
        weight, known = self._lookup(name), self._entries.get(name)
        check_writable(weight)
        weight.hold()
        rounded = None if known is None else known.rounded
        return _Entry(weight, weight.stored.clone(), rounded=rounded, unrounded=rounded)

    def _entry(self, name: str, delta: Delta) -> _Entry:
        entry = self._entries.get(name)
        if entry is None:
            entry = self._copied(name)
            entry.mark()
        else:
            self._check_unchanged(entry)
        if delta.shape != tuple(entry.weight.matrix.shape):
            raise PatchMismatchError(
                f"The update of {name} has shape {delta.shape}; the weight has {tuple(entry.weight.matrix.shape)} [O, I]. "
                "It was made for another model."
            )
        return entry

    def _lookup(self, name: str) -> Weight:
        model = self._model()
        assert model is not None, "a ledger does not outlive its model"
        return ModelArch(model, self._spec).weight_of(name)

    def _check_unchanged(self, entry: _Entry) -> None:
        name, original = entry.weight.name, entry.original
        try:
            weight = self._lookup(name)
        except ArchitectureError as error:
            raise PatchMismatchError(f"{name} is no longer where kedit edited it. {error}") from error
        stored = weight.stored
        if stored.shape != original.shape or stored.dtype != original.dtype:
            raise PatchMismatchError(
                f"{name} changed its shape or dtype since kedit edited it (now {stored.dtype}, then {original.dtype}). "
                "Revert edits before converting the model."
            )
        # An offloaded weight's parameter is an empty one that is made anew for every use.
        same = weight.parameter is entry.weight.parameter or weight.away is not None
        same = same and stored._version == entry.version
        if not same or bit_sum(stored) != entry.bit_sum:
            raise PatchMismatchError(
                f"{name} was written by something else since kedit edited it, so the edit cannot be added to or taken back "
                "exactly. Reload the model, or call kedit.Ledger.of(model).revert_all() to return to the weights before "
                "the first edit."
            )

    @contextmanager
    def _restoring(self, entries: Mapping[str, _Entry]) -> Iterator[None]:
        """Undo weights and bookkeeping where anything, Ctrl-C included, breaks in."""
        known = dict(self._entries)
        kept = {
            name: (
                dict(entry.deltas),
                entry.rounded,
                entry.weight.stored.clone() if entry.deltas else entry.original,
            )
            for name, entry in entries.items()
        }
        try:
            with _interrupts_held():  # one that came in meanwhile arrives here, when it ends
                yield
        except BaseException:
            with _interrupts_held():
                self._entries = known
                for name, entry in entries.items():
                    entry.deltas, rounded, stored = kept[name]
                    entry.store(stored, rounded)
                self._note_siblings(entries)
            raise


class Provisional:
    """Weights that are changed for a while; get it with :meth:`Ledger.provisional`.

    Updates are added as :meth:`Ledger.apply` adds them, so a weight has the bits that it will have once they are applied.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.entries: dict[str, _Entry] = {}

    def add(self, deltas: Mapping[str, Delta], *, anew: bool = False) -> None:
        """Add updates to the weights; with ``anew`` in place of all that were added to these weights before.

        Raises:
            NonFiniteError: a weight would not be finite.
            PatchMismatchError: a weight cannot be written in place.
        """
        for name, delta in deltas.items():
            if name not in self.entries:
                self.entries[name] = self._ledger._copied(name)
            entry = self.entries[name]
            total = add_delta(entry.start() if anew else entry.total(), delta, transposed=entry.weight.transposed)
            stored = cast_checked(name, total, entry.original.dtype)
            entry.rounded = None if stored is total else total
            _store(entry.weight, stored)


def check_writable(weight: Weight) -> None:
    """Raise :class:`PatchMismatchError` where a weight is not stored as numbers that can be changed in place."""
    if weight.writable:
        return
    place = f"in {weight.parameter.dtype}"
    if weight.packed or weight.wrapped:
        place = "packed, as quantization leaves it,"
    elif weight.overlaps:
        raise PatchMismatchError(
            f"Several numbers of {weight.name} share one place in memory (expand), so one of them cannot be written alone. Give "
            "the weight memory of its own: parameter.data = parameter.data.clone()."
        )
    raise PatchMismatchError(
        f"{weight.name} is stored {place} and cannot be written in place. Attach the edit instead (editor.propose(edit) and "
        "patch.attach(model)), or load the model in full precision."
    )


def cast_checked(name: str, total: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum in the weight's dtype, or :class:`NonFiniteError` where that holds NaN or infinity."""
    stored = total.to(dtype)
    if not is_finite(stored):
        raise NonFiniteError(
            f"{name} would hold NaN or infinite numbers in {dtype} after the update; nothing is written."
        )
    return stored


@torch.no_grad()
def _store(weight: Weight, stored: Tensor) -> None:
    weight.stored.copy_(stored)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Keep Ctrl-C back while weights are written, and deliver it at the end."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is None:
        yield  # interrupts only ever reach the main thread
        return
    arrived: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: arrived.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if arrived:
            signal.raise_signal(signal.SIGINT)
