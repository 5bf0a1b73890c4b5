"""True float64: a mode that lifts the float32 casts inside transformers, for tests only.

Many models compute softmax, RMSNorm, rotary angles or attention scores in float32 whatever their dtype, so a
`.double()` model is only accurate to 1e-7. Inside `TrueFloat64`, code *of the transformers package* that asks for
float32 gets float64. Other callers are left alone: a float32 cast in kedit itself still shows.
"""

import sys

import torch
from torch.overrides import TorchFunctionMode

_ROOTS = ("transformers",)


def _caller() -> str:
    """Name the first package on the stack that is neither torch nor this file."""
    frame = sys._getframe(2)
    while frame is not None:
        root = frame.f_globals.get("__name__", "").partition(".")[0]
        if root != "torch" and frame.f_globals.get("__name__") != __name__:
            return root
        frame = frame.f_back
    return ""


def _asks_for_float32(args, kwargs) -> bool:
    return kwargs.get("dtype") is torch.float32 or any(a is torch.float32 for a in args)


class TrueFloat64(TorchFunctionMode):
    """Give float64 wherever transformers asks for float32."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.float:
            if _caller() in _ROOTS:
                return args[0].double()
        elif _asks_for_float32(args, kwargs) and _caller() in _ROOTS:
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()}
        return func(*args, **kwargs)
