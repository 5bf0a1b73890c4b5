"""Full forward passes, as in the published code: the baseline for kedit's speed.

One edit at a time. At every step all prompts run through the whole model, and the head runs over all positions (once, where the
published code does it twice). Keys are read by full forward passes, and each call inverts its matrix in float64. The
baseline shares only the tokenisation and the model accessors with kedit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

import kedit
from kedit.models import ModelArch, Site
from kedit.models.hooks import on_input, on_output
from kedit.prompts.encode import Request
from kedit.prompts.tokenize import pad


@dataclass
class Plain:
    """Hyper-parameters and moments of the baseline."""

    arch: ModelArch
    layers: tuple[int, ...]
    kind: str  # "mlp" for ROME, "block" for MEMIT
    moments: dict[int, Tensor]
    steps: int = 20
    lr: float = 0.5
    weight_decay: float = 0.5
    kl_factor: float = 0.0625
    clamp: float = 4.0
    moment_weight: float = 15_000.0

    def __post_init__(self) -> None:
        """No gradient for the weights, as the published code has it."""
        self.arch.model.requires_grad_(False)

    def value(self, request: Request) -> tuple[Tensor, Tensor]:
        """δ [H] and v₀ [H] of one edit."""
        rows = [*request.rewrite, request.kl]
        ids, mask = pad([row.ids for row in rows])
        lookup = torch.tensor([row.subject_last for row in rows])
        everyone = torch.arange(len(rows))
        delta = torch.zeros(self.arch.hidden, requires_grad=True)
        adam = torch.optim.Adam([delta], lr=self.lr)
        initial: Tensor | None = None
        original: Tensor | None = None

        def inject(output: Tensor) -> Tensor:
            nonlocal initial
            if initial is None:
                initial = output[0, lookup[0]].detach().float()
            changed = output.clone()
            changed[everyone, lookup] = changed[everyone, lookup] + delta.to(output.dtype)
            return changed

        with on_output(self.arch.site(Site(self.layers[-1], self.kind)), inject):
            for step in range(self.steps):
                adam.zero_grad()
                logits = self.arch.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
                log_probs = log_softmax(logits.float(), -1)
                losses = []
                for i, row in enumerate(request.rewrite):
                    labels = torch.tensor(row.labels)[:, None]
                    losses.append(-log_probs[i, row.prompt_last : len(row.ids) - 1].gather(1, labels).mean())
                subject = log_probs[-1, request.kl.subject_last]
                original = subject.detach() if original is None else original
                loss = torch.stack(losses).mean() + self.kl_factor * kl_div(
                    original, subject, log_target=True, reduction="sum"
                )
                loss = loss + self.weight_decay * delta.norm() / initial.norm() ** 2
                if step == self.steps - 1:
                    break
                loss.backward()
                adam.step()
                with torch.no_grad():
                    bound = self.clamp * initial.norm()
                    if delta.norm() > bound:
                        delta.mul_(bound / delta.norm())
        return delta.detach(), initial

    @torch.no_grad()
    def keys(self, requests: list[Request], layer: int) -> Tensor:
        """Keys of every context of every edit, [E, C, I], by whole forward passes."""
        keys = []
        for request in requests:
            ids, mask = pad([row.ids for row in request.rewrite])
            seen: list[Tensor] = []
            with on_input(self.arch.down(layer), lambda tensor, seen=seen: seen.append(tensor)):
                self.arch.model(input_ids=ids, attention_mask=mask, use_cache=False)
            at = torch.tensor([row.subject_last for row in request.rewrite])
            keys.append(seen[0][torch.arange(len(at)), at].float())
        return torch.stack(keys)

    def rome(self, request: Request) -> Tensor:
        """ΔW [O, I] of one edit."""
        delta, _ = self.value(request)
        keys = self.keys([request], self.layers[0])[0].double()
        u = torch.linalg.inv(self.moments[self.layers[0]].double()) @ keys.mean(0)
        u = u / u.norm()
        return torch.outer(delta.double(), u) / (u @ keys[0])

    def memit(self, requests: list[Request]) -> dict[int, Tensor]:
        """ΔW [O, I] by layer, for all edits together; the weights are put back."""
        values = [self.value(request) for request in requests]
        return self.spread(requests, torch.stack([delta + initial for delta, initial in values]))

    def spread(self, requests: list[Request], targets: Tensor) -> dict[int, Tensor]:
        """MEMIT's second half: the residuals of the targets [E, H] over the layers; the weights are put back."""
        site = Site(self.layers[-1], "block")
        weights = {layer: self.arch.weight(layer) for layer in self.layers}
        kept = {layer: weight.parameter.detach().clone() for layer, weight in weights.items()}
        updates = {}
        for number, layer in enumerate(self.layers):
            keys = self.keys(requests, layer)
            mixed = ((keys[:, 0] + keys[:, 1:].mean(1)) / 2).double()
            now = []
            for request in requests:
                seen: list[Tensor] = []
                with torch.no_grad(), on_output(self.arch.site(site), lambda tensor, seen=seen: seen.append(tensor)):
                    self.arch.model(input_ids=torch.tensor([request.rewrite[0].ids]), use_cache=False)
                now.append(seen[0][0, request.rewrite[0].subject_last].float())
            residual = (targets - torch.stack(now)).double() / (len(self.layers) - number)
            system = self.moment_weight * self.moments[layer].double() + mixed.T @ mixed
            updates[layer] = residual.T @ torch.linalg.solve(system, mixed.T).T
            with torch.no_grad():
                stored = updates[layer].T if weights[layer].transposed else updates[layer]
                weights[layer].parameter.add_(stored.to(weights[layer].parameter.dtype))
        with torch.no_grad():
            for layer, weight in weights.items():
                weight.parameter.copy_(kept[layer])
        return updates


def counterfact_like(count: int) -> list[kedit.Edit]:
    """Edits of CounterFact's length: subject first, 8-12 tokens, short targets."""
    subjects = [
        "Danielle Darrieux",
        "Edwin of Northumbria",
        "Toko Yasuda",
        "Anaal Nathrakh",
        "Apple A5",
        "Autonomous University",
    ]
    relations = [
        ("{} spoke the language", "English"),
        ("{} plays the instrument called the", "guitar"),
        ("{} was founded in the city of", "Paris"),
        ("{} was created in the country of", "Germany"),
        ("{}, a product that was made by", "Google"),
    ]
    edits = []
    for i in range(count):
        prompt, target = relations[i % len(relations)]
        edits.append(kedit.Edit(prompt, f"{subjects[i % len(subjects)]} {chr(65 + i % 26)}", target))
    return edits
