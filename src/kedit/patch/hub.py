"""Patches on the Hugging Face hub: a repository with the patch file and a model card."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from kedit.errors import PatchError
from kedit.patch.card import CARD, PATCH_FILE, model_card
from kedit.patch.content import PatchContent
from kedit.patch.format import read_patch, write_patch
from kedit.utils.network import UNREACHABLE, hub_is_reachable
from kedit.utils.terminal import printable


def push_to_hub(
    patch: PatchContent,
    repo: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
) -> str:
    """Upload a patch with its model card; make the repository if there is none.

    Args:
        patch: what to upload.
        repo: ``"user/name"``, a model repository.
        private: whether a repository that is made now is private; missing: the account's setting.
        token: of the account; missing: the one that ``hf auth login`` stored.
        revision: the branch; missing: main.
        create_pr: open a pull request in the repository.
        message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        PatchError: the hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi

    if not hub_is_reachable():
        raise PatchError(f"{repo!r} cannot be written: {UNREACHABLE}. Save the patch, and push it later.")
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory(prefix="kedit-") as place:
        write_patch(Path(place, PATCH_FILE), patch)
        card = model_card([patch.provenance], list(patch.deltas), repo=repo)
        Path(place, CARD).write_text(card, encoding="utf-8")
        try:
            api.create_repo(repo, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo,
                folder_path=place,
                commit_message=message or "Upload an edit with kedit",
                revision=revision,
                create_pr=create_pr,
            )
        except _refusals() as error:
            raise PatchError(
                f"The hub refuses {repo!r}: {_said(error)}. Check the name, and that the token may write."
            ) from error
    return str(getattr(commit, "pr_url", None) or commit.commit_url)


def from_pretrained(
    source: str | Path,
    *,
    filename: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> PatchContent:
    """Read a patch from a folder, or from a repository on the hub.

    Args:
        source: a folder, a patch file, or ``"user/name"`` on the hub. A name that exists here is a folder or file.
        filename: of the patch; missing: ``edit.safetensors``, or in a folder its only safetensors file.
        revision: branch, tag or commit on the hub.
        token: of an account that may read the repository.
        cache_dir: where downloads are kept.
        local_files_only: download nothing.

    Raises:
        PatchError: there is no patch, or it is damaged.
    """
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        return read_patch(path / (filename or _only(path)))
    if path.exists() or isinstance(source, Path) or source.count("/") != 1 or source.startswith((".", "~", "/")):
        return read_patch(path)  # says where nothing is there
    from huggingface_hub import hf_hub_download

    offline = local_files_only or not hub_is_reachable()
    wanted: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": offline}
    try:
        file = hf_hub_download(source, filename or PATCH_FILE, **wanted)
    except _refusals() as error:
        why = UNREACHABLE if offline and not local_files_only else _said(error)
        raise PatchError(
            f"There is no folder {source!r} here, and no patch {filename or PATCH_FILE} could be had from the hub: {why}. Give a "
            "folder, or the name of a repository that patch.push_to_hub wrote."
        ) from error
    return read_patch(file)


def _only(folder: Path) -> str:
    """The name of the patch file in a folder."""
    if (folder / PATCH_FILE).is_file():
        return PATCH_FILE
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(files) != 1:
        held = f"{len(files)} safetensors files ({', '.join(map(printable, files[:5]))})" if files else "no patch"
        raise PatchError(f"{str(folder)!r} holds {held}. Name the patch with filename=..., or give another folder.")
    return files[0]


def _refusals() -> tuple[type[Exception], ...]:
    """What the hub's client raises: HTTP errors are OSErrors in some of its versions, names are checked with ValueErrors."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError, OSError, ValueError


def _said(error: Exception) -> str:
    return printable(" ".join(str(error).split())).rstrip(".") or type(error).__name__
