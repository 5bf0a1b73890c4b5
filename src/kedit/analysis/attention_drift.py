"""Attention drift: how an edit moves the last token's attention, block by block and head by head (arXiv:2502.14838)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kedit.analysis.checks import as_kinds
from kedit.analysis.edited_models import CHUNK, Patches, Source
from kedit.analysis.probes import ProbeTokens, probe_tokens_by_case
from kedit.analysis.results.drift import DriftProbe, DriftResult
from kedit.capture import row_divergence
from kedit.capture.divergence import over_attending
from kedit.capture.modules import attention_modules
from kedit.errors import EditError
from kedit.evaluation.attention import AttentionToSubject, attention_to_subject
from kedit.evaluation.cases import EditCase, Kind
from kedit.evaluation.probing import WATCHED
from kedit.models import ModelArch
from kedit.models.hooks import inference_state
from kedit.models.lock import holding_model
from kedit.prompts.likelihood import score_rows
from kedit.regularizers import Choice
from kedit.utils.progress import Progress
from kedit.utils.validation import check_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@holding_model
def drift(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cases: EditCase | Iterable[EditCase],
    editor: Source = "rome",
    regularizer: Choice = None,
    *,
    config: Mapping[str, Any] | None = None,
    kinds: Sequence[Kind | str] = WATCHED,
    chunk: int = CHUNK,
) -> DriftResult:
    """Compare the last token's attention before and after each case's edit; the model is unedited again afterwards.

    Asked are the probes in whose context the edited subject stands. Each costs one pass for its attention rows and one for
    its answers, before and after.

    Args:
        model: a causal language model.
        tokenizer: its fast tokenizer.
        cases: edits with their probes.
        editor: a name, an editor of this model, one patch for all cases, or a patch per case id.
        regularizer: as in :meth:`kedit.Editor.apply`.
        config: the editor's hyper-parameters, where it is given by name.
        kinds: kinds of probes to ask.
        chunk: cases whose values are optimised together.

    Raises:
        EditError: no probe of these kinds mentions the edited subject, or no case could be edited.
        CaptureError: the model's attention cannot be captured.
        ConfigError: options do not fit together.
    """
    chosen = as_kinds(kinds)
    check_whole("chunk", chunk, 1)
    arch = ModelArch(model)
    patches = Patches(model, tokenizer, cases, editor, regularizer, config)
    asked = probe_tokens_by_case(arch, tokenizer, patches.cases, chosen)
    measured = _Measured([])
    with inference_state(model), Progress(len(asked), "comparing attention", unit="case") as progress:
        for part in patches.chunks(chunk):
            before = dict(zip([case.id for case, _ in part], _ask(arch, [asked[c.id] for c, _ in part]), strict=True))
            for case, patch in part:
                with patches.edited(patch):
                    after = _ask(arch, [asked[case.id]])[0]
                for probe, then, now in zip(asked[case.id], before[case.id], after, strict=True):
                    measured.add(tokenizer, probe, then, now)
                progress.advance()
    if not measured.probes:
        raise EditError(f"No edit succeeded. The first: {next(iter(patches.failures.values()), 'there was none')}")
    return measured.result(patches, tuple(attention_modules(model)))


@dataclass(frozen=True)
class _Asked:
    """One probe under one state of the model: its rows and the probabilities of its answers."""

    attention: AttentionToSubject
    right: float
    wrong: float | None


def _ask(arch: ModelArch, cases: Sequence[Sequence[ProbeTokens]]) -> list[list[_Asked]]:
    """All probes of some cases, case by case."""
    flat = [probe for probes in cases for probe in probes]
    if not flat:
        return [[] for _ in cases]
    seen = attention_to_subject(arch, [probe.right for probe in flat])
    answers = score_rows(arch, [row for probe in flat for row in (probe.right, probe.wrong or probe.right)])
    asked = iter(
        _Asked(seen[i], answers[2 * i].probability, None if probe.wrong is None else answers[2 * i + 1].probability)
        for i, probe in enumerate(flat)
    )
    return [[next(asked) for _ in probes] for probes in cases]


@dataclass
class _Measured:
    """Probes measured so far."""

    probes: list[DriftProbe]

    def add(self, tokenizer: PreTrainedTokenizerBase, asked: ProbeTokens, then: _Asked, now: _Asked) -> None:
        """Compare one probe's two states."""
        p, q = then.attention.rows[None].double(), now.attention.rows[None].double()  # [1, L, A, T]
        column = torch.tensor([then.attention.column])
        kl = row_divergence(q, p).clamp(min=0)[0]
        over = torch.stack([over_attending(q[:, i], p[:, i], column)[0] for i in range(q.shape[1])])
        row = asked.right
        self.probes.append(
            DriftProbe(
                case=asked.case,
                kind=asked.probe.kind,
                prompt=asked.probe.prompt,
                right=str(asked.probe.right),
                wrong=asked.probe.wrong,
                tokens=tuple(str(tokenizer.decode([token])) for token in row.ids[: row.target]),
                column=row.subject_last,
                right_before=then.right,
                right_after=now.right,
                wrong_before=then.wrong,
                wrong_after=now.wrong,
                kl=kl.numpy(),
                weight_before=_numpy(p[0, :, :, row.subject_last]),
                weight_after=_numpy(q[0, :, :, row.subject_last]),
                over=over.numpy(),
                map_before=_numpy(p[0].amax(1)),
                map_after=_numpy(q[0].amax(1)),
            )
        )

    def result(self, patches: Patches, layers: tuple[int, ...]) -> DriftResult:
        """All of it."""
        return DriftResult(patches.label, tuple(self.probes), layers, dict(patches.failures))


def _numpy(values: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.asarray(values.double().numpy())
