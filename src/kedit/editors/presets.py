"""Published and calibrated hyper-parameters by a model's type, depth and width, and those of a file beside the model.

A model without an entry gets stated rules, which mean the same for every model: :func:`layer_rule`, :data:`VALUE_RULE`, and what
the editor's ``rule`` adds.
Sources: the hyper-parameter files of ROME, MEMIT and the SADR authors' fork (GPT-J, Llama-2-13B, TinyLlama), and
EasyEdit's for Llama-2, Llama-3, Mistral and Qwen2. γ of SADR is published for GPT-J only. SmolLM2's are those that
``kedit calibrate`` chose (benchmarks/results/real/calibrate.md).
"""

from __future__ import annotations

import dataclasses
import glob
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from kedit.errors import ConfigError, PatchError
from kedit.keys.estimate import cache_folder
from kedit.keys.second_moment import RIDGE
from kedit.models import ModelArch
from kedit.models.defaults import Preset as Preset
from kedit.models.defaults import model_defaults
from kedit.models.fingerprint import bit_sum, model_fingerprint
from kedit.models.offload import stored
from kedit.patch.ledger import Ledger
from kedit.regularizers.base import Regularizer, WithGamma
from kedit.utils.files import write_text
from kedit.utils.progress import logger

Model = tuple[str, int, int]  # model type, blocks, width

GPT2_XL: Model = ("gpt2", 48, 1600)
GPT_J_6B: Model = ("gptj", 28, 4096)
NEOX_20B: Model = ("gpt_neox", 44, 6144)
LLAMA_7B: Model = ("llama", 32, 4096)  # Llama-2-7B and Llama-3-8B share depth and width
LLAMA_13B: Model = ("llama", 40, 5120)
TINYLLAMA: Model = ("llama", 22, 2048)
SMOLLM2_135M: Model = ("llama", 30, 576)
MISTRAL_7B: Model = ("mistral", 32, 4096)
QWEN2_7B: Model = ("qwen2", 28, 3584)


def _rome(layer: int, steps: int, weight_decay: float, clamp: float = 4.0) -> dict[str, Any]:
    return {"layers": (layer,), "steps": steps, "lr": 0.5, "weight_decay": weight_decay, "clamp": clamp}


def _span(
    layers: tuple[int, int], steps: int, lr: float, weight_decay: float, clamp: float, **own: Any
) -> dict[str, Any]:
    chosen = tuple(range(layers[0], layers[1] + 1))
    return {"layers": chosen, "steps": steps, "lr": lr, "weight_decay": weight_decay, "clamp": clamp, **own}


_ROME: dict[Model, Preset] = {
    GPT2_XL: Preset(_rome(17, 20, 0.5)),
    GPT_J_6B: Preset(_rome(5, 20, 0.5), {"sadr": {"steps": 80, "self": {"gamma": 1e-2}}}),
    NEOX_20B: Preset(_rome(15, 20, 0.5)),
    LLAMA_7B: Preset(_rome(5, 25, 1e-3)),
    LLAMA_13B: Preset(_rome(6, 20, 1e-3)),
    TINYLLAMA: Preset(_rome(4, 20, 0.5, 2.0)),
    SMOLLM2_135M: Preset(
        {
            "layers": (5,),
            "steps": 60,
            "lr": 0.12,
            "lr_relative": True,
            "weight_decay": 1e-3,
            "clamp": 2.0,
            "patience": 5,
        }
    ),
    MISTRAL_7B: Preset(_rome(5, 25, 1e-3)),
    QWEN2_7B: Preset(_rome(5, 25, 1e-3)),
}
_MEMIT: dict[Model, Preset] = {
    GPT2_XL: Preset(_span((13, 17), 20, 0.5, 0.5, 0.75, moment_weight=20_000.0)),
    GPT_J_6B: Preset(
        _span((3, 8), 25, 0.5, 0.5, 0.75, moment_weight=15_000.0),
        {"sadr": {"steps": 20, "self": {"gamma": 5e-3}}},
    ),
    NEOX_20B: Preset(_span((6, 10), 20, 0.5, 0.5, 0.8, moment_weight=6_000.0)),
    LLAMA_7B: Preset(_span((4, 8), 25, 0.5, 1e-3, 4.0)),
    LLAMA_13B: Preset(_span((5, 9), 20, 0.5, 1e-3, 4.0)),
    TINYLLAMA: Preset(_span((3, 5), 20, 0.5, 0.5, 8.0, moment_weight=20_000.0)),
    MISTRAL_7B: Preset(_span((4, 8), 25, 0.5, 1e-3, 4.0)),
    QWEN2_7B: Preset(_span((4, 8), 25, 0.5, 1e-3, 4.0)),
}
_PMET: dict[Model, Preset] = {
    GPT_J_6B: Preset(
        _span((3, 8), 30, 0.2, 0.5, 0.75, kl_factor=1.0, moment_weight=6_000.0),
        # The SADR authors run PMET with a larger weight of the second moment.
        {"sadr": {"steps": 40, "moment_weight": 15_000.0, "self": {"gamma": 8e-2}}},
    ),
    NEOX_20B: Preset(_span((6, 10), 30, 0.5, 0.5, 0.8, kl_factor=0.8, moment_weight=15_000.0)),
    # Config's defaults are those for GPT-J; the Llama files have the other editors' kl_factor.
    LLAMA_7B: Preset(_span((4, 8), 20, 0.5, 0.5, 1.0, kl_factor=0.0625, moment_weight=15_000.0)),
    LLAMA_13B: Preset(_span((7, 9), 20, 0.5, 0.5, 4.0, kl_factor=0.0625, moment_weight=15_000.0)),
    TINYLLAMA: Preset(_span((3, 5), 20, 0.5, 0.5, 4.0, kl_factor=0.0625, moment_weight=20_000.0)),
}
_EMMET: dict[Model, Preset] = {
    GPT2_XL: Preset(_span((17, 17), 20, 0.5, 0.5, 0.75, alpha=1_000.0)),
    GPT_J_6B: Preset(_span((5, 5), 25, 0.5, 0.5, 0.75)),
    LLAMA_7B: Preset(_span((5, 5), 25, 0.5, 1e-3, 4.0)),
}
_PUBLISHED_NULL_SPACE = {"l2": 10.0, "threshold": 0.02, "threshold_rule": "absolute", "l2_relative": False}
_ALPHAEDIT: dict[Model, Preset] = {
    GPT2_XL: Preset(_span((13, 17), 20, 0.5, 0.5, 0.75, **_PUBLISHED_NULL_SPACE)),
    GPT_J_6B: Preset(_span((3, 8), 25, 0.5, 0.5, 0.75, **_PUBLISHED_NULL_SPACE)),
    LLAMA_7B: Preset(_span((4, 8), 25, 0.1, 0.5, 0.75, **_PUBLISHED_NULL_SPACE)),
    QWEN2_7B: Preset(_span((7, 11), 25, 0.1, 0.5, 0.75, **_PUBLISHED_NULL_SPACE)),
}
_FT: dict[Model, Preset] = {
    GPT2_XL: Preset({"layers": (0,), "clamp": 5e-4}),
    GPT_J_6B: Preset({"layers": (0,), "clamp": 5e-5}),
    MISTRAL_7B: Preset({"layers": (21,), "clamp": 5e-5}),
}

PRESETS: dict[str, dict[Model, Preset]] = {
    "rome": _ROME,
    "rrome": _ROME,
    "memit": _MEMIT,
    "pmet": _PMET,
    "emmet": _EMMET,
    "alphaedit": _ALPHAEDIT,
    "ft": _FT,
}


def ridge(arch: ModelArch) -> float:
    """The relative ridge of second moments that are estimated for a model: its own, or the usual one."""
    own = model_defaults(arch.model)
    return (None if own is None else own.ridge) or RIDGE


FILE = "kedit_preset.json"
"""Presets in a model's folder: ``{editor: {"values": {...}, "regularized": {regularizer: {...}}}}`` (:class:`Preset`)."""


def find(editor: str, arch: ModelArch, file: str | Path | None = None) -> Preset | None:
    """The preset of an editor for a model, of the first of these that has one; or ``None``.

    1. ``file``, where one is given; 2. the file in the model's folder (:data:`FILE`); 3. kedit's cache
    (:func:`cache_path`); 4. the model's own defaults; 5. the published values.

    Raises:
        ConfigError: a file cannot be read, or ``file`` holds presets of other editors only.
    """
    if file is not None:
        return read_one(file, editor)
    return _beside(arch).get(editor) or _cached(arch).get(editor) or built_in(editor, arch)


def built_in(editor: str, arch: ModelArch) -> Preset | None:
    """The preset that comes with the model's type: its own default, or the published values; or ``None``."""
    own = model_defaults(arch.model)
    if own is not None and editor in own.presets:
        return own.presets[editor]
    return PRESETS.get(editor, {}).get((arch.model_type, arch.num_layers, arch.hidden))


def read(file: str | Path) -> dict[str, Preset]:
    """The presets of a file by editor; the evidence that :func:`save` writes beside them is left aside.

    Raises:
        ConfigError: the file is missing or is not a file of presets.
    """
    if not Path(file).is_file():
        raise ConfigError(f"There is no file of presets {str(file)!r}. Check the path; kedit calibrate writes one.")
    try:
        entries = json.loads(Path(file).read_text(encoding="utf-8"))
        parts = {editor: {k: v for k, v in entry.items() if k != "evidence"} for editor, entry in entries.items()}
        return {editor: Preset(**entry, source=str(file)) for editor, entry in parts.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f'{file} is not a file of presets ({error}). It is JSON: {{"rome": {{"values": {{"layers": [5]}}}}}}.'
        ) from error


def read_one(file: str | Path, editor: str) -> Preset:
    """The preset of one editor in a file; raises as :func:`read`, and where the file has none of it."""
    known = read(file)
    if editor not in known:
        raise ConfigError(f"{file} holds no preset of {editor}. It has {', '.join(known) or 'none'}.")
    return known[editor]


def save(file: str | Path, editor: str, preset: Preset, evidence: Mapping[str, Any] | None = None) -> Path:
    """Write an editor's preset into a file, with what it rests on; the entries of other editors stay.

    Raises:
        ConfigError: the file holds something else, or cannot be written.
    """
    path = Path(file)
    entries: dict[str, Any] = {}
    if path.exists():
        read(path)
        entries = json.loads(path.read_text(encoding="utf-8"))
    entry: dict[str, Any] = {"values": dict(preset.values)}
    if preset.regularized:
        entry["regularized"] = {name: dict(changes) for name, changes in preset.regularized.items()}
    if evidence is not None:
        entry["evidence"] = dict(evidence)
    try:
        write_text(path, json.dumps({**entries, editor: entry}, indent=2, ensure_ascii=False) + "\n")
    except PatchError as error:
        raise ConfigError(f"The preset is not saved. {error}") from error
    return path


def cache_path(arch: ModelArch) -> Path:
    """Where kedit's cache keeps the presets of a model: named by its size and the fingerprint of its unedited weights."""
    return _cache_folder() / f"{_size(arch)}-{_fingerprint(arch.model).removeprefix('sha256:')}.json"


def announce(editor: str, arch: ModelArch, preset: Preset | None) -> None:
    """Log where an editor's preset comes from, once per model and place."""
    place = "" if preset is None else preset.source
    known = _ANNOUNCED.setdefault(arch.model, set())
    if place and (editor, place) not in known:
        logger.info("%s: hyper-parameters from %s.", editor, place)
    known.add((editor, place))


_ANNOUNCED: WeakKeyDictionary[Any, set[tuple[str, str]]] = WeakKeyDictionary()
_FINGERPRINTS: WeakKeyDictionary[Any, tuple[int, str]] = WeakKeyDictionary()


def _beside(arch: ModelArch) -> dict[str, Preset]:
    """The presets of the file in the folder from which the model was loaded."""
    path = Path(str(getattr(arch.model.config, "_name_or_path", "") or "")) / FILE
    return read(path) if path.is_file() else {}


def _cached(arch: ModelArch) -> dict[str, Preset]:
    """The presets in the cache; the model's weights are read only where one of a model of its size is kept."""
    if not any(_cache_folder().glob(f"{glob.escape(_size(arch))}-*.json")):
        return {}
    path = cache_path(arch)
    return read(path) if path.is_file() else {}


def _cache_folder() -> Path:
    return cache_folder() / "presets"


def _size(arch: ModelArch) -> str:
    return f"{arch.model_type}-{arch.num_layers}-{arch.hidden}"


def _fingerprint(model: Any) -> str:
    """The fingerprint of a model as it was before its edits, computed once for the same weights."""
    ledger = Ledger.of(model)
    originals = {name: original for name in ledger.touched if (original := ledger.original(name)) is not None}
    weights = hash(tuple(bit_sum(originals.get(name, tensor)) for name, tensor in stored(model)))
    known = _FINGERPRINTS.get(model)
    if known is None or known[0] != weights:
        known = _FINGERPRINTS[model] = weights, model_fingerprint(model, originals)
    return known[1]


def changes_for(preset: Preset | None, regularizers: Iterable[str]) -> dict[str, Any]:
    """Hyper-parameters that a preset changes where these regularizers are used, or the rule for one that it does not name."""
    known = {**RULE_WITH, **({} if preset is None else preset.regularized)}
    return {key: value for name in regularizers for key, value in known.get(name, {}).items() if key != "self"}


def complete(preset: Preset | None, regularizer: Regularizer) -> Regularizer:
    """A regularizer with the fields that are ``None`` from a preset; its usual γ where neither says one."""
    values = {} if preset is None else preset.regularized.get(regularizer.name, {}).get("self", {})
    missing = {key: value for key, value in values.items() if getattr(regularizer, key, 0) is None}
    if missing and dataclasses.is_dataclass(regularizer) and not isinstance(regularizer, type):
        regularizer = dataclasses.replace(regularizer, **missing)
        logger.info("%s: %s from the preset.", regularizer.name, missing)
    if isinstance(regularizer, WithGamma) and regularizer.gamma is None and regularizer.usual_gamma is not None:
        regularizer = dataclasses.replace(regularizer, gamma=regularizer.usual_gamma)
    return regularizer


# Published step sizes are absolute: 0.5 per coordinate is a third of ‖v₀‖ on one model and many times ‖v₀‖ on another, where the
# first step already ends at the clamp. Relative steps reach the target with a smaller value (docs/defaults.md has the numbers).
VALUE_RULE: Mapping[str, Any] = {"steps": 60, "lr": 0.12, "lr_relative": True, "clamp": 2.0, "patience": 5}
# The penalty keeps a confident value from other subjects. With 0.05, DNS is the same and PS lower on one of two samples of
# development facts, equal on the other (benchmarks/results/real/ideas.md).
RULE_WITH: Mapping[str, Mapping[str, Any]] = {"neighbours": {"stop_loss": 0.01}}
ADAPTIVE_STEPS = 1.25  # times as many where a penalty is made small once the target is said; most edits end earlier
MIN_SHARE = 0.9  # of the wanted change that the multi-layer editors write at least


def layer_span_rule(arch: ModelArch) -> tuple[int, ...]:
    """The blocks for the multi-layer editors where nothing is published: up to five, the last above ROME's choice."""
    last = max(0, min(layer_rule(arch) + max(1, round(0.1 * arch.num_layers)), arch.num_layers - 2))
    count = min(5, max(1, arch.num_layers // 5))
    return tuple(range(max(0, last - count + 1), last + 1))


def layer_rule(arch: ModelArch) -> int:
    """The block to edit where nothing is published: about a sixth of the way up (a third for GPT-2 and GPT-NeoX).

    That is where the published choices lie: 17 of 48 and 15 of 44, but 5 of 28 and 5 of 32.
    """
    share = 0.35 if arch.model_type in ("gpt2", "gpt_neox") else 0.17
    return round(share * (arch.num_layers - 1))
