"""The regularizers' own prompts in a pass of their own: the same edits."""

import pytest
from test_batching import ALL, editor, relative

import kedit
from kedit.regularizers import Neighbours, Relations
from kedit.values.split_forward import SplitForward
from reference.float64 import TrueFloat64

REGULARIZERS = {
    "neighbours": [Neighbours(gamma=0.3)],
    "all": [kedit.SADR(gamma=0.3), Relations(gamma=0.3), Neighbours(gamma=0.3)],
    "auto": [kedit.SADR(gamma="auto"), Neighbours(gamma=0.3)],
}


@pytest.mark.parametrize("regularizers", REGULARIZERS)
@pytest.mark.parametrize("mode", ["cached", "full"])
def test_apart_is_together(mode, regularizers, monkeypatch):
    made = editor("rome", "llama", "left")
    made.engine.mode = mode
    found, ran, run = [], [], SplitForward.run

    def noting(self, delta):
        ran.append(self)
        return run(self, delta)

    monkeypatch.setattr(SplitForward, "run", noting)
    with TrueFloat64():
        for pays in (False, True):
            monkeypatch.setattr(SplitForward, "pays", lambda _whole, pays=pays: pays)
            found.append(made.propose(ALL[:3], REGULARIZERS[regularizers]))
            assert bool(ran) == pays
    for together, apart in zip(*found, strict=True):
        for weight, delta in together.deltas.items():
            assert relative(apart.deltas[weight].dense, delta.dense) < 1e-10


def test_it_pays_where_the_prompts_differ_much_in_length(monkeypatch):
    made = editor("rome", "llama")
    asked, pays = [], SplitForward.pays

    def noting(whole):
        asked.append(pays(whole))
        return asked[-1]

    monkeypatch.setattr(SplitForward, "pays", noting)
    made.propose(ALL[0], Relations(gamma=0.3, prompts=("{} is",)))
    assert not any(asked)
    asked.clear()
    long = kedit.Edit("{} lives in the city of Ada and works in the city of Ada and the", "Ada", "Berlin")
    made.propose(long, Relations(gamma=0.3))
    assert any(asked)
