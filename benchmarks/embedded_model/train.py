"""Training of the embedded model: ``python benchmarks/embedded_model/train.py --out DIR --seed 0``.

Plain training gives a model that recalls every fact and cannot be edited: its last position reads the raw name in the first
block and looks the fact up itself. So names are hidden during training: per row a depth is drawn, up to which no position
outside a mention of a name sees any of it; above, in most rows, it sees only the mention's last token, which must then carry
the subject as it does in large models. The model is used without any mask.

The shipped weights were made by the two stages of the default recipe, run as two programs with the weights rounded to
bfloat16 in between: 13.5 and 3.7 minutes on one core without matrix units for bfloat16. Measured on them: every wording of
every relation is recalled for at least 99% of the people, and the hidden state at the subject's last token hands the facts of
another person over in at least 90% of cases after the first two blocks, in none after the last.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from invent import invent
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from training_rows import END, Batch, Rows, block_masks, build_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from kedit.embedded.world import World


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Hyper-parameters of the training.

    Attributes:
        steps: optimiser steps.
        batch: rows per step.
        length: tokens per row.
        first_people: how many people the first ``first_steps`` steps are about. Attention learns to carry a name on few
            people in a fraction of the steps that it takes on all.
        first_steps: see there.
        lr: highest step size; it rises over ``warmup`` steps and falls along a cosine to 2%.
        warmup: see ``lr``.
        polish_steps: steps of the second stage, with a fresh optimiser.
        polish_lr: its highest step size.
        weight_decay: of AdamW.
        depths: last block in which names are hidden from the rest of the row; drawn per row, -1 hides nothing.
        last_only: share of rows in which later blocks see only a name's last token.
        positions: longest text of the model; a third of the rows start somewhere in it, the others at 0.
    """

    steps: int = 1_500
    batch: int = 32
    length: int = 64
    first_people: int = 40
    first_steps: int = 250
    lr: float = 3e-3
    warmup: int = 60
    polish_steps: int = 420
    polish_lr: float = 1.2e-3
    weight_decay: float = 0.02
    depths: tuple[int, ...] = (-1, 1, 2, 2)
    last_only: float = 0.7
    positions: int = 128


def build_model(tokenizer: Tokenizer, recipe: Recipe, seed: int) -> GPT2LMHeadModel:
    """An untrained model. Its position embeddings start as small sinusoids, so that distances mean the same anywhere."""
    end = tokenizer.token_to_id(END)
    config = GPT2Config(
        vocab_size=tokenizer.get_vocab_size(),
        n_positions=recipe.positions,
        n_embd=128,
        n_layer=6,
        n_head=8,
        n_inner=1024,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=end,
        eos_token_id=end,
    )
    config._attn_implementation = "eager"  # on a CPU quicker than the fused kernels at this length
    config.kedit_testbed = True
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config)
    rate = 10_000 ** (-torch.arange(0, config.n_embd, 2) / config.n_embd)
    angle = torch.arange(recipe.positions)[:, None] * rate
    with torch.no_grad():
        model.transformer.wpe.weight.copy_(0.03 * torch.cat((angle.sin(), angle.cos()), dim=1))
    return model


def _blocks(model: GPT2LMHeadModel) -> Any:
    return model.transformer.h


@contextmanager
def masked(model: GPT2LMHeadModel, masks: Sequence[Tensor]) -> Iterator[None]:
    """Give every block its own attention mask, [B, 1, T, T] each."""

    def replace(mask: Tensor) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            return args, {**kwargs, "attention_mask": mask}

        return hook

    handles = [
        block.attn.register_forward_pre_hook(replace(mask), with_kwargs=True)
        for block, mask in zip(_blocks(model), masks, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def train(world: World, tokenizer: Tokenizer, recipe: Recipe, seed: int) -> GPT2LMHeadModel:
    """Train a model on the world's text: the main stage, and a short one at a lower rate that fixes the last facts."""
    model = build_model(tokenizer, recipe, seed)
    model.train()
    few = Rows(world, tokenizer, length=recipe.length, seed=seed, people=recipe.first_people).batches(recipe.batch)
    main = _Stage(recipe.steps, recipe.lr, recipe.warmup, seed)
    _run(model, world, tokenizer, recipe, main, few)
    if recipe.polish_steps:
        _run(model, world, tokenizer, recipe, _Stage(recipe.polish_steps, recipe.polish_lr, 15, seed + 1), None)
    model.eval()
    return model


@dataclass(frozen=True)
class _Stage:
    """A stretch of training with an optimiser and a cosine of its own."""

    steps: int
    lr: float
    warmup: int
    seed: int


def _run(
    model: GPT2LMHeadModel,
    world: World,
    tokenizer: Tokenizer,
    recipe: Recipe,
    stage: _Stage,
    few: Iterator[Batch] | None,
) -> None:
    adam = torch.optim.AdamW(
        model.parameters(), lr=stage.lr, betas=(0.9, 0.98), weight_decay=recipe.weight_decay, fused=True
    )
    generator = torch.Generator().manual_seed(stage.seed)
    everybody = Rows(world, tokenizer, length=recipe.length, seed=stage.seed).batches(recipe.batch)
    bar = tqdm(range(stage.steps), desc="training", unit="step", disable=None)
    for step in bar:
        batch = next(few if few is not None and step < recipe.first_steps else everybody)
        loss, answers = _loss(model, batch, recipe, generator)
        model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.param_groups[0]["lr"] = _rate(step, stage) * stage.lr
        adam.step()
        if step % 10 == 0:
            bar.set_postfix(answers=f"{answers:.3f}")


def _rate(step: int, stage: _Stage) -> float:
    if step < stage.warmup:
        return (step + 1) / stage.warmup
    share = torch.tensor((step - stage.warmup) / max(1, stage.steps - stage.warmup))
    return 0.02 + 0.98 * 0.5 * (1 + torch.cos(torch.pi * share).item())


def _loss(model: GPT2LMHeadModel, batch: Batch, recipe: Recipe, generator: torch.Generator) -> tuple[Tensor, float]:
    """The weighted loss of a batch under freshly drawn masks, and the mean loss of the answers alone."""
    rows, length = batch.ids.shape
    depth = torch.tensor(recipe.depths)[torch.randint(len(recipe.depths), (rows,), generator=generator)]
    last_only = torch.rand(rows, generator=generator) < recipe.last_only
    start = torch.randint(recipe.positions - length + 1, (rows,), generator=generator)
    start *= torch.rand(rows, generator=generator) < 1 / 3
    masks = block_masks(batch, depth, last_only, model.config.n_layer)
    bf16 = bool(torch.cpu.get_capabilities().get("avx512_bf16", False))
    with masked(model, masks), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(batch.ids, position_ids=start[:, None] + torch.arange(length), use_cache=False).logits
    losses = cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch.ids[:, 1:].flatten(), reduction="none")
    weight = batch.weight[:, 1:].flatten()
    answers = losses.detach()[weight == 1].mean().item()
    return (losses * weight).sum() / weight.sum(), answers


def save(model: GPT2LMHeadModel, tokenizer: Tokenizer, world: World, folder: Path) -> None:
    """Write weights in bfloat16, tokenizer and world."""
    folder.mkdir(parents=True, exist_ok=True)
    nn.Module.to(model, dtype=torch.bfloat16)  # in place
    model.save_pretrained(folder)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=model.config.n_positions,
        model_input_names=["input_ids", "attention_mask"],
    )
    wrapped.save_pretrained(folder)
    world.save(folder / "world.json")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the embedded model.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the model goes")
    parser.add_argument("--seed", type=int, default=0, help="of the world, the initial weights and the training rows")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="optimiser steps")
    options = parser.parse_args(argv)
    world = invent(options.seed)
    tokenizer = build_tokenizer(world)
    polish = Recipe.polish_steps if options.steps == Recipe.steps else 0
    model = train(world, tokenizer, Recipe(steps=options.steps, polish_steps=polish), options.seed)
    save(model, tokenizer, world, options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
