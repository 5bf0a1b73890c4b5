"""Edits as artefacts: patches that are kept, shipped, reviewed, merged and undone."""

from kedit.patch.patch import FORMAT_VERSION as FORMAT_VERSION
from kedit.patch.patch import EditPatch as EditPatch
from kedit.patch.patch import fingerprints as fingerprints
