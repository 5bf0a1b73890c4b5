"""A model's parameters by name, with how they are stored: needs the modules alone, neither their numbers nor an entry."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from kedit.errors import ArchitectureError
from kedit.models.experts import Experts
from kedit.models.offload import offloaded
from kedit.models.weight import Weight

_NAME = re.compile(r"(?P<path>.*?)\.?(?P<leaf>[^.\[\]]*)(\[(?P<index>0|[1-9][0-9]*)\])?", re.ASCII)


def weight_of(model: Any, name: str) -> Weight:
    """The matrix called ``name`` of a model that is not wrapped, with the layout that its module's type implies.

    The model may be an empty one on the meta device, of a type that has no entry and whose structure cannot be probed.

    Of a quantized layer whose numbers are packed, or called otherwise, the matrix is an empty one.

    Raises:
        ArchitectureError: there is no such parameter, or it is no plain ``nn.Linear`` or ``Conv1D`` weight.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ArchitectureError(f"{type(model).__name__} has no parameter {name!r}.")
    module = bare(part(model, match["path"]))
    parameter = getattr(module, match["leaf"], None)
    if match["leaf"] == "weight" and (packed := _packed(module, parameter)) is not None:
        return Weight(name, packed, transposed=False)
    if not isinstance(parameter, nn.Parameter):
        raise ArchitectureError(f"{type(model).__name__} has no parameter {name!r}.")
    if match["index"] is None:
        away = offloaded(module, match["leaf"]) if parameter.is_meta else None
        return Weight(name, parameter, _stored_transposed(module, name), away=away)
    return Experts(module, match["path"], match["leaf"]).weight(int(match["index"]))


def part(model: Any, path: str, root: nn.Module | None = None) -> nn.Module:
    """The module called ``path`` of a model, or of a part of it."""
    try:
        module: nn.Module = (model if root is None else root).get_submodule(path)
    except AttributeError as error:
        config = getattr(model, "config", None)
        kind = getattr(config, "model_type", type(model).__name__)
        raise ArchitectureError(
            f"{type(model).__name__} has no module {path!r}, where a {kind} keeps it. "
            "Pass the causal language model itself, not a part or a wrapper of it."
        ) from error
    return module


def bare(module: nn.Module) -> nn.Module:
    """The layer inside a PEFT adapter, which adds to what it gives."""
    inner = getattr(module, "base_layer", None)
    return inner if isinstance(inner, nn.Module) else module


def _packed(module: nn.Module, weight: Any) -> nn.Parameter | None:
    """An empty matrix [O, I] for a layer that says how many features it has and does not store as many plain numbers."""
    rows, columns = getattr(module, "out_features", None), getattr(module, "in_features", None)
    if not isinstance(rows, int) or not isinstance(columns, int):
        return None
    if isinstance(weight, Tensor) and (
        weight.is_floating_point() or (isinstance(module, nn.Linear) and weight.shape == (rows, columns))
    ):
        return None
    return nn.Parameter(torch.empty((rows, columns), dtype=torch.int8, device="meta"), requires_grad=False)


def _stored_transposed(module: nn.Module, name: str) -> bool:
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):
        return True
    if isinstance(module, nn.Linear):
        return False
    raise ArchitectureError(
        f"{name} belongs to a {type(module).__name__}; kedit writes nn.Linear and Conv1D weights, and attaches edits beside "
        "quantized layers that say their in_features and out_features. Load the model in another form."
    )
