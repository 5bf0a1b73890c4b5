"""A copy of a model in another dtype, for passes that are many and need not be exact."""

from __future__ import annotations

import copy
import time
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from kedit.models.arch import ModelArch
from kedit.utils.progress import logger

AUTO = "auto"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COMPUTE_DTYPES = (*_DTYPES, AUTO)
_GAIN = 1.3  # how many times as fast half precision must be
_SHAPE = (128, 1024, 1024)  # tokens, inputs, outputs: one product of an optimisation step
_REPEATS = 5


def compute_dtype(arch: ModelArch, name: str | None) -> torch.dtype:
    """The dtype that ``name`` stands for with this model; ``None`` and what does not apply: the model's own.

    ``"auto"`` is bfloat16 where this device multiplies it at least 1.3 times as fast as float32, which is measured once.
    A float64 model keeps its dtype unless another one is named.
    """
    if name is None:
        return arch.dtype
    if name != AUTO:
        return _DTYPES[name]
    fast = arch.dtype == torch.float32 and half_is_faster(arch.input_device)
    return torch.bfloat16 if fast else arch.dtype


def half_is_faster(device: torch.device) -> bool:
    """Whether ``device`` multiplies bfloat16 matrices clearly faster than float32 ones."""
    return _speedup(str(device)) >= _GAIN


@lru_cache(maxsize=8)
def _speedup(device: str) -> float:
    tokens, inputs, outputs = _SHAPE
    x, weight = torch.ones(tokens, inputs, device=device), torch.ones(outputs, inputs, device=device)
    try:
        plain, half = _seconds(x, weight), _seconds(x.bfloat16(), weight.bfloat16())
    except RuntimeError:  # no bfloat16 there
        return 0.0
    logger.debug("%s multiplies bfloat16 %.1f times as fast as float32.", device, plain / half)
    return plain / half


def _seconds(x: Tensor, weight: Tensor) -> float:
    """The shortest time of one product."""
    best = float("inf")
    with torch.no_grad():
        for _ in range(_REPEATS + 1):  # the first one warms up
            start = time.perf_counter()
            linear(x, weight)[0, 0].item()  # waits for the device
            best = min(best, time.perf_counter() - start)
    return best


def copy_in(arch: ModelArch, dtype: torch.dtype, *, backward: bool = True) -> ModelArch | None:
    """The model with its weights in ``dtype``; ``None`` where it cannot be copied so, which is logged.

    The model itself is not touched, so whoever else uses it meanwhile notices nothing. Buffers keep their dtype, as with
    ``from_pretrained(dtype=...)``.

    Args:
        arch: the model.
        dtype: of the copy.
        backward: whether gradients will be computed: on the CPU sdpa's backward pass in half precision is many times slower
            than that of "eager" attention, which the copy then uses.
    """
    model = arch.model
    reason = next(filter(None, map(_obstacle, model.modules())), None)
    if reason is None:
        memo: dict[int, object] = {}
        for parameter in model.parameters():
            half = parameter.detach().to(dtype) if parameter.is_floating_point() else parameter.detach()
            memo[id(parameter)] = nn.Parameter(half, requires_grad=False)
        try:
            copied = copy.deepcopy(model, memo)
            on_cpu = arch.input_device.type == "cpu"
            if backward and on_cpu and getattr(model.config, "_attn_implementation", None) == "sdpa":
                copied.set_attn_implementation("eager")
            return ModelArch(copied, arch.spec)
        except (RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
            reason = f"{type(error).__name__}: {error}"
    logger.warning(
        "This %s computes in %s, its own dtype: no copy in %s (%s).", arch.model_type, arch.dtype, dtype, reason
    )
    return None


def _obstacle(module: nn.Module) -> str | None:
    """Why a module's weights cannot be converted."""
    if hasattr(module, "_hf_hook"):
        return "accelerate moves its weights"
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.is_meta or is_traceable_wrapper_subclass(parameter):
            return f"{name} is not stored as plain numbers"
    if type(module).__module__.partition(".")[0] in ("bitsandbytes", "torchao", "optimum"):
        return f"{type(module).__name__} is quantized"
    return None
