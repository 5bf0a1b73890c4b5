"""One thread at a time: a lock for every model, and forward passes of other threads that wait while a model is edited."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import nn

from kedit.models.offload import unwrap

P = ParamSpec("P")
R = TypeVar("R")


class _HasModel(Protocol):
    model: Any


S = TypeVar("S", bound=_HasModel)

_GUARD = threading.Lock()
_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()


def lock_of(model: nn.Module) -> threading.RLock:
    """The lock of a model, made on first use."""
    with _GUARD:
        if model not in _LOCKS:
            _LOCKS[model] = threading.RLock()
        return _LOCKS[model]


@contextmanager
def editing(model: nn.Module) -> Iterator[None]:
    """Hold a model for this thread; another thread that edits it, or begins a forward pass of it, waits until the end.

    A forward pass that another thread began before runs on as it is: kedit's hooks change nothing in it
    (:func:`kedit.models.hooks.on_output`). Weights may change under it.
    """
    lock = lock_of(model)
    with lock, model.register_forward_pre_hook(_Wait(lock)):
        yield


class _Wait:
    """A hook that lets other threads wait for the lock that the thread which makes it holds."""

    def __init__(self, lock: threading.RLock) -> None:
        self.lock, self.owner = lock, threading.get_ident()

    def __deepcopy__(self, _memo: dict[int, Any]) -> _Wait:
        return self  # a lock cannot be copied; a copy of the model is used by the thread that holds it

    def __call__(self, _module: nn.Module, _args: Any) -> None:
        if threading.get_ident() != self.owner:
            with self.lock:
                pass


def has_hooks(model: nn.Module) -> bool:
    """Whether hooks may change what a model computes: any but those by which threads wait for one another."""
    hooks = [
        hook for part in model.modules() for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
    ]
    return not all(isinstance(hook, _Wait) for hook in hooks)


def one_at_a_time(call: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Hold ``self.model`` while a method runs."""

    @functools.wraps(call)
    def held(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with editing(self.model):
            return call(self, *args, **kwargs)

    return held


def with_gradient(call: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Let a method work also where its caller has gradients switched off, one thread at a time."""

    @functools.wraps(call)
    def wrapped(self: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with editing(self.model), torch.inference_mode(False), torch.enable_grad():
            return call(self, *args, **kwargs)

    return wrapped


def holding_model(call: Callable[P, R]) -> Callable[P, R]:
    """Hold a function's first argument, ``model``, while it runs: what it measures is of one state of the model."""

    @functools.wraps(call)
    def held(*args: P.args, **kwargs: P.kwargs) -> R:
        inner = unwrap(args[0] if args else kwargs.get("model"))
        if not isinstance(inner, nn.Module):  # the function says that it is no model
            return call(*args, **kwargs)
        with editing(inner):
            return call(*args, **kwargs)

    return held
