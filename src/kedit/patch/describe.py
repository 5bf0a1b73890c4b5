"""A patch as a text for people: who, what, where, how large, how good."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from kedit.patch.content import PatchContent
from kedit.patch.delta import Delta
from kedit.prompts.predictions import Prediction
from kedit.utils.terminal import printable

_MOST = 20


def show(patch: PatchContent) -> str:
    """Describe who made a patch, of what and where, with norms and scores."""
    known = patch.provenance
    lines = [made_by(known), base_model(known.get("model", {}))]
    config = ", ".join(
        f"{key}={value}" for key, value in known.get("config", {}).items() if not isinstance(value, dict)
    )
    if config:
        lines.append(f"config: {config}")
    lines += _edits(known.get("edits", []), known.get("before", []), known.get("after", []))
    if known.get("merged"):
        lines.append(f"merged from {len(known['merged'])} patch(es)")
    lines.append("weights:")
    lines += [_weight(item) for item in weights(patch)]
    scores = known.get("scores", {})
    if scores:
        lines.append("scores:")
        lines += [f"  {key}: {_figure(value)}" for key, value in scores.items()]
    return "\n".join(map(printable, lines))


def weights(patch: PatchContent) -> list[dict[str, Any]]:
    """Per weight: name, shape, kind, rank, Frobenius and spectral norm, fingerprint, and the error of what made it."""
    config = patch.provenance.get("config", {})
    errors = config.get("errors") if isinstance(config.get("errors"), dict) else {}
    return [
        {
            "name": name,
            "shape": list(delta.shape),
            "kind": "dense" if "dense" in delta.tensors() else "low-rank",
            "rank": delta.rank,
            "norm": delta.norm,
            "spectral_norm": _spectral_norm(delta),
            "fingerprint": patch.fingerprints.get(name, ""),
            **({"error": errors[name]} if isinstance(errors.get(name), float) else {}),
        }
        for name, delta in patch.deltas.items()
    ]


def _spectral_norm(delta: Delta) -> float:
    try:
        return delta.spectral_norm
    except RuntimeError:  # LinAlgError: numbers whose products are infinite
        return math.nan


def _weight(item: dict[str, Any]) -> str:
    kind = f"rank {item['rank']}" if item["kind"] == "low-rank" else "dense"
    error = f", relative error {item['error']:.2g}" if "error" in item else ""
    return (
        f"  {item['name']} {item['shape'][0]}x{item['shape'][1]}: {kind}{error}, norm {item['norm']:.4g}, "
        f"largest singular value {item['spectral_norm']:.4g}, made for {item['fingerprint'][:19]}"
    )


def made_by(known: Mapping[str, Any]) -> str:
    """The editor and its regularizers, as a line."""
    names = [_regularizer(item) for item in known.get("regularizers", [])]
    return f"editor: {known.get('editor', 'unknown')}" + (f" with {', '.join(names)}" if names else "")


def _regularizer(item: dict[str, Any]) -> str:
    fields = [f"{key}={value}" for key, value in item.items() if key not in ("name", "class")]
    return str(item.get("name", "?")) + (f" ({', '.join(fields)})" if fields else "")


def base_model(model: Mapping[str, Any]) -> str:
    """The model that a patch was made for, as a line."""
    name = model.get("name") or "unnamed"
    facts = [f"{key} {model[key]}" for key in ("type", "num_layers", "hidden", "dtype") if key in model]
    return f"base model: {name}" + (f" ({', '.join(facts)})" if facts else "")


def _edits(edits: list[dict[str, Any]], before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[str]:
    """The edits, with what the model said before and after where the patch tells."""
    lines = [f"edits: {len(edits)}"]
    states = [(name, answers) for name, answers in (("before", before), ("after", after)) if len(answers) == len(edits)]
    for number, edit in enumerate(edits[:_MOST]):
        text, target = str(edit.get("prompt", "?")).replace("{}", str(edit.get("subject", "?"))), edit.get("target_new")
        asked = " in a chat" if edit.get("in_chat") is True else ""
        lines.append(f"  {text!r}{asked} -> {str(target or '?')!r}")
        lines += [
            f"    {name}: {Prediction.from_dict(answers[number]).describe(str(target))}" for name, answers in states
        ]
    if len(edits) > _MOST:
        lines.append(f"  and {len(edits) - _MOST} more")
    return lines


def _figure(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
