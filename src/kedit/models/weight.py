"""One editable matrix of a model, wherever and however it is stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from kedit.models.offload import Offloaded


@dataclass(frozen=True)
class Weight:
    """A matrix of a model together with how it is stored.

    Attributes:
        name: the parameter's; with ``[n]`` at the end for expert n of a fused tensor.
        parameter: the parameter, or the fused tensor that holds the matrix.
        transposed: whether it is stored as [I, O], as by GPT-2's ``Conv1D``; ``nn.Linear`` stores [O, I].
        index: the expert's number in a fused tensor.
        away: where the numbers are, if the parameter itself is empty.
    """

    name: str
    parameter: nn.Parameter
    transposed: bool
    index: int | None = None
    away: Offloaded | None = None

    @property
    def stored(self) -> Tensor:
        """The matrix as it is stored: a view without gradient (of an offloaded weight, what is kept of it)."""
        whole = self.parameter.detach() if self.away is None else self.away.read()
        return whole if self.index is None else whole[self.index]

    @property
    def matrix(self) -> Tensor:
        """W with y = W x, [O, I]: a view of the stored tensor, without gradient."""
        return self.stored.T if self.transposed else self.stored

    @property
    def writable(self) -> bool:
        """Whether the weight is stored as plain numbers, in memory or offloaded: not quantized, not left out."""
        plain = self.parameter.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
        here = self.away is not None or not (self.parameter.is_meta or self.overlaps)
        return plain and not self.wrapped and here

    @property
    def overlaps(self) -> bool:
        """Whether several of the weight's numbers lie in one place of memory, as ``expand`` leaves them."""
        parameter = self.parameter
        return any(step == 0 and size > 1 for step, size in zip(parameter.stride(), parameter.shape, strict=True))

    @property
    def wrapped(self) -> bool:
        """Whether the tensor stands for others, as torchao's and quanto's quantized ones do: a copy of its values is written."""
        return is_traceable_wrapper_subclass(self.parameter)

    @property
    def packed(self) -> bool:
        """Whether the matrix is an empty one that stands for a quantized layer's."""
        return self.parameter.is_meta and self.away is None

    def hold(self) -> None:
        """Get the weight to where it can be written: an offloaded one is in memory from now on."""
        if self.away is not None:
            self.away.hold()
