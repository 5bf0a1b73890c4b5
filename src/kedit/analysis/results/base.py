"""The base class of the results of the analysis functions, and kinds of probes by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kedit.utils.files import write_text
from kedit.utils.registry import import_target


class AnalysisResult:
    """A result with a summary, JSON values, and HTML for notebooks (:mod:`kedit.report.html` makes it)."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        raise NotImplementedError

    def save(self, path: str | Path) -> Path:
        """Write :meth:`to_dict` as JSON."""
        return write_text(Path(path), json.dumps(self.to_dict(), ensure_ascii=False))

    def _repr_html_(self) -> str:
        return str(import_target("kedit.report.html:notebook_html")(self))
