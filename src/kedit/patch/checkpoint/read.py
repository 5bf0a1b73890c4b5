"""A model on disk: a folder with a configuration and one or many safetensors shards."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kedit.errors import ArchitectureError, PatchError, PatchMismatchError
from kedit.models import weight_of
from kedit.models.compat import auto_class
from kedit.utils.files import Header, numbered, parse_json, read_header, reading

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kedit.models import Weight

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_CONVERT = "Convert it first: kedit.load it, and write model and tokenizer into a folder with save_pretrained."


@dataclass(frozen=True)
class Checkpoint:
    """A checked folder: every shard has the size that its header announces, and the index names what is there.

    Attributes:
        folder: where it is.
        shards: headers by file name.
        files: the file that holds a tensor, by the tensor's name.
        described_by: another checkpoint of the same model, whose configuration counts.
    """

    folder: Path
    shards: dict[str, Header]
    files: dict[str, str]
    described_by: Checkpoint | None = None

    @classmethod
    def open(cls, folder: str | Path, *, described_by: Checkpoint | None = None) -> Checkpoint:
        """Read the index and all headers.

        Args:
            folder: where it is.
            described_by: another checkpoint of the same model, whose configuration says what this one holds.

        Raises:
            PatchError: no checkpoint, a shard that is missing, truncated or disagrees with the index, or a file name
                in the index that leads out of the folder.
        """
        where = Path(folder)
        with reading(folder):
            if where.is_file() and where.suffix.lower() == ".gguf":
                raise PatchError(f"{str(folder)!r} is a GGUF file. {_CONVERT}")
            if not where.is_dir():
                raise PatchError(f"{str(folder)!r} is no folder. Give one that save_pretrained wrote.")
            index, single = where / INDEX, where / SINGLE
            raw = index.read_bytes() if index.is_file() else None
            if raw is not None and single.is_file():
                raise PatchError(
                    f"{folder} holds both {SINGLE} and {INDEX}: two sets of weights, of which one may be out of date. "
                    "Remove the one that is not the model (transformers loads the single file)."
                )
            if raw is None and not single.is_file():
                if any(entry.suffix.lower() == ".gguf" for entry in where.iterdir()):
                    raise PatchError(f"{str(folder)!r} holds a model as GGUF. {_CONVERT}")
                raise PatchError(
                    f"{str(folder)!r} holds neither {INDEX} nor {SINGLE}. kedit edits safetensors checkpoints; convert others "
                    "with save_pretrained."
                )
        if raw is None:
            header = read_header(single)
            return cls(where, {SINGLE: header}, dict.fromkeys(header.tensors, SINGLE), described_by)
        files = _weight_map(index, parse_json(raw, str(index)))
        shards = {name: read_header(where / name) for name in sorted(set(files.values()))}
        for tensor, name in files.items():
            if tensor not in shards[name].tensors:
                raise PatchError(f"{index} says that {tensor} is in {name}, which does not hold it. It is damaged.")
        for name, header in shards.items():
            for tensor in header.tensors:
                if files.get(tensor) != name:
                    raise PatchError(f"{name} holds {tensor}, which {INDEX} does not place there. It is damaged.")
        return cls(where, shards, files, described_by)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model that the configuration describes, without numbers (:func:`skeleton`)."""
        return skeleton(self.folder) if self.described_by is None else self.described_by.model

    def file_of(self, key: str) -> str:
        """The file that holds a tensor, or the tensor that ``key`` with ``[n]`` at its end is a part of."""
        return self.files[key] if key in self.files else self.files[numbered(key)[0]]

    def read(self, key: str) -> Tensor:
        """One tensor, or a part of one."""
        return self.shards[self.file_of(key)].read(key)

    def same_bytes(self, name: str, other: Checkpoint, step: int = 1 << 24) -> bool:
        """Return whether a tensor of the same size has the same bytes in another checkpoint."""
        mine, theirs = self.shards[self.files[name]], other.shards[other.files[name]]
        one, two = mine.tensors[name], theirs.tensors[name]
        with reading(mine.path), open(mine.path, "rb") as a, open(theirs.path, "rb") as b:
            a.seek(one.start)
            b.seek(two.start)
            left = one.stop - one.start
            while left > 0:
                piece = a.read(min(step, left))
                if not piece or piece != b.read(len(piece)):
                    return False
                left -= len(piece)
        return True

    def key_of(self, parameter: str) -> str:
        """The name under which a model's parameter is stored: its own, without (with) the base model's prefix, or its type's.

        Vision-language models, for one, store ``model.language_model.layers`` under older names.
        One expert of a fused tensor is a part of it, ``name[n]``, or a tensor of its own, as the model's type is stored.

        Raises:
            PatchMismatchError: it is not there, or could be several.
            ArchitectureError: it is an expert, and the folder's configuration is of no use.
        """
        fused, number = numbered(parameter)
        if number is not None:
            return self._key_of_expert(fused, number)
        keys = self._keys_like(parameter) or self._renamed(parameter)
        if len(keys) != 1:
            what = f"several that could be it ({', '.join(sorted(keys)[:3])})" if keys else "nothing of that name"
            raise PatchMismatchError(
                f"The patch changes {parameter}, and {self.folder} holds {what}. The patch was made for another model, or the "
                "checkpoint stores its layers otherwise; load it, apply the patch and use save_pretrained."
            )
        return keys[0]

    def _renamed(self, parameter: str) -> list[str]:
        """The name that the model's type has for a parameter in files, if that is there."""
        with suppress(ArchitectureError):
            stored = stored_names(self.model).get(parameter)
            return [stored] if stored in self.files else []
        return []

    @cached_property
    def _experts(self) -> dict[str, list[str]]:
        """The names under which the matrices of a fused tensor are stored, for those that were asked for."""
        return {}

    def _keys_of_experts(self, fused: str) -> list[str]:
        keys = self._keys_like(fused)
        if not keys:
            return [key for name in stored_experts(self.model, fused) for key in self._keys_like(name)]
        if len(keys) == 1 and len(shape := self.like(keys[0])[1]) == 3:
            return [f"{keys[0]}[{number}]" for number in range(shape[0])]
        return []

    def _key_of_expert(self, fused: str, number: int) -> str:
        if fused not in self._experts:
            self._experts[fused] = self._keys_of_experts(fused)
        keys = self._experts[fused]
        if number >= len(keys):
            held = f"{len(keys)} experts there" if keys else "no experts of that name, together or apart"
            raise PatchMismatchError(
                f"The patch changes expert {number} of {fused}, and {self.folder} holds {held}. The patch was made for another "
                "model, or the checkpoint stores its layers otherwise; load it, apply the patch and use save_pretrained."
            )
        return keys[number]

    def _keys_like(self, parameter: str) -> list[str]:
        """Stored names that could be a parameter's: its own, or those without (with) the base model's prefix."""
        if parameter in self.files:
            return [parameter]
        return [key for key in self.files if parameter.endswith(f".{key}") or key.endswith(f".{parameter}")]

    def like(self, key: str) -> tuple[str, tuple[int, ...]]:
        """Dtype and shape of a tensor, or of a part of one, as stored."""
        info = self.shards[self.file_of(key)].info(key)
        return info.dtype, info.shape


def _weight_map(index: Path, content: Any) -> dict[str, str]:
    table = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(table, dict) or not table:
        raise PatchError(f"{index} has no weight_map. It is damaged.")
    for tensor, name in table.items():
        plain = (
            isinstance(name, str) and name.isprintable() and name == os.path.basename(name) and not name.startswith(".")
        )
        if not plain or "\\" in name or not name.endswith(".safetensors"):
            raise PatchError(
                f"{index} places {tensor!r} in {name!r}, which is not the name of a safetensors file in that folder. "
                "The checkpoint is damaged or malicious."
            )
    return table


def skeleton(folder: str | Path) -> PreTrainedModel:
    """The model that a checkpoint's configuration describes, without numbers: it says how each weight is stored.

    Any type that transformers builds will do: kedit need not know its parts. Code that comes with a checkpoint is never run.

    Raises:
        ArchitectureError: the configuration is missing, malformed, or unknown to transformers.
    """
    from transformers import AutoConfig

    where = Path(folder)
    with reading(folder):
        raw = (where / "config.json").read_bytes() if (where / "config.json").is_file() else None
    if raw is None:
        raise ArchitectureError(f"{folder} holds no config.json, which says what model the weights belong to.")
    try:
        config = AutoConfig.from_pretrained(str(where), local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            model: PreTrainedModel = auto_class(config).from_config(config, trust_remote_code=False)
    except Exception as error:  # whatever a malformed configuration sets off in there
        if b'"auto_map"' in raw:
            raise ArchitectureError(
                f"The model in {folder} needs program code that comes with it (auto_map in config.json), and kedit runs no "
                "such code. If you trust it, load the model yourself, apply the patch to it, and use save_pretrained."
            ) from error
        raise ArchitectureError(
            f"The configuration in {folder} describes no model that can be built: {error}"
        ) from error
    return model


def stored_names(model: PreTrainedModel) -> dict[str, str]:
    """By parameter: the name that checkpoints of a model's type have for it, where they hold it as it is."""
    from transformers.core_model_loading import revert_weight_conversion

    marks = {name: torch.empty(1) for name, parameter in model.named_parameters() if parameter.ndim < 3}
    named = {id(mark): name for name, mark in marks.items()}
    try:
        stored = revert_weight_conversion(model, marks)
    except Exception:  # whatever a conversion does that expects other shapes
        return {}
    return {named[id(mark)]: key for key, mark in stored.items() if id(mark) in named}


def stored_experts(model: PreTrainedModel, fused: str) -> list[str]:
    """Name the matrices that are fused into one tensor as checkpoints of a model's type do, in order.

    Empty where a checkpoint holds the fused tensor, or the matrices in another form. transformers says what it does to a
    tensor when it saves it; a small tensor of known numbers shows whether that is to take it apart and nothing else.
    """
    from transformers.core_model_loading import revert_weight_conversion

    try:
        count = len(model.get_parameter(fused))
    except (AttributeError, TypeError):
        return []
    probe = torch.arange(count * 6.0).view(count, 2, 3)
    try:
        parts = revert_weight_conversion(model, {fused: probe})
    except Exception:  # whatever a conversion does that expects other shapes
        return []
    taken_apart = len(parts) == count and all(map(torch.equal, parts.values(), probe))
    return list(parts) if taken_apart else []


def weight_in(checkpoint: Checkpoint, parameter: str) -> tuple[str, Weight]:
    """A parameter's name in the checkpoint, and how it is stored; raises unless the shapes agree."""
    model = checkpoint.model
    try:
        weight = weight_of(model, parameter)
    except ArchitectureError as error:
        raise PatchMismatchError(
            f"The patch changes {parameter}, which this model does not have as a plain weight. {error}"
        ) from error
    key = checkpoint.key_of(parameter)
    _, stored = checkpoint.like(key)
    wanted = tuple(weight.parameter.shape)[0 if weight.index is None else 1 :]
    if stored != wanted:
        raise PatchMismatchError(
            f"{key} in {checkpoint.folder} has shape {list(stored)}; its config.json describes {list(wanted)}. The checkpoint "
            "is damaged."
        )
    return key, weight
