"""The route through transformers' ``AttentionInterface``: a registered attention function and its mask function."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kedit.capture.attention_capture import CAPTURES
from kedit.capture.attention_rule import Rule
from kedit.capture.substitution import SUBSTITUTIONS
from kedit.errors import CaptureError
from kedit.models.compat import attention_scaling, attention_softcap

NAME = "kedit_rows"
_OWN = ("sdpa", "eager")


@dataclass
class Switch:
    """A configuration that names kedit's attention, and what it named before."""

    config: Any
    original: str
    users: int = 0


_SWITCHES: dict[int, Switch] = {}


def register_attention() -> None:
    """Make :data:`NAME` known to transformers, as an attention and as a mask function. Harmless to repeat."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)


def switch(configs: list[Any], undo: list[Callable[[], None]]) -> None:
    """Name kedit's attention in every configuration; what puts it back is appended to ``undo``.

    Raises:
        CaptureError: a configuration names an attention other than SDPA or eager.
    """
    register_attention()
    for config in configs:
        original = config._attn_implementation
        if original == NAME:
            original = _SWITCHES[id(config)].original if id(config) in _SWITCHES else "sdpa"
        if original not in _OWN:
            raise CaptureError(
                f"The model runs the attention {original!r}; rows are captured beside {' and '.join(_OWN)}. "
                'Call model.set_attn_implementation("sdpa") first.'
            )
        if original == "eager" and getattr(config, "reorder_and_upcast_attn", False):
            raise CaptureError("reorder_and_upcast_attn bypasses the attention interface. Set it to False to capture.")
        entry = _SWITCHES.setdefault(id(config), Switch(config, original))
        entry.users += 1
        undo.append(lambda entry=entry: _leave(entry))  # type: ignore[misc]
        config._attn_implementation_internal = NAME


def _leave(entry: Switch) -> None:
    entry.users -= 1
    if not entry.users:
        del _SWITCHES[id(entry.config)]
        entry.config._attn_implementation_internal = entry.original


def original_of(config: Any) -> str:
    """The attention that a switched configuration named before; SDPA for a copy made while it was switched."""
    entry = _SWITCHES.get(id(config))
    return entry.original if entry else "sdpa"


def mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask function of the model's own attention."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    made: Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS[original_of(kwargs.get("config"))](*args, **kwargs)
    return made


def own_attention(module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The function by which the module computes its attention when it is not captured."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    home = sys.modules[type(module).__module__]
    if _is_eager(module):
        eager: Callable[..., tuple[Tensor, Tensor | None]] = home.eager_attention_forward
        return eager
    interface = getattr(home, "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)
    chosen: Callable[..., tuple[Tensor, Tensor | None]] = interface[original_of(getattr(module, "config", None))]
    return chosen


def _is_eager(module: nn.Module) -> bool:
    return original_of(getattr(module, "config", None)) == "eager"


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention function registered with transformers: the model's own, and the rows where a capture is open.

    Args:
        module: the attention module.
        query: [B, A, Tq, D].
        key: [B, A / G, Tk, D].
        value: [B, A / G, Tk, Dv].
        attention_mask: bool or additive [B, 1, Tq, Tk]; ``None`` for plain causality.
        kwargs: what the model type adds: scaling, dropout, softcap, sinks ...

    Returns:
        The attention's output [B, Tq, A, Dv], and no weights.
    """
    out, weights = _attention(module, query, key, value, attention_mask, kwargs)
    substitution = SUBSTITUTIONS.of(module)
    if substitution is not None:
        out = substitution.output(module, out, value, heads_first=False)
    return out, weights


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    own = own_attention(module)
    capture = CAPTURES.running(module)
    if capture is None:
        return own(module, query, key, value, attention_mask, **kwargs)
    rule = rule_of(module, query, key, attention_mask, kwargs)
    if any(isinstance(extra, Tensor) and extra.requires_grad for extra in kwargs.values()) or _is_eager(module):
        # The attention depends on more than q, k and v (sinks, a learned bias): its own graph has to stay.
        out, weights = own(module, query, key, value, attention_mask, **kwargs)
        capture.record(module, query, key, rule)
        return out, weights

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return own(module, q, k, v, attention_mask, **kwargs)[0]

    return capture.attend(module, query, key, value, rule, attend), None


def rule_of(module: nn.Module, q: Tensor, k: Tensor, mask: Tensor | None, extra: dict[str, Any]) -> Rule:
    """Read one call of the interface as a :class:`Rule`."""
    scaling = extra.get("scaling")
    eager = _is_eager(module)
    causal = extra.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True)
    num_keys = k.shape[2]
    add = extra.get("position_bias")
    add = None if add is None else add[..., :num_keys].detach()
    allow = None
    if mask is not None:
        if mask.shape[-1] > num_keys:
            mask = mask[..., :num_keys]
        if mask.dtype == torch.bool:
            allow = mask
        else:
            add = mask if add is None else add + mask
    return Rule(
        scaling=attention_scaling(module, q.shape[-1], eager=eager) if scaling is None else float(scaling),
        allow=allow,
        add=add,
        causal=bool(causal) and mask is None and q.shape[2] > 1,
        offset=0,
        softcap=attention_softcap(extra.get("softcap"), eager=eager),
        sinks=extra.get("s_aux"),
    )
