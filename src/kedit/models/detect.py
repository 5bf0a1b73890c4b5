"""Finding the parts of a model whose type is unknown, by what its modules do.

Nothing is read from names. A short input is run once to see which modules pass hidden states on; then one block is run
again and again with a change put into one linear layer, to see whom it reaches:

- the *blocks* are the list of modules of which each takes what the one before gave;
- the attention's *output projection* is the first linear layer whose input, at a later token, changes with what an earlier
  layer of the block gave at an earlier token;
- the MLP's *down-projection* is the linear layer, with the width of the residual stream, that reaches no other linear layer
  of its block, and is not the former.

What is found is verified before it is used: nothing but these two may reach the block's output (no expert beside them),
and a change of the down-projection's output must reach it at its own token and nowhere else. Where it arrives as a fixed
multiple, that is the gain; where not, the block normalises it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kedit.errors import ArchitectureError
from kedit.models.architectures import ArchSpec
from kedit.models.hooks import evaluating
from kedit.models.offload import device_of
from kedit.models.probe import PLACE, Block, Call, chain, others, probe, put, refused, width_of

_LINEAR = 1e-3  # how far from a multiple of the change the answer may be


def detect(model: Any) -> ArchSpec:
    """Describe a causal language model by its structure.

    Raises:
        ArchitectureError: it is an encoder-decoder, keeps a recurrent state, has no blocks, has no down-projection or several,
            or the verification fails; the message says which.
    """
    config = getattr(model, "config", None)
    kind = str(getattr(config, "model_type", type(model).__name__))
    if getattr(config, "is_encoder_decoder", False):
        raise refused(kind, "it is an encoder-decoder, where no decoder-only prompt holds the fact")
    if getattr(model, "_is_stateful", False):
        raise refused(kind, _recurrent(config))
    names = {module: name for name, module in model.named_modules()}
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if output is None or not hasattr(model, "get_input_embeddings"):
        raise refused(kind, "it has no language-model head; pass the causal language model itself")
    if device_of(model.get_input_embeddings()).type == "meta":
        raise refused(kind, "its weights are not loaded, so it cannot be run to find its parts")
    try:
        with evaluating(model), torch.no_grad():
            calls, final_norm = chain(model, kind)
            _check_causal(model, kind)
            parts = Block(calls[0], kind).parts()
            spec = ArchSpec(
                blocks=names[calls.blocks],
                mlp=parts.down,
                down=parts.down,
                attention=parts.attention,
                attention_out=parts.attention_out,
                final_norm=names[final_norm],
                head=names[output],
            )
            return _verified(spec, calls, kind)
    except (AttributeError, IndexError, KeyError, RuntimeError, StopIteration, TypeError, ValueError) as error:
        if isinstance(error, ArchitectureError):
            raise
        raise refused(kind, f"its blocks do not run one by one ({type(error).__name__}: {error})") from error


def _check_causal(model: Any, kind: str) -> None:
    """Raise :class:`ArchitectureError` where what a token's place gives depends on the tokens behind it."""
    embeddings = model.get_input_embeddings()
    size = int(embeddings.weight.shape[0])
    ids = torch.arange(1, 7, device=device_of(embeddings))[None] % size
    other = ids.clone()
    other[0, -1] = (ids[0, -1] + size // 2) % size
    one, two = (
        model(input_ids=each, attention_mask=torch.ones_like(ids), use_cache=False).logits for each in (ids, other)
    )
    moved = (one - two)[:, :-1].float().abs().max()
    if float(moved) > 16 * torch.finfo(one.dtype).eps * float(one.float().abs().max()):
        raise refused(
            kind,
            "its tokens see those behind them, so it is no causal language model (BERT-like types: load it with is_decoder=True)",
        )


def _verified(spec: ArchSpec, calls: Sequence[Call], kind: str) -> ArchSpec:
    """The description with its gain, once a change at every block's down-projection is seen to arrive.

    Raises:
        ArchitectureError: a block lacks a part, or a change does not arrive at its token, or arrives elsewhere.
    """
    gains: list[float | None] = []
    for number, call in enumerate(calls):
        ends = []
        for path in (spec.down, spec.attention_out):
            try:
                linear = width_of(call.block.get_submodule(path))
            except AttributeError:
                linear = None
            if linear is None:
                raise refused(kind, _differs(call.block, number, path))
            ends.append(call.block.get_submodule(path))
        if extra := others(call, ends, spec.attention):
            raise refused(
                kind,
                f"several parts of block {number} beside its attention add to its output "
                f"({', '.join([*extra, spec.down])}), so which of them is the MLP's down-projection is not "
                "certain, as in mixtures with a shared expert or with inputs of their own for every layer (which need an entry)",
            )
        gains.append(_gain(call, ends[0], number, kind))
    known = [gain for gain in gains if gain is not None]
    if len(known) < len(gains):
        return replace(spec, normalised=True)
    if max(known) - min(known) > 2 * _tolerance(calls[0].output) * abs(known[0]):
        raise refused(kind, "its blocks multiply what their MLPs give by different factors")
    scale = sum(known) / len(known)
    return replace(spec, scale=1.0 if abs(scale - 1) < _tolerance(calls[0].output) else scale)


def _recurrent(config: Any) -> str:
    """Why a model with a recurrent state is refused: in all of its blocks, or in some."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    types = list(getattr(text, "layer_types", None) or ())
    without = sum(str(each) in ("linear_attention", "mamba", "recurrent") for each in types)
    if 0 < without < len(types):
        return (
            f"it is a hybrid: {without} of its {len(types)} blocks keep a recurrent state in the place of attention, "
            "and kedit's forward passes and its regularizers read attention in every block"
        )
    return "it keeps a recurrent state, so there is no attention from the prompt's end to the subject"


def _differs(block: nn.Module, number: int, path: str) -> str:
    """Why a block is refused that lacks a linear layer of block 0."""
    names = [name.rpartition(".")[2] for name, _ in block.named_modules()]
    if "experts" in names:
        shared = (
            ", with shared experts beside the routed ones"
            if any(name.startswith("shared_exp") for name in names)
            else ""
        )
        return (
            f"its blocks differ: block {number} is a mixture of experts{shared}, and block 0 is dense ({path}). "
            "Mixtures are edited where their type has an entry"
        )
    return f"its blocks differ: block {number} has no linear layer {path!r}, as block 0 has"


def _tolerance(like: Tensor) -> float:
    return max(_LINEAR, 16 * torch.finfo(like.dtype).eps)


def _gain(call: Call, down: nn.Module, number: int, kind: str) -> float | None:
    """By how much a change at ``down`` arrives at the block's output; ``None`` where it is no fixed multiple."""
    gains: list[float | None] = []
    base = call.again(lambda _stack: None).float()
    for seed, size in ((1, 1.0), (2, 0.5)):
        change = size * probe(base.shape[-1], call.output, seed)
        moved = call.again(lambda stack, change=change: put(stack, down, change)).float() - base  # type: ignore[misc]
        here = moved[0, PLACE].clone()
        moved[0, PLACE] = 0
        if not bool(here.any()):
            raise refused(
                kind, f"a change of the down-projection of block {number} does not arrive at the block's output"
            )
        if float(moved.abs().max()) > 1e-4 * float(here.abs().max()):
            raise refused(kind, f"a change of the down-projection of block {number} also arrives at other tokens")
        wanted = change.float()
        gain = float(here @ wanted / (wanted @ wanted))
        error = float((here - gain * wanted).norm() / here.norm())
        gains.append(gain if error < _tolerance(call.output) else None)
    first, second = gains
    if first is None or second is None or abs(first - second) > 2 * _tolerance(call.output) * abs(first):
        return None
    return (first + second) / 2
