"""FT-L: constrained fine-tuning of one layer (Zhu et al., 2020, arXiv:2012.00363; ROME's baseline)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from kedit.editors import presets
from kedit.editors.base import Editor
from kedit.editors.config import EditorConfig, Settings
from kedit.editors.solve_layers import Timer
from kedit.errors import ConfigError, NonFiniteError, UnsupportedError
from kedit.models import ModelArch
from kedit.models.hooks import inference_state
from kedit.patch.delta import Delta, DenseDelta, check_finite
from kedit.patch.ledger import Ledger
from kedit.prompts.encode import Request
from kedit.prompts.tokenize import pad
from kedit.regularizers import Choice
from kedit.utils.device_memory import LivePeak
from kedit.values.memory import Footprint
from kedit.values.optimize import StepLog


class FT(Editor):
    """Fine-tunes the down-projection on the edit's sentence, every weight staying within ±ε of where it was.

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

        steps: int = 25
        lr: float = 5e-4
        weight_decay: float = 0.0
        kl_factor: float = 0.0
        clamp: float = 5e-4
        stop_loss: float = 1e-2
        objective_form: Literal["masked", "prompt_last"] = "masked"

        def __post_init__(self) -> None:
            """Check every field."""
            super().__post_init__()
            if self.kl_factor:
                raise ConfigError("FT has no KL term: leave kl_factor at 0.")
            if self.objective_form not in ("masked", "prompt_last"):
                raise ConfigError(f"objective_form is 'masked' or 'prompt_last', not {self.objective_form!r}.")

    @classmethod
    def rule(cls, arch: ModelArch) -> dict[str, Any]:
        """ε and step size relative to the weights: ε = ‖W‖_rms / √I, and five steps reach it.

        The output of a neuron that such a change aligns with a key moves by about what the neuron gives.
        """
        layer = presets.layer_rule(arch)
        matrix = arch.weights(layer)[0].matrix
        found: dict[str, Any] = {"layers": (layer,)}
        if matrix.is_floating_point() and matrix.numel():
            clamp = float(matrix.float().square().mean().sqrt()) / math.sqrt(arch.shape(layer)[1])
            if 0 < clamp < math.inf:
                found |= {"clamp": clamp, "lr": clamp / 5}
        return found

    @property
    def contexts(self) -> tuple[str, ...]:
        """The bare prompt alone, unless contexts were given."""
        return self._contexts or ("{}",)

    def largest_wave(self, requests: Sequence[Request], settings: Settings) -> Footprint:
        """One step of the longest edit, as it runs, beside what training holds of the weights.

        That is the original twice, the change, its gradient twice and Adam's two averages.
        """
        longest = max(requests, key=lambda request: max(len(row.ids) for row in request.rewrite))
        trained = self._trained(settings)
        with inference_state(self.model, trained), LivePeak(self.model) as seen:
            torch.autograd.grad(self._loss(longest, settings.config.objective_form), trained)
        held = 7 * sum(tensor.numel() for tensor in trained) * self.arch.work_dtype.itemsize
        return Footprint(stored=held, activations=seen.peak, logits=0)

    def write(
        self, requests: Sequence[Request], settings: Settings, timer: Timer
    ) -> tuple[dict[str, Delta], list[list[StepLog]]]:
        """Fine-tune on one edit; the weights are put back."""
        (request,) = requests
        with timer.stage("optimise"), Ledger.of(self.model).scratch([self.arch.weight_of(n) for n in settings.names]):
            return self._tune(request, settings)

    def _settings(self, regularizer: Choice) -> Settings:
        settings = super()._settings(regularizer)
        if settings.regularizers:
            raise ConfigError(
                f"FT optimises weights, not a value, so {settings.regularizers[0].name!r} has nothing to restrain. "
                "Use another editor, or no regularizer."
            )
        return settings

    def _trained(self, settings: Settings) -> list[torch.nn.Parameter]:
        """The parameters behind the edited weights; experts share theirs."""
        weights = [self.arch.weight_of(name) for name in settings.names]
        return list({id(weight.parameter): weight.parameter for weight in weights}.values())

    def _tune(self, request: Request, settings: Settings) -> tuple[dict[str, Delta], list[list[StepLog]]]:
        config = settings.config
        weights = [self.arch.weight_of(name) for name in settings.names]
        if any(weight.away is not None for weight in weights):
            raise UnsupportedError(
                f"FT trains {weights[0].name}, which is offloaded: no gradient reaches it. Keep its block on a device "
                "(device_map), or use an editor that solves for its update."
            )
        trained = self._trained(settings)
        original = [tensor.detach().to(self.arch.work_dtype, copy=True) for tensor in trained]
        changes = [torch.zeros_like(tensor, requires_grad=True) for tensor in original]
        adam = torch.optim.Adam(changes, lr=config.lr, weight_decay=config.weight_decay)
        log: list[StepLog] = []
        with inference_state(self.model, trained):
            for step in range(config.steps):
                loss = self._loss(request, config.objective_form)
                log.append({"step": float(step), "total": loss.item(), "nll": loss.item()})
                if not math.isfinite(log[-1]["total"]):
                    raise NonFiniteError(f"The loss of {request.edit.text!r} is not finite at step {step}.")
                if log[-1]["total"] < config.stop_loss:
                    break
                grads = torch.autograd.grad(loss, trained)
                for change, grad in zip(changes, grads, strict=True):
                    change.grad = grad.to(change.dtype)
                adam.step()
                with torch.no_grad():
                    for tensor, change, base in zip(trained, changes, original, strict=True):
                        change.clamp_(-config.clamp, config.clamp)
                        tensor.copy_(base + change)
        found = {id(tensor): change.detach() for tensor, change in zip(trained, changes, strict=True)}
        deltas: dict[str, Delta] = {}
        for weight in weights:
            change = found[id(weight.parameter)]
            if weight.index is not None:
                change = change[weight.index]
                if not bool(change.any()) and (deltas or weight is not weights[-1]):  # it served no token
                    continue
            matrix = change.T if weight.transposed else change
            deltas[weight.name] = check_finite(weight.name, DenseDelta(matrix.contiguous()))
        return deltas, [log]

    def _loss(self, request: Request, form: str) -> Tensor:
        """Mean NLL of the target's tokens, over the contexts."""
        rows = request.rewrite
        ids, mask = pad([row.ids[:-1] if form == "masked" else row.ids[: row.target] for row in rows])
        device = self.arch.input_device
        output = self.model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
        losses = []
        for i, row in enumerate(rows):
            if form == "masked":
                logits = output.logits[i, row.prompt_last : len(row.ids) - 1]
            else:
                logits = output.logits[i, row.prompt_last].expand(len(row.labels), -1)
            log_probs = log_softmax(logits.to(self.arch.work_dtype), -1)
            labels = torch.tensor(row.labels, device=log_probs.device)
            losses.append(-log_probs.gather(1, labels[:, None]).mean())
        return torch.stack(losses).mean()
