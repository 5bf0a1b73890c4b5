"""Scores of unedited models, kept by content: runs on the same model and cases ask them once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from kedit.evaluation.cases import EditCase
from kedit.evaluation.probing import EvalOptions, ProbeScorer
from kedit.evaluation.records import CaseScore
from kedit.keys.estimate import cache_folder, tokenizer_fingerprint
from kedit.models import unwrap
from kedit.models.fingerprint import bit_sum, model_fingerprint
from kedit.models.lock import has_hooks
from kedit.models.offload import stored
from kedit.utils.files import write_text
from kedit.utils.progress import logger

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VERSION = 1  # of what is measured: raise it when kept scores no longer hold

_IN_MEMORY: WeakKeyDictionary[nn.Module, dict[str, tuple[CaseScore, ...]]] = WeakKeyDictionary()


def disk_folder() -> Path | None:
    """Where scores are kept for other processes: beside second moments, where anything is kept there already."""
    folder = cache_folder()
    return folder / "before" if folder.is_dir() else None


class BeforeScores:
    """What a model as it is now scores on groups of cases; a group is what is asked at once, so that a hit rounds alike.

    Scores are kept in memory as long as the model lives, and on disk where kedit's cache folder exists. Attention is not
    kept, as its baseline is much larger than the scores, nor is anything of a model with hooks, which compute what no
    fingerprint shows.

    Args:
        model: as it is, unedited.
        tokenizer: its tokenizer.
        extent: what is measured.
        cases: all cases of the run: the weights of the terms of their references depend on all of them.
        wanted: whether to keep anything at all.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        extent: EvalOptions,
        cases: Sequence[EditCase],
        *,
        wanted: bool = True,
    ) -> None:
        self.model: Any = unwrap(model)
        self.active = wanted and not extent.attention and not has_hooks(self.model)
        self.folder = disk_folder() if self.active else None
        if not self.active:
            return
        config = self.model.config
        about = {
            "version": [VERSION, *(version(name) for name in ("kedit", "torch", "transformers"))],
            "class": f"{type(self.model).__module__}.{type(self.model).__qualname__}",
            "attention": repr(getattr(config, "_attn_implementation", None)),
            "devices": sorted({str(parameter.device) for parameter in self.model.parameters()}),
            "ends": repr(getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)),
            "tokenizer": [
                tokenizer_fingerprint(tokenizer),
                repr(tokenizer.eos_token_id),
                repr(tokenizer.chat_template),
            ],
            "extent": asdict(extent),
            "references": [list(case.references) for case in cases if case.references] if extent.generate else [],
        }
        weights = [(name, str(t.dtype), list(t.shape), bit_sum(t)) for name, t in stored(self.model)]
        self.in_memory = _IN_MEMORY.setdefault(self.model, {})
        self._about = about
        self._quick = _digest({**about, "weights": weights, "config": repr(config.to_dict())})

    def scores(self, scorer: ProbeScorer, cases: Sequence[EditCase]) -> list[CaseScore]:
        """The scores of a group of cases: those of an earlier run, or what the scorer measures now, which is kept."""
        scores = self.read(cases)
        if scores is None:
            scores = scorer.before(cases)
            self.keep(cases, scores)
        return scores

    def read(self, cases: Sequence[EditCase]) -> list[CaseScore] | None:
        """The scores of a group of cases, if they are kept."""
        if not self.active:
            return None
        key = self._key(cases)
        if key not in self.in_memory and self.folder is not None:
            scores = _read(self._path(cases), cases)
            if scores is not None:
                self.in_memory[key] = scores
        return list(self.in_memory[key]) if key in self.in_memory else None

    def keep(self, cases: Sequence[EditCase], scores: Sequence[CaseScore]) -> None:
        """Keep the scores of a group of cases; a folder that cannot be written is only worth a warning."""
        if not self.active:
            return
        self.in_memory[self._key(cases)] = tuple(scores)
        if self.folder is None:
            return
        path = self._path(cases)
        try:
            self.folder.mkdir(exist_ok=True)
            write_text(path, json.dumps([score.to_dict() for score in scores]))
        except OSError as error:
            logger.warning("Scores could not be kept in %s: %s.", path, error)

    def _key(self, cases: Sequence[EditCase]) -> str:
        return _digest([self._quick, [case.to_dict() for case in cases]])

    def _path(self, cases: Sequence[EditCase]) -> Path:
        assert self.folder is not None
        return self.folder / f"{_digest([self._exact, [case.to_dict() for case in cases]])}.json"

    @cached_property
    def _exact(self) -> str:
        """What holds for other processes too; the hash of a whole model takes its time, so only where it is needed."""
        return _digest({**self._about, "model": model_fingerprint(self.model)})


def _digest(value: Mapping[str, Any] | Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _read(path: Path, cases: Sequence[EditCase]) -> tuple[CaseScore, ...] | None:
    """Scores of a file; ``None`` where there is none or it is damaged (they are then made anew)."""
    try:
        scores = tuple(CaseScore.from_dict(record) for record in json.loads(path.read_text(encoding="utf-8")))
        if [len(score.probes) for score in scores] != [len(case.probes) for case in cases]:
            raise ValueError("it holds other probes")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        logger.warning("The kept scores %s are damaged (%s); they are computed again.", path, error)
        return None
    return scores
