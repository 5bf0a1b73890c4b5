"""ROME (arXiv:2202.05262), R-ROME and p-ROME (arXiv:2403.07175): one association into one down-projection.

With W the down-projection, k̄ the mean key over the contexts, k_0 the bare prompt's key, u = C⁻¹k̄ / ‖C⁻¹k̄‖:

    ROME     Δ = (v* − W k_0) uᵀ / (u·k_0)               v* = t0 + δ
    R-ROME   Δ = (v* − mean_j W k_j) uᵀ / (u·k̄)
    p-ROME   Δ = (v* − W k_0) uᵀ / (u·k_0), u = C⁻¹k_0    the bare key everywhere

Conventions: δ and t0 live at the MLP's output (its down-projection's, bias included); keys are read without δ at the
subject's last token; the mean over contexts is plain (the bare prompt is one of them), and taken before C⁻¹; "W k" is
the module's output, bias included, so the bias cancels. C is used as it is handed over; C⁻¹ is taken in float64.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .common import Request, down, read
from .inner import Hyper, Value, optimise


@dataclass(frozen=True)
class RankOne:
    value: Value
    left: Tensor  # u, [I], unit length
    right: Tensor  # v, [O]
    keys: list[Tensor]  # one per context, [I]

    @property
    def update(self) -> Tensor:
        """ΔW = v uᵀ, [O, I]."""
        return torch.outer(self.right, self.left)


def _whitened(second_moment: Tensor, key: Tensor) -> Tensor:
    u = torch.linalg.inv(second_moment.double()) @ key.double()
    return (u / u.norm()).to(key.dtype)


def _run(model, request: Request, layer: int, second_moment: Tensor, hyper: Hyper, variant: str) -> RankOne:
    module = down(model, layer)
    value = optimise(model, request, module, hyper)
    keys, outputs = zip(*[read(model, prompt, module) for prompt in request.rewriting], strict=True)
    bare_key, bare_output = keys[0], outputs[0]
    mean_key, mean_output = sum(keys) / len(keys), sum(outputs) / len(outputs)
    if variant == "rome":
        left = _whitened(second_moment, mean_key)
        right = (value.target - bare_output) / (left @ bare_key)
    elif variant == "r-rome":
        left = _whitened(second_moment, mean_key)
        right = (value.target - mean_output) / (left @ mean_key)
    else:
        left = _whitened(second_moment, bare_key)
        right = (value.target - bare_output) / (left @ bare_key)
    return RankOne(value, left, right, list(keys))


def rome(model, request: Request, layer: int, second_moment: Tensor, hyper: Hyper) -> RankOne:
    return _run(model, request, layer, second_moment, hyper, "rome")


def r_rome(model, request: Request, layer: int, second_moment: Tensor, hyper: Hyper) -> RankOne:
    return _run(model, request, layer, second_moment, hyper, "r-rome")


def p_rome(model, request: Request, layer: int, second_moment: Tensor, hyper: Hyper) -> RankOne:
    return _run(model, request, layer, second_moment, hyper, "p-rome")
