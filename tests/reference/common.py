"""The plain pieces of the reference: prompts as token ids, module getters, one forward pass with δ added.

The reference restates the methods from their equations, to check the engine against. It shares no code with kedit.
It is slow on purpose: one prompt at a time, whole prompts, no padding, no cache, every matrix in full.

Letters: H hidden size, I input and O output of the down-projection (O = H), A heads, T tokens, V vocabulary.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Prompt:
    """A prompt and, behind it, all tokens of the target but the last: what is fed to the model.

    Conventions: the subject that counts is the one in the request's own prompt, not one inside a context; the
    target gets one space in front and its tokens are all that stand behind the prompt (where the space is a token
    of its own, it is the target's first); a BOS token, if the tokenizer adds one, stays in front and is no target.
    """

    ids: list[int]
    subject_last: int  # position of the subject's last token: δ is added and keys are read here
    last: int  # position of the last token before the target: its logits predict the first target token
    targets: list[int]  # all tokens of the target


@dataclass(frozen=True)
class Request:
    """One edit, laid out."""

    rewriting: list[Prompt]  # one per context; the first is the bare prompt
    kl: Prompt  # "{subject} is a", without target or context


def lay_out(tokenizer, text: str, subject_span: tuple[int, int], target: str | None) -> Prompt:
    """Encode a prompt and its target in one go, and find the positions from character offsets."""
    full = text if target is None else text + " " + target.strip()
    encoded = tokenizer(full, return_offsets_mapping=True)
    spans = encoded["offset_mapping"]
    begin, end = subject_span
    subject = [i for i, (a, b) in enumerate(spans) if a < end and b > begin and b > a]
    behind = [i for i, (_, b) in enumerate(spans) if b > len(text)]
    first = behind[0] if behind else len(spans)
    assert not behind or spans[first][0] >= len(text), "a token crosses from the prompt into the target"
    ids = list(encoded["input_ids"])
    fed = ids[:-1] if target is not None else ids
    return Prompt(fed, subject[-1], first - 1, ids[first:])


def request(tokenizer, prompt: str, subject: str, target: str, contexts: list[str]) -> Request:
    """Lay out an edit: every context around the prompt, and the KL prompt."""
    before, _ = prompt.split("{}")
    rewriting = []
    for context in contexts:
        prefix, suffix = context.split("{}")
        text = prefix + prompt.replace("{}", subject) + suffix
        begin = len(prefix) + len(before)
        rewriting.append(lay_out(tokenizer, text, (begin, begin + len(subject)), target))
    return Request(rewriting, lay_out(tokenizer, f"{subject} is a", (0, len(subject)), None))


@dataclass(frozen=True)
class Getters:
    """Accessors for the modules of a model type."""

    blocks: Callable[[nn.Module], nn.ModuleList]
    attention_out: Callable[[nn.Module], nn.Module]  # of a block: the attention's output projection
    down: Callable[[nn.Module], nn.Module]  # of a block: the MLP's down-projection
    transposed: bool = False  # the weight is stored as [I, O] (Conv1D)


_LLAMA = Getters(lambda m: m.model.layers, lambda b: b.self_attn.o_proj, lambda b: b.mlp.down_proj)
GETTERS = {
    "gpt2": Getters(lambda m: m.transformer.h, lambda b: b.attn.c_proj, lambda b: b.mlp.c_proj, transposed=True),
    "gptj": Getters(lambda m: m.transformer.h, lambda b: b.attn.out_proj, lambda b: b.mlp.fc_out),
    "gpt_neox": Getters(lambda m: m.gpt_neox.layers, lambda b: b.attention.dense, lambda b: b.mlp.dense_4h_to_h),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
}


def block(model, layer: int) -> nn.Module:
    return GETTERS[model.config.model_type].blocks(model)[layer]


def down(model, layer: int) -> nn.Module:
    return GETTERS[model.config.model_type].down(block(model, layer))


def attention_out(model, layer: int) -> nn.Module:
    return GETTERS[model.config.model_type].attention_out(block(model, layer))


def weight(model, layer: int) -> Tensor:
    """Give the down-projection's weight as [O, I]; a view, whatever the stored layout."""
    stored = down(model, layer).weight
    return stored.T if GETTERS[model.config.model_type].transposed else stored


@contextlib.contextmanager
def added(module: nn.Module, position: int, delta: Tensor) -> Iterator[None]:
    """Add δ to a module's output at one position."""

    def hook(_module, _inputs, output):
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = hidden.clone()
        tokens = hidden if hidden.ndim == 2 else hidden[0]  # OPT's MLP works on all tokens in one row
        tokens[position] = tokens[position] + delta
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def eager(model) -> Iterator[None]:
    """Use eager attention, which can hand out its rows."""
    before = model.config._attn_implementation
    if before != "eager":
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        if before != "eager":
            model.set_attn_implementation(before)


@dataclass(frozen=True)
class Pass:
    """Outputs of one forward pass."""

    logits: Tensor  # [T, V]
    attentions: list[Tensor]  # per block: [A, T, T]


def forward(model, prompt: Prompt, deltas: dict[nn.Module, Tensor]) -> Pass:
    """Run one prompt, with δ added to each given module's output at the subject's last token."""
    with contextlib.ExitStack() as stack:
        for module, delta in deltas.items():
            stack.enter_context(added(module, prompt.subject_last, delta))
        output = model(torch.tensor([prompt.ids]), output_attentions=True, use_cache=False)
    return Pass(output.logits[0], [rows[0] for rows in output.attentions])


def read(model, prompt: Prompt, module: nn.Module) -> tuple[Tensor | None, Tensor]:
    """Give a module's input and output at the subject's last token."""
    seen = {}

    def hook(_module, inputs, output):
        hidden = output[0] if isinstance(output, tuple) else output
        seen["input"] = inputs[0][0, prompt.subject_last].detach().clone() if inputs else None
        seen["output"] = hidden[0, prompt.subject_last].detach().clone()

    handle = module.register_forward_hook(hook)
    try:
        with torch.no_grad():
            model(torch.tensor([prompt.ids]), use_cache=False)
    finally:
        handle.remove()
    return seen["input"], seen["output"]


@contextlib.contextmanager
def weights_kept(model, layers: list[int]) -> Iterator[None]:
    """Restore the down-projections of these layers on leaving."""
    kept = {layer: down(model, layer).weight.detach().clone() for layer in layers}
    try:
        yield
    finally:
        with torch.no_grad():
            for layer, original in kept.items():
                down(model, layer).weight.copy_(original)
