"""An edit with a penalty ends when its target is said and its loss falls no further."""

import torch
from test_adaptive_weights import editor

import kedit
from kedit.editors import presets
from kedit.regularizers import Needs
from kedit.values.plateau import Plateau
from reference.float64 import TrueFloat64
from tiny_models import EDITS, tiny_model, tokenizer

EDIT = kedit.Edit(*EDITS["middle"])


def log_of(regularizer, **config):
    with TrueFloat64():
        result = editor(steps=80, **config).apply(EDIT, regularizer=regularizer)
    result.revert()
    return result.log[0]


class Constant:
    """A penalty that stays, so that the loss as a whole never falls below ``stop_loss``."""

    name = "constant"

    def needs(self, site):
        return Needs()

    def penalty(self, now, before):
        return now.delta.new_ones(now.num_edits)


def test_it_ends_earlier_at_the_same_loss():
    held = {"clamp": 1.0, "stop_loss": 5.9}  # the loss falls no further once δ lies at its bound
    published, early = log_of(Constant(), patience=0, **held), log_of(Constant(), patience=5, **held)
    assert len(published) == 80
    assert len(early) < 60
    assert [row["nll"] for row in early] == [row["nll"] for row in published[: len(early)]]
    assert early[-1]["nll"] <= 5.9
    assert early[-1]["total"] < published[-1]["total"] * 1.02


def test_an_edit_that_does_not_say_its_target_goes_on():
    assert len(log_of(kedit.SADR(gamma=0.1), stop_loss=0.001, patience=2)) == 80


def test_without_a_penalty_it_has_no_influence():
    assert log_of(None, stop_loss=0.001, patience=1) == log_of(None, stop_loss=0.001, patience=0)


def test_the_rule_has_it_and_the_presets_and_given_steps_do_not():
    assert kedit.ROME.preset(tiny_model("llama")).patience == 5
    assert kedit.ROME(tiny_model("llama"), tokenizer(), steps=80).config.patience == 0
    calibrated = [presets.SMOLLM2_135M]  # from the rule
    tables = presets.PRESETS.values()
    assert all("patience" not in one.values for table in tables for key, one in table.items() if key not in calibrated)


def test_waiting_begins_with_the_first_score_that_counts():
    plateau, all_edits = Plateau(2, torch.zeros(1)), torch.arange(2)
    for scores, counts in (([5.0, 5.0], [False, True]), ([4.0, 5.0], [False, True]), ([3.0, 4.999], [True, True])):
        plateau.step(torch.tensor(scores), torch.tensor(counts), all_edits)
    assert plateau.waited.tolist() == [0, 2]
    assert plateau.least.tolist() == [3.0, 5.0]
