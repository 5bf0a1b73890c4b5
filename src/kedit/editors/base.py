"""The base class of editors: the steps of an edit, of which each editor supplies the update."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from kedit.edit import Edit, as_edits
from kedit.editors import presets
from kedit.editors.config import EditorConfig
from kedit.editors.facts import check_consistent, earlier_facts
from kedit.editors.memory import MemoryEstimate, dense_memory
from kedit.editors.observers import Observers, applied, check_guard, check_weights, without_noise
from kedit.editors.parts import Parts, missed
from kedit.editors.result import EditResult, GuardLike, Timer, log_by_edit
from kedit.errors import ConfigError
from kedit.models import ModelArch, Weight
from kedit.models.lock import one_at_a_time, with_gradient
from kedit.models.offload import check_held
from kedit.models.validate import check_editable, check_model
from kedit.patch import EditPatch, fingerprints
from kedit.patch.delta import Delta
from kedit.patch.ledger import Ledger
from kedit.prompts.contexts import check_contexts, generate_contexts
from kedit.prompts.encode import Request, encode_edits, join_subjects
from kedit.prompts.predictions import EditCheck, predict
from kedit.regularizers import Choice, describe, resolve
from kedit.regularizers.base import Needs, Regularizer, is_adaptive
from kedit.utils.distributed import current_group
from kedit.utils.progress import Progress
from kedit.values.memory import Footprint
from kedit.values.optimize import StepLog
from kedit.values.scheduler import Engine

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from typing_extensions import Self


@dataclass(frozen=True)
class Call:
    """One call of an editor, beside its hyper-parameters: the regularizers with all their fields, and what they want to see."""

    regularizers: Sequence[Regularizer]
    needs: Needs
    timer: Timer = field(default_factory=Timer)


class Editor(ABC):
    """Writes facts into one model.

    Args:
        model: a causal language model; it is edited in place by :meth:`apply` and by nothing else.
        tokenizer: its fast tokenizer.
        config: all hyper-parameters; missing: the model's preset.
        contexts: templates with one ``{}`` each, the first of them ``"{}"``; missing: sampled from the model, seeded.
            ``"mixed"``: sampled, and every second one in the model's chat template, for an edit that holds in text and in a chat.
        preset: a file of presets to use in place of those found for the model (docs/defaults.md).
        overrides: single hyper-parameters, before preset and ``config``.

    Attributes:
        config: the hyper-parameters; while a call runs, with the changes that the preset makes for its regularizers.

    Raises:
        ArchitectureError: the model's type is unknown.
        ConfigError: a hyper-parameter is out of range or unknown.
    """

    name: ClassVar[str]
    Config: ClassVar[type[EditorConfig]] = EditorConfig
    batched: ClassVar[bool] = False  # several edits become one update, solved together
    context_lengths: ClassVar[tuple[tuple[int, int], ...]] = ((10, 5),)  # (tokens, how many)
    context_seed: ClassVar[int] = 0
    rounds: ClassVar[int] = 0  # how often joined facts that are not said yet are written again
    config: EditorConfig
    _asks: bool = True  # whether apply asks the model before and after

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: EditorConfig | None = None,
        *,
        contexts: Sequence[str] | Literal["mixed"] | None = None,
        preset: str | Path | None = None,
        **overrides: Any,
    ) -> None:
        check_model(model)
        self.arch = ModelArch(model)
        self.model = self.arch.model
        check_held(self.model)
        _ = self.arch.head  # a model for another task has none
        self.tokenizer = tokenizer
        owner = type(self).__name__
        if not isinstance(getattr(self, "name", None), str):
            raise ConfigError(f"{owner} has no name: give the class a string of that name, as others have.")
        self.Config.check_names(owner, overrides)
        if config is not None and not isinstance(config, self.Config):
            raise ConfigError(f"config must be a {owner}.Config, not {type(config).__name__}.")
        self._given: dict[str, Any] = {**({} if config is None else vars(config)), **overrides}
        self._preset = presets.find(self.name, self.arch, preset)
        presets.announce(self.name, self.arch, self._preset)
        self.config = self._configure([])
        self.engine = Engine(self.arch)
        self._mixed = contexts == "mixed"
        self._contexts = None if contexts is None or self._mixed else check_contexts(contexts)

    # What a child supplies

    @abstractmethod
    def updates(self, requests: Sequence[Request], call: Call) -> tuple[dict[str, Delta], list[list[StepLog]]]:
        """The updates that write ``requests`` into the model as it is, and the log; the weights are left as they are."""

    @abstractmethod
    def largest_wave(self, requests: Sequence[Request], call: Call) -> Footprint:
        """The memory that the optimisation holds at its peak."""

    # What users call

    @with_gradient
    def apply(
        self, edits: Edit | Iterable[Edit], regularizer: Choice = None, *, guard: GuardLike | None = None
    ) -> EditResult:
        """Write one edit or many into the model.

        Editors that solve jointly write many as one batch; the others in order, each on the model as edited so far.
        Several facts of one subject, those of earlier patches on this model among them, become one value that is optimised
        on all their prompts together, because they have the same key (``join_subjects=False``: a value each, as published).
        Whatever goes wrong, Ctrl-C included, leaves every weight as it was.

        The model is asked for every edit's target before anything is written and after everything is
        (:attr:`EditResult.checks`). One :class:`~kedit.IneffectiveEditWarning` names the edits that it does not say
        afterwards; where a filter turns that warning into an error, the edits are taken back.

        Args:
            edits: an :class:`~kedit.Edit` or several.
            regularizer: a name, an object, or a list of them.
            guard: limits that the edited model must keep (:class:`kedit.Guard`); what misses one is rolled back.

        Raises:
            KEditError: bad input, a non-finite loss, a singular second moment.
            GuardError: the guard refused the edit; its report says which measurement failed.
        """
        chosen = as_edits(edits)
        with self._call(regularizer) as call:
            check_guard(guard)
            check_weights(self.arch, self.config.layers)
            requests = self._encode_together(chosen, call)
            self._prepare(call.timer)
            observers = Observers(
                self.engine, self.tokenizer, chosen, requests, self.config, call.timer, guard=guard, ask=self._asks
            )
            deltas, logs = self._updates_in_groups(requests, call)
            patch = self._patch(chosen, without_noise(self.arch, deltas), call)
            log = log_by_edit(logs, requests, chosen)
            with applied(patch, self.model):
                seen = observers.measure_again(patch)
                self.on_applied(patch, requests)
                return EditResult(patch, chosen, log, call.timer.seconds, self.model, **seen)

    def _updates_in_groups(
        self, requests: Sequence[Request], call: Call
    ) -> tuple[dict[str, Delta], list[list[StepLog]]]:
        """The updates that write all requests, and the log; each group of requests sees the groups before it as written."""
        log: list[list[StepLog]] = []
        groups = self._groups(requests)
        with Ledger.of(self.model).provisional() as provisional, Progress(len(groups), self.name) as progress:
            parts = Parts(provisional)
            for group in groups:
                parts.show()
                deltas, steps = self.updates(group, call)
                parts.add(current_group().broadcast(deltas))  # so that rounding keeps no two processes apart
                log += steps
                progress.advance()
            self._write_again(requests, parts, log, call)
            return parts.together(), log

    def _completed(self, request: Request, deltas: dict[str, Delta], call: Call) -> dict[str, Delta]:
        """The updates that write one request, with what :meth:`_write_again` adds."""
        if len(request.edits) == 1:
            return deltas
        with Ledger.of(self.model).provisional() as provisional:
            parts = Parts(provisional)
            parts.add(deltas)
            self._write_again([request], parts, [[]], call)
            return parts.together()

    def _write_again(self, requests: Sequence[Request], parts: Parts, log: Sequence[list[StepLog]], call: Call) -> None:
        """Write the joined facts that the model with the updates so far misses, up to :attr:`rounds` times.

        A closed form that writes a value not quite, as PMET's without the attention's δ, may lose one of the facts. The rest of
        the change is then optimised and written on the model as it is.
        """
        joined = [number for number, request in enumerate(requests) if len(request.edits) > 1]
        for _ in range(self.rounds if joined else 0):
            parts.show()
            asked = [requests[number] for number in joined]
            again = [joined[i] for i in missed(self.engine, self.tokenizer, asked, call.timer)]
            for group in self._groups([requests[number] for number in again]) if again else []:
                parts.show()
                deltas, steps = self.updates(group, call)
                parts.add(current_group().broadcast(deltas))
                for more in steps:
                    known = log[again.pop(0)]
                    known += [{**row, "step": row["step"] + len(known)} for row in more]

    @with_gradient
    def reapply(self, patch: EditPatch, edits: Edit | Iterable[Edit], regularizer: Choice = None) -> None:
        """Put a patch that this editor made of ``edits`` back onto the model, as :meth:`apply` left it.

        Raises:
            PatchMismatchError: the model is not as it was when the patch was made.
        """
        with self._call(regularizer) as call:
            requests = self._encode_together(as_edits(edits), call)
            with applied(patch, self.model):
                self.on_applied(patch, requests)

    @with_gradient
    def propose(self, edits: Edit | Iterable[Edit], regularizer: Choice = None) -> list[EditPatch]:
        """Compute what each edit alone would change of the model as it is; nothing is written."""
        chosen = as_edits(edits)
        with self._call(regularizer) as call:
            requests = self._with_earlier(self._encode(chosen, call), chosen, call)
            self._prepare(call.timer)
            each = self.updates_of_each(requests, call)
            each = [self._completed(*pair, call) for pair in zip(requests, each, strict=True)]
            known = fingerprints(self.arch, {name for deltas in each for name in deltas})
            return [self._patch([edit], deltas, call, known) for edit, deltas in zip(chosen, each, strict=True)]

    @with_gradient
    def estimate_memory(self, edits: Edit | Iterable[Edit], regularizer: Choice = None) -> MemoryEstimate:
        """Estimate how much memory :meth:`apply` would take; nothing is written. Contexts and the like are made where missing."""
        with self._call(regularizer) as call:
            requests = self._encode_together(as_edits(edits), call)
            self._prepare(call.timer)
            return self.memory_of(requests, call)

    @contextmanager
    def unchecked(self) -> Iterator[None]:
        """Inside, :meth:`apply` asks the model nothing before and after: for callers that ask it themselves."""
        held, self._asks = self._asks, False
        try:
            yield
        finally:
            self._asks = held

    @one_at_a_time
    def check(self, edits: Edit | Iterable[Edit]) -> list[EditCheck]:
        """Ask the model, as it is now, for the targets of edits; ``before`` of each is unknown.

        :meth:`apply` does this on its own. Use it after a sequence of calls, of which a later one may have undone what an
        earlier one wrote.
        """
        chosen = as_edits(edits)
        said = predict(self.arch, self.tokenizer, chosen, tokens=self.engine.budget)
        return [EditCheck(edit, None, after) for edit, after in zip(chosen, said, strict=True)]

    @one_at_a_time
    def revert_all(self) -> None:
        """Give every weight that the model's patches touched its original back, bit for bit, whichever editor made them."""
        Ledger.of(self.model).revert_all()

    @one_at_a_time
    def prepare(self) -> None:
        """Get now, of the model as it is, what the editor otherwise gets when it is first needed, contexts among it."""
        _ = self.contexts
        self._prepare(Timer())

    @property
    def contexts(self) -> tuple[str, ...]:
        """The context templates; sampled from the model on first use."""
        if self._contexts is None:
            self._contexts = generate_contexts(
                self.model, self.tokenizer, self.context_lengths, seed=self.context_seed, chat=self._mixed
            )
        return self._contexts

    @property
    def edited_weights(self) -> list[Weight]:
        """The weights that this editor may write."""
        return [weight for layer in self.config.layers for weight in self.arch.weights(layer)]

    @classmethod
    def preset(cls, model: PreTrainedModel) -> EditorConfig:
        """The hyper-parameters for a model where the user gives none."""
        return cls._preset_config(ModelArch(model), {})

    @classmethod
    def from_provenance(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, provenance: Mapping[str, Any], **options: Any
    ) -> Self:
        """Make the editor again that made a patch: ``MEMIT.from_provenance(model, tokenizer, patch.provenance)``.

        On the model that it was made for, it proposes the same update for the same edits and regularizers
        (:func:`kedit.editors.from_provenance` finds the class, :func:`kedit.regularizers.from_description` makes a regularizer
        again). Second moments are not part of a patch: they are estimated anew, or given as ``moments``.

        Args:
            model: as for the class.
            tokenizer: as for the class.
            provenance: of the patch.
            options: further arguments of the class.

        Raises:
            ConfigError: the provenance is of another editor, or not complete.
        """
        if provenance.get("editor") != cls.name:
            raise ConfigError(f"The patch was made by the editor {provenance.get('editor')!r}, not by {cls.name!r}.")
        if missing := {"config", "contexts"} - provenance.keys():
            raise ConfigError(
                f"The patch's provenance holds no {' and no '.join(sorted(missing))}, so its editor is not known."
            )
        config = cls.Config.from_dict(provenance["config"])
        editor = cls(model, tokenizer, config, contexts=provenance["contexts"], **options)
        editor.engine.budget = provenance.get("budget", editor.engine.budget)
        return editor

    def describe_call(self, regularizer: Choice = None) -> dict[str, Any]:
        """The hyper-parameters and regularizers that a call with ``regularizer`` uses, as JSON."""
        with self._call(regularizer) as call:
            return {"regularizers": [describe(item) for item in call.regularizers], "config": self.config.to_dict()}

    # What a child may replace

    def needs(self, regularizers: Sequence[Regularizer]) -> Needs:
        """The activations that some regularizers want to see; raises where the editor has no use for them."""
        if regularizers:
            raise ConfigError(
                f"{type(self).__name__} optimises no value, so {regularizers[0].name!r} has nothing to restrain. Use another "
                "editor, or no regularizer."
            )
        return Needs()

    def memory_of(self, requests: Sequence[Request], call: Call) -> MemoryEstimate:
        """The memory that writing ``requests`` takes, with a dense update of every edited weight."""
        return dense_memory(self.arch, requests, self.config.layers, self.largest_wave(requests, call))

    def updates_of_each(self, requests: Sequence[Request], call: Call) -> list[dict[str, Delta]]:
        """The updates that write each request alone."""
        return [self.updates([request], call)[0] for request in requests]

    def on_applied(self, patch: EditPatch, requests: Sequence[Request]) -> None:
        """Called once the patch is on the model; an editor with a memory of past edits updates it here."""
        return

    @classmethod
    def rule(cls, arch: ModelArch) -> dict[str, Any]:
        """Hyper-parameters for a model without a preset, the layers among them."""
        return {"layers": (presets.layer_rule(arch),)}

    # Inside

    @contextmanager
    def _call(self, regularizer: Choice) -> Iterator[Call]:
        """Inside, :attr:`config` holds for a call with ``regularizer``."""
        chosen, own = resolve(regularizer), self.config
        complete = [presets.complete(self._preset, item) for item in chosen]
        self.config = self._configure([item.name for item in chosen], adaptive=any(map(is_adaptive, complete)))
        try:
            check_editable(self.arch, self.config.layers)
            yield Call(complete, self.needs(complete))
        finally:
            self.config = own

    def _configure(self, regularizers: Sequence[str], *, adaptive: bool = False) -> EditorConfig:
        """User > preset of (editor, model, regularizer) > preset of (editor, model) > rule."""
        changes = {**presets.changes_for(self._preset, regularizers), **self._given}
        config = self._config_of(self.arch, self._preset, changes)
        if adaptive and "steps" not in changes:
            config = config.replace(steps=round(presets.ADAPTIVE_STEPS * config.steps))
        for layer in config.layers:
            self.arch.check_layer(layer)
        return config

    @classmethod
    def _preset_config(cls, arch: ModelArch, changes: Mapping[str, Any]) -> EditorConfig:
        return cls._config_of(arch, presets.find(cls.name, arch), changes)

    @classmethod
    def _config_of(cls, arch: ModelArch, preset: presets.Preset | None, changes: Mapping[str, Any]) -> EditorConfig:
        return cls.Config.over(preset.values if preset else cls.rule(arch), changes)

    def _prepare(self, timer: Timer) -> None:
        """Get what takes long and depends on the model alone, before anything is written."""
        return

    def _encode(self, edits: Sequence[Edit], call: Call) -> list[Request]:
        return encode_edits(self.arch, self.tokenizer, edits, self.contexts, call.needs)

    def _encode_together(self, edits: Sequence[Edit], call: Call) -> list[Request]:
        """One request per subject, its facts of earlier patches included; one per edit without ``join_subjects``."""
        if not self.config.join_subjects:
            return self._encode(edits, call)
        check_consistent(edits)
        return self._with_earlier(join_subjects(self._encode(edits, call)), edits, call)

    def _with_earlier(self, requests: list[Request], edits: Sequence[Edit], call: Call) -> list[Request]:
        """Requests that hold, beside their own facts, those that earlier patches wrote of their subjects."""
        earlier = earlier_facts(self.model, edits) if self.config.join_subjects else []
        if not earlier:
            return requests
        kept = self._encode(earlier, call)
        return [join_subjects([own, *(r for r in kept if r.edit.subject == own.edit.subject)])[0] for own in requests]

    def _groups(self, requests: Sequence[Request]) -> list[Sequence[Request]]:
        """Requests whose updates are computed together."""
        return [requests] if self.batched else [[request] for request in requests]

    def _patch(
        self, edits: Sequence[Edit], deltas: Mapping[str, Delta], call: Call, known: Mapping[str, Any] | None = None
    ) -> EditPatch:
        base = fingerprints(self.arch, deltas) if known is None else {name: known[name] for name in deltas}
        return EditPatch(dict(deltas), base, self._provenance(edits, call))

    def _provenance(self, edits: Sequence[Edit], call: Call) -> dict[str, Any]:
        return {
            "editor": self.name,
            "config": self.config.to_dict(),
            "regularizers": [describe(item) for item in call.regularizers],
            "edits": [edit.to_dict() for edit in edits],
            "contexts": list(self.contexts),
            "budget": self.engine.used,
            "model": self.arch.describe(),
        }
