"""Warnings that point at the user's line."""

from __future__ import annotations

import sys
import warnings

from kedit.errors import KEditWarning

_INSIDE = ("kedit", "torch", "contextlib")


def warn_user(message: str, category: type[KEditWarning] = KEditWarning) -> None:
    """Warn, with the nearest line outside kedit as the place, however deep inside the cause was seen."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in _INSIDE:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
