"""The result of an edit."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from kedit.edit import Edit
from kedit.keys.routing import Route
from kedit.patch import EditPatch
from kedit.prompts.encode import Request
from kedit.prompts.predictions import EditCheck
from kedit.utils.terminal import printable
from kedit.values.optimize import StepLog

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class GuardCheckLike(Protocol):
    """The measurements of a guard before an edit."""

    report: Any

    def check(self, names: Iterable[str]) -> Any:
        """Measure again after the weights ``names`` were edited: the report, or an error where the edit must go."""
        ...


@runtime_checkable
class GuardLike(Protocol):
    """Decides whether an edit is kept; :class:`kedit.Guard` is one."""

    def watch(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, edits: Iterable[Edit]
    ) -> GuardCheckLike:
        """Measure the model before ``edits`` are written."""
        ...


@dataclass
class Timer:
    """Seconds by stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside to ``name``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


WRITTEN = "written"


@dataclass(eq=False)
class EditResult:
    """A finished edit of one model.

    Attributes:
        patch: the weight updates with their provenance.
        edits: what was asked for.
        log: per edit and step: step, total, nll, kl, weight_decay, and one column per regularizer; at the last step also
            ``written``, the share of the wanted change that the closed form writes at the bare prompt.
        seconds: time by stage.
        guard: the guard's report, where there was one.
        routes: in mixtures of experts, how the router treats each edit's subject, before and after.
        rounding: by weight, what rounding to the weight's dtype took from the update, relative to its norm; 0 where the weight
            is stored in the dtype in which updates are summed.
        checks: per edit, what the model said of it before anything was written and after everything was; empty where the model
            could not be asked.
    """

    patch: EditPatch
    edits: Sequence[Edit]
    log: list[list[StepLog]]
    seconds: dict[str, float] = field(default_factory=dict)
    _model: PreTrainedModel | None = None
    guard: Any = None
    routes: Sequence[Route] = ()
    rounding: Mapping[str, float] = field(default_factory=dict)
    checks: Sequence[EditCheck] = ()

    @property
    def all_said(self) -> bool | None:
        """Whether the edited model, decoding greedily, says the target of every edit; ``None`` where it was not asked."""
        return all(check.after.said for check in self.checks) if self.checks else None

    def revert(self) -> None:
        """Take this edit back, whatever was edited before or after; raises ``PatchMismatchError`` the second time."""
        assert self._model is not None
        self.patch.revert(self._model)

    def report(self) -> str:
        """Describe what was written, the losses before and after, and the time: a text for people."""
        provenance = self.patch.provenance
        names = [item["name"] for item in provenance.get("regularizers", [])]
        with_text = f" with {', '.join(names)}" if names else ""
        lines = [f"{provenance.get('editor', '?')}{with_text}: {len(self.edits)} edit(s)"]
        if self.checks:
            said = sum(check.after.said for check in self.checks)
            lines.append(f"  the edited model says {said} of {len(self.checks)} target(s)")
        for number, (edit, steps) in enumerate(zip(self.edits, self.log, strict=True)):
            lines.append(f"  {edit.text} → {edit.target_new}")
            if self.checks:
                lines += [f"    {line}" for line in self.checks[number].lines()]
            if steps:
                first, last = steps[0], steps[-1]
                columns = [name for name in last if name not in ("step", WRITTEN)]
                columns_shown = ", ".join(f"{name} {first[name]:.3f} → {last[name]:.3f}" for name in columns)
                lines.append(f"    {len(steps)} steps: {columns_shown}")
                if last.get(WRITTEN, 1.0) < 0.995:  # of a closed form that is not exact
                    lines.append(f"    written: {last[WRITTEN]:.0%} of the wanted change")
        for name, delta in self.patch.deltas.items():
            lost = self.rounding.get(name, 0.0)
            note = f", {lost:.1%} of it lost to rounding" if lost else ""
            lines.append(f"  {name}: rank {delta.rank} update of norm {delta.norm:.3g}, shape {delta.shape}{note}")
        lines += [f"  {route}" for route in self.routes]
        if self.guard is not None:
            lines += [f"  {line}" for line in str(self.guard).splitlines()]
        if self.seconds:
            lines.append("  " + ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in self.seconds.items()))
        return "\n".join(map(printable, lines))

    def __repr__(self) -> str:
        return f"EditResult({len(self.edits)} edits, {', '.join(self.patch.deltas)})"


def log_by_edit(
    logs: Sequence[list[StepLog]], requests: Sequence[Request], edits: Sequence[Edit]
) -> list[list[StepLog]]:
    """The log of every edit: that of the request that holds it."""
    if len(requests) == len(edits):
        return list(logs)
    place = {(e.subject, e.text): number for number, request in enumerate(requests) for e in request.edits}
    return [logs[place[edit.subject, edit.text]] for edit in edits]
