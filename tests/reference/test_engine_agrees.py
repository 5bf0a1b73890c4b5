"""The engine against the plain reference, in true float64: same losses, same δ, same updates.

All edits go through the engine together, stop on their own, and share stored keys and values; the reference takes
one edit and one whole prompt at a time.
"""

import pytest
import torch

import kedit
from kedit.pipeline import needs_of
from kedit.request import encode_edits
from models import CONTEXTS, EDITS, MODEL_TYPES, moments, tiny_model, tokenizer

from . import common, rome
from .float64 import TrueFloat64
from .inner import Hyper

BLOCKS = 4
GAMMA = 0.5
COLUMNS = ("total", "nll", "kl", "weight_decay", "sadr")

# Chosen so that δ is clamped, the mask of SADR opens, and edits stop at different steps.
CONFIG = {"steps": 7, "lr": 0.4, "weight_decay": 0.5, "kl_factor": 0.0625, "clamp": 1.5, "stop_loss": 5.7}


class Case:
    """A tiny model, four edits, and both ways of editing."""

    def __init__(self, model_type: str, kind: str = "plain", attention: str = "sdpa"):
        self.model = tiny_model(model_type, layers=BLOCKS, dtype=torch.float64, attention=attention)
        self.tokenizer = tokenizer(kind)
        self.edits = [kedit.Edit(*edit) for edit in EDITS.values()]
        self.requests = [common.request(self.tokenizer, *edit, CONTEXTS) for edit in EDITS.values()]
        width = common.weight(self.model, 0).shape[1]
        self.moments = {layer: moments(width, layer) for layer in range(BLOCKS)}

    def editor(self, name: str, layers, mode: str = "partial", **config):
        editor = kedit.editor(
            name,
            self.model,
            self.tokenizer,
            moments=self.moments,
            contexts=CONTEXTS,
            layers=layers,
            **(CONFIG | config),
        )
        editor.engine.mode = mode
        return editor

    def values(self, editor, regularizers):
        sites = editor.sites(editor.config)
        needs = needs_of(regularizers, sites)
        requests = encode_edits(editor.arch, self.tokenizer, self.edits, CONTEXTS, needs)
        return editor.engine.optimise(sites, requests, editor.config.objective, regularizers, needs)


def hyper(gamma: float = 0.0, masked: bool = True) -> Hyper:
    return Hyper(
        steps=CONFIG["steps"],
        lr=CONFIG["lr"],
        weight_decay=CONFIG["weight_decay"],
        kl=CONFIG["kl_factor"],
        clamp=CONFIG["clamp"],
        stop=CONFIG["stop_loss"],
        gamma=gamma,
        masked=masked,
    )


def assert_close(found, expected, bound, what):
    error, size = (found - expected).norm(), expected.norm()
    assert error <= bound * size, f"{what}: differs by {error:.1e}, its norm is {size:.1e}, allowed {bound:.0e} relative"


def assert_values(values, references, site=0):
    """Compare losses, t0 and δ of every edit."""
    for i, reference in enumerate(references):
        found = torch.tensor([[row.get(c, 0.0) for c in COLUMNS] for row in values.log[i]], dtype=torch.float64)
        torch.testing.assert_close(found, torch.tensor(reference.losses, dtype=torch.float64), rtol=1e-10, atol=1e-12)
        assert_close(values.initial[i, site], reference.initial, 1e-12, f"t0 of edit {i}")
        assert_close(values.delta[i, site], reference.delta, 1e-10, f"δ of edit {i}")


def dense(patch, layer):
    (name,) = [name for name in patch.deltas if f".{layer}." in name]
    return patch.deltas[name].dense


@pytest.mark.parametrize("gamma", [0.0, GAMMA])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_rome(model_type, gamma):
    case = Case(model_type)
    regularizers = [kedit.SADR(gamma=gamma)] if gamma else []
    with TrueFloat64():
        references = [rome.rome(case.model, r, 1, case.moments[1], hyper(gamma)) for r in case.requests]
        for mode in ("partial", "plain"):
            editor = case.editor("rome", (1,), mode)
            assert_values(case.values(editor, regularizers), [r.value for r in references])
        patches = editor.propose(case.edits, regularizers)
    for patch, reference in zip(patches, references, strict=True):
        assert_close(dense(patch, 1), reference.update, 1e-8, "ΔW")
