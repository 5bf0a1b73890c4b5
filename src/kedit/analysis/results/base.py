"""What all results of the analysis functions share."""

from __future__ import annotations

from kedit.utils.registry import import_target


class NotebookResult:
    """A result that notebooks show as HTML; :mod:`kedit.report.html` makes it."""

    def _repr_html_(self) -> str:
        return str(import_target("kedit.report.html:notebook_html")(self))
