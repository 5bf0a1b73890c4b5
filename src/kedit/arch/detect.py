"""Finding the parts of a model whose type is unknown, by what its modules do.

Nothing is read from names. A short input is run once to see which modules pass hidden states on; then one block is run
again and again with a change put into one linear layer, to see whom it reaches:

- the *blocks* are the list of modules of which each takes what the one before gave;
- the attention's *output projection* is the first linear layer whose input, at a later token, changes with what an earlier
  layer of the block gave at an earlier token;
- the MLP's *down-projection* is the linear layer, with the width of the residual stream, that reaches no other linear layer
  of its block, and is not the former.

What is found is verified before it is used: a change of the down-projection's output must reach the block's output at its
own token and nowhere else. Where it arrives as a fixed multiple, that is the gain; where not, the block normalises it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kedit.arch.placement import device_of
from kedit.arch.table import ARCHITECTURES, ArchSpec
from kedit.errors import ArchitectureError

TOKENS = 6
PLACE = 2  # the token whose values are changed
_LINEAR = 1e-3  # how far from a multiple of the change the answer may be


def detect(model: Any) -> ArchSpec:
    """Describe a causal language model by its structure.

    Raises:
        ArchitectureError: it is an encoder-decoder, keeps a recurrent state, has no blocks, has no down-projection or several,
            or the verification fails; the message says which.
    """
    config = getattr(model, "config", None)
    kind = str(getattr(config, "model_type", type(model).__name__))
    if getattr(config, "is_encoder_decoder", False):
        raise _refused(kind, "it is an encoder-decoder, where no decoder-only prompt holds the fact")
    if getattr(model, "_is_stateful", False):
        raise _refused(
            kind, "it keeps a recurrent state, so there is no attention from the prompt's end to the subject"
        )
    names = {module: name for name, module in model.named_modules()}
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if output is None or not hasattr(model, "get_input_embeddings"):
        raise _refused(kind, "it has no language-model head; pass the causal language model itself")
    if device_of(model.get_input_embeddings()).type == "meta":
        raise _refused(kind, "its weights are not loaded, so it cannot be run to find its parts")
    was = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            calls, final_norm = _chain(model, kind)
            parts = _Block(calls[0], kind).parts()
            spec = ArchSpec(
                blocks=names[calls.blocks],
                mlp=parts.down,
                down=parts.down,
                attention=parts.attention,
                attention_out=parts.attention_out,
                final_norm=names[final_norm],
                head=names[output],
            )
            return _verified(spec, calls, kind)
    finally:
        for module in was:
            module.training = True


def _refused(kind: str, reason: str) -> ArchitectureError:
    return ArchitectureError(
        f"kedit does not know the model type {kind!r}, and cannot edit what it finds: {reason}. The types that it knows are "
        f"{', '.join(sorted(ARCHITECTURES))}."
    )


@dataclass(frozen=True)
class _Call:
    """One call of a block, to be repeated."""

    block: nn.Module
    args: tuple[Any, ...]
    named: dict[str, Any]
    output: Tensor

    @property
    def hidden(self) -> Any:
        """The hidden states that it was given."""
        return self.args[0] if self.args else self.named.get("hidden_states")

    def again(self, hooks: Callable[[ExitStack], None]) -> Tensor:
        """The output of the same call with hooks in place."""
        with ExitStack() as stack:
            hooks(stack)
            output: Tensor = _first(self.block(*self.args, **self.named))
            return output


class _Calls(list[_Call]):
    """The calls of all blocks, in order, and the list that holds the blocks."""

    blocks: nn.ModuleList


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _width(module: nn.Module) -> int | None:
    """Width of what a linear layer gives; ``None`` for other modules."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):
        return int(module.nf)
    return module.out_features if isinstance(module, nn.Linear) else None


def _chain(model: Any, kind: str) -> tuple[_Calls, nn.Module]:
    """The blocks' calls in a short run, and the first module that is given what the last block gave."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    seen: dict[nn.Module, list[_Call]] = {block: [] for blocks in lists for block in blocks}
    order: list[tuple[nn.Module, Any]] = []

    def note(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        if isinstance(_first(output), Tensor):
            seen[module].append(_Call(module, args, named, _first(output)))

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        order.append((module, args[0] if args else None))

    embeddings = model.get_input_embeddings()
    ids = torch.arange(1, TOKENS + 1, device=device_of(embeddings))[None] % embeddings.weight.shape[0]
    handles = [block.register_forward_hook(note, with_kwargs=True) for block in seen]
    handles += [module.register_forward_pre_hook(enter) for module in model.modules()]
    try:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except (TypeError, ValueError, RuntimeError) as error:
        raise _refused(kind, f"it does not run on token ids alone ({type(error).__name__}: {error})") from error
    finally:
        for handle in handles:
            handle.remove()
    found = [calls for blocks in lists if (calls := _chained(blocks, seen)) is not None]
    if not found:
        raise _refused(kind, "it has no list of blocks of which each takes what the one before gave")
    calls = max(found, key=len)  # the first of the longest: outer lists come first
    last = max(i for i, (module, _) in enumerate(order) if module is calls[-1].block)
    after = [module for module, given in order[last:] if given is calls[-1].output]
    return calls, after[0] if after else model.get_output_embeddings()


def _chained(blocks: nn.ModuleList, seen: dict[nn.Module, list[_Call]]) -> _Calls | None:
    """The calls of the blocks of a list, where each is called once with what the one before gave."""
    each = [seen[block] for block in blocks]
    if any(len(calls) != 1 for calls in each):
        return None
    chain = _Calls(calls[0] for calls in each)
    chain.blocks = blocks
    for call in chain:
        if not isinstance(call.hidden, Tensor) or call.hidden.ndim != 3 or call.hidden.shape != call.output.shape:
            return None
    linked = all(torch.equal(one.output, two.hidden) for one, two in zip(chain, chain[1:], strict=False))
    return chain if linked else None


@dataclass(frozen=True)
class _Parts:
    down: str
    attention_out: str
    attention: str


class _Block:
    """One block whose linear layers are told apart by whom they reach."""

    def __init__(self, call: _Call, kind: str) -> None:
        self.call = call
        self.kind = kind
        self.names = {module: name for name, module in call.block.named_modules() if _width(module)}
        self.before, self.order = self._inputs(None)

    def parts(self) -> _Parts:
        """The projections that end the attention and the MLP."""
        hidden = self.call.output.shape[-1]
        reached = {module: self._reached(module) for module in self.order}
        mixing = [
            other
            for place, other in enumerate(self.order)
            if _width(other) == hidden
            and any(bool(reached[one].get(other, torch.zeros(TOKENS))[PLACE + 1 :].any()) for one in self.order[:place])
        ]
        if not mixing:
            raise _refused(
                self.kind, "no linear layer of its blocks sees other tokens, as the end of an attention does"
            )
        attention_out = mixing[0]
        ends = [
            module
            for module in self.order
            if module is not attention_out and _width(module) == hidden and not reached[module]
        ]
        if not ends:
            raise _refused(
                self.kind, "its blocks have no down-projection, a linear layer that ends an MLP (experts need an entry)"
            )
        if len(ends) > 1:
            several = ", ".join(self.names[module] for module in ends)
            raise _refused(
                self.kind, f"its blocks have several down-projections ({several}), as mixtures of experts do"
            )
        path = self.names[attention_out]
        return _Parts(self.names[ends[0]], path, path.rpartition(".")[0] or path)

    def _inputs(self, changed: nn.Module | None) -> tuple[dict[nn.Module, Tensor], list[nn.Module]]:
        """What every linear layer is given when one layer's output is changed, [T, I] each, and the order of calls."""
        given: dict[nn.Module, Tensor] = {}

        def hooks(stack: ExitStack) -> None:
            for module in self.names:
                handle = module.register_forward_pre_hook(
                    lambda module, args: given.__setitem__(module, args[0].reshape(-1, args[0].shape[-1]).clone())
                )
                stack.callback(handle.remove)
            if changed is not None:
                _put(stack, changed, _probe(_width(changed) or 0, self.call.output, 0))

        self.call.again(hooks)
        return given, list(given)

    def _reached(self, module: nn.Module) -> dict[nn.Module, Tensor]:
        """The linear layers whose input changes with a layer's output, and at which tokens, [T]."""
        given, _ = self._inputs(module)
        found = {}
        for other, before in self.before.items():
            if other is module or other not in given or given[other].shape != before.shape:
                continue
            scale = before.abs().max().clamp(min=1e-30)
            moved = (given[other] - before).abs().amax(-1) > 1e-5 * scale
            if bool(moved.any()):
                found[other] = moved.cpu()
        return found


def _probe(width: int, like: Tensor, seed: int) -> Tensor:
    """A random change as large as the hidden states."""
    generator = torch.Generator().manual_seed(seed)
    change = torch.randn(width, generator=generator).to(like.device, like.dtype)
    return change * like.float().square().mean().sqrt().clamp(min=1e-3).to(like.dtype)


def _put(stack: ExitStack, module: nn.Module, change: Tensor) -> None:
    """Add a change to a linear layer's output at the token :data:`PLACE`."""

    def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        changed = output.clone()
        changed[..., PLACE, :] += change.to(changed.device)
        return changed

    stack.callback(module.register_forward_hook(hook).remove)


def _verified(spec: ArchSpec, calls: Sequence[_Call], kind: str) -> ArchSpec:
    """The description with its gain, once a change at every block's down-projection is seen to arrive.

    Raises:
        ArchitectureError: a block lacks a part, or a change does not arrive at its token, or arrives elsewhere.
    """
    gains: list[float | None] = []
    for number, call in enumerate(calls):
        for path in (spec.down, spec.attention_out):
            try:
                linear = _width(call.block.get_submodule(path))
            except AttributeError:
                linear = None
            if linear is None:
                raise _refused(kind, f"its blocks differ: block {number} has no linear layer {path!r}, as block 0 has")
        gains.append(_gain(call, call.block.get_submodule(spec.down), number, kind))
    known = [gain for gain in gains if gain is not None]
    if len(known) < len(gains):
        return replace(spec, normalised=True)
    if max(known) - min(known) > 2 * _tolerance(calls[0].output) * abs(known[0]):
        raise _refused(kind, "its blocks multiply what their MLPs give by different factors")
    scale = sum(known) / len(known)
    return replace(spec, scale=1.0 if abs(scale - 1) < _tolerance(calls[0].output) else scale)


def _tolerance(like: Tensor) -> float:
    return max(_LINEAR, 16 * torch.finfo(like.dtype).eps)


def _gain(call: _Call, down: nn.Module, number: int, kind: str) -> float | None:
    """By how much a change at ``down`` arrives at the block's output; ``None`` where it is no fixed multiple."""
    gains: list[float | None] = []
    base = call.again(lambda _stack: None).float()
    for seed, size in ((1, 1.0), (2, 0.5)):
        change = size * _probe(base.shape[-1], call.output, seed)
        moved = call.again(lambda stack, change=change: _put(stack, down, change)).float() - base  # type: ignore[misc]
        here = moved[0, PLACE].clone()
        moved[0, PLACE] = 0
        if not bool(here.any()):
            raise _refused(
                kind, f"a change of the down-projection of block {number} does not arrive at the block's output"
            )
        if float(moved.abs().max()) > 1e-4 * float(here.abs().max()):
            raise _refused(kind, f"a change of the down-projection of block {number} also arrives at other tokens")
        wanted = change.float()
        gain = float(here @ wanted / (wanted @ wanted))
        error = float((here - gain * wanted).norm() / here.norm())
        gains.append(gain if error < _tolerance(call.output) else None)
    first, second = gains
    if first is None or second is None or abs(first - second) > 2 * _tolerance(call.output) * abs(first):
        return None
    return (first + second) / 2
