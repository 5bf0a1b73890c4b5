"""The golden results: what the methods' published code printed and wrote on two small models."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

COLUMNS = ("total", "nll", "kl", "weight_decay", "sadr")
PRINTED = 6e-4  # losses were printed to 3 decimals: half a unit, and a little for float32


@dataclass(frozen=True)
class Golden:
    """One folder of golden results."""

    folder: Path
    base: PreTrainedModel
    tokenizer: object
    contexts: list[str]
    requests: list[dict]
    runs: dict[str, dict]
    tensors: dict[str, Tensor]

    def model(self) -> PreTrainedModel:
        """Give a fresh copy of the model."""
        return copy.deepcopy(self.base)

    def moments(self, *layers: int) -> dict[int, Tensor]:
        return {layer: self.tensors[f"cov.{layer}"] for layer in layers}


def _load(folder: Path) -> Golden:
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    meta = json.loads((folder / "meta.json").read_text())
    tensors = load_file(folder / "tensors.safetensors")
    return Golden(folder, model, tokenizer, meta["contexts"], meta["requests"], meta["runs"], tensors)


@pytest.fixture(scope="session")
def gpt2(test_data) -> Golden:
    return _load(test_data / "golden" / "gpt2")


@pytest.fixture(scope="session")
def gptj(test_data) -> Golden:
    return _load(test_data / "golden" / "gptj")


@pytest.fixture
def golden(request) -> Golden:
    """The folder that the test's parameter names."""
    return request.getfixturevalue(request.param)


def assert_losses(found: list[list[float]], printed: list[list[float]]) -> None:
    """Compare [total, nll, kl, weight decay, drift] of every step with what was printed."""
    assert len(found) == len(printed), f"{len(found)} steps were run, {len(printed)} are in the golden results"
    torch.testing.assert_close(torch.tensor(found), torch.tensor(printed), rtol=0, atol=PRINTED)


def assert_relative(found: Tensor, expected: Tensor, bound: float) -> None:
    """Compare by the norm of the difference."""
    assert found.shape == expected.shape
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert error <= bound, f"relative difference {error:.2e}, allowed {bound:.0e}"
