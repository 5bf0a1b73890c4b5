"""Observers of an edit: they look at the model before it is written and after."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

from kedit.edit import Edit
from kedit.editors.config import EditorConfig
from kedit.editors.facts import warn_of_alike
from kedit.editors.result import GuardLike, Timer
from kedit.editors.shared import warn_of_shared
from kedit.errors import ConfigError, IneffectiveEditWarning
from kedit.keys import routing
from kedit.models import ModelArch
from kedit.models.validate import check_takes_effect
from kedit.patch import EditPatch
from kedit.patch.delta import Delta, emptied
from kedit.patch.ledger import Ledger, check_writable
from kedit.prompts.encode import Request
from kedit.prompts.predictions import EditCheck, Prediction, predict
from kedit.utils.device_memory import HeapTrim
from kedit.utils.distributed import current_group
from kedit.utils.warning import warn_user
from kedit.values.scheduler import Engine

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NOISE = 1e-7  # share of a weight's norm up to which an update is rounding noise: float32 holds nothing smaller
ZERO_UPDATE_WARNING = (
    "The update is 0, so nothing was written. Either the loss was below stop_loss from the start; or steps is 1, which "
    "measures and changes nothing; or no gradient reached the value "
    "(above the last block no attention carries the subject on: edit a lower one; in float16 small gradients become 0: load the "
    "model in bfloat16 or float32); or ordinary keys use every direction (AlphaEdit: raise the threshold)."
)
_NAMED = 3  # edits in a warning
_SHORT = 10  # words of a target that the default numbers of steps suit
_STEPS_PER_WORD = 2  # of a longer one, as measured in docs/facts.md
_HINTS = {
    "steps": "more steps",
    "clamp": "a larger clamp",
    "moment_weight": "a smaller moment_weight",
    "threshold": "a larger threshold",
    "layers": "another layer",
}


def check_guard(guard: object) -> None:
    """Raise :class:`ConfigError` where a guard is none."""
    if guard is not None and not isinstance(guard, GuardLike):
        raise ConfigError(f"guard must be a kedit.Guard, not {guard!r}.")


def check_weights(arch: ModelArch, layers: Sequence[int]) -> None:
    """Raise where an edited weight cannot be written, or a change of it does not arrive."""
    weights = {layer: arch.weights(layer) for layer in layers}
    for weight in chain.from_iterable(weights.values()):
        check_writable(weight)
    warn_of_shared(arch.model, [*chain.from_iterable(weights.values())])
    touched = Ledger.of(arch.model).touched  # an edit of these has taken effect before
    check_takes_effect(arch, [i for i in layers if not any(weight.name in touched for weight in weights[i])])


class Observers:
    """The routing of experts, a guard, and the check whether the model says the targets.

    Making one measures the model as it is before the edit; :meth:`measure_again` measures the edited one.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        edits: Sequence[Edit],
        requests: Sequence[Request],
        config: EditorConfig,
        timer: Timer,
        *,
        guard: GuardLike | None = None,
        ask: bool = True,
    ) -> None:
        """Measure the model before the edit; ``ask`` whether it says the targets, before and after."""
        self.engine, self.arch, self.tokenizer, self.requests = engine, engine.arch, tokenizer, requests
        self.config, self.timer = config, timer
        self.edits = edits
        self._before = self._predictions() if ask else None
        if self._before is not None and current_group().leads:
            warn_of_alike(edits, self._before)
        self._watcher = None if guard is None else guard.watch(self.arch.model, tokenizer, self.edits)
        self._shares = routing.shares(self.arch, requests, config.layers)

    def measure_again(self, patch: EditPatch) -> dict[str, Any]:
        """Measure the model that carries ``patch``; notes scores and predictions in its provenance.

        Returns:
            The fields ``guard``, ``routes``, ``rounding`` and ``checks`` of the :class:`~kedit.editors.result.EditResult`.

        Raises:
            KEditError: the guard refuses the edit.
        """
        deltas, ledger = patch.deltas, Ledger.of(self.arch.model)
        changes = any(delta.norm for delta in deltas.values())
        routes = routing.check(self.arch, self.requests, self._shares, deltas) if changes else []
        if self._watcher is not None:
            with self.timer.stage("guard"):
                patch.provenance["scores"] = self._watcher.check(deltas).scores
        return {
            "guard": None if self._watcher is None else self._watcher.report,
            "routes": routes,
            "checks": self._check(patch),
            "rounding": {name: ledger.rounding(name) / max(delta.norm, 1e-30) for name, delta in deltas.items()},
        }

    def _predictions(self) -> list[Prediction] | None:
        """Ask the model for the targets of the edits; ``None``, with a warning, where it cannot be asked."""
        mine: list[Prediction] | None = None
        try:
            with self.timer.stage("check"):
                mine = predict(self.arch, self.tokenizer, self.edits, tokens=self.engine.used)
        except Exception as error:
            warn_user(
                f"What the model says of the edits was not checked: {type(error).__name__}: {error}. The edits are written "
                "all the same; ask the model yourself, or call editor.check(edits)."
            )
        return current_group().broadcast(mine)  # so that all processes tell the same

    def _check(self, patch: EditPatch) -> list[EditCheck]:
        after = None if self._before is None else self._predictions()
        if self._before is None or after is None:
            return []
        patch.provenance["before"] = [prediction.to_dict() for prediction in self._before]
        patch.provenance["after"] = [prediction.to_dict() for prediction in after]
        checks = [EditCheck(*each) for each in zip(self.edits, self._before, after, strict=True)]
        if current_group().leads:
            warn_of_ineffective(checks, self.config)
        return checks


def without_noise(arch: ModelArch, deltas: Mapping[str, Delta]) -> dict[str, Delta]:
    """The updates as they are; or empty, with a warning, where none is more than the rounding noise of its weight."""
    for name, delta in deltas.items():
        weight = arch.weight_of(name).stored
        dtype = torch.promote_types(weight.dtype, torch.float32)
        if delta.norm > NOISE * float(torch.linalg.vector_norm(weight, dtype=dtype)):
            return dict(deltas)
    warn_user(ZERO_UPDATE_WARNING)
    return {name: emptied(delta) for name, delta in deltas.items()}


@contextmanager
def applied(patch: EditPatch, model: PreTrainedModel) -> Iterator[None]:
    """Apply a patch for the block; where the block raises or is interrupted, take it back."""
    ledger = Ledger.of(model)
    carried = ledger.carries(patch)
    try:
        patch.apply(model)
        yield
        HeapTrim.after_apply()
    except BaseException:
        if not carried and ledger.carries(patch):
            patch.revert(model)
        raise


def warn_of_ineffective(checks: Sequence[EditCheck], config: EditorConfig) -> None:
    """Warn, once, of the edits whose target the edited model does not say."""
    missed = [check for check in checks if not check.after.said]
    if not missed:
        return
    named = [f"{c.edit.text!r} → {c.edit.target_new!r}, but it says {c.after.shown!r}" for c in missed[:_NAMED]]
    more = [f"and {len(missed) - _NAMED} more"] if len(missed) > _NAMED else []
    count = "The edited model does not say what the edit asks for"
    if len(checks) > 1:
        count = f"The edited model does not say what {len(missed)} of {len(checks)} edits ask for"
    hints = [hint for name, hint in _HINTS.items() if hasattr(config, name)]
    words = max(len(check.edit.target_new.split()) for check in missed)
    if words > _SHORT and config.steps < _STEPS_PER_WORD * words:
        hints[0] += (
            f" (a target of {words} words takes {_STEPS_PER_WORD * words} or more, and memit reaches it sooner than rome)"
        )
    if len(checks) > 1:
        hints.append("fewer edits at once (a later edit can undo an earlier one)")
    warn_user(
        f"{count}: {'; '.join([*named, *more])}. Try {', '.join(hints[:-1])} or {hints[-1]}.", IneffectiveEditWarning
    )
