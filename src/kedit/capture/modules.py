"""The attention modules of a model, by block."""

from __future__ import annotations

from typing import Any

from torch import nn

from kedit.errors import ArchitectureError, CaptureError
from kedit.models import ModelArch
from kedit.utils.validation import is_whole


def decoder_of(model: nn.Module) -> nn.Module:
    """The text decoder of a model: without vision towers and the like."""
    inner: Any = model
    for step in ("get_base_model", "get_decoder"):  # the first is PEFT's
        if hasattr(inner, step):
            inner = getattr(inner, step)()
    return inner if isinstance(inner, nn.Module) else model


def layer_index(module: nn.Module) -> int | None:
    """Number of the block an attention module belongs to, as transformers stores it."""
    for name in ("layer_idx", "layer_id"):
        value = getattr(module, name, None)
        if is_whole(value):
            return value
    return None


def attention_modules(model: nn.Module) -> dict[int, nn.Module]:
    """The self-attention module of every block that has one, by block.

    Models of transformers number theirs; of others, the modules are those that :class:`kedit.models.ModelArch` knows or finds.

    Raises:
        CaptureError: none was found.
    """
    modules: dict[int, nn.Module] = {}
    for module in decoder_of(model).modules():  # parents come before children: the innermost stays
        layer = layer_index(module)
        if layer is None or "Attention" not in type(module).__name__ or getattr(module, "is_cross_attention", False):
            continue
        if layer in modules and module not in set(modules[layer].modules()):
            raise CaptureError(
                f"Block {layer} of {type(model).__name__} has two attention modules "
                f"({type(modules[layer]).__name__}, {type(module).__name__}); kedit cannot tell which to capture."
            )
        modules[layer] = module
    modules = modules or _by_structure(model)
    if not modules:
        raise CaptureError(f"{type(model).__name__} has no attention module that kedit can find.")
    return dict(sorted(modules.items()))


def _by_structure(model: nn.Module) -> dict[int, nn.Module]:
    """The attention of every block, where the model's structure is understood and its attention is a module of its own."""
    try:
        arch = ModelArch(model)  # type: ignore[arg-type]
    except ArchitectureError:
        return {}
    if arch.spec.attention == arch.spec.attention_out:
        return {}
    return {layer: arch.attention(layer) for layer in range(arch.num_layers)}
