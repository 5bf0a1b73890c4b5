"""kedit: edit facts inside open-weight language models, and prove what the edit did.

    model, tok = kedit.load()
    edit = kedit.Edit(prompt="{} lives in", subject="...", target_new="...")
    result = kedit.ROME(model, tok).apply(edit, regularizer="sadr")

Names are imported when first used, so ``import kedit`` is quick and does not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_NAMES = {
    "AlphaEdit": "kedit.editors.alphaedit",
    "EMMET": "kedit.editors.emmet",
    "Edit": "kedit.edit",
    "EditCase": "kedit.evaluation.cases",
    "EditCheck": "kedit.prompts.predictions",
    "EditPatch": "kedit.patch",
    "EditResult": "kedit.editors.result",
    "Editor": "kedit.editors.base",
    "FT": "kedit.editors.ft",
    "EvalReport": "kedit.evaluation.report",
    "Guard": "kedit.evaluation.guard",
    "GuardError": "kedit.evaluation.guard",
    "IneffectiveEditWarning": "kedit.errors",
    "KEditError": "kedit.errors",
    "Ledger": "kedit.patch.ledger",
    "MEMIT": "kedit.editors.memit",
    "PMET": "kedit.editors.pmet",
    "ROME": "kedit.editors.rome",
    "RROME": "kedit.editors.rome",
    "SADR": "kedit.regularizers.sadr",
    "SecondMoments": "kedit.keys.second_moment",
    "ValueEditor": "kedit.editors.value_editor",
    "calibrate": "kedit.calibration.search",
    "drift": "kedit.analysis.attention_drift",
    "get_editor": "kedit.editors",
    "evaluate": "kedit.evaluation.api",
    "load": "kedit.loading",
    "run_journal": "kedit.sequential",
    "second_moments": "kedit.keys.estimate",
    "trace": "kedit.analysis.causal_tracing",
}

if TYPE_CHECKING:
    from kedit.analysis.attention_drift import drift as drift
    from kedit.analysis.causal_tracing import trace as trace
    from kedit.calibration.search import calibrate as calibrate
    from kedit.edit import Edit as Edit
    from kedit.editors import get_editor as get_editor
    from kedit.editors.alphaedit import AlphaEdit as AlphaEdit
    from kedit.editors.base import Editor as Editor
    from kedit.editors.emmet import EMMET as EMMET
    from kedit.editors.ft import FT as FT
    from kedit.editors.memit import MEMIT as MEMIT
    from kedit.editors.pmet import PMET as PMET
    from kedit.editors.result import EditResult as EditResult
    from kedit.editors.rome import ROME as ROME
    from kedit.editors.rome import RROME as RROME
    from kedit.editors.value_editor import ValueEditor as ValueEditor
    from kedit.errors import IneffectiveEditWarning as IneffectiveEditWarning
    from kedit.errors import KEditError as KEditError
    from kedit.evaluation.api import evaluate as evaluate
    from kedit.evaluation.cases import EditCase as EditCase
    from kedit.evaluation.guard import Guard as Guard
    from kedit.evaluation.guard import GuardError as GuardError
    from kedit.evaluation.report import EvalReport as EvalReport
    from kedit.keys.estimate import second_moments as second_moments
    from kedit.keys.second_moment import SecondMoments as SecondMoments
    from kedit.loading import load as load
    from kedit.patch import EditPatch as EditPatch
    from kedit.patch.ledger import Ledger as Ledger
    from kedit.prompts.predictions import EditCheck as EditCheck
    from kedit.regularizers.sadr import SADR as SADR
    from kedit.sequential import run_journal as run_journal

__all__ = list(_NAMES)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("kedit")
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'kedit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*_NAMES, "__version__"]
