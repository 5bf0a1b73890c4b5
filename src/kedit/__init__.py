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
    "EMMET": "kedit.editors.memit",
    "Edit": "kedit.edit",
    "EditCase": "kedit.evaluation.cases",
    "EditCheck": "kedit.check",
    "EditPatch": "kedit.patch",
    "EditResult": "kedit.result",
    "Editor": "kedit.editors.base",
    "FT": "kedit.editors.ft",
    "EvalReport": "kedit.evaluation.report",
    "Guard": "kedit.guard",
    "GuardError": "kedit.guard",
    "IneffectiveEditWarning": "kedit.errors",
    "KEditError": "kedit.errors",
    "Ledger": "kedit.ledger",
    "MEMIT": "kedit.editors.memit",
    "PMET": "kedit.editors.memit",
    "ROME": "kedit.editors.rome",
    "RROME": "kedit.editors.rome",
    "SADR": "kedit.regularizers.sadr",
    "SecondMoments": "kedit.moments",
    "drift": "kedit.analysis.drifting",
    "editor": "kedit.editors",
    "evaluate": "kedit.evaluation.api",
    "load": "kedit.loading",
    "run_journal": "kedit.journal",
    "second_moments": "kedit.stats",
    "trace": "kedit.analysis.tracing",
}

if TYPE_CHECKING:
    from kedit.analysis.drifting import drift as drift
    from kedit.analysis.tracing import trace as trace
    from kedit.check import EditCheck as EditCheck
    from kedit.edit import Edit as Edit
    from kedit.editors import editor as editor
    from kedit.editors.alphaedit import AlphaEdit as AlphaEdit
    from kedit.editors.base import Editor as Editor
    from kedit.editors.ft import FT as FT
    from kedit.editors.memit import EMMET as EMMET
    from kedit.editors.memit import MEMIT as MEMIT
    from kedit.editors.memit import PMET as PMET
    from kedit.editors.rome import ROME as ROME
    from kedit.editors.rome import RROME as RROME
    from kedit.errors import IneffectiveEditWarning as IneffectiveEditWarning
    from kedit.errors import KEditError as KEditError
    from kedit.evaluation.api import evaluate as evaluate
    from kedit.evaluation.cases import EditCase as EditCase
    from kedit.evaluation.report import EvalReport as EvalReport
    from kedit.guard import Guard as Guard
    from kedit.guard import GuardError as GuardError
    from kedit.journal import run_journal as run_journal
    from kedit.ledger import Ledger as Ledger
    from kedit.loading import load as load
    from kedit.moments import SecondMoments as SecondMoments
    from kedit.patch import EditPatch as EditPatch
    from kedit.regularizers.sadr import SADR as SADR
    from kedit.result import EditResult as EditResult
    from kedit.stats import second_moments as second_moments

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
