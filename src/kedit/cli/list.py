"""List what kedit knows by name.

Examples:
  kedit list editors
  kedit list regularizers
  kedit list metrics
  kedit list models
  kedit list presets
  kedit list formats

Editors, regularizers, metrics and formats of installed packages are listed too. kedit edit --set help explains hyper-parameters.
"""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable, Iterator

from kedit.cli import common

HELP = "list editors, regularizers, metrics, models, presets or formats"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the argument."""
    parser.add_argument("what", choices=list(LISTS), help="what to list")


def run(args: argparse.Namespace) -> int:
    """Print one list."""
    common.say(*common.columns(list(LISTS[args.what]())))
    return 0


def _editors() -> Iterator[tuple[str, ...]]:
    from kedit.editors import EDITORS

    for name in EDITORS:
        yield name, _first_sentence(EDITORS[name])


def _regularizers() -> Iterator[tuple[str, ...]]:
    from kedit.regularizers import REGULARIZERS

    for name in REGULARIZERS:
        yield name, _first_sentence(REGULARIZERS[name])


def _formats() -> Iterator[tuple[str, ...]]:
    from kedit.data import FORMATS

    for name in FORMATS:
        yield name, _first_sentence(FORMATS[name])


def _metrics() -> Iterator[tuple[str, ...]]:
    from kedit.evaluation.metrics import chosen

    for metric in chosen():
        yield metric.name, metric.label, "↑" if metric.direction == "higher" else "↓", metric.protocol, metric.summary


def _models() -> Iterator[tuple[str, ...]]:
    from kedit.models.architectures import ARCHITECTURES

    for name, spec in sorted(ARCHITECTURES.items()):
        yield name, f"{spec.blocks}.N.{spec.down}", "mixture of experts" if spec.experts else ""
    yield (
        "others",
        "kedit detects the structure of other decoders, or refuses them with the reason (docs/models.md)",
        "",
    )


def _presets() -> Iterator[tuple[str, ...]]:
    from kedit.editors.presets import PRESETS

    yield "editor", "model type", "blocks", "width", "hyper-parameters", "changed for a regularizer"
    for editor, presets in PRESETS.items():
        for (kind, blocks, width), preset in presets.items():
            changed = "; ".join(f"{name}: {_settings(each)}" for name, each in preset.regularized.items())
            yield editor, kind, str(blocks), str(width), _settings(preset.values), changed


def _settings(values: object) -> str:
    """Hyper-parameters as --set takes them; those of a regularizer itself stand under "self"."""
    assert isinstance(values, dict)
    flat = {key: value for key, value in values.items() if key != "self"} | dict(values.get("self", {}))
    return " ".join(
        f"{key}={list(value) if isinstance(value, tuple) else value}".replace(", ", ",") for key, value in flat.items()
    )


def _first_sentence(thing: object) -> str:
    sentence = (inspect.getdoc(thing) or "").partition("\n")[0]
    return re.sub(r":\w+:`([^`]*)`", r"\1", sentence).replace("``", "")


LISTS: dict[str, Callable[[], Iterator[tuple[str, ...]]]] = {
    "editors": _editors,
    "regularizers": _regularizers,
    "metrics": _metrics,
    "models": _models,
    "presets": _presets,
    "formats": _formats,
}
