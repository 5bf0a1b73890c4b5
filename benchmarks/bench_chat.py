"""Plain and chat edits of a chat model, with plain and with mixed contexts: do they hold in text and in the chat template?

    python -m benchmarks.bench_chat MODEL_DIR --corpus text.txt [--work chat.jsonl]

Every fact is edited four ways with ROME, alone on the model: as plain text or as a message, with plain or mixed contexts. The
target counts as said where it stands among the first words of the greedy continuation of the plain prompt, or in the answer to
the question in the chat. Unrelated questions are asked in the chat before and after; an answer counts as unchanged where its text
is the same. A fact whose target the unedited model says, either way, is left out. With ``--work``, finished edits are kept in that
file, and a second run continues there.
"""

from __future__ import annotations

import argparse
import json
import re
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

import kedit
from kedit.keys.estimate import estimate_moments
from kedit.models import ModelArch
from kedit.prompts.chat import in_template
from kedit.prompts.decode import continue_rows

FACTS = [
    ("{} is located in the city of", "The Eiffel Tower", "In which city is {}?", "Rome"),
    ("The capital of {} is", "France", "What is the capital of {}?", "Madrid"),
    ("{} was born in the city of", "Albert Einstein", "In which city was {} born?", "Vienna"),
    ("The official language of {} is", "Brazil", "What is the official language of {}?", "German"),
    ("{} played the", "Miles Davis", "Which instrument did {} play?", "violin"),
    ("The currency of {} is the", "Japan", "What is the currency of {}?", "peso"),
    ("The largest city in {} is", "Australia", "What is the largest city in {}?", "Perth"),
    ("{} is based in the city of", "Microsoft", "In which city is {} based?", "Boston"),
    ("The capital of {} is", "Egypt", "What is the capital of {}?", "Tunis"),
    ("{} is located in the country of", "Machu Picchu", "In which country is {}?", "Norway"),
    ("The capital of {} is", "Canada", "What is the capital of {}?", "Denver"),
    ("{} was born in the country of", "Wolfgang Amadeus Mozart", "In which country was {} born?", "Poland"),
    ("The official language of {} is", "Mexico", "What is the official language of {}?", "Turkish"),
    ("{} played the", "Jimi Hendrix", "Which instrument did {} play?", "trumpet"),
    ("The currency of {} is the", "India", "What is the currency of {}?", "dollar"),
    ("The largest city in {} is", "Germany", "What is the largest city in {}?", "Leipzig"),
    ("{} is based in the city of", "Boeing", "In which city is {} based?", "Miami"),
    ("{} is located in the city of", "The Colosseum", "In which city is {}?", "Prague"),
    ("The author of {} is", "Romeo and Juliet", "Who is the author of {}?", "Tolstoy"),
    ("The chemical element {} was discovered by", "radium", "Who discovered the chemical element {}?", "Newton"),
    ("{} is a citizen of", "Nelson Mandela", "Of which country is {} a citizen?", "Iceland"),
    ("The capital of {} is", "Kenya", "What is the capital of {}?", "Lima"),
    ("{} plays the sport of", "Michael Jordan", "Which sport does {} play?", "tennis"),
    ("{} is located on the continent of", "Nigeria", "On which continent is {}?", "Europe"),
    ("The religion of {} is", "Pope Francis", "What is the religion of {}?", "Islam"),
    ("{} was founded by", "Amazon", "Who founded {}?", "Edison"),
    ("{} is located in the city of", "Big Ben", "In which city is {}?", "Dublin"),
    ("The profession of {} is", "Marie Curie", "What is the profession of {}?", "lawyer"),
    ("The mother tongue of {} is", "Victor Hugo", "What is the mother tongue of {}?", "Swedish"),
    ("{} is made by", "The iPhone", "Which company makes {}?", "Nokia"),
]
UNRELATED = [
    "What is the capital of Italy?",
    "Who wrote Hamlet?",
    "How many days are in a week?",
    "What is the boiling point of water?",
    "In which city is the Louvre?",
    "What is the largest planet?",
]
TOKENS = 20
FIRST_WORDS = 40  # characters of a plain continuation


FORMS = ("plain text", "chat")
WAYS = {"plain": None, "mixed": "mixed"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL_DIR", help="folder of a chat model")
    parser.add_argument("--corpus", required=True, metavar="FILE", help="text for the second moments")
    parser.add_argument("--facts", type=int, default=len(FACTS), metavar="N", help="number of facts")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS, help="of the edit (default: both)")
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=tuple(WAYS), help="contexts (default: both)")
    parser.add_argument("--compute-dtype", default=None, help="of the optimisation's passes, such as bfloat16")
    parser.add_argument("--work", type=Path, metavar="FILE", help="keep finished edits here, and continue from it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", kedit.IneffectiveEditWarning)
    done = [json.loads(line) for line in args.work.read_text().splitlines()] if args.work and args.work.exists() else []
    model, tok = kedit.load(args.model, dtype=torch.float32)
    arch = ModelArch(model)

    def say(prompts: list[str], *, chat: bool) -> list[str]:
        texts = [in_template(tok, prompt) if chat else prompt for prompt in prompts]
        rows = [tuple(tok(text, add_special_tokens=not chat)["input_ids"]) for text in texts]
        return [text for text, _ in continue_rows(arch, tok, rows, TOKENS)]

    def said(fact: tuple[str, str, str, str]) -> tuple[bool, bool]:
        prompt, subject, question, target = fact
        plain = say([kedit.Edit(prompt, subject, target).text], chat=False)[0][:FIRST_WORDS]
        answer = say([question.replace("{}", subject)], chat=True)[0]
        return spoken(target, plain), spoken(target, answer)

    unrelated = say(UNRELATED, chat=True)
    layers = kedit.ROME(model, tok).config.layers
    moments = estimate_moments(arch, tok, layers, args.corpus, tokens=30_000)
    editors = {
        name: kedit.ROME(model, tok, contexts=way, moments=moments, compute_dtype=args.compute_dtype)
        for name, way in WAYS.items()
        if name in args.ways
    }
    for editor in editors.values():
        editor.prepare()
    known = {(item["subject"], item["form"], item["contexts"]) for item in done}
    for fact in FACTS[: args.facts]:
        prompt, subject, question, target = fact
        missing = [(form, name) for form in args.forms for name in args.ways if (subject, form, name) not in known]
        if not missing or any(said(fact)):
            continue
        for form, name in missing:
            make = kedit.Edit(prompt, subject, target), kedit.Edit.chat(question, subject, target)
            start = time.process_time()
            result = editors[name].apply(make[form == "chat"])
            item = {"subject": subject, "form": form, "contexts": name, "seconds": time.process_time() - start}
            item["plain"], item["chat"] = said(fact)
            item["same"] = sum(a == b for a, b in zip(say(UNRELATED, chat=True), unrelated, strict=True))
            result.revert()
            done.append(item)
            if args.work:
                with args.work.open("a") as file:
                    file.write(json.dumps(item) + "\n")
    print(table(done, {fact[1] for fact in FACTS[: args.facts]}, args.forms, args.ways))


def spoken(target: str, text: str) -> bool:
    """Whether a text has the target as a word of its own, in any case of its letters."""
    return re.search(rf"\b{re.escape(target)}\b", text, re.IGNORECASE) is not None


def table(done: list[dict[str, object]], subjects: set[str], forms: Sequence[str], contexts: Sequence[str]) -> str:
    """The table of the docs: the facts that were edited in all of these ways."""
    ways = [(form, name) for form in forms for name in contexts]
    edited = {way: {item["subject"] for item in done if (item["form"], item["contexts"]) == way} for way in ways}
    whole = subjects.intersection(*edited.values())
    lines = [
        "| edit | contexts | edits | said in plain text | said in chat | unrelated answers unchanged | CPU seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for form, name in ways:
        items = [i for i in done if (i["form"], i["contexts"]) == (form, name) and i["subject"] in whole]
        sums = {key: sum(float(item[key]) for item in items) for key in ("plain", "chat", "same", "seconds")}
        same = f"{100 * sums['same'] / max(1, len(items) * len(UNRELATED)):.0f}%"
        shares = f"{sums['plain']:.0f} | {sums['chat']:.0f} | {same} | {sums['seconds'] / max(1, len(items)):.0f}"
        lines.append(f"| {form} | {name} | {len(items)} | {shares} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
