"""Models inside wrappers, and weights that accelerate keeps away from the device."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kedit.errors import ArchitectureError


def unwrap(model: Any) -> Any:
    """The model inside the wrappers of ``torch.compile`` and PEFT; adapters stay where they are and act as before."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


@dataclass(frozen=True)
class Offloaded:
    """A weight that accelerate keeps in memory or on disk, and loads for every use.

    Attributes:
        store: all offloaded weights by name.
        key: the weight's name.
        device: where it is used.
    """

    store: Mapping[str, Tensor]
    key: str
    device: torch.device

    def read(self) -> Tensor:
        """The weight as it is kept."""
        return self.store[self.key].detach()

    def hold(self) -> None:
        """Keep the weight in memory from now on, so that what is written to it lasts: the file is left as it is."""
        from accelerate.utils import OffloadedWeightsLoader

        if isinstance(self.store, OffloadedWeightsLoader) and self.key not in self.store.state_dict:
            self.store.state_dict[self.key] = self.read().clone()


def offloaded(module: nn.Module, leaf: str) -> Offloaded | None:
    """Return how a module's parameter is kept elsewhere; ``None`` where it is not, or not by accelerate.

    Accelerate's ``align_module_device`` reads a module as a whole and drops what is written to it; so single weights are
    found here by the hook that loads them.
    """
    hook = getattr(module, "_hf_hook", None)
    if hook is None:
        return None
    from accelerate.hooks import AlignDevicesHook, SequentialHook
    from accelerate.utils import PrefixedDataset

    for each in hook.hooks if isinstance(hook, SequentialHook) else (hook,):
        if isinstance(each, AlignDevicesHook) and each.offload and each.weights_map is not None:
            key, store = leaf, each.weights_map
            while isinstance(store, PrefixedDataset):  # a view of a part of the weights
                key, store = f"{store.prefix}{key}", store.dataset
            return Offloaded(store, key, torch.device(each.execution_device))
    return None


def stored(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every stored tensor of a model with its name, sorted; an offloaded one is read when its turn comes.

    Raises:
        ArchitectureError: a tensor is on the meta device and kept nowhere.
    """
    for name, value in sorted(model.state_dict(keep_vars=True).items()):
        if isinstance(value, Tensor):
            yield name, read(model, name, value)
        else:  # torch's quantized layers store what they have packed as a tuple
            parts = value if isinstance(value, tuple) else ()
            yield from ((f"{name}.{i}", _plain(part)) for i, part in enumerate(parts) if isinstance(part, Tensor))


def _plain(tensor: Tensor) -> Tensor:
    return tensor.int_repr() if tensor.is_quantized else tensor


def read(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A model's tensor, or what accelerate keeps in its place.

    Raises:
        ArchitectureError: it is on the meta device and kept nowhere.
    """
    if not tensor.is_meta:
        return tensor
    return _kept(model, name).read()


def check_held(model: nn.Module) -> None:
    """Raise :class:`ArchitectureError` where a parameter holds no numbers and is kept nowhere."""
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            _kept(model, name)


def _kept(model: nn.Module, name: str) -> Offloaded:
    path, _, leaf = name.rpartition(".")
    away = offloaded(model.get_submodule(path), leaf)
    if away is None:
        raise ArchitectureError(
            f"{name} is on the meta device and holds no numbers. Load the model's weights, or let accelerate offload "
            "them (device_map)."
        )
    return away


def device_of(module: nn.Module, leaf: str = "weight") -> torch.device:
    """Return where a module computes with its parameter; with the first that it has, where it has none of that name."""
    tensor = getattr(module, leaf, None)
    if not isinstance(tensor, Tensor):
        tensor = next(itertools.chain(module.parameters(), module.buffers()), None)
    if tensor is None:  # torch's dynamically quantized layers hold packed objects, and run on the CPU
        return torch.device("cpu")
    device: torch.device = tensor.device
    if device.type != "meta":
        return device
    away = offloaded(module, leaf)
    return device if away is None else away.device
