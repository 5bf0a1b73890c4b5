"""Running a model, and one of its blocks again and again, to see what its modules do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kedit.errors import ArchitectureError
from kedit.models.architectures import ARCHITECTURES
from kedit.models.offload import device_of

TOKENS = 6
PLACE = 2  # the token whose values are changed
_FELT = 1e-5  # a relative change that is no rounding


def refused(kind: str, reason: str) -> ArchitectureError:
    """The error that says why a model of an unknown type cannot be edited."""
    return ArchitectureError(
        f"kedit does not know the model type {kind!r}, and cannot edit what it finds: {reason}. The types that it knows are "
        f"{', '.join(sorted(ARCHITECTURES))}."
    )


@dataclass(frozen=True)
class Call:
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
            output: Tensor = first_of(self.block(*self.args, **self.named))
            return output


class Calls(list[Call]):
    """The calls of all blocks, in order, and the list that holds the blocks."""

    blocks: nn.ModuleList


def first_of(output: Any) -> Any:
    """The hidden states in what a block returns."""
    return output[0] if isinstance(output, tuple) else output


def width_of(module: nn.Module) -> int | None:
    """Width of what a linear layer gives; ``None`` for other modules."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):
        return int(module.nf)
    return module.out_features if isinstance(module, nn.Linear) else None


def chain(model: Any, kind: str) -> tuple[Calls, nn.Module]:
    """The blocks' calls in a short run, and the first module that is given what the last block gave."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module)]
    seen: dict[nn.Module, list[Call]] = {block: [] for blocks in lists for block in blocks}
    order: list[tuple[nn.Module, Any]] = []

    def note(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        if isinstance(first_of(output), Tensor):
            seen[module].append(Call(module, args, named, first_of(output)))

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        order.append((module, args[0] if args else None))

    embeddings = model.get_input_embeddings()
    ids = torch.arange(1, TOKENS + 1, device=device_of(embeddings))[None] % embeddings.weight.shape[0]
    handles = [block.register_forward_hook(note, with_kwargs=True) for block in seen]
    handles += [module.register_forward_pre_hook(enter) for module in model.modules()]
    try:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except (TypeError, ValueError, RuntimeError) as error:
        raise refused(kind, f"it does not run on token ids alone ({type(error).__name__}: {error})") from error
    finally:
        for handle in handles:
            handle.remove()
    chains = [calls for blocks in lists if (calls := _chained(blocks, seen)) is not None]
    if not chains:
        raise refused(kind, "it has no list of blocks of which each takes what the one before gave")
    calls = max(chains, key=len)  # the first of the longest: outer lists come first
    last = max(i for i, (module, _) in enumerate(order) if module is calls[-1].block)
    after = [module for module, given in order[last:] if given is calls[-1].output]
    return calls, after[0] if after else model.get_output_embeddings()


def _chained(blocks: nn.ModuleList, seen: dict[nn.Module, list[Call]]) -> Calls | None:
    """The calls of the blocks of a list, where each is called once with what the one before gave."""
    each = [seen[block] for block in blocks]
    if any(len(calls) != 1 for calls in each):
        return None
    chain = Calls(calls[0] for calls in each)
    chain.blocks = blocks
    for call in chain:
        if not isinstance(call.hidden, Tensor) or call.hidden.ndim != 3 or call.hidden.shape != call.output.shape:
            return None
    linked = all(torch.equal(one.output, two.hidden) for one, two in zip(chain, chain[1:], strict=False))
    return chain if linked else None


@dataclass(frozen=True)
class Parts:
    """Names of a block's parts, relative to it: the projections that end its MLP and its attention, and its attention."""

    down: str
    attention_out: str
    attention: str


class Block:
    """One block whose linear layers are told apart by whom they reach."""

    def __init__(self, call: Call, kind: str) -> None:
        self.call = call
        self.kind = kind
        self.names = {module: name for name, module in call.block.named_modules() if width_of(module)}
        self.before, self.order = self._inputs(None)

    def parts(self) -> Parts:
        """The projections that end the attention and the MLP."""
        hidden = self.call.output.shape[-1]
        reached = {module: self._reached(module) for module in self.order}
        mixing = [
            other
            for place, other in enumerate(self.order)
            if width_of(other) == hidden
            and any(bool(reached[one].get(other, torch.zeros(TOKENS))[PLACE + 1 :].any()) for one in self.order[:place])
        ]
        if not mixing:
            raise refused(self.kind, "no linear layer of its blocks sees other tokens, as the end of an attention does")
        attention_out = mixing[0]
        ends = [
            module
            for module in self.order
            if module is not attention_out and width_of(module) == hidden and not reached[module]
        ]
        if not ends:
            raise refused(
                self.kind, "its blocks have no down-projection, a linear layer that ends an MLP (experts need an entry)"
            )
        if len(ends) > 1:
            several = ", ".join(self.names[module] for module in ends)
            raise refused(self.kind, f"its blocks have several down-projections ({several}), as mixtures of experts do")
        path = self.names[attention_out]
        return Parts(self.names[ends[0]], path, path.rpartition(".")[0] or path)

    def _inputs(self, changed: nn.Module | None) -> tuple[dict[nn.Module, Tensor], list[nn.Module]]:
        """Inputs of all linear layers when one layer's output is changed, [T, I] each, and the order of calls."""
        given: dict[nn.Module, Tensor] = {}

        def note(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            tensor = next(value for value in (*args, *named.values()) if isinstance(value, Tensor))
            given[module] = tensor.reshape(-1, tensor.shape[-1]).clone()

        def hooks(stack: ExitStack) -> None:
            for module in self.names:
                stack.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
            if changed is not None:
                put(stack, changed, probe(width_of(changed) or 0, self.call.output, 0))

        self.call.again(hooks)
        return given, list(given)

    def _reached(self, module: nn.Module) -> dict[nn.Module, Tensor]:
        """The linear layers whose input changes with a layer's output, and at which tokens, [T]."""
        given, _ = self._inputs(module)
        reached = {}
        for other, before in self.before.items():
            if other is module or other not in given or given[other].shape != before.shape:
                continue
            scale = before.abs().max().clamp(min=1e-30)
            moved = (given[other] - before).abs().amax(-1) > _FELT * scale
            if bool(moved.any()):
                reached[other] = moved.cpu()
        return reached


def probe(width: int, like: Tensor, seed: int) -> Tensor:
    """A random change as large as the hidden states."""
    generator = torch.Generator().manual_seed(seed)
    change = torch.randn(width, generator=generator).to(like.device, like.dtype)
    return change * like.float().square().mean().sqrt().clamp(min=1e-3).to(like.dtype)


def put(stack: ExitStack, module: nn.Module, change: Tensor) -> None:
    """Add a change to a linear layer's output at the token :data:`PLACE`.

    Some routers are linear layers that return several tensors; the first is changed.
    """

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        first = first_of(output)
        changed = first.clone()
        changed[..., PLACE, :] += change[: changed.shape[-1]].to(changed.device)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    stack.callback(module.register_forward_hook(hook).remove)


def others(call: Call, ends: Sequence[nn.Module], attention: str) -> list[str]:
    """Names of modules that reach the block's output besides its linear layers ``ends``; what its attention does is left out.

    The ends' outputs are held as they are, and what every other matrix of the block gives is changed. So an expert or a
    second MLP beside the down-projection is seen, however it is written.
    """
    around, apart = [], []
    for name, module in call.block.named_modules():
        if module in ends or not _has_matrix(module) or f"{name}.".startswith(f"{attention}."):
            continue
        if any(end is part for end in ends for part in module.modules()):
            around.append(name or "the block itself")  # its output holds theirs, so it cannot be told apart
        else:
            apart.append((name, module))
    held: dict[nn.Module, Any] = {}

    def keep(stack: ExitStack) -> None:
        for end in ends:
            stack.callback(end.register_forward_hook(lambda m, _a, out: held.__setitem__(m, out.clone())).remove)

    base = call.again(keep)

    def moved(changed: Sequence[tuple[str, nn.Module]]) -> bool:
        def hooks(stack: ExitStack) -> None:
            for _, module in changed:
                stack.callback(module.register_forward_hook(lambda _m, _a, out: _shaken(out)).remove)
            for end in ends:
                stack.callback(end.register_forward_hook(lambda m, _a, _out: held[m].clone()).remove)

        return float((call.again(hooks) - base).abs().max()) > _FELT * float(base.abs().max())

    if apart and moved(apart):
        around += [one[0] for one in apart if moved([one])] or [apart[0][0]]
    return around


def _has_matrix(module: nn.Module) -> bool:
    """Return whether a module has a parameter of its own with two dimensions or more."""
    return any(sum(size > 1 for size in own.shape) > 1 for own in module.parameters(recurse=False))


def _shaken(output: Any) -> Any:
    """An output changed beyond recognition; that which is no number stays."""
    if isinstance(output, tuple):
        return tuple(_shaken(part) for part in output)
    if not isinstance(output, Tensor) or not output.is_floating_point():
        return output
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(output.shape, generator=generator).to(output.device, output.dtype)
    return output + noise * output.float().square().mean().sqrt().clamp(min=1e-3).to(output.dtype)
