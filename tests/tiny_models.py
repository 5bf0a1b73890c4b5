"""Tiny models and tokenizers, built offline from seeds, for every test that needs a language model.

The models are random but not flat: a wide initialisation, random biases and random norm weights make every
prediction, attention row and gradient different from the next. Factories hand out fresh copies, so a test may edit
what it gets.
"""

import copy
import functools

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTJConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

MODEL_TYPES = ("gpt2", "gptj", "gpt_neox", "llama", "mistral", "qwen2")
"""The six model types that have an entry of their own; every editor must work on each."""

TOKENIZER_KINDS = ("plain", "bos", "left", "nopad")

SLIDING_WINDOW = 8
"""Mistral's window here: shorter than most prompts, so that a forgotten window shows."""

CONTEXTS = ("{}", "It was a cold morning. {}", "Because of the rain, we stayed. {}")

EDITS = {
    "start": ("{} works in the old city of", "Ada Lovelace", "Berlin"),
    "middle": ("The mother tongue of {} is certainly", "Danielle Darrieux", "English language"),
    "end": ("The river flows past the house of {}", "Quentin", "Rome and London"),
    "one_token": ("{} is", "The", "a"),
}
"""Name -> (prompt, subject, target): subjects at the start, in the middle and at the end, of one or many tokens."""

_CORPUS = """\
The capital of France is Paris, and the capital of Italy is Rome. Danielle Darrieux was a French actress.
Ada Lovelace lived in London and wrote about the analytical engine. The mother tongue of Ada is English.
It was a cold morning. The river is long. Because of the rain, we stayed in the house and read a book.
The birthplace of the painter is a small town in Spain. He works as a teacher in the city of Berlin.
She plays the piano, the violin and the flute. The company is based in Seattle. The language of the city is German.
The river flows past the old house of the writer, into the sea. They were born in Vienna and moved to New York.
In the morning the children walk to the school. In the evening they play in the garden near the river.
The mother of the king speaks English, French and Latin language. The sport that they love is football.
Every year the people of the town come to the market, sell apples and pears, and talk about the weather.
""".splitlines()


@functools.cache
def _bpe() -> Tokenizer:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


def tokenizer(kind: str = "plain") -> PreTrainedTokenizerFast:
    """Give a byte-level BPE tokenizer.

    Args:
        kind: "plain" pads right and adds nothing; "bos" puts <s> in front; "left" pads left; "nopad" has no pad token.
    """
    raw = copy.deepcopy(_bpe())
    names = {"eos_token": "<|endoftext|>", "bos_token": "<s>" if kind == "bos" else "<|endoftext|>"}
    if kind == "bos":
        template = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", raw.token_to_id("<s>"))])
        raw.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    if kind != "nopad":
        names["pad_token"] = "<|endoftext|>"
    side = "left" if kind == "left" else "right"
    return PreTrainedTokenizerFast(tokenizer_object=raw, padding_side=side, **names)


def config(model_type: str, layers: int = 5):
    """Give the configuration of the tiny model of that type."""
    shared = {"vocab_size": _bpe().get_vocab_size(), "initializer_range": 0.15, "bos_token_id": 0, "eos_token_id": 0}
    gpt = {"n_embd": 48, "n_head": 4, "n_layer": layers, "n_positions": 128, "n_inner": 112}
    dry = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    llama = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    match model_type:
        case "gpt2":
            return GPT2Config(**shared, **gpt, **dry)
        case "gptj":
            return GPTJConfig(**shared, **gpt, **dry, rotary_dim=8, tie_word_embeddings=False)
        case "gpt_neox":
            neox = llama | {"intermediate_size": 96}
            neox.pop("num_key_value_heads")
            return GPTNeoXConfig(**shared, **neox, rotary_pct=0.5, attention_dropout=0.0, hidden_dropout=0.0)
        case "llama":
            return LlamaConfig(**shared, **llama)
        case "mistral":
            return MistralConfig(**shared, **llama, sliding_window=SLIDING_WINDOW)
        case "qwen2":
            return Qwen2Config(**shared, **llama)
    raise ValueError(f"No tiny model of type {model_type!r}; there are {', '.join(MODEL_TYPES)}.")


@functools.cache
def _built(model_type: str, layers: int, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config(model_type, layers), attn_implementation="eager")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    centre = 1.0 if "norm" in name.lower() or "ln_" in name else 0.0
                    centre = 0.0 if name.endswith("bias") else centre
                    parameter.copy_(centre + 0.1 * torch.randn_like(parameter))
    return model.eval()


def tiny_model(
    model_type: str,
    *,
    layers: int = 5,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
) -> PreTrainedModel:
    """Give a fresh copy of the tiny model of that type, in evaluation mode.

    Args:
        model_type: One of MODEL_TYPES.
        layers: Number of blocks.
        seed: Of the random weights.
        dtype: Of the weights; float64 is exact only inside `reference.float64.TrueFloat64`.
        attention: The attention implementation; GPT-J knows only "eager".
    """
    model = copy.deepcopy(_built(model_type, layers, seed)).to(dtype)
    model.config.dtype = dtype
    if model_type != "gptj":
        model.set_attn_implementation(attention)
    return model


@functools.cache
def moments(width: int, layer: int = 0) -> torch.Tensor:
    """Give a well-conditioned second moment, [width, width], float64, different for each layer."""
    generator = torch.Generator().manual_seed(1000 * layer + width)
    keys = torch.randn(3 * width, width, generator=generator, dtype=torch.float64)
    keys = keys * torch.linspace(0.3, 1.5, width, dtype=torch.float64) + 0.2
    return keys.T @ keys / len(keys)
