"""FT-L: constrained fine-tuning of one layer (Zhu et al., 2020, arXiv:2012.00363; ROME's baseline)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn.functional import log_softmax

from kedit.editors import presets
from kedit.editors.base import Call, Editor
from kedit.editors.config import EditorConfig, hyper
from kedit.editors.memory import training_footprint
from kedit.errors import ConfigError, NonFiniteError, UnsupportedError
from kedit.models import ModelArch
from kedit.models.hooks import inference_state
from kedit.patch.delta import Delta, DenseDelta, check_finite
from kedit.patch.ledger import Ledger
from kedit.prompts.encode import Request
from kedit.prompts.tokenize import pad
from kedit.values.memory import Footprint
from kedit.values.optimize import StepLog


class FT(Editor):
    """Fine-tunes the down-projection on the edit's sentence, every weight staying within ±ε of where it was.

    ::

        min over Δ of −log p(target | prompt; W + Δ),   |Δ_ij| ≤ ε

    There is no value, so there are no value regularizers, and nothing is guaranteed to hold afterwards. Of a mixture of
    experts, those are trained that serve the sentence's tokens.
    """

    name: ClassVar[str] = "ft"

    @dataclass(frozen=True, kw_only=True)
    class Config(EditorConfig):
        """FT's hyper-parameters; ``clamp`` is ε, absolute, and ``kl_factor`` does not apply.

        Attributes:
            objective_form: ``"masked"``: each target token is predicted from the tokens before it; ``"prompt_last"``: the
                published form, all target tokens from the prompt's last position, wrong beyond one token.
        """

        lr: float = 5e-4
        weight_decay: float = 0.0
        kl_factor: float = 0.0
        clamp: float = 5e-4
        stop_loss: float = 1e-2
        objective_form: Literal["masked", "prompt_last"] = hyper("masked", choices=("masked", "prompt_last"))

        def __post_init__(self) -> None:
            """Check every field."""
            super().__post_init__()
            if self.kl_factor:
                raise ConfigError("FT has no KL term: leave kl_factor at 0.")

    config: Config

    @classmethod
    def rule(cls, arch: ModelArch) -> dict[str, Any]:
        """ε and step size relative to the weights: ε = ‖W‖_rms / √I, and five steps reach it.

        The output of a neuron that such a change aligns with a key moves by about what the neuron gives.
        """
        layer = presets.layer_rule(arch)
        matrix = arch.weights(layer)[0].matrix
        values: dict[str, Any] = {"layers": (layer,)}
        if matrix.is_floating_point() and matrix.numel():
            clamp = float(matrix.float().square().mean().sqrt()) / math.sqrt(arch.shape(layer)[1])
            if 0 < clamp < math.inf:
                values |= {"clamp": clamp, "lr": clamp / 5}
        return values

    @property
    def contexts(self) -> tuple[str, ...]:
        """The bare prompt alone, unless contexts were given."""
        return self._contexts or ("{}",)

    def largest_wave(self, requests: Sequence[Request], call: Call) -> Footprint:
        """One step of the longest edit, and what training holds of the weights."""
        longest = max(requests, key=lambda request: max(len(row.ids) for row in request.rewrite))
        return training_footprint(self.arch, self._trained(), lambda: self._loss(longest))

    def _trained(self) -> list[torch.nn.Parameter]:
        """The parameters behind the edited weights; experts share theirs."""
        return list({id(weight.parameter): weight.parameter for weight in self.edited_weights}.values())

    def updates(self, requests: Sequence[Request], call: Call) -> tuple[dict[str, Delta], list[list[StepLog]]]:
        """Fine-tune on one edit; the weights stay as they are."""
        [request], config, weights = requests, self.config, self.edited_weights
        if any(weight.away is not None for weight in weights):
            raise UnsupportedError(
                f"FT trains {weights[0].name}, which is offloaded: no gradient reaches it. Keep its block on a device "
                "(device_map), or use an editor that solves for its update."
            )
        trained = self._trained()
        changes = [torch.zeros_like(tensor, dtype=self.arch.work_dtype, requires_grad=True) for tensor in trained]
        adam = torch.optim.Adam(changes, lr=config.lr, weight_decay=config.weight_decay)
        log: list[StepLog] = []
        provisional = Ledger.of(self.model).provisional()
        with call.timer.stage("optimise"), provisional as written, inference_state(self.model, trained):
            for step in range(config.steps * len(request.edits)):
                loss = self._loss(request)
                log.append({"step": float(step), "total": loss.item(), "nll": loss.item()})
                if not math.isfinite(log[-1]["total"]):
                    raise NonFiniteError(f"The loss of {request.edit.text!r} is not finite at step {step}.")
                if log[-1]["total"] < config.stop_loss:
                    break
                grads = torch.autograd.grad(loss, trained)
                for change, grad in zip(changes, grads, strict=True):
                    change.grad = grad.to(change.dtype)
                adam.step()
                for change in changes:
                    change.detach().clamp_(-config.clamp, config.clamp)
                written.add(self._deltas(trained, changes), anew=True)
        return {name: check_finite(name, delta) for name, delta in self._deltas(trained, changes).items()}, [log]

    def _deltas(self, trained: Sequence[Tensor], changes: Sequence[Tensor]) -> dict[str, Delta]:
        """The changes as updates by name; experts that served no token are left out (but for one, if none did)."""
        by_parameter = {id(tensor): change.detach() for tensor, change in zip(trained, changes, strict=True)}
        weights, deltas = self.edited_weights, dict[str, Delta]()
        for weight in weights:
            change = by_parameter[id(weight.parameter)]
            if weight.index is not None:
                change = change[weight.index]
                if not bool(change.any()) and (deltas or weight is not weights[-1]):
                    continue
            deltas[weight.name] = DenseDelta((change.T if weight.transposed else change).contiguous())
        return deltas

    def _loss(self, request: Request) -> Tensor:
        """Mean NLL of the target's tokens, over the contexts."""
        rows, masked = request.rewrite, self.config.objective_form == "masked"
        ids, mask = pad([row.ids[:-1] if masked else row.ids[: row.target] for row in rows])
        device = self.arch.input_device
        output = self.model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
        losses = []
        for logits, row in zip(output.logits, rows, strict=True):
            if masked:
                chosen = logits[row.prompt_last : len(row.ids) - 1]
            else:
                chosen = repeat(logits[row.prompt_last], "v -> t v", t=len(row.labels))
            log_probs = log_softmax(chosen.to(self.arch.work_dtype), -1)
            labels = rearrange(torch.tensor(row.labels, device=log_probs.device), "t -> t 1")
            losses.append(-log_probs.gather(1, labels).mean())
        return torch.stack(losses).mean()
