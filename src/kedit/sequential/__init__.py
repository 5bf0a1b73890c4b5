"""Long sequences of edits that survive a crash: each kept edit is on the disk before the next one begins.

A journal is a folder: ``journal.json`` says what the run is, ``000000.safetensors``, ``000001.safetensors``, ... are the
patches of the kept edits (each an ordinary patch file), ``000002.refused.json`` stands for one that was rolled back.
Where the editor knew keys of earlier edits at the start, ``start.safetensors`` holds them.
"""

from kedit.sequential.folder import is_begun as is_begun
from kedit.sequential.run import JournalResult as JournalResult
from kedit.sequential.run import Refusal as Refusal
from kedit.sequential.run import read_journal as read_journal
from kedit.sequential.run import run_journal as run_journal
