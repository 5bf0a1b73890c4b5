"""Calibration: hyper-parameters for one model, chosen on development cases by edits that are tried."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kedit.calibration.result import Calibration as Calibration
    from kedit.calibration.search import calibrate as calibrate

_NAMES = {"Calibration": "kedit.calibration.result", "calibrate": "kedit.calibration.search"}


def __getattr__(name: str) -> Any:  # imported when first used: they load torch
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'kedit.calibration' has no attribute {name!r}")
