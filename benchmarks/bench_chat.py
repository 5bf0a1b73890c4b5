"""Plain and chat edits of a chat model, with plain and with mixed contexts: do they hold in text and in the chat template?

    python -m benchmarks.bench_chat MODEL_DIR --corpus text.txt

Every fact is edited four ways with ROME, alone on the model: as plain text or as a message, with plain or mixed contexts. The
target counts as said where it stands among the first words of the greedy continuation of the plain prompt, or in the answer to
the question in the chat. Unrelated questions are asked in the chat before and after; an answer counts as unchanged where its text
is the same.
"""

from __future__ import annotations

import argparse
import time
import warnings

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL_DIR", help="folder of a chat model")
    parser.add_argument("--corpus", required=True, metavar="FILE", help="text for the second moments")
    parser.add_argument("--facts", type=int, default=len(FACTS), metavar="N", help="number of facts")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", kedit.IneffectiveEditWarning)
    model, tok = kedit.load(args.model, dtype=torch.float32)
    arch = ModelArch(model)

    def say(prompts: list[str], *, chat: bool) -> list[str]:
        texts = [in_template(tok, prompt) if chat else prompt for prompt in prompts]
        rows = [tuple(tok(text, add_special_tokens=not chat)["input_ids"]) for text in texts]
        return [text for text, _ in continue_rows(arch, tok, rows, TOKENS)]

    unrelated = say(UNRELATED, chat=True)
    layers = kedit.ROME(model, tok).config.layers
    moments = estimate_moments(arch, tok, layers, args.corpus, tokens=30_000)
    editors = {
        name: kedit.ROME(model, tok, contexts=way, moments=moments)
        for name, way in (("plain", None), ("mixed", "mixed"))
    }
    print("| edit | contexts | edits | said in plain text | said in chat | unrelated answers unchanged | CPU seconds |")
    print("|---|---|---|---|---|---|---|")
    for form in ("plain text", "chat"):
        for name, editor in editors.items():
            plain, chat, same, seconds = 0, 0, 0, 0.0
            editor.prepare()
            for prompt, subject, question, target in FACTS[: args.facts]:
                in_text = kedit.Edit(prompt, subject, target)
                edit = in_text if form == "plain text" else kedit.Edit.chat(question, subject, target)
                start = time.process_time()
                result = editor.apply(edit)
                seconds += time.process_time() - start
                plain += target.lower() in say([in_text.text], chat=False)[0][:FIRST_WORDS].lower()
                chat += target.lower() in say([question.replace("{}", subject)], chat=True)[0].lower()
                same += sum(a == b for a, b in zip(say(UNRELATED, chat=True), unrelated, strict=True))
                result.revert()
            count = len(FACTS[: args.facts])
            shares = f"{plain} | {chat} | {100 * same / (count * len(UNRELATED)):.0f}%"
            print(f"| {form} | {name} | {count} | {shares} | {seconds / count:.0f} |", flush=True)


if __name__ == "__main__":
    main()
