"""The base class of editors: it owns the steps of an edit and leaves to its children what each step computes."""

from __future__ import annotations

import functools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Concatenate, ParamSpec, TypeVar

import torch

from kedit.edit import Edit, as_edits
from kedit.editors import presets
from kedit.editors.config import EditorConfig, Settings, adapted, check_fields, describe_model, filled
from kedit.editors.memory import MemoryEstimate, dense_memory
from kedit.editors.result import EditResult, Gate
from kedit.editors.solve_layers import Timer, describe, overwrite
from kedit.errors import ConfigError, IneffectiveEditWarning, KEditWarning
from kedit.keys import routing
from kedit.models import ModelArch
from kedit.models.lock import editing, one_at_a_time
from kedit.models.offload import check_held
from kedit.models.validate import check_editable, check_model
from kedit.patch import EditPatch, fingerprints
from kedit.patch.delta import Delta, append, concatenate, emptied
from kedit.patch.ledger import Ledger, check_writable
from kedit.prompts.contexts import check_contexts, generate_contexts
from kedit.prompts.encode import Request, encode_edits
from kedit.prompts.predictions import EditCheck, Prediction, predict
from kedit.regularizers import Choice, resolve
from kedit.utils.device_memory import HeapTrim
from kedit.utils.distributed import current_group
from kedit.utils.progress import Progress
from kedit.values.memory import Footprint
from kedit.values.optimize import StepLog
from kedit.values.scheduler import Engine

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound="Editor")


def with_gradient(call: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Let a method work also where its caller has gradients switched off, one thread at a time."""

    @functools.wraps(call)
    def wrapped(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with editing(self.model), torch.inference_mode(False), torch.enable_grad():
            return call(self, *args, **kwargs)

    return wrapped


NOISE = 1e-7  # share of a weight's norm up to which an update is rounding noise: float32 holds nothing smaller
ZERO_UPDATE_WARNING = (
    "The update is 0, so nothing was written. Either the loss was below stop_loss from the start; or no gradient reached the value "
    "(above the last block no attention carries the subject on: edit a lower one; in float16 small gradients become 0: load the "
    "model in bfloat16 or float32); or ordinary keys use every direction (AlphaEdit: raise the threshold)."
)

# What a rule says beside its own value of a hyper-parameter does not hold for a user's value: a step size that is given is
# absolute, a weight that is given is not lowered.
_BELONGING = {"lr": "lr_relative", "moment_weight": "min_share", "l2": "min_share"}
_NAMED = 3  # edits in a warning
_HINTS = {
    "steps": "more steps",
    "clamp": "a larger clamp",
    "moment_weight": "a smaller moment_weight",
    "threshold": "a larger threshold",
    "layers": "another layer",
}


class Editor(ABC):
    """Writes facts into one model.

    Args:
        model: a causal language model; it is edited in place by :meth:`apply` and by nothing else.
        tokenizer: its fast tokenizer.
        config: all hyper-parameters; missing: the model's preset.
        contexts: templates with one ``{}`` each, the first of them ``"{}"``; missing: sampled from the model, seeded.
        overrides: single hyper-parameters, before preset and ``config``.

    Raises:
        ArchitectureError: the model's type is unknown.
        ConfigError: a hyper-parameter is out of range or unknown.
    """

    name: ClassVar[str]
    Config: ClassVar[type[EditorConfig]] = EditorConfig
    batched: ClassVar[bool] = False  # several edits become one update, solved together
    context_lengths: ClassVar[tuple[tuple[int, int], ...]] = ((10, 5),)  # (tokens, how many)
    context_seed: ClassVar[int] = 0
    _checks: bool = True  # whether apply asks the model before and after

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: EditorConfig | None = None,
        *,
        contexts: Sequence[str] | None = None,
        **overrides: Any,
    ) -> None:
        check_model(model)
        self.arch = ModelArch(model)
        self.model = self.arch.model
        check_held(self.model)
        _ = self.arch.head  # a model for another task has none
        self.tokenizer = tokenizer
        if not isinstance(getattr(self, "name", None), str):
            raise ConfigError(
                f"{type(self).__name__} has no name: give the class a string of that name, as others have."
            )
        check_fields(type(self).__name__, self.Config, overrides)
        if config is not None and not isinstance(config, self.Config):
            raise ConfigError(f"config must be a {type(self).__name__}.Config, not {type(config).__name__}.")
        self._given: dict[str, Any] = {**({} if config is None else dict(vars(config))), **overrides}
        self.config = self._configure([])
        self.engine = Engine(self.arch)
        self._contexts = None if contexts is None else check_contexts(contexts)

    # What a child supplies

    @abstractmethod
    def write(
        self, requests: Sequence[Request], settings: Settings, timer: Timer
    ) -> tuple[dict[str, Delta], list[list[StepLog]]]:
        """The updates that write ``requests`` into the model as it is, and the log; the weights are left as they are."""

    @abstractmethod
    def largest_wave(self, requests: Sequence[Request], settings: Settings) -> Footprint:
        """The memory that the optimisation holds at its peak."""

    # What users call

    @classmethod
    def preset(cls, model: PreTrainedModel) -> EditorConfig:
        """The hyper-parameters for a model where the user gives none."""
        return cls._preset_config(ModelArch(model), {})

    @property
    def contexts(self) -> tuple[str, ...]:
        """The context templates; sampled from the model on first use."""
        if self._contexts is None:
            self._contexts = generate_contexts(self.model, self.tokenizer, self.context_lengths, seed=self.context_seed)
        return self._contexts

    @with_gradient
    def apply(
        self, edits: Edit | Iterable[Edit], regularizer: Choice = None, *, guard: Gate | None = None
    ) -> EditResult:
        """Write one edit or many into the model.

        Editors that solve jointly write many as one batch; the others in order, each on the model as edited so far.
        Whatever goes wrong, Ctrl-C included, leaves every weight as it was.

        The model is asked for every edit's target before anything is written and after everything is
        (:attr:`EditResult.checks`). One :class:`~kedit.IneffectiveEditWarning` names the edits that it does not say
        afterwards; where a filter turns that warning into an error, the edits are taken back.

        Args:
            edits: an :class:`~kedit.Edit` or several.
            regularizer: a name, an object, or a list of them.
            guard: limits that the edited model must keep (:class:`kedit.Guard`); what misses one is rolled back.

        Raises:
            KEditError: bad input, a non-finite loss, a singular second moment; in words.
            GuardError: the guard refused the edit; its report says which figure failed.
        """
        chosen = as_edits(edits)
        settings = self._settings(regularizer)
        if guard is not None and not isinstance(guard, Gate):
            raise ConfigError(f"guard must be a kedit.Guard, not {guard!r}.")
        for name in settings.names:
            check_writable(self.arch.weight_of(name))
        requests = self._encode(chosen, settings)
        timer = Timer()
        self._prepare(timer)
        before = self._predictions(chosen, timer)
        watch = None if guard is None else guard.watch(self.model, self.tokenizer, chosen)
        routed = routing.shares(self.arch, requests, settings.config.layers)
        written: dict[str, list[Delta]] = {}
        log: list[list[StepLog]] = []
        groups = [requests] if self.batched else [[request] for request in requests]
        ledger = Ledger.of(self.model)
        with ExitStack() as stack:
            keep = stack.enter_context(ledger.scratch())
            progress = stack.enter_context(Progress(len(groups), self.name))
            for number, group in enumerate(groups):
                deltas, steps = self.write(group, settings, timer)
                deltas = current_group().broadcast(deltas)  # so that rounding keeps no two processes apart
                log += steps
                for name, delta in deltas.items():
                    append(written.setdefault(name, []), delta)
                if number < len(groups) - 1:
                    keep([self.arch.weight_of(name) for name in deltas])
                    overwrite(self.arch, deltas)
                progress.advance()
        summed = {name: concatenate(parts) for name, parts in written.items()}
        changes = any(self._is_update(name, delta) for name, delta in summed.items())
        if not changes:
            summed = {name: emptied(delta) for name, delta in summed.items()}
            warnings.warn(ZERO_UPDATE_WARNING, KEditWarning, stacklevel=3)
        patch = EditPatch(summed, fingerprints(self.arch, summed), self._provenance(chosen, settings))
        try:
            patch.apply(self.model)
            routes = routing.check(self.arch, requests, routed, summed) if changes else []
            if watch is not None:
                with timer.stage("guard"):
                    patch.provenance["scores"] = watch.check(patch.deltas).scores
            checks = self._checked(patch, chosen, before, settings, timer)
            self.on_applied(patch, requests, settings)
            lost = {name: ledger.rounding(name) / max(delta.norm, 1e-30) for name, delta in summed.items()}
            report = None if watch is None else watch.report
            result = EditResult(patch, chosen, log, timer.seconds, self.model, report, routes, lost, checks)
            HeapTrim.after_apply()
        except BaseException:
            if ledger.carries(patch):
                patch.revert(self.model)
            raise
        return result

    @one_at_a_time
    def reapply(self, patch: EditPatch, edits: Edit | Iterable[Edit], regularizer: Choice = None) -> None:
        """Put a patch that this editor made of ``edits`` back onto the model, as :meth:`apply` left it.

        Raises:
            PatchMismatchError: the model is not as it was when the patch was made.
        """
        settings = self._settings(regularizer)
        requests = self._encode(as_edits(edits), settings)
        patch.apply(self.model)
        try:
            self.on_applied(patch, requests, settings)
        except BaseException:
            patch.revert(self.model)
            raise

    @contextmanager
    def unchecked(self) -> Iterator[None]:
        """Inside, :meth:`apply` asks the model nothing before and after: for callers that ask it themselves."""
        held, self._checks = self._checks, False
        try:
            yield
        finally:
            self._checks = held

    @one_at_a_time
    def check(self, edits: Edit | Iterable[Edit]) -> list[EditCheck]:
        """What the model, as it is now, says of edits; ``before`` of each is unknown.

        :meth:`apply` does this on its own. Use it after a sequence of calls, of which a later one may have undone what an
        earlier one wrote.
        """
        chosen = as_edits(edits)
        found = predict(self.arch, self.tokenizer, chosen, tokens=self.engine.budget)
        return [EditCheck(edit, None, after) for edit, after in zip(chosen, found, strict=True)]

    @one_at_a_time
    def revert_all(self) -> None:
        """Give every weight that the model's patches touched its original back, bit for bit, whichever editor made them."""
        Ledger.of(self.model).revert_all()

    @one_at_a_time
    def prepare(self) -> None:
        """Get now, of the model as it is, what the editor otherwise gets when it is first needed, contexts among it."""
        _ = self.contexts
        self._prepare(Timer())

    @with_gradient
    def propose(self, edits: Edit | Iterable[Edit], regularizer: Choice = None) -> list[EditPatch]:
        """What each edit alone would change of the model as it is; nothing is written."""
        chosen = as_edits(edits)
        settings = self._settings(regularizer)
        requests = self._encode(chosen, settings)
        self._prepare(Timer())
        found = self.propose_deltas(requests, settings)
        base = fingerprints(self.arch, {name for deltas in found for name in deltas})
        return [
            EditPatch(deltas, {name: base[name] for name in deltas}, self._provenance([edit], settings))
            for edit, deltas in zip(chosen, found, strict=True)
        ]

    @with_gradient
    def estimate_memory(self, edits: Edit | Iterable[Edit], regularizer: Choice = None) -> MemoryEstimate:
        """How much memory :meth:`apply` would take; nothing is written. Contexts and the like are made where missing."""
        settings = self._settings(regularizer)
        requests = self._encode(as_edits(edits), settings)
        self._prepare(Timer())
        return self.memory_of(requests, settings)

    # What a child may replace

    def memory_of(self, requests: Sequence[Request], settings: Settings) -> MemoryEstimate:
        """The memory that writing ``requests`` takes, with a dense update of every edited weight."""
        return dense_memory(self.arch, requests, settings.config.layers, self.largest_wave(requests, settings))

    def propose_deltas(self, requests: Sequence[Request], settings: Settings) -> list[dict[str, Delta]]:
        """The updates that write each request alone."""
        return [self.write([request], settings, Timer())[0] for request in requests]

    def on_applied(self, patch: EditPatch, requests: Sequence[Request], settings: Settings) -> None:
        """Called once the patch is on the model; an editor with a memory of past edits updates it here."""
        return

    # Inside

    def _is_update(self, name: str, delta: Delta) -> bool:
        """Whether an update is more than the rounding noise of its weight."""
        weight = self.arch.weight_of(name).stored
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return delta.norm > NOISE * float(torch.linalg.vector_norm(weight.detach(), dtype=dtype))

    def _predictions(self, edits: Sequence[Edit], timer: Timer) -> list[Prediction] | None:
        """What the model says of ``edits`` now; ``None``, with a warning, where it cannot be asked."""
        if not self._checks:
            return None
        mine: list[Prediction] | None = None
        try:
            with timer.stage("check"):
                mine = predict(self.arch, self.tokenizer, edits, tokens=self.engine.used)
        except Exception as error:
            warnings.warn(
                f"What the model says of the edits was not checked: {type(error).__name__}: {error}. The edits are written "
                "all the same; ask the model yourself, or call editor.check(edits).",
                KEditWarning,
                stacklevel=4,
            )
        return current_group().broadcast(mine)  # so that all processes tell the same

    def _checked(
        self,
        patch: EditPatch,
        edits: Sequence[Edit],
        before: Sequence[Prediction] | None,
        settings: Settings,
        timer: Timer,
    ) -> list[EditCheck]:
        """Ask the edited model for every edit, note it in the patch, and warn of what it does not say."""
        after = None if before is None else self._predictions(edits, timer)
        if before is None or after is None:
            return []
        patch.provenance["before"] = [prediction.to_dict() for prediction in before]
        patch.provenance["after"] = [prediction.to_dict() for prediction in after]
        checks = [EditCheck(*found) for found in zip(edits, before, after, strict=True)]
        if current_group().leads:
            warn_of_ineffective(checks, settings.config, stacklevel=4)
        return checks

    def _settings(self, regularizer: Choice) -> Settings:
        found = resolve(regularizer)
        config = self._configure([item.name for item in found])
        complete = [filled(self.name, self.arch, item) for item in found]
        check_editable(self.arch, config.layers)
        names = tuple(weight.name for layer in config.layers for weight in self.arch.weights(layer))
        return Settings(config, complete, names)

    def _prepare(self, timer: Timer) -> None:
        """Get what takes long and depends on the model alone, before anything is written."""
        return

    def _encode(self, edits: Sequence[Edit], settings: Settings) -> list[Request]:
        return encode_edits(self.arch, self.tokenizer, edits, self.contexts, settings.needs)

    def _configure(self, regularizers: Sequence[str]) -> EditorConfig:
        """User > preset of (editor, model, regularizer) > preset of (editor, model) > rule."""
        config = self._preset_config(self.arch, {**adapted(self.name, self.arch, regularizers), **self._given})
        for layer in config.layers:
            self.arch.check_layer(layer)
        return config

    @classmethod
    def _preset_config(cls, arch: ModelArch, changes: Mapping[str, Any]) -> EditorConfig:
        preset = presets.find(cls.name, arch)
        values: dict[str, Any] = dict(preset.values) if preset else cls.rule(arch)
        for given, belonging in _BELONGING.items():
            if given in changes:
                values.pop(belonging, None)
        return cls.Config(**{**values, **changes})

    @classmethod
    def rule(cls, arch: ModelArch) -> dict[str, Any]:
        """Hyper-parameters for a model without a preset, the layers among them."""
        return {"layers": (presets.layer_rule(arch),)}

    def _provenance(self, edits: Sequence[Edit], settings: Settings) -> dict[str, Any]:
        return {
            "editor": self.name,
            "config": settings.config.to_dict(),
            "regularizers": [describe(item) for item in settings.regularizers],
            "edits": [edit.to_dict() for edit in edits],
            "contexts": list(self.contexts),
            "budget": self.engine.used,
            "model": describe_model(self.model, self.arch),
        }


def warn_of_ineffective(checks: Sequence[EditCheck], config: EditorConfig, *, stacklevel: int = 2) -> None:
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
    if len(checks) > 1:
        hints.append("fewer edits at once (a later edit can undo an earlier one)")
    warnings.warn(
        f"{count}: {'; '.join([*named, *more])}. Try {', '.join(hints[:-1])} or {hints[-1]}.",
        IneffectiveEditWarning,
        stacklevel=stacklevel + 1,
    )
