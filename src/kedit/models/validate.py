"""Checks of a model before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kedit.errors import ArchitectureError, UnsupportedError
from kedit.models.arch import ModelArch
from kedit.models.hooks import evaluating, on_input, on_output
from kedit.models.offload import device_of
from kedit.models.parameters import bare


def check_editable(arch: ModelArch, layers: Sequence[int]) -> None:
    """Raise unless ``layers`` can be written one by one, each update reaching its block as it is.

    Raises:
        UnsupportedError: blocks share a down-projection, or an adapter does more than add to its output.
    """
    holders: dict[int, list[int]] = {}
    for layer in range(arch.num_layers):
        holders.setdefault(id(_down(arch, layer)), []).append(layer)
    for layer in layers:
        down = _down(arch, layer)
        if len(shared := holders[id(down)]) > 1:
            raise UnsupportedError(
                f"Blocks {', '.join(map(str, shared))} of this {arch.model_type} share one down-projection, so an edit of block "
                f"{layer} would change the others too. kedit edits blocks that have weights of their own."
            )
        if arch.experts(layer) is None and bare(down) is not down and not _adds(down, bare(down)):
            raise UnsupportedError(
                f"The adapter at the down-projection of block {layer} ({type(down).__name__}) does more than add to what the layer "
                "gives (as IA³, DoRA and OFT do), so a change of the weight does not arrive as it is. Merge it into the weights "
                "first (merge_and_unload), or edit another block."
            )


def check_model(model: Any) -> None:
    """Raise unless this is a model with its weights, and not one that prompt learning has wrapped.

    Raises:
        ArchitectureError: it is no module.
        UnsupportedError: PEFT puts virtual tokens in front of every prompt, or torch has quantized layers dynamically.
    """
    if not isinstance(model, nn.Module):
        raise ArchitectureError(f"Expected a causal language model of transformers, and found {type(model).__name__}.")
    for name, module in model.named_modules():
        if type(module).__module__.startswith("torch.ao.nn.quantized"):
            raise UnsupportedError(
                f"{name} is a {type(module).__name__} that torch has quantized: no gradient passes it, so no value can be "
                "optimised below it. Edit the model in full precision, and quantize it afterwards."
            )
    adapter = getattr(model, "active_peft_config", None)
    if getattr(adapter, "is_prompt_learning", False):
        raise UnsupportedError(
            f"PEFT puts virtual tokens in front of every prompt ({type(adapter).__name__}), which the model inside does not see, "
            "so a value found for it is not that of the whole. Pass get_base_model(), or use an adapter of weights."
        )


def _down(arch: ModelArch, layer: int) -> nn.Module:
    experts = arch.experts(layer)
    down: nn.Module = arch.down(layer) if experts is None else experts.module
    return down


@torch.no_grad()
def _adds(wrapper: nn.Module, inner: nn.Module) -> bool:
    """Return whether a change of what the layer inside gives arrives unchanged, for an input that reaches it unchanged."""
    if len(getattr(wrapper, "lora_magnitude_vector", ())):
        return False  # DoRA: depends on the weight itself, also where its factors are still 1
    device = device_of(inner)
    weight: Any = getattr(inner, "weight", None)
    plain = isinstance(weight, Tensor) and weight.is_floating_point()
    dtype = weight.dtype if plain else torch.float32
    width = getattr(inner, "in_features", None) or weight.shape[0]  # a Conv1D is stored [I, O]
    given = torch.randn((1, 3, width), generator=torch.Generator().manual_seed(0)).to(device, dtype)
    seen: list[Tensor] = []
    moved: list[Tensor] = []

    def move(output: Tensor) -> Tensor:
        moved.append(output.flip(-1) + 1)  # of the size of what the layer gives, and not 0
        return output + moved[-1]

    with evaluating(wrapper):
        before = wrapper(given)
        with on_input(inner, seen.append), on_output(inner, move):
            after = wrapper(given)
    error = (after - before - moved[0]).float().norm() / moved[0].float().norm()
    tolerance = max(1e-4, 16 * torch.finfo(dtype).eps)
    return len(seen) == 1 and torch.equal(seen[0], given) and bool(error <= tolerance)


@torch.no_grad()
def check_takes_effect(arch: ModelArch, layers: Sequence[int]) -> None:
    """Raise where a change of the weight does not change what its layer gives, as where that computes with a copy.

    One row of the weight is changed for one forward pass of the layer alone, and put back bit for bit.

    Raises:
        UnsupportedError: the layer gives the same as before.
    """
    for layer in layers:
        if arch.experts(layer) is not None:
            continue
        down, [weight] = arch.down(layer), arch.weights(layer)
        if weight.away is not None or weight.parameter.is_meta:
            continue
        stored = weight.stored
        row = stored[:1]
        given = torch.ones((1, 1, weight.matrix.shape[1]), dtype=stored.dtype, device=stored.device)
        kept = row.clone()
        with evaluating(down):
            try:
                before = down(given)
                row.add_(row.abs().max() + 1)
                after = down(given)
            finally:
                row.copy_(kept)
        if torch.equal(before, after):
            raise UnsupportedError(
                f"A change of {weight.name} does not reach the forward pass: {type(down).__name__} computes with a copy of it, "
                "as some quantized layers do. Attach the edit beside the weight instead (editor.propose(edit) and "
                "patch.attach(model)), or load the model in full precision."
            )
