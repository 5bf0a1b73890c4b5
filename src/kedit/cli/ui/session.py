"""What the page does: one model, edits that are kept, and one that waits to be kept or undone."""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedit.edit import Edit
from kedit.errors import ConfigError, EditError
from kedit.utils.progress import watching

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kedit.editors.result import EditResult

    Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]

QUESTIONS, LENGTH = 10, 20  # asked beside the edit's prompt at most, and tokens of an answer


class BusyError(ConfigError):
    """Another request is at work on the model."""


class CancelledError(KeyboardInterrupt):
    """The user cancelled the edit; like Ctrl-C, no part of the engine takes it for an error of its own."""


class _Running:
    """An edit that is being written: how far it is, and whether to end it."""

    def __init__(self) -> None:
        self.text = "starting"
        self._mutex = threading.Lock()
        self._cancelled = self._finished = False

    def watch(self, what: str, done: int, total: int | None) -> None:
        """Note how far the work is; raises :class:`CancelledError` once the user cancelled."""
        self.text = f"{what}: {done:,}" + ("" if total is None else f" of at most {total:,}")
        if self._cancelled:
            raise CancelledError

    def cancel(self) -> bool:
        """End the edit at its next step; ``False`` where it is finished already."""
        with self._mutex:
            self._cancelled = not self._finished
            return self._cancelled

    def finish(self) -> None:
        """From here on the edit cannot be cancelled; raises :class:`CancelledError` where it was."""
        with self._mutex:
            self._finished = True
            if self._cancelled:
                raise CancelledError


@dataclass(eq=False)
class _Done:
    """An edit on the model."""

    edit: Edit
    result: EditResult
    shown: dict[str, Any] = field(default_factory=dict)


class Session:
    """A model and its edits. Every method that uses the model is done by one thread at a time; others get :class:`BusyError`.

    Args:
        load: gives model and tokenizer by name; ``None`` is the embedded model.
        make_editor: gives an editor for them, and notes for the user.
        regularizers: of every edit.
    """

    def __init__(
        self,
        load: Callable[[str | None], Loaded],
        make_editor: Callable[[PreTrainedModel, PreTrainedTokenizerBase, str | None], tuple[Any, list[str]]],
        regularizers: Sequence[Any] = (),
    ) -> None:
        self._load, self._make_editor, self._regularizers = load, make_editor, list(regularizers)
        self._lock = threading.Lock()
        self._editor: Any = None
        self._notes: list[str] = []
        self._kept: list[_Done] = []
        self._pending: _Done | None = None
        self._running: _Running | None = None

    def load(self, name: str | None) -> dict[str, Any]:
        """Take another model; the edits of the one before are dropped with it. If it cannot be loaded, all stays as it was."""
        with self._alone():
            self.model, self.tokenizer = self._load(name or None)
            self.name = name or None
            self._editor, self._notes, self._kept, self._pending = None, [], [], None
        return self.state()

    def state(self) -> dict[str, Any]:
        """What the page shows of the model and its edits."""
        from kedit.models import ModelArch
        from kedit.prompts.chat import has_template

        known = ModelArch(self.model).describe()
        return {
            "model": f"{known['name'] or 'a model'}: {known['type']}, {known['num_layers']} blocks",
            "embedded": self.name is None,
            "chat": has_template(self.tokenizer),
            "notes": list(self._notes),
            "kept": [f"{done.edit.text} → {done.edit.target_new}" for done in self._kept],
            "pending": None if self._pending is None else self._pending.shown,
            "busy": self._lock.locked(),
        }

    def edit(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Write an edit into the model; it waits for :meth:`keep` or :meth:`undo`.

        After :meth:`cancel` nothing waits, every weight is as it was, and the state says ``cancelled``.

        Args:
            asked: prompt, subject, target_new; ``chat``: whether the prompt is a message; ``questions``: more prompts to ask.
        """
        edit = Edit(
            *(_text(asked, name) for name in ("prompt", "subject", "target_new")), in_chat=asked.get("chat") is True
        )
        questions = asked.get("questions") or []
        if not isinstance(questions, list) or not all(isinstance(text, str) for text in questions):
            raise ConfigError("questions are a list of texts.")
        prompts = [edit.text, *(text.strip() for text in questions if text.strip())][: 1 + QUESTIONS]
        with self._alone():
            if self._pending is not None:
                raise EditError("An edit waits to be kept or undone. Do that first.")
            self._running = running = _Running()
            try:
                with watching(running.watch):
                    self._pending = self._write(edit, prompts, running)
            except CancelledError:
                return {**self.state(), "cancelled": True}
            finally:
                self._running = None
        return self.state()

    def _write(self, edit: Edit, prompts: Sequence[str], running: _Running) -> _Done:
        if self._editor is None:
            running.watch("preparing the editor, once per model", 0, None)
            self._editor, self._notes = self._make_editor(self.model, self.tokenizer, self.name)
        start = time.perf_counter()
        before = self._look(edit, prompts)
        result = self._editor.apply(edit, self._regularizers)
        try:
            done = _Done(edit, result)
            after = self._look(edit, prompts)
            done.shown = self._show(edit, result, prompts, before, after, time.perf_counter() - start)
            running.finish()
        except BaseException:
            result.revert()
            raise
        return done

    def progress(self) -> dict[str, Any]:
        """How far the edit that is being written is; ``None`` where there is none."""
        running = self._running
        return {"progress": None if running is None else running.text}

    def cancel(self) -> dict[str, Any]:
        """End the edit that is being written, at its next step; the model stays as it was before it."""
        running = self._running
        if running is None or not running.cancel():
            raise EditError("No edit is being written, so there is nothing to cancel.")
        return {"progress": "cancelling"}

    def keep(self) -> dict[str, Any]:
        """Keep the edit that waits."""
        with self._alone():
            self._kept.append(self._waiting())
            self._pending = None
        return self.state()

    def undo(self, number: int | None = None) -> dict[str, Any]:
        """Take the edit that waits back, or a kept one: the weights are those without it, bit for bit."""
        with self._alone():
            if number is None:
                self._waiting().result.revert()
                self._pending = None
            else:
                if type(number) is not int or not 0 <= number < len(self._kept):
                    raise ConfigError(f"There is no kept edit number {number!r}.")
                self._kept[number].result.revert()
                del self._kept[number]
        return self.state()

    def ask(self, prompt: str, *, chat: bool = False) -> dict[str, Any]:
        """What the model says now."""
        with self._alone():
            return {"answer": self._answers([_text({"prompt": prompt}, "prompt")], chat=chat)[0]}

    def patch(self) -> bytes:
        """The kept edits as a patch file."""
        from kedit.patch import EditPatch

        with self._alone(), tempfile.TemporaryDirectory(prefix="kedit-") as place:
            patches = [done.result.patch for done in self._kept]
            if not patches:
                raise EditError("No edit is kept, so there is no patch. Keep one first.")
            patch = patches[0] if len(patches) == 1 else EditPatch.merge(patches)
            return patch.save(Path(place, "edit.safetensors")).read_bytes()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise BusyError("The model is at work. Wait until it has finished.")
        try:
            yield
        finally:
            self._lock.release()

    def _waiting(self) -> _Done:
        if self._pending is None:
            raise EditError("No edit waits to be kept or undone.")
        return self._pending

    def _look(self, edit: Edit, prompts: Sequence[str]) -> tuple[list[str], Any]:
        from kedit.cli.demo import attention_rows

        return self._answers(prompts, chat=edit.in_chat), attention_rows(self.model, self._row(edit).ids)

    def _answers(self, prompts: Sequence[str], *, chat: bool) -> list[str]:
        from kedit.evaluation.own import greedy

        return greedy(self.model, self.tokenizer, prompts, LENGTH, in_chat=chat)

    def _row(self, edit: Edit) -> Any:
        from kedit.prompts.tokenize import context_limit, edit_text, encode

        return encode(
            self.tokenizer, [edit_text(edit, None, tokenizer=self.tokenizer)], limit=context_limit(self.model)
        )[0]

    def _show(
        self, edit: Edit, result: EditResult, prompts: Sequence[str], before: Any, after: Any, seconds: float
    ) -> dict[str, Any]:
        from kedit.utils.terminal import printable

        row, check = self._row(edit), result.checks[0] if result.checks else None
        maps = None
        if before[1] is not None and after[1] is not None:
            maps = [[[round(x, 4) for x in line] for line in rows.float().tolist()] for rows in (before[1], after[1])]
        return {
            "text": edit.text,
            "target": edit.target_new,
            "answers": [list(cells) for cells in zip(prompts, before[0], after[0], strict=True)],
            "probability": None
            if check is None or check.before is None
            else [check.before.probability, check.after.probability],
            "said": None if check is None else check.after.said,
            "tokens": [printable(str(self.tokenizer.decode([token]))) for token in row.ids],
            "subject": [row.first, row.subject_last],
            "attention": maps,
            "report": result.report(),
            "seconds": round(seconds, 1),
        }


def _text(asked: Mapping[str, Any], name: str) -> str:
    value = asked.get(name)
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{name} is missing. Fill the field.")
    return value
