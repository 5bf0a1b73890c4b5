"""Shared by all tests: test data, threads, a small disk, and NaN in uninitialised memory so that reading it fails."""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

TEST_DATA = "KEDIT_TEST_DATA"
REAL_MODEL = "KEDIT_REAL_MODEL"
TESTS = Path(__file__).parent
FAST = [  # files and folders whose tests train and edit no model: `pytest -m fast`
    TESTS / place
    for place in (
        "test_import_order.py",
        "contract/test_reference_pages.py",
        "editors/test_closed_forms.py",
        "prompts/test_edit_request.py",
        "regularizers",
        "utils/test_registry.py",
    )
]


def _by_the_caller_of_modules(warn: Callable[..., None]) -> Callable[..., None]:
    """``warnings.warn`` that blames whoever called a module where it would blame ``nn.Module.__call__``.

    transformers warns of a deprecated argument of ``forward`` with the frame that called ``forward``: torch's, whether kedit's code
    called the model or a dependency's did. Filters go by the module that is blamed.
    """

    def warned(message: Any, category: Any = None, stacklevel: int = 1, **kwargs: Any) -> None:
        stacklevel = max(stacklevel, 1)
        try:
            frame = sys._getframe(stacklevel)
        except ValueError:  # the stack is not that deep
            frame = None
        while frame is not None and frame.f_globals.get("__name__") == "torch.nn.modules.module":
            frame = frame.f_back
            stacklevel += 1
        warn(message, category, stacklevel + 1, **kwargs)

    torch.jit._builtins._register_builtin(warned, "aten::warn")  # as warnings.warn is, in functions that are scripted
    return warned


def pytest_configure(config: pytest.Config) -> None:
    warnings.warn = _by_the_caller_of_modules(warnings.warn)
    # Tiny tensors: more threads only wait for one another, and change the order of sums.
    torch.set_num_threads(1)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With ``-m fast``, import the fast files alone: importing all others takes longer than the fast tests."""
    if config.option.markexpr != "fast" or collection_path.is_dir():
        return None
    return True if not _is_fast(collection_path) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _is_fast(item.path) and not item.get_closest_marker("slow"):
            item.add_marker("fast")


def _is_fast(path: Path) -> bool:
    return any(path.is_relative_to(place) for place in FAST)


@pytest.fixture(autouse=True)
def _poisoned_memory(request: pytest.FixtureRequest):
    """Fill uninitialised memory with NaN (CPU tests; on CUDA the switch forbids needed operations)."""
    if request.node.get_closest_marker("gpu"):
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def _scores_of_no_other_run(monkeypatch: pytest.MonkeyPatch):
    """Evaluations keep nothing on disk, where it would outlive a change of the code."""
    monkeypatch.setattr("kedit.evaluation.kept.disk_folder", lambda: None)


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Give the folder of the test data, or skip: it is not part of the project."""
    folder = os.environ.get(TEST_DATA)
    if not folder:
        pytest.skip(f"Needs the test data: set the environment variable {TEST_DATA} to its folder.")
    path = Path(folder)
    if not path.is_dir():
        pytest.fail(f"{TEST_DATA} is {folder!r}, which is not a folder.")
    return path


@pytest.fixture(scope="session")
def real_model() -> Path:
    """Give the folder of a pretrained model that ``python -m benchmarks.real_model DIR`` made, or skip."""
    folder = os.environ.get(REAL_MODEL)
    if not folder:
        pytest.skip(f"Needs a real model: run `python -m benchmarks.real_model DIR` and set {REAL_MODEL}=DIR.")
    path = Path(folder)
    if not (path / "config.json").is_file():
        pytest.fail(f"{REAL_MODEL} is {folder!r}, which is not the folder of a model: it holds no config.json.")
    return path


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
