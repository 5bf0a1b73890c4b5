"""Reading and changing what flows through modules, with hooks that are always removed, and the mode they run in."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn


class StopForward(Exception):
    """Raised by a hook once all that was wanted has been read; caught by :func:`stops_early`."""


def of_this_thread() -> Callable[[], bool]:
    """Return whether the forward pass that runs is one of the thread that calls this now, for hooks to ask.

    What an autograd thread recomputes of a checkpointed block counts as such; a pass that another thread runs does not.
    """
    owner = threading.get_ident()
    return lambda: threading.get_ident() == owner or torch._C._current_graph_task_id() != -1


@contextmanager
def on_output(module: nn.Module, function: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Call ``function`` with the module's output tensor; what it returns (if anything) takes its place.

    Where the module returns a tuple, its first element is meant.
    """
    mine = of_this_thread()

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        if not mine():
            return None
        tensor = output[0] if isinstance(output, tuple) else output
        changed = function(tensor)
        if changed is None:
            return None
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    with module.register_forward_hook(hook):
        yield


@contextmanager
def on_input(module: nn.Module, function: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Call ``function`` with the module's first input (or ``hidden_states``); what it returns takes its place."""
    mine = of_this_thread()

    def hook(_module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if not mine():
            return None
        changed = function(args[0] if args else named["hidden_states"])
        if changed is None:
            return None
        return ((changed, *args[1:]), named) if args else (args, {**named, "hidden_states": changed})

    with module.register_forward_pre_hook(hook, with_kwargs=True):
        yield


@contextmanager
def on_arguments(module: nn.Module, function: Callable[..., None]) -> Iterator[None]:
    """Call ``function`` with everything that the module is called with by place."""
    mine = of_this_thread()
    with module.register_forward_pre_hook(lambda _module, args: function(*args) if mine() else None):
        yield


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; every part is in the mode that it was in afterwards."""
    training = [part for part in module.modules() if part.training]
    try:
        module.eval()
        yield
    finally:
        for part in training:
            part.training = True


def stops_early() -> AbstractContextManager[None]:
    """A place where :class:`StopForward` ends a forward pass quietly."""
    return suppress(StopForward)


def by_prompt(tensor: Tensor, prompts: int) -> Tensor:
    """[P, T, ...] also where a block works on all tokens in one row, [P · T, ...]; a view."""
    return tensor if tensor.ndim > 2 else tensor.unflatten(0, (prompts, -1))


@contextmanager
def inference_state(model: nn.Module, trained: Sequence[nn.Parameter] = ()) -> Iterator[None]:
    """Evaluation mode inside, gradient for the ``trained`` weights alone; all as before afterwards."""
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    chosen = {id(parameter) for parameter in trained}
    # A module compiled in place would not see hooks that come and go.
    compiled = {module: call for module in model.modules() if (call := vars(module).get("_compiled_call_impl"))}
    with evaluating(model):
        try:
            for module in compiled:
                module._compiled_call_impl = None
            for parameter in model.parameters():
                parameter.requires_grad_(id(parameter) in chosen)
            yield
        finally:
            for name, parameter in model.named_parameters():  # by name: an offloaded weight's parameter is made anew
                parameter.requires_grad_(wanted[name])
            for module, call in compiled.items():
                module._compiled_call_impl = call
