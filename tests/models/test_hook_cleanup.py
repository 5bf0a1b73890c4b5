"""Hooks read, change, and are gone afterwards, whatever happened inside."""

import pytest
import torch
from torch import nn

from kedit.models.hooks import StopForward, inference_state, on_input, on_output, stops_early
from tiny_models import tiny_model


class Pair(nn.Module):
    """Returns a tuple, as attention modules do."""

    def forward(self, x, scale=1.0):
        return x * scale, "rest"


def count_hooks(model):
    """Count the hooks on all modules of a model."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def test_output_is_seen_and_replaced():
    linear, x = nn.Linear(3, 2), torch.randn(4, 3)
    seen = []
    with on_output(linear, seen.append):
        plain = linear(x)
    assert torch.equal(seen[0], plain)
    with on_output(linear, lambda y: y + 1):
        assert torch.equal(linear(x), plain + 1)
    assert torch.equal(linear(x), plain)


def test_of_a_tuple_the_first_is_meant_and_the_rest_stays():
    pair, x = Pair(), torch.ones(2)
    with on_output(pair, lambda y: y * 5):
        out, rest = pair(x)
    assert out.tolist() == [5, 5]
    assert rest == "rest"
    with on_output(pair, lambda y: None):
        assert pair(x)[0].tolist() == [1, 1]


def test_input_is_seen_and_replaced_and_other_arguments_stay():
    pair, x = Pair(), torch.ones(2)
    with on_input(pair, lambda y: y * 5):
        assert pair(x, 2.0)[0].tolist() == [10, 10]
        assert pair(x, scale=3.0)[0].tolist() == [15, 15]
    seen = []
    with on_input(pair, seen.append):
        assert pair(x, 2.0)[0].tolist() == [2, 2]
    assert torch.equal(seen[0], x)


@pytest.mark.parametrize("error", [StopForward, ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("place", [on_output, on_input])
def test_gone_after_any_exception(place, error):
    linear, x = nn.Linear(3, 3), torch.randn(1, 3)
    plain = linear(x)

    def fail(_):
        raise error("inside")

    with pytest.raises(error), place(linear, fail):
        linear(x)
    assert count_hooks(linear) == 0
    assert torch.equal(linear(x), plain)


def test_only_stop_forward_is_quiet():
    with stops_early():
        raise StopForward
    with pytest.raises(ValueError, match="loud"), stops_early():
        raise ValueError("loud")


def test_inference_state_restores_each_module_and_parameter():
    model = tiny_model("gpt2")
    model.train()
    model.transformer.h[1].eval()
    model.transformer.wte.weight.requires_grad_(False)
    before = [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]
    assert len(set(before[0])) == len(set(before[1])) == 2
    for error in (None, KeyboardInterrupt):
        try:
            with inference_state(model):
                assert not any(module.training for module in model.modules())
                assert not any(p.requires_grad for p in model.parameters())
                if error:
                    raise error
        except KeyboardInterrupt:
            pass
        assert ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]) == before
