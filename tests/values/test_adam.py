"""Adam with a number of steps per edit."""

import torch

from kedit.values.adam import Adam

EDITS, STEPS = 3, 8


def gradients():
    return torch.randn(STEPS, EDITS, 1, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def torch_adam(gradients):
    value = torch.zeros_like(gradients[0], requires_grad=True)
    adam = torch.optim.Adam([value], lr=0.3)
    for gradient in gradients:
        value.grad = gradient.clone()
        adam.step()
    return value.detach()


def test_it_is_torch_adam():
    value, adam = torch.zeros(EDITS, 1, 16, dtype=torch.float64), Adam(torch.zeros(EDITS, 1, 16, dtype=torch.float64))
    for gradient in gradients():
        value += adam.change(gradient, torch.ones(EDITS, dtype=torch.bool), 0.3)
    assert torch.allclose(value, torch_adam(gradients()), rtol=1e-12, atol=0)


def test_an_edit_that_skips_a_step_is_as_if_it_had_not_been():
    value, adam = torch.zeros(EDITS, 1, 16, dtype=torch.float64), Adam(torch.zeros(EDITS, 1, 16, dtype=torch.float64))
    for number, gradient in enumerate(gradients()):
        value += adam.change(gradient, torch.tensor([number != 2, True, True]), 0.3)
    kept = torch.cat([gradients()[:2], gradients()[3:]])
    assert torch.allclose(value[0], torch_adam(kept)[0], rtol=1e-12, atol=0)
    assert torch.allclose(value[1:], torch_adam(gradients())[1:], rtol=1e-12, atol=0)


def test_an_edit_begins_anew_on_its_own():
    adam = Adam(torch.zeros(EDITS, 1, 16, dtype=torch.float64))
    everyone = torch.ones(EDITS, dtype=torch.bool)
    for gradient in gradients()[:4]:
        adam.change(gradient, everyone, 0.3)
    adam.restart(torch.tensor([False, True, False]))
    value = sum(adam.change(gradient, everyone, 0.3) for gradient in gradients()[4:])
    assert torch.allclose(value[1], torch_adam(gradients()[4:])[1], rtol=1e-12, atol=0)
    assert not torch.allclose(value[0], torch_adam(gradients()[4:])[0])
