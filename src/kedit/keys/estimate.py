"""Estimating second moments from text: one pass for all layers, cached by content."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kedit.errors import ConfigError
from kedit.keys.corpus import Corpus, as_corpus
from kedit.keys.second_moment import RIDGE, Accumulator, ExpertsAccumulator, Moment, SecondMoments
from kedit.keys.settling import Settling, shuffled
from kedit.models import ModelArch
from kedit.models.compute_copy import compute_dtype as dtype_for
from kedit.models.compute_copy import copy_in
from kedit.models.fingerprint import model_fingerprint
from kedit.models.hooks import StopForward, by_prompt, inference_state, on_arguments, on_input, stops_early
from kedit.models.lock import editing
from kedit.prompts.tokenize import context_limit, pad
from kedit.utils.distributed import Group, current_group
from kedit.utils.progress import Progress, logger

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENS_PER_BATCH = 8_192
KEYS_PER_DIMENSION = 50
MAX_PIECE = 1_024  # tokens; longer documents are cut, for memory
CHECKPOINT_SECONDS = 60.0
VERSION = 1  # of what is computed: raise it when cached results no longer hold


def estimate_moments(
    arch: ModelArch,
    tokenizer: PreTrainedTokenizerBase,
    layers: Sequence[int],
    corpus: Corpus | Iterable[str] | str | Path | None = None,
    *,
    tokens: int | None = None,
    ridge: float = RIDGE,
    cache: bool = True,
    compute_dtype: str | None = None,
    tolerance: float | None = None,
) -> SecondMoments:
    """Second moments of some layers' keys over a corpus, or over the model's default corpus.

    One pass serves all layers and ends at the highest. The result is cached under the hash of the model's weights, the
    tokenizer, the corpus, the number of tokens and the layer (folder: ``KEDIT_CACHE``, or ``~/.cache/kedit``).

    Args:
        arch: the model.
        tokenizer: its tokenizer.
        layers: whose down-projection inputs are wanted.
        corpus: texts, a text or JSONL file, or ``None`` for the default.
        tokens: how many keys to see; 50 per dimension by default, or what the corpus has.
        ridge: added to the diagonal, relative to its mean.
        cache: read and write the cache.
        compute_dtype: of the forward passes, by :func:`kedit.models.compute_copy.compute_dtype`; another one than the model's runs
            on a copy of the model. The sums stay in float32 (float64 for a float64 model).
        tolerance: read the texts in a random order (seeded), and stop before ``tokens`` where reading twice as much changed the
            direction C⁻¹k of ordinary keys by less than this share (the median of 64 keys, in every layer); 0.5 takes
            about 20 keys per dimension. ``None``: read all, as do layers of a mixture of experts, and several processes.

    Raises:
        ConfigError: there is no default corpus for this model, or the corpus is empty; a number is out of range.
        NonFiniteError: the model's keys are NaN or infinite.
    """
    if tokens is not None and tokens < 1:
        raise ConfigError(f"tokens must be at least 1, not {tokens!r}.")
    if not 0 <= ridge < float("inf"):
        raise ConfigError(f"ridge must be a finite number of at least 0, not {ridge!r}.")
    if tolerance is not None and not 0 < tolerance < float("inf"):
        raise ConfigError(f"tolerance must be a positive number or None, not {tolerance!r}.")
    wanted = sorted({arch.check_layer(layer) for layer in layers})
    texts = as_corpus(corpus, arch.model)
    budget = tokens if tokens is not None else KEYS_PER_DIMENSION * max(map(arch.memory_width, wanted))
    dtype = dtype_for(arch, compute_dtype)
    group = current_group()
    if group.size > 1 or any(arch.experts(layer) is not None for layer in wanted):
        tolerance = None
    paths: dict[int, Path] = {}
    if cache and texts.key:
        paths = _cache_paths(arch, tokenizer, texts, budget, ridge, wanted, dtype, tolerance)
    moments = {layer: moment for layer, path in paths.items() if (moment := _read(path)) is not None}
    missing = sorted({layer for each in group.gather([i for i in wanted if i not in moments]) for layer in each})
    if missing:
        logger.info("Second moments of layers %s from %s tokens of %s.", missing, f"{budget:,}", texts.name)
        checkpoint = _checkpoint_path([paths[layer] for layer in missing], group) if paths else None
        running = _running_in(arch, dtype)
        settling = None
        if tolerance is not None:  # short enough to begin again after an interruption
            settling, checkpoint = Settling(tolerance, max(map(arch.memory_width, missing)), ridge), None
        for layer, accumulator in accumulate(running, tokenizer, missing, texts, budget, checkpoint, settling).items():
            made = accumulator.moment(layer, ridge)
            moments[layer] = replace(made, matrix=made.matrix.cpu())  # as one that is read from the cache
            if layer in paths and group.leads:
                _write(paths[layer], moments[layer])
        if checkpoint is not None:
            with suppress(OSError):
                checkpoint.unlink(missing_ok=True)
    for layer, moment in moments.items():
        moment.warn_if_scarce(layer)
    return SecondMoments(moments)


def _running_in(arch: ModelArch, dtype: torch.dtype) -> ModelArch:
    """The model, or a copy of it in ``dtype``."""
    if dtype == arch.dtype:
        return arch
    with editing(arch.model):  # no other thread changes weights meanwhile
        return copy_in(arch, dtype, backward=False) or arch


def accumulate(
    arch: ModelArch,
    tokenizer: PreTrainedTokenizerBase,
    layers: Sequence[int],
    texts: Iterable[str],
    budget: int,
    checkpoint: Path | None = None,
    settling: Settling | None = None,
) -> dict[int, Accumulator]:
    """Run ``budget`` tokens of ``texts`` up to the highest layer and sum k kᵀ of every layer.

    With a ``checkpoint`` the sums are kept there every minute and when interrupted; the next call goes on from them
    with the same result. Of several processes each runs its share of the batches, and all return the sums of all.
    With ``settling`` the texts are read in a random order, and not on when it finds the sums good enough.
    """
    group = current_group()
    sums: dict[int, Accumulator] = {}
    for layer in layers:
        experts = arch.experts(layer)
        if experts is None:
            sums[layer] = Accumulator(arch.memory_width(layer), arch.device(layer), arch.work_dtype)
        else:
            sums[layer] = ExpertsAccumulator(experts, arch.device(layer), arch.work_dtype)
        sums[layer].first = group.rank % 2
    device = arch.input_device
    top = max(layers)
    done, seen, told = _resume(checkpoint, sums), 0, False
    started = saved = time.monotonic()
    with (
        editing(arch.model),
        inference_state(arch.model),
        torch.no_grad(),
        Progress(budget, "second moments", "token") as bar,
    ):
        limit = context_limit(arch.model)
        if settling is None:
            batches = _batches(tokenizer, texts, budget, limit)
        else:  # rows of similar length among few, so that the first batches hold all lengths
            batches = _batches(tokenizer, shuffled(texts), budget, limit, together=1)
        for number, rows in enumerate(batches):
            ids, mask = pad(rows)
            if number < done or number % group.size != group.rank:
                seen += int(mask.sum())
                bar.advance(int(mask.sum()))
                continue
            real = mask.bool().to(device)

            def collect(*seen: Tensor, layer: int, real: Tensor = real) -> None:
                tokens = [by_prompt(tensor, len(real))[real.to(tensor.device)] for tensor in seen]
                total = sums[layer]
                if isinstance(total, ExpertsAccumulator):
                    total.route(*tokens)
                else:
                    total.add(*tokens)
                    if settling is not None:
                        settling.see(layer, *tokens)
                if layer == top:
                    raise StopForward

            with _kept_on_interrupt(checkpoint, sums, number), _reading(arch, layers, collect), stops_early():
                arch.model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)
            if checkpoint is not None and time.monotonic() - saved > CHECKPOINT_SECONDS:
                _keep(checkpoint, sums, number + 1)
                saved = time.monotonic()
            if not told and (left := (time.monotonic() - started) * budget / int(mask.sum()) / group.size) > 10:
                logger.info("This takes about %.0f s.", left)
            told = True
            seen += int(mask.sum())
            bar.advance(int(mask.sum()))
            if settling is not None and settling.reached(sums, seen):
                logger.info("%s tokens are enough; %s were allowed.", f"{seen:,}", f"{budget:,}")
                return sums
    if seen == 0:
        raise ConfigError("The corpus for the second moments holds no text.")
    if seen < budget:
        logger.info("The corpus ended after %s of %s tokens.", f"{seen:,}", f"{budget:,}")
    if group.size > 1:
        for total in sums.values():
            total.restore({name: group.sum(part) for name, part in total.state().items()})
    return sums


@contextmanager
def _kept_on_interrupt(checkpoint: Path | None, sums: dict[int, Accumulator], done: int) -> Iterator[None]:
    """Keep the sums of the first ``done`` batches where Ctrl-C ends the pass over the next one."""
    before = {layer: total.counts.copy() for layer, total in sums.items()}
    try:
        yield
    except KeyboardInterrupt:
        # A batch that some layers have summed already would count twice.
        if checkpoint is not None and all(total.counts == before[layer] for layer, total in sums.items()):
            _keep(checkpoint, sums, done)
        raise


def _checkpoint_path(paths: Sequence[Path], group: Group) -> Path:
    digest = hashlib.sha256("".join(path.name for path in paths).encode()).hexdigest()
    part = f".{group.rank}-of-{group.size}" if group.size > 1 else ""
    return paths[0].with_name(f"{digest}{part}.partial.safetensors")


def _keep(path: Path, sums: dict[int, Accumulator], done: int) -> None:
    tensors = {f"{layer}.{key}": t.cpu().clone() for layer, total in sums.items() for key, t in total.state().items()}
    _save(path, tensors, {"batches": str(done)})


def _resume(path: Path | None, sums: dict[int, Accumulator]) -> int:
    """Restore the sums of an interrupted pass; the number of batches that they hold."""
    if path is None or not path.exists():
        return 0
    try:
        with safe_open(str(path), framework="pt") as file:
            done = int((file.metadata() or {})["batches"])
            states = {i: {k: file.get_tensor(f"{i}.{k}") for k in ("total", "sketches", "counts")} for i in sums}
        for layer, total in sums.items():
            total.restore(states[layer])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        logger.warning("The interrupted estimate %s cannot be continued (%s); it begins again.", path, error)
        return 0
    logger.info("Continuing an interrupted estimate after %d batches.", done)
    return done


@contextmanager
def _reading(arch: ModelArch, layers: Sequence[int], collect: Callable[..., None]) -> Iterator[None]:
    with ExitStack() as stack:
        for layer in layers:
            experts, function = arch.experts(layer), partial(collect, layer=layer)
            place = on_input(arch.down(layer), function) if experts is None else on_arguments(experts.module, function)
            stack.enter_context(place)
        yield


def _batches(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], budget: int, limit: int | None, together: int = 4
) -> Iterator[list[list[int]]]:
    """Token rows of similar length, among so many batches, in batches; ``budget`` tokens in all, long documents in pieces.

    Two rows make two batches at least, so that there are halves to compare.
    """
    longest = min(limit or MAX_PIECE, MAX_PIECE)
    buffer: list[list[int]] = []
    buffered, first = 0, True
    for text in texts:
        ids = tokenizer(text, verbose=False)["input_ids"]
        for start in range(0, len(ids), longest):
            piece = ids[start : start + min(longest, budget)]
            if not piece:
                break
            buffer.append(piece)
            buffered += len(piece)
            budget -= len(piece)
        if buffered >= together * TOKENS_PER_BATCH or budget <= 0:
            yield from _by_length(buffer, halve=first)
            buffer, buffered, first = [], 0, False
        if budget <= 0:
            return
    yield from _by_length(buffer, halve=first)


def _by_length(rows: list[list[int]], *, halve: bool) -> Iterator[list[list[int]]]:
    batch: list[list[int]] = []
    rows = sorted(rows, key=len, reverse=True)
    if halve and rows and len(rows[0]) * len(rows) <= TOKENS_PER_BATCH:
        yield from (part for part in (rows[::2], rows[1::2]) if part)
        return
    for row in rows:
        if batch and len(batch[0]) * (len(batch) + 1) > TOKENS_PER_BATCH:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def cache_folder() -> Path:
    """Return the folder in which kedit keeps what is costly to compute: ``KEDIT_CACHE``, or ``~/.cache/kedit``."""
    return Path(os.environ.get("KEDIT_CACHE") or Path.home() / ".cache" / "kedit")


def _cache_paths(
    arch: ModelArch,
    tokenizer: PreTrainedTokenizerBase,
    texts: Corpus,
    budget: int,
    ridge: float,
    layers: Sequence[int],
    dtype: torch.dtype,
    tolerance: float | None = None,
) -> dict[int, Path]:
    parts = [VERSION, model_fingerprint(arch.model), tokenizer_fingerprint(tokenizer), texts.key, budget, ridge]
    if dtype != arch.dtype:
        parts.append(str(dtype))
    if tolerance is not None:
        parts.append(f"tolerance {float(tolerance)}")
    paths = {}
    for layer in layers:
        content = json.dumps([*parts, layer])
        digest = hashlib.sha256(content.encode()).hexdigest()
        paths[layer] = cache_folder() / "moments" / f"{digest}.safetensors"
    return paths


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what turns text into tokens."""
    backend: dict[str, Any] = {"vocabulary": tokenizer.get_vocab()}
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        del backend["padding"], backend["truncation"]  # the state that the last call left behind
    return hashlib.sha256(json.dumps(backend, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> Moment | None:
    """A cached moment; ``None`` where there is none or the file is damaged (it is then made anew)."""
    if not path.exists():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            statistics: dict[str, Any] = json.loads((file.metadata() or {})["figures"])
            matrix = file.get_tensor("moment").clone()
            if not torch.isfinite(matrix).all():
                raise ValueError("it holds NaN or infinite numbers")
            return Moment(matrix, **statistics)
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        logger.warning("The cached second moment %s is damaged (%s); it is computed again.", path, error)
        return None


def _write(path: Path, moment: Moment) -> None:
    _save(path, {"moment": moment.matrix.contiguous().cpu()}, {"figures": json.dumps(moment.statistics())})


def _save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a file as a whole or not at all; a cache that cannot be written is only worth a warning."""
    partial_path = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial_path, metadata=metadata)
        partial_path.replace(path)
    except (OSError, SafetensorError) as error:
        logger.warning("The second moment could not be kept in %s: %s.", path, error)
    finally:
        with suppress(OSError):
            partial_path.unlink(missing_ok=True)


def second_moments(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layers: Sequence[int],
    corpus: Corpus | Iterable[str] | str | Path | None = None,
    **options: Any,
) -> SecondMoments:
    """Second moments for an editor: ``kedit.ROME(model, tok, moments=kedit.second_moments(model, tok, [5], "text.txt"))``.

    Arguments as of :func:`estimate_moments`.
    """
    return estimate_moments(ModelArch(model), tokenizer, layers, corpus, **options)
