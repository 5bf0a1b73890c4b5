"""A disk that is soon full."""

import subprocess

import pytest


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of one megabyte; skipped where the tests may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    except FileNotFoundError:
        pytest.skip("Needs the program mount.")
    if done.returncode:
        pytest.skip("Needs the right to mount a small tmpfs (root).")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
