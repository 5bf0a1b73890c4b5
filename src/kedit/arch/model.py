"""A model seen as blocks, sites and editable weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from kedit.arch.table import ARCHITECTURES, ArchSpec
from kedit.errors import ArchitectureError, ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Kind = Literal["mlp", "block", "attention"]


@dataclass(frozen=True)
class Site:
    """Where a value is written: the output of a block's MLP, of its attention, or of the whole block."""

    layer: int
    kind: Kind = "mlp"


@dataclass(frozen=True)
class Weight:
    """A parameter together with how it is stored.

    ``transposed`` is true for GPT-2's ``Conv1D``, which stores [I, O]; ``nn.Linear`` stores [O, I].
    """

    name: str
    parameter: nn.Parameter
    transposed: bool

    @property
    def matrix(self) -> Tensor:
        """W with y = W x, [O, I]: a view of the stored tensor, without gradient."""
        stored = self.parameter.detach()
        return stored.T if self.transposed else stored


class ModelArch:
    """Typed access to the parts of one model.

    ``ModelArch(model)`` looks the model's type up in :data:`kedit.arch.ARCHITECTURES`.

    Raises:
        ArchitectureError: the type has no entry, or the model lacks a part that its entry names.
    """

    def __init__(self, model: PreTrainedModel, spec: ArchSpec | None = None) -> None:
        config = getattr(model, "config", None)
        self.model_type = str(getattr(config, "model_type", type(model).__name__))
        if spec is None:
            spec = ARCHITECTURES.get(self.model_type)
        if spec is None:
            known = ", ".join(sorted(ARCHITECTURES))
            raise ArchitectureError(
                f"kedit does not know the model type {self.model_type!r}. It knows {known}. Pass a model of one of these."
            )
        self.model = model
        self.spec = spec
        blocks = self._part(spec.blocks)
        if not isinstance(blocks, nn.ModuleList):
            raise ArchitectureError(f"{spec.blocks} of {type(model).__name__} is not a list of blocks.")
        self.blocks = blocks

    def __repr__(self) -> str:
        return f"ModelArch({self.model_type}, {self.num_layers} blocks)"

    @property
    def num_layers(self) -> int:
        """Number of blocks, L."""
        return len(self.blocks)

    @property
    def hidden(self) -> int:
        """Width of the residual stream, H."""
        return int(self.config.hidden_size)

    @property
    def config(self) -> Any:
        """The text model's configuration."""
        return self.model.config.get_text_config()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights that are edited."""
        dtype: torch.dtype = self.down(0).weight.dtype
        return dtype

    @property
    def work_dtype(self) -> torch.dtype:
        """Dtype in which values are optimised: float32, or float64 for a float64 model."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def head(self) -> nn.Module:
        """The language-model head."""
        return self._part(self.spec.head)

    @property
    def final_norm(self) -> nn.Module:
        """The normalisation before the head."""
        return self._part(self.spec.final_norm)

    def block(self, layer: int) -> nn.Module:
        """Block number ``layer``."""
        return self.blocks[self.check_layer(layer)]

    def mlp(self, layer: int) -> nn.Module:
        """The MLP of a block."""
        return self._part(self.spec.mlp, layer)

    def attention(self, layer: int) -> nn.Module:
        """The attention of a block."""
        return self._part(self.spec.attention, layer)

    def down(self, layer: int) -> Any:
        """The down-projection of a block's MLP."""
        return self._part(self.spec.down, layer)

    def site(self, site: Site) -> nn.Module:
        """The module whose output the site names."""
        if site.kind == "block":
            return self.block(site.layer)
        return self.mlp(site.layer) if site.kind == "mlp" else self._part(self.spec.attention_out, site.layer)

    def device(self, layer: int) -> torch.device:
        """Device of a block's down-projection."""
        device: torch.device = self.down(layer).weight.device
        return device

    @property
    def input_device(self) -> torch.device:
        """Device that token ids go to."""
        embeddings: Any = self.model.get_input_embeddings()
        device: torch.device = embeddings.weight.device
        return device

    def weight(self, layer: int) -> Weight:
        """The editable weight of a block: its down-projection's, with its stored layout."""
        name = f"{self.spec.blocks}.{self.check_layer(layer)}.{self.spec.down}.weight"
        return self.weight_of(name)

    def weight_of(self, name: str) -> Weight:
        """The matrix parameter called ``name``, with the layout that its module's type implies."""
        path, _, leaf = name.rpartition(".")
        module = self._part(path)
        parameter = getattr(module, leaf, None)
        if not isinstance(parameter, nn.Parameter):
            raise ArchitectureError(f"{type(self.model).__name__} has no parameter {name!r}.")
        return Weight(name, parameter, _stored_transposed(module, name))

    def check_layer(self, layer: int) -> int:
        """Return ``layer``, or raise :class:`ConfigError` where the model has no such block."""
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise ConfigError(f"A layer must be a whole number, not {layer!r}.")
        if not 0 <= layer < self.num_layers:
            raise ConfigError(
                f"Layer {layer} is out of range: this {self.model_type} has {self.num_layers} blocks "
                f"(0-{self.num_layers - 1}). Change the editor's layers."
            )
        return layer

    def _part(self, path: str, layer: int | None = None) -> nn.Module:
        root: nn.Module = self.model if layer is None else self.block(layer)
        try:
            return root.get_submodule(path)
        except AttributeError as error:
            raise ArchitectureError(
                f"{type(self.model).__name__} has no module {path!r}, where a {self.model_type} keeps it. "
                "Pass the causal language model itself, not a part or a wrapper of it."
            ) from error


def _stored_transposed(module: nn.Module, name: str) -> bool:
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):
        return True
    if isinstance(module, nn.Linear):
        return False
    raise ArchitectureError(
        f"{name} belongs to a {type(module).__name__}; kedit writes nn.Linear and Conv1D weights. "
        "A quantized or wrapped layer cannot be edited in place."
    )
