"""The report as one self-contained page."""

from __future__ import annotations
