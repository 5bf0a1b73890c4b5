"""The search: one coordinate after the other, many candidates on few cases, the best of them on all."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from kedit.analysis import facts
from kedit.analysis.causal_tracing import trace
from kedit.analysis.results.tracing import ROLES
from kedit.bench.suite import fewer
from kedit.calibration.candidates import (
    Candidate,
    Gamma,
    clamp_candidates,
    gamma_candidates,
    layer_candidates,
    stages_of,
    threshold_candidates,
    weight_candidates,
    with_changes,
)
from kedit.calibration.cases import development_cases
from kedit.calibration.choice import ranked
from kedit.calibration.names import STAGES
from kedit.calibration.result import Calibration
from kedit.calibration.stage import Row, Stage
from kedit.calibration.trials import Trials
from kedit.editors import editor_class, presets
from kedit.editors.value_editor import ValueEditor
from kedit.errors import ConfigError, EditError
from kedit.evaluation import EditCase, EvalReport
from kedit.evaluation.journal import make_folder
from kedit.evaluation.provenance import describe_model, digest, environment, versions
from kedit.keys.corpus import Corpus, as_corpus
from kedit.keys.estimate import cache_folder, estimate_moments
from kedit.models import ModelArch
from kedit.models.fingerprint import model_fingerprint
from kedit.models.hooks import inference_state
from kedit.models.lock import holding_model
from kedit.patch.ledger import Ledger
from kedit.regularizers import Regularizer, make, takes_gamma
from kedit.utils.files import write_text
from kedit.utils.progress import Progress, logger
from kedit.utils.validation import check_choice, check_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CASES, QUICK_CASES = 36, 12
CONTEXTS = 5
TRACED, SAMPLES = 4, 4
THIRD = 3  # all candidates edit one in so many of the cases, and one in so many candidates the others
LEAST = 3
BLOCK = 6  # cases that are kept together: a later call with more cases finds them again


@holding_model
def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cases: Sequence[EditCase],
    editor: str = "rome",
    *,
    regularizer: str | None = None,
    search: Sequence[str] | None = None,
    preset: str | Path | None = None,
    number: int | None = None,
    check: int | None = None,
    quick: bool = False,
    traced: bool = True,
    exclude: Collection[str] = (),
    corpus: Corpus | Iterable[str] | str | Path | None = None,
    contexts: int = CONTEXTS,
    work: str | Path | None = None,
    seed: int = 0,
    compute_dtype: str | None = "auto",
) -> Calibration:
    """Choose an editor's hyper-parameters for a model by edits of development cases; the model is unedited afterwards.

    Coordinate by coordinate (:data:`~kedit.calibration.names.STAGES`), every candidate edits a third of the cases, each
    alone on the unedited model; the best third of the candidates, and the present value, edit the others too.
    :data:`kedit.calibration.choice.RULE` says what is best.
    Every finished part is kept in ``work``, so that an interrupted call goes on when it is repeated, and one with more cases too.

    Args:
        model: a causal language model, unedited.
        tokenizer: its tokenizer.
        cases: facts with probes: paraphrases, and neighbours or other relations, or both. Those that the model knows are used.
        editor: name of an editor that optimises a value.
        regularizer: name of one whose γ is chosen; ``None``: none.
        search: stages to run; all that the editor has by default.
        preset: file whose preset is the start; by default kedit's own for the model, or the rule where there is none.
        number: development cases; 36 by default, 12 with ``quick``.
        check: further cases, on which the choice is compared with the start in the end; half of ``number`` by default,
            none with ``quick``.
        quick: fewer cases and candidates, and no tracing.
        traced: whether to trace some of the facts, as evidence for the blocks.
        exclude: subjects to leave out.
        corpus: for the second moments; see :func:`kedit.second_moments`.
        contexts: how many of the editor's contexts the optimisation uses.
        work: folder for what is done; in kedit's cache folder by default.
        seed: of the choice of cases.
        compute_dtype: as of the editor.

    Raises:
        ConfigError: the editor optimises no value, the regularizer has no γ, a number is out of range, the model
            carries edits.
        EditError: there are no cases, the model knows none of them, or they ask nothing that must stay as it is.
    """
    number = (QUICK_CASES if quick else CASES) if number is None else number
    check = (0 if quick else number // 2) if check is None else check
    check_whole("number", number, LEAST)
    check_whole("check", check, 0)
    check_whole("contexts", contexts, 1)
    arch = ModelArch(model)
    if Ledger.of(arch.model).touched:
        raise ConfigError("The model carries edits, on which a calibration would build. Revert them first.")
    kind = _editor(editor)
    known = presets.read_one(preset, editor) if preset is not None else presets.built_in(editor, arch)
    start = Candidate(kind.Config.over(known.values if known else kind.rule(arch), {}))
    stages = _stages(start, kind, regularizer, search)
    usual, maker = _regularizer(regularizer, known)
    changes = presets.changes_for(known, [] if regularizer is None else [regularizer])
    texts = as_corpus(corpus, model)
    fingerprint = model_fingerprint(arch.model)
    folder = make_folder(work or cache_folder() / "calibration" / digest([fingerprint, editor]))
    chosen = development_cases(model, tokenizer, cases, number + check, exclude=exclude, seed=seed)
    development, held_out = _divide(chosen, number)
    effects = (
        _trace(model, tokenizer, development, folder, fingerprint)
        if traced and "layers" in stages and not quick
        else {}
    )
    best_traced = sorted(effects, key=lambda block: -effects[block])[:2]
    layers = layer_candidates(start, arch.num_layers, best_traced, quick=quick) if "layers" in stages else [start]
    moments = estimate_moments(
        arch,
        tokenizer,
        sorted({layer for candidate in layers for layer in candidate.config.layers}),
        texts,
        ridge=presets.ridge(arch),
        compute_dtype=compute_dtype,
    )
    maker_of: dict[str, Callable[[Candidate], list[Candidate]]] = {
        "layers": lambda now: layers,
        "clamp": partial(clamp_candidates, quick=quick),
        "moment_weight": partial(weight_candidates, name="moment_weight", quick=quick),
        "threshold": partial(threshold_candidates, quick=quick),
        "l2": partial(weight_candidates, name="l2", quick=quick),
        "gamma": lambda now: gamma_candidates(with_changes(now, changes), usual, quick=quick),
    }
    templates = fewer(kind(model, tokenizer, start.config, moments=moments).contexts, contexts)
    about = [versions(), fingerprint, editor, templates, texts.key, compute_dtype, seed]
    trials = Trials(model, tokenizer, kind, moments, templates, maker, folder, compute_dtype, digest(about))
    parts = _parts(development)
    counts = [len(maker_of[name](start)) for name in stages]
    edits = sum(map(partial(_edits, parts=parts), counts)) + 2 * len(held_out)
    logger.info(
        "%s: %d edits at most of %d development cases (%s).", editor, edits, len(development), ", ".join(stages)
    )
    now, done = start, []
    with Progress(edits, "calibrating", unit="edit") as progress:
        for name in stages:
            reference = now if name == "gamma" else None
            done.append(_run(name, maker_of[name](now), reference, parts, trials, effects, progress))
            now = done[-1].chosen
        pairs = [
            (trials.report(start, groups, progress), trials.report(now, groups, progress))
            for groups in ([parts] if not held_out else [parts, _parts(held_out)])
        ]
    meta = {
        "model": describe_model(model),
        "fingerprint": fingerprint,
        "environment": environment(),
        "corpus": Path(texts.name).name,
        "contexts": len(templates),
        "seed": seed,
        "quick": quick,
        "cases": len(development),
        "held_out": len(held_out),
        "traced": {str(block): effect for block, effect in effects.items()},
    }
    return Calibration(
        editor=editor,
        regularizer=regularizer,
        start=start,
        chosen=now,
        stages=tuple(done),
        development=pairs[0],
        held_out=pairs[1] if held_out else None,
        meta=meta,
        folder=folder,
        regularized={} if known is None else known.regularized,
    )


def _run(
    name: str,
    candidates: Sequence[Candidate],
    reference: Candidate | None,
    parts: Sequence[Sequence[EditCase]],
    trials: Trials,
    effects: Mapping[int, float],
    progress: Progress,
) -> Stage:
    """One stage: all candidates on a third of the cases, the best of them on all."""

    def reports(numbers: Iterable[int], upto: int) -> dict[int, EvalReport]:
        found = {}
        for number in numbers:
            progress.note(trying=candidates[number].label)
            found[number] = trials.report(candidates[number], parts[:upto], progress)
            logger.info("%s", Row.of(candidates[number], found[number]))
        return found

    few = math.ceil(len(parts) / THIRD)
    beside = None if reference is None else trials.report(reference, parts[:few], progress)
    first = reports(range(len(candidates)), few)
    order = ranked(first, beside, slack=True)
    last, best = first, order[0]
    if len(parts) > few and len(candidates) > 1:
        going_on = {0, *order[: max(2, round(len(candidates) / THIRD))]}
        beside = None if reference is None else trials.report(reference, parts, progress)
        last = reports(sorted(going_on), len(parts))
        best = ranked(last, beside)[0]
    rows = [Row.of(candidates[number], last.get(number, first[number])) for number in first]
    if effects and name == "layers":
        rows = [replace(row, effect=effects[row.value[-1]]) for row in rows]
    before = [] if reference is None or beside is None else [Row.of(reference, beside, "no regularizer")]
    logger.info("%s: %s.", name, candidates[best].label)
    return Stage(name, candidates[best], (*before, *rows), best + len(before))


def _edits(candidates: int, parts: Sequence[Sequence[EditCase]]) -> int:
    """Edits of a stage at most."""
    few, going_on = math.ceil(len(parts) / THIRD), max(2, round(candidates / THIRD)) + 1
    return candidates * sum(map(len, parts[:few])) + min(going_on, candidates) * sum(map(len, parts[few:]))


def _editor(name: str) -> type[ValueEditor]:
    kind = editor_class(name)
    if not issubclass(kind, ValueEditor):
        raise ConfigError(f"{kind.__name__} optimises no value, so it has nothing to calibrate. Choose another editor.")
    return kind


def _stages(
    start: Candidate, kind: type[ValueEditor], regularizer: str | None, search: Sequence[str] | None
) -> list[str]:
    for name in search or ():
        check_choice("search", name, STAGES)
    known = stages_of(start.config, regularizer is not None)
    stages = [name for name in known if search is None or name in search]
    if regularizer is not None and "gamma" not in stages:
        raise ConfigError(
            f"{regularizer} is named for its γ, which is not searched. Add gamma to the search, or drop it."
        )
    if not stages:
        raise ConfigError(
            f"{kind.__name__} has none of the stages {', '.join(search or ())} to search; it has {', '.join(known)}. The stage "
            "gamma needs a regularizer."
        )
    return stages


def _regularizer(
    name: str | None, preset: presets.Preset | None
) -> tuple[Gamma, Callable[[Gamma], Regularizer] | None]:
    """The γ that a regularizer has without a calibration, and what makes one with another γ."""
    if name is None:
        return "auto", None
    if not takes_gamma(name):
        raise ConfigError(f"The regularizer {name!r} has no gamma to choose. Give one that has.")
    usual: Gamma | None = getattr(presets.complete(preset, make(name)), "gamma", None)
    return ("auto" if usual is None else usual), lambda gamma: presets.complete(preset, make(name, gamma=gamma))


def _divide(cases: Sequence[EditCase], number: int) -> tuple[Sequence[EditCase], Sequence[EditCase]]:
    """Development cases, so many or all that there are, and those that are left for the check."""
    if len(cases) < LEAST:
        raise EditError(
            f"The model knows {len(cases)} of the facts, one per subject, and a calibration needs at least {LEAST}. Give more "
            "cases."
        )
    if len(cases) < number:
        logger.warning(
            "The model knows %d cases only, where %d were wanted; none is left for a check.", len(cases), number
        )
    return cases[:number], cases[number:]


def _parts(cases: Sequence[EditCase]) -> list[Sequence[EditCase]]:
    """The cases in blocks."""
    return [cases[start : start + BLOCK] for start in range(0, len(cases), BLOCK)]


def _trace(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    cases: Sequence[EditCase],
    folder: Path,
    fingerprint: str,
) -> dict[int, float]:
    """By block: the mean indirect effect of its MLP at the subject's last token, in points of probability; empty without any.

    Traced are the first facts whose answer is the model's first choice.
    """
    arch = ModelArch(model)
    with inference_state(model):
        keep = facts.known(arch, facts.as_facts(arch, tokenizer, cases))
    chosen = [case for case, knows in zip(cases, keep, strict=True) if knows][:TRACED]
    if not chosen:
        logger.info("The first choice of the model is another answer in all cases, so nothing is traced.")
        return {}
    path = folder / f"tracing-{digest([fingerprint, *(case.edit.to_dict() for case in chosen)])}.json"
    try:
        return {int(block): float(effect) for block, effect in json.loads(path.read_text(encoding="utf-8")).items()}
    except FileNotFoundError:
        pass
    except (OSError, ValueError, AttributeError) as error:
        logger.warning("%s is damaged (%s); the facts are traced again.", path, error)
    result = trace(model, tokenizer, chosen, kinds=("mlp",), samples=SAMPLES)
    if result.unfinished:
        raise KeyboardInterrupt
    means = result.average("mlp")[0][ROLES.index("subject last")]
    effects = {block: round(100 * float(effect), 2) for block, effect in enumerate(means)}
    write_text(path, json.dumps(effects))
    return effects
