"""The routes for model types outside transformers' ``AttentionInterface``.

Types that compute attention in a method ``_attn(query, key, value, mask)`` (GPT-J, GPT-Neo, CodeGen) are read there:
queries and keys are at hand. In every other type (Bloom, MPT, Falcon, XGLM ...) the softmax or SDPA call inside the
attention module is overheard. Either way the model's own computation runs unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kedit.capture.attention_capture import CAPTURES, AttentionCapture
from kedit.capture.attention_rule import Rule, accumulator, gather_queries
from kedit.capture.autograd import Attend
from kedit.capture.reference import normalise
from kedit.capture.substitution import SUBSTITUTIONS, Substitution
from kedit.errors import CaptureError

_SDPA = torch.nn.functional.scaled_dot_product_attention
_SOFTMAX = (torch.nn.functional.softmax, torch.softmax, torch.Tensor.softmax)


_USERS: dict[int, int] = {}


def wrap(module: nn.Module, undo: list[Callable[[], None]]) -> None:
    """Make one attention module capturable; what puts it back is appended to ``undo``. Repeating it only counts."""
    name = "_attn" if hasattr(module, "_attn") else "forward"
    users = _USERS.get(id(module), 0)
    _USERS[id(module)] = users + 1
    undo.append(lambda: _unwrap(module, name))
    if not users:
        original = getattr(module, name)
        wrapped = _reading_attn(module, original) if name == "_attn" else _overheard(module, original)
        wrapped.__dict__["before"] = module.__dict__.get(name)
        module.__dict__[name] = wrapped


def _unwrap(module: nn.Module, name: str) -> None:
    _USERS[id(module)] -= 1
    if _USERS[id(module)]:
        return
    del _USERS[id(module)]
    before = module.__dict__.pop(name).__dict__["before"]
    if before is not None:
        module.__dict__[name] = before


def _reading_attn(module: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
    """``_attn`` that also records the rows."""

    def attn(
        query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        out, *rest = attend(query, key, value, attention_mask, *args, **kwargs)
        substitution = SUBSTITUTIONS.of(module)
        if substitution is not None:
            out = substitution.output(module, out, value, heads_first=True)
        return (out, *rest)

    def attend(
        query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args: Any, **kwargs: Any
    ) -> Any:
        capture = CAPTURES.running(module)
        if capture is None:
            return original(query, key, value, attention_mask, *args, **kwargs)
        rule = _attn_rule(module, query, key, attention_mask)
        if capture.sdpa:
            return capture.attend(module, query, key, value, rule, _sdpa_instead(module, rule)), None
        out = original(query, key, value, attention_mask, *args, **kwargs)
        capture.record(module, query, key, rule)
        return out

    return attn


def _sdpa_instead(module: nn.Module, rule: Rule) -> Attend:
    """SDPA in place of eager attention: the same function up to rounding."""
    mask = rule.allow
    if rule.add is not None:
        mask = rule.add
        if rule.allow is not None:
            mask = mask.masked_fill(~rule.allow, torch.finfo(mask.dtype).min)
    dropout = getattr(module, "attn_dropout", None)
    chance = float(dropout.p) if isinstance(dropout, nn.Dropout) and dropout.training else 0.0

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = mask.to(v.dtype) if mask is not None and mask.is_floating_point() else mask
        return _SDPA(q.to(v.dtype), k.to(v.dtype), v, bias, chance, scale=rule.scaling)

    return attend


def _attn_rule(module: nn.Module, q: Tensor, k: Tensor, mask: Tensor | None) -> Rule:
    num_queries, num_keys = q.shape[2], k.shape[2]
    scale = getattr(module, "scale_attn", None)
    allow = None
    triangle = getattr(module, "bias", None)  # GPT-Neo: causal, and local in every other block
    if isinstance(triangle, Tensor):
        allow = triangle[:, :, num_keys - num_queries : num_keys, :num_keys]
    add = None if mask is None else mask[..., :num_keys]
    if add is not None and add.dtype == torch.bool:
        allow, add = (add if allow is None else allow & add), None
    return Rule(scaling=1.0 if scale is None else 1.0 / float(scale), allow=allow, add=add)


def _overheard(module: nn.Module, original: Callable[..., Any]) -> Callable[..., Any]:
    """``forward`` under a mode that overhears the softmax or SDPA call."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        capture, substitution = CAPTURES.running(module), SUBSTITUTIONS.of(module)
        if capture is None and substitution is None:
            return original(*args, **kwargs)
        with _Overhear(module, capture, substitution):
            return original(*args, **kwargs)

    return forward


def _num_heads(module: nn.Module) -> int:
    """Return the number of heads of a module whose scores hold prompts and heads in one axis."""
    count = getattr(module, "num_heads", None)
    if not isinstance(count, int):
        raise CaptureError(
            f"{type(module).__name__} has prompts and heads in one axis and no num_heads, so its heads cannot be told apart. "
            "Edit without a regularizer that reads attention."
        )
    return count


class _Overhear(TorchFunctionMode):
    """Records the rows of the first softmax or SDPA call, and puts others in their place where that is wanted."""

    def __init__(self, module: nn.Module, capture: AttentionCapture | None, substitution: Substitution | None) -> None:
        super().__init__()
        self.module = module
        self.capture = capture
        self.substitution = substitution
        self.done = False
        self.cast: tuple[Tensor, Tensor] | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is _SDPA and not self.done:
            self.done = True
            return self._sdpa(*args, **kwargs)
        out = func(*args, **kwargs)
        if self.done:
            return out
        if func is torch.Tensor.float:
            self.cast = (out, args[0])  # float64 scores of which only a float32 copy reaches the softmax
        elif func in _SOFTMAX:
            self.done = True
            scores = args[0] if args else kwargs["input"]
            if self.capture is not None:
                self._from_scores(self.capture, self.cast[1] if self.cast and self.cast[0] is scores else scores)
            if self.substitution is not None:
                heads = self._by_head(out)
                out = self.substitution.weights(self.module, heads).view_as(out)
        return out

    def _by_head(self, scores: Tensor) -> Tensor:
        """[B, A, Tq, Tk] also where the module has prompts and heads in one axis; a view."""
        return scores if scores.dim() > 3 else rearrange(scores, "(b a) q k -> b a q k", a=_num_heads(self.module))

    def _from_scores(self, capture: AttentionCapture, scores: Tensor) -> None:
        batch, scores = capture.positions.shape[0], self._by_head(scores)
        if scores.shape[0] != batch:
            raise CaptureError(
                f"positions has {batch} rows but the forward pass has a batch of {scores.shape[0]}. "
                "Give one row of positions per prompt."
            )

        def rows(positions: Tensor) -> Tensor:
            dtype = accumulator(scores.dtype)
            floor = torch.finfo(scores.dtype).min / 2
            picked = gather_queries(scores, positions).expand(-1, -1, positions.shape[1], -1).to(dtype)
            seen = (positions >= 0)[:, None, :, None] & (picked > floor)
            return normalise(torch.where(seen, picked, -torch.inf))

        capture.keep(self.module, rows, scores.shape[2], scores.device)

    def _sdpa(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        bool_mask = attn_mask is not None and attn_mask.dtype == torch.bool
        rule = Rule(
            scaling=query.shape[-1] ** -0.5 if scale is None else scale,
            allow=attn_mask if bool_mask else None,
            add=None if bool_mask or attn_mask is None else attn_mask.detach(),
            causal=is_causal,
            offset=0,
        )

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return _SDPA(q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

        capture, substitution = self.capture, self.substitution
        out: Tensor = (
            attend(query, key, value)
            if capture is None
            else capture.attend(self.module, query, key, value, rule, attend)
        )
        if substitution is not None:
            out = substitution.output(self.module, out, value, heads_first=True)
        return out
