"""Devices that a machine does not have: tensors that say ``cuda:0`` or ``cuda:1`` and are computed in main memory.

What breaks on a GPU and not on a CPU is mostly a tensor that stays behind: an operation gets one input from the device and
one from the CPU, or inputs from two devices. Here such an operation raises what torch raises, while every value is computed
as on the CPU, so an edit on pretended devices must end in the very same bits as the edit of the same model on the CPU.

Not pretended: kernels of Triton, streams, the size of a device's memory (it is plenty) and how it rounds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import accelerate
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from kedit.models import ModelArch

CPU = torch.device("cpu")
DEVICES = 2
MOVES = {"aten::_to_copy", "aten::copy_"}
INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
TAKES_NUMBERS = {"aten::masked_fill", "aten::masked_fill_", "aten::index_put", "aten::index_put_"}


class Away(torch.Tensor):
    """A tensor on a pretended device."""

    @staticmethod
    def __new__(
        cls, plain: torch.Tensor, where: torch.device | None = None, requires_grad: bool = False
    ) -> torch.Tensor:
        if where is None:  # accelerate makes a parameter anew by its class
            return nn.Parameter(plain, requires_grad)
        return torch.Tensor._make_wrapper_subclass(
            cls,
            plain.size(),
            strides=plain.stride(),
            storage_offset=plain.storage_offset(),
            dtype=plain.dtype,
            layout=plain.layout,
            # For what torch decides in C++; what reads past the dispatcher finds no values there.
            device=torch.device("meta", where.index),
        )

    def __init__(self, plain: torch.Tensor, where: torch.device | None = None, requires_grad: bool = False) -> None:
        if where is not None:
            self.plain, self.where = plain.detach(), where

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def device(self) -> torch.device:
        return self.where

    @property
    def is_cuda(self) -> bool:
        return True

    @property
    def is_meta(self) -> bool:
        return False

    def tolist(self) -> Any:
        return self.plain.tolist()

    def data_ptr(self) -> int:
        return self.plain.data_ptr()

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.plain.numpy(force=True)
        raise TypeError(f"can't convert {self.where} device type tensor to numpy. Use Tensor.cpu() first.")

    def __repr__(self) -> str:
        return f"Away({self.plain}, {self.where})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


def place(tensor: torch.Tensor) -> torch.device:
    return tensor.where if isinstance(tensor, Away) else CPU


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation in main memory, refuse mixed devices, and let its result say where it would be."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    where = meeting_place(func, args, tensors)
    drawn = kwargs.get("generator")
    if (asked := kwargs.get("device")) is not None:
        where = torch.device(asked)
        if where.type == "cuda" or (where.type == "meta" and where.index is not None):  # the latter: chosen in C++
            where = torch.device("cuda", where.index or 0)
            kwargs = {**kwargs, "device": CPU}
    if drawn is not None and where.type == "cuda":
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found '{drawn.device}' in {func}!")
    wrappers = {id(t.plain): t for t in tensors if isinstance(t, Away)}
    args, kwargs = tree_map(plain, args), tree_map(plain, kwargs)
    if func is torch.ops.aten.histc.default and not args[0].is_floating_point():  # a CPU counts no whole numbers
        result = func(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
    else:
        result = func(*args, **kwargs)

    def wrap(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if id(leaf) in wrappers:  # written in place
            assert wrappers[id(leaf)].shape == leaf.shape, f"{func} changes a tensor's shape in place"
            return wrappers[id(leaf)]
        return Away(leaf, where) if where.type == "cuda" else leaf

    return tree_map(wrap, result)


def meeting_place(func: Any, args: Any, tensors: list[torch.Tensor]) -> torch.device:
    """The one device of an operation's tensors, by torch's rules."""
    name = func._schema.name
    if name in MOVES:
        return place(args[0])
    here = tensors
    if torch.Tag.pointwise in func.tags or name in TAKES_NUMBERS:  # a number may come as a tensor on the CPU
        kept = tensors[0] if name.endswith("_") else None
        here = [t for t in here if t.dim() or place(t) != CPU or t is kept]
    if name in INDEXED and place(args[0]) != CPU:  # indices may come from the CPU
        here = [t for t in here if place(t) != CPU or all(t is not index for index in args[1])]
    places = {place(tensor) for tensor in here}
    if len(places) > 1:
        listed = " and ".join(sorted(map(str, places)))
        raise RuntimeError(f"Expected all tensors to be on the same device, but found {listed} in {name}!")
    return next(iter(places), CPU)


def plain(leaf: Any) -> Any:
    return leaf.plain if isinstance(leaf, Away) else leaf


class Devices(TorchDispatchMode):
    """Makes what is asked of a pretended device there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


def launch(function: Any, grid: tuple[int, int], *args: Any, device: torch.device, **constants: Any) -> None:
    """Launch an interpreted kernel as on a GPU: whatever it is handed has to be there."""
    assert device.type == "cuda"
    assert {place(each) for each in args if isinstance(each, torch.Tensor)} == {device}
    function[grid](*map(plain, args), num_warps=4, num_stages=2, **constants)


@contextlib.contextmanager
def devices(*, kernels: bool = False) -> Iterator[None]:
    """As if two GPUs were there.

    Args:
        kernels: attention rows come from the Triton kernels, which must be interpreted (TRITON_INTERPRET=1).
    """
    free = 1 << 34
    fakes = {
        "_lazy_init": lambda: None,
        "mem_get_info": lambda device=None: (free, free),
        "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "device_count": lambda: DEVICES,
        "is_available": lambda: True,
        "is_current_stream_capturing": lambda: False,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: "pretended",
    }
    patches = [mock.patch.object(torch.cuda, name, fake) for name, fake in fakes.items()]
    if kernels:
        patches.append(mock.patch("kedit.capture.triton_rows._launch", launch))
    else:
        patches.append(mock.patch("kedit.capture.dispatch._obstacle", return_value="the device is pretended"))
    swap = torch.__future__.get_overwrite_module_params_on_conversion()
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor makes them on the CPU and moves them
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, swap)
        stack.enter_context(Devices())
        yield


def spread(model: Any, first: int | Sequence[str] = 1, folder: str | None = None) -> Any:
    """The model over both devices, as ``device_map="auto"`` lays it.

    Args:
        model: may be wrapped by PEFT.
        first: how many blocks are on the first device, with what comes before them; the others, and what comes behind, are on
            the second. Or the place of every block: "cuda:0", "cuda:1", "cpu" or "disk"; what comes behind is on the second.
        folder: where weights on "disk" go.
    """
    arch = ModelArch(model)
    prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is arch.model)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    later = [arch.spec.final_norm] + [arch.spec.head] * (not tied)
    if isinstance(first, int):
        first = [f"cuda:{int(number >= first)}" for number in range(arch.num_layers)]
    places: dict[str, str] = {}
    for name, module in arch.model.named_modules():
        if name.startswith(f"{arch.spec.blocks}."):
            number = name.removeprefix(f"{arch.spec.blocks}.")
            if number.isdigit():
                places[prefix + name] = first[int(number)]
        elif not list(module.children()):
            places[prefix + name] = f"cuda:{int(name in later)}"
    for name, where in places.items():
        if where.startswith("cuda"):
            model.get_submodule(name).to(where)
    return accelerate.dispatch_model(model, places, main_device="cuda:0", offload_dir=folder, force_hooks=True)
