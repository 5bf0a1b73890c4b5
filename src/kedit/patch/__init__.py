"""Edits as artefacts: patches that are kept, shipped, reviewed, merged and undone."""

from kedit.patch.core import FORMAT_VERSION as FORMAT_VERSION
from kedit.patch.core import EditPatch as EditPatch
from kedit.patch.core import fingerprints as fingerprints
