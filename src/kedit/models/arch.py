"""A model seen as blocks, sites and editable weights."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kedit.errors import ArchitectureError, ConfigError, UnsupportedError
from kedit.models.architectures import ARCHITECTURES, ArchSpec
from kedit.models.compat import forward_parameters, head_of
from kedit.models.experts import Experts
from kedit.models.hooks import by_prompt, on_input
from kedit.models.offload import device_of, unwrap
from kedit.models.parameters import bare, part, weight_of
from kedit.models.weight import Weight
from kedit.utils.progress import logger
from kedit.utils.validation import is_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SiteKind = Literal["mlp", "block", "attention"]


@dataclass(frozen=True)
class Site:
    """The place at which a value is written: the output of a block's MLP, of its attention, or of the whole block.

    The MLP's output is what its down-projection gives (in a mixture, the experts' together), before the block normalises,
    scales or adds it.
    """

    layer: int
    kind: SiteKind = "mlp"


class ModelArch:
    """Typed access to the parts of one model; of one wrapped by PEFT or ``torch.compile``, to those of the model inside.

    ``ModelArch(model)`` looks the model's type up in :data:`kedit.models.ARCHITECTURES`; a type without an entry is found by
    its structure (:mod:`kedit.models.detect`), once per model.

    Raises:
        ArchitectureError: the type has no entry and its structure is not understood, or the model lacks a part that its entry
            names.
    """

    def __init__(self, model: PreTrainedModel, spec: ArchSpec | None = None) -> None:
        model = unwrap(model)
        config = getattr(model, "config", None)
        self.model_type = str(getattr(config, "model_type", type(model).__name__))
        if spec is None:
            spec = ARCHITECTURES.get(self.model_type)
        if spec is None:
            spec = _spec_by_structure(model)
        self.model = model
        self.spec = spec
        blocks = self._part(spec.blocks)
        if not isinstance(blocks, nn.ModuleList):
            raise ArchitectureError(f"{spec.blocks} of {type(model).__name__} is not a list of blocks.")
        self.blocks = blocks
        self.keeps_logits = "logits_to_keep" in forward_parameters(model)
        """Whether the model computes the logits of chosen positions only."""

    def __repr__(self) -> str:
        return f"ModelArch({self.model_type}, {self.num_layers} blocks)"

    def describe(self) -> dict[str, Any]:
        """The model's name, type, size and dtype as JSON values, without a path of this machine."""
        source = str(getattr(self.model.config, "_name_or_path", "") or "")
        return {
            "name": Path(source).name if Path(source).exists() else source,
            "type": self.model_type,
            "num_layers": self.num_layers,
            "hidden": self.hidden,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    @property
    def num_layers(self) -> int:
        """Number of blocks, L."""
        return len(self.blocks)

    @property
    def hidden(self) -> int:
        """Width of the residual stream, H."""
        return self.shape(0)[0]

    @property
    def config(self) -> Any:
        """The text model's configuration."""
        return self.model.config.get_text_config()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights that are edited."""
        return self.weights(0)[0].parameter.dtype

    @property
    def work_dtype(self) -> torch.dtype:
        """Dtype in which values are optimised: float32, or float64 for a float64 model."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def head(self) -> nn.Module:
        """The language-model head."""
        head = head_of(self.model, self.spec.head)
        return self._part(self.spec.head) if head is None else head

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
        """The attention of a block; in a hybrid, what stands in its place."""
        return self._part(self.spec.attention if self.has_attention(layer) else self.spec.mixer, layer)

    def has_attention(self, layer: int) -> bool:
        """Whether a block has attention; in a hybrid, some blocks keep a recurrent state in its place."""
        return not self.hybrid or not hasattr(self.block(layer), self.spec.mixer)

    @property
    def hybrid(self) -> bool:
        """Whether some blocks keep a recurrent state, so that stored keys and values do not stand for the tokens before."""
        return bool(self.spec.mixer)

    def down(self, layer: int) -> Any:
        """The down-projection of a block's MLP.

        Raises:
            UnsupportedError: the block is a mixture of experts, which has several (:meth:`experts`).
        """
        experts = self.experts(layer)
        if experts is not None:
            raise UnsupportedError(f"{self._no_single(layer, experts.count)} Use experts(layer).")
        return self._part(self.spec.down, layer)

    def experts(self, layer: int) -> Experts | None:
        """The experts of a block's MLP; ``None`` where it is no mixture."""
        path = self.spec.experts
        if not path:
            return None
        try:
            module = self.block(layer).get_submodule(path)
        except AttributeError:  # some types mix only in some blocks
            return None
        return Experts(module, f"{self.spec.blocks}.{layer}.{path}", self.spec.fused_down)

    def gain(self, layer: int) -> float | None:
        """By how much a change of the MLP's output changes the block's; ``None`` where the block normalises in between."""
        self.check_layer(layer)
        normalised = self.spec.normalised
        if isinstance(normalised, tuple):
            normalised = getattr(self.config, normalised[0], None) == normalised[1]
        if normalised:
            return None
        scale = self.spec.scale
        return float(getattr(self.config, scale) if isinstance(scale, str) else scale)

    def output_site(self, layer: int) -> Site:
        """Return the site of a block's contribution: its output, or its MLP's where the block normalises that.

        A wanted change of a normalised output is no change of the MLP's that could be solved for, so there the value is
        optimised at the MLP's output itself.
        """
        return Site(layer, "block" if self.gain(layer) is not None else "mlp")

    def site(self, site: Site) -> nn.Module:
        """The module whose output the site names."""
        if site.kind == "block":
            return self.block(site.layer)
        if site.kind == "mlp":
            return self.mlp(site.layer)
        out = self.spec.attention_out if self.has_attention(site.layer) else self.spec.mixer_out
        return self._part(out, site.layer)

    def device(self, layer: int) -> torch.device:
        """Device of a block's down-projection."""
        experts = self.experts(layer)
        return device_of(self.down(layer)) if experts is None else device_of(experts.module, experts.leaf)

    @property
    def input_device(self) -> torch.device:
        """Device that token ids go to."""
        return device_of(self.model.get_input_embeddings())

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Devices that the model computes on, the input's first."""
        return tuple(dict.fromkeys([self.input_device, *map(self.device, range(self.num_layers)), *self._at_the_end()]))

    def _at_the_end(self) -> list[torch.device]:
        """Devices of the last block, of the final norm (some types have none) and of the head."""
        devices = [self.device(self.num_layers - 1)]
        for name in ("final_norm", "head"):
            with suppress(ArchitectureError):
                module = bare(getattr(self, name))
                devices += [device_of(module)] if getattr(module, "weight", None) is not None else []
        return devices

    def logits(self, keep: Tensor, **inputs: Any) -> Tensor:
        """Run the model and give the logits [N, V] at the places marked in ``keep`` [P, T] (bool), prompt by prompt.

        Where the model can, the head runs at these places only. ``inputs``, ``keep`` and what is returned are on the input's
        device.
        """
        # transformers takes such a mask as `logits_to_keep` only in its newest versions, and on the device of the last
        # hidden states only. What a model does after its head it does to every logit alone.
        with ExitStack() as stack:
            if self.keeps_logits and not self.compiled:
                chosen = on_input(self.head, lambda hidden: by_prompt(hidden, len(keep))[keep.to(hidden.device)])
                stack.enter_context(chosen)
            elif self.keeps_logits:
                columns = keep.any(0).nonzero().squeeze(1)
                inputs["logits_to_keep"], keep = columns.to(self._at_the_end()[-1]), keep[:, columns]
            logits: Tensor = self.model(**inputs).logits
        if logits.ndim > 2:
            logits = logits[keep.to(logits.device)]
        return logits.to(self.input_device)

    @property
    def compiled(self) -> bool:
        """Whether the model or its head is compiled in place, so that hooks would be compiled in, or not be seen."""
        return any(vars(module).get("_compiled_call_impl") for module in (self.model, self.head))

    def weight(self, layer: int) -> Weight:
        """The editable weight of a block: its down-projection's, with its stored layout.

        Raises:
            UnsupportedError: the block is a mixture of experts, which has several (:meth:`weights`).
        """
        weights = self.weights(layer)
        if len(weights) > 1:
            raise UnsupportedError(f"{self._no_single(layer, len(weights))} Use weights(layer).")
        return weights[0]

    def _no_single(self, layer: int, experts: int) -> str:
        return f"Block {layer} of this {self.model_type} is a mixture of {experts} experts, so it has no single down-projection."

    def weights(self, layer: int) -> tuple[Weight, ...]:
        """The editable weights of a block: its down-projection's, or one per expert."""
        self.check_layer(layer)
        experts = self.experts(layer)
        if experts is None:
            return (self.weight_of(f"{self.spec.blocks}.{layer}.{self.spec.down}.weight"),)
        return tuple(self.weight_of(name) for name in experts.names)

    def memory_width(self, layer: int) -> int:
        """Return how many numbers a key of a block has: I, or the experts' widths together (:mod:`kedit.models.experts`)."""
        experts = self.experts(layer)
        return self.shape(layer)[1] * (1 if experts is None else experts.count)

    def shape(self, layer: int) -> tuple[int, int]:
        """(O, I) of a block's down-projection, or of each expert's; also where the weight is quantized."""
        experts = self.experts(layer)
        if experts is not None:
            return experts.shape
        down: Any = bare(self.down(layer))
        if hasattr(down, "in_features"):
            return int(down.out_features), int(down.in_features)
        rows, columns = self.weight(layer).matrix.shape
        return rows, columns

    def weight_of(self, name: str) -> Weight:
        """The matrix called ``name``, with the layout that its module's type implies."""
        return weight_of(self.model, name)

    def check_layer(self, layer: int) -> int:
        """Return ``layer``, or raise :class:`ConfigError` where the model has no such block."""
        if not is_whole(layer):
            raise ConfigError(f"A layer must be a whole number, not {layer!r}.")
        if not 0 <= layer < self.num_layers:
            raise ConfigError(
                f"Layer {layer} is out of range: this {self.model_type} has {self.num_layers} blocks "
                f"(0-{self.num_layers - 1}). Change the editor's layers."
            )
        return layer

    def _part(self, path: str, layer: int | None = None) -> nn.Module:
        return part(self.model, path, None if layer is None else self.block(layer))


_DETECTED: WeakKeyDictionary[Any, ArchSpec] = WeakKeyDictionary()


def _spec_by_structure(model: Any) -> ArchSpec:
    if model not in _DETECTED:
        from kedit.models.detect import detect

        _DETECTED[model] = spec = detect(model)
        logger.info(
            "Its blocks are %s, its down-projections %s: found by structure, and verified.", spec.blocks, spec.down
        )
    return _DETECTED[model]
