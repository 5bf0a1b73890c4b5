"""The stabilisers' formulas: ``pytest benchmarks/test_stabilisers.py``, seconds."""

from types import SimpleNamespace

import torch
from stabilisers import ENCORE, NAS

from kedit.editors.solve_layers import LayerProblem
from kedit.editors.value_editor import ValueEditor
from kedit.keys import read
from kedit.keys.second_moment import SecondMoments
from kedit.values.optimize import Values

WIDTH, OUT, EDITS = 12, 7, 3


def test_encore_is_its_normal_equations():
    draw = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    text, keys, residual, earlier = rand(60, WIDTH), rand(EDITS, 2, WIDTH), rand(EDITS, OUT), rand(4, WIDTH)
    moments = SecondMoments({0: text.T @ text / len(text)})
    weights = (SimpleNamespace(name="w", matrix=rand(OUT, WIDTH)),)
    problem = LayerProblem(layer=0, keys=keys, residual=residual, weights=weights, moments=moments)
    editor = object.__new__(ENCORE)
    editor.config = ENCORE.Config(layers=(0,), moment_weight=2.0, norm_weight=0.5)
    editor.history = SimpleNamespace(keys=lambda *_: earlier)
    c, k = moments[0].matrix, problem.own_keys
    system = 2 * c + earlier.T @ earlier + k.T @ k + 0.5 * 2 * c.trace() / WIDTH * torch.eye(WIDTH)
    expected = torch.linalg.solve(system, k.T @ residual).T
    torch.testing.assert_close(editor.solve(problem).dense, expected, rtol=1e-6, atol=1e-8)


def test_nas_gives_every_value_the_length_of_the_first_calls(monkeypatch):
    before = torch.tensor([[3.0, 4.0], [3.0, 4.0]])
    delta = torch.tensor([[3.0, 4.0], [0.0, 0.0]])  # values of length 10 and 5
    made = Values(delta[:, None], before[:, None], [[], []], [False, False])
    monkeypatch.setattr(ValueEditor, "_optimize", lambda *_: made)
    monkeypatch.setattr(read, "request_outputs", lambda *_: before)
    editor = object.__new__(NAS)
    editor.config, editor.arch, editor.anchor = SimpleNamespace(layers=(1,)), None, None
    found = editor._optimize([], None)
    assert editor.anchor == 7.5
    torch.testing.assert_close((before + found.delta[:, 0]).norm(dim=1), torch.tensor([7.5, 7.5]))
    editor.anchor = 4.0  # 10 is more than twice as long: that edit is dropped
    found = editor._optimize([], None)
    torch.testing.assert_close(found.delta[0, 0], torch.zeros(2))
    torch.testing.assert_close((before + found.delta[:, 0])[1].norm(), torch.tensor(4.0))
