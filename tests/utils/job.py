"""Job that the tests run in one process or in several: ``python job.py TASK FOLDER``; prints and writes from the first."""

import sys
import warnings
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import kedit  # noqa: E402
from kedit.embedded import load_world  # noqa: E402
from kedit.embedded.cases import world_cases  # noqa: E402
from kedit.keys.estimate import accumulate  # noqa: E402
from kedit.models import ModelArch  # noqa: E402
from kedit.utils import distributed  # noqa: E402
from tiny_models import CONTEXTS, EDITS, moments, tiny_model, tokenizer  # noqa: E402

WORDS = "the old river flows past a house in the city and the teacher reads in the garden near the sea"
ALL = [kedit.Edit(*EDITS[name]) for name in ("start", "middle", "end")]


def corpus():
    """Short texts, many batches."""
    words = WORDS.split()
    return [" ".join(words[i % 7 : i % 7 + 3 + i % 11]) + "." for i in range(600)]


def run_moments(folder):
    """Sums over a corpus that makes several batches."""
    import kedit.keys.estimate

    kedit.keys.estimate.TOKENS_PER_BATCH = 512
    arch = ModelArch(tiny_model("gpt2", dtype=torch.float64))
    sums = accumulate(arch, tokenizer(), [1, 2], corpus(), 4_000)
    return {str(layer): total.total for layer, total in sums.items()} | {
        "tokens": torch.tensor([sum(total.counts) for total in sums.values()])
    }


def run_edit(folder):
    """MEMIT on three edits in true double precision of the values; the weights after it."""
    model = tiny_model("llama", dtype=torch.float64)
    width = ModelArch(model).weight(1).matrix.shape[1]
    made = {layer: moments(width, layer).double() for layer in (1, 2)}
    editor = kedit.MEMIT(
        model, tokenizer(), layers=(1, 2), moments=made, contexts=CONTEXTS, steps=6, moment_weight=10.0
    )
    result = editor.apply(ALL, regularizer=kedit.SADR(gamma=0.1))
    found = {name: delta.dense for name, delta in result.patch.deltas.items()}
    return found | {"log": torch.tensor([steps[-1]["total"] for steps in result.log])}


def run_eval(folder):
    """Six cases of the embedded world in chunks of two."""
    from kedit.evaluation.journal import Journal

    asked, append = [], Journal.append
    Journal.append = lambda self, record: (asked.append(record.id), append(self, record))
    model, tok = kedit.load()
    cases = world_cases(load_world(), "dev", 6)
    options = {"steps": 4, "lr": 2.0}
    report = kedit.evaluate(model, tok, cases, "memit", config=options, chunk=2, exact=False, out=folder / "run")
    Journal.append = append
    figures = {name: torch.tensor(report[name].value, dtype=torch.float64) for name in ("es", "ps", "ns", "dns", "dnm")}
    return figures | {"asked": distributed.current_group().gather(len(asked))}


def run_all(folder):
    """All three."""
    return {"moments": run_moments(folder), "edit": run_edit(folder), "eval": run_eval(folder)}


def run_error(folder):
    """A non-finite loss in the share of one process."""
    model = tiny_model("gpt2")
    width = ModelArch(model).weight(1).matrix.shape[1]
    editor = kedit.ROME(model, tokenizer(), layers=1, moments={1: moments(width, 1)}, contexts=CONTEXTS, steps=3)

    class Breaks:
        name = "breaks"

        def needs(self, site):
            return kedit.regularizers.Needs()

        def penalty(self, now, before):
            return torch.full((now.num_edits,), float("nan") if distributed.current_group().rank == 1 else 0.0)

    editor.propose(ALL, regularizer=Breaks())


def main():
    task, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    distributed.join()
    try:
        found = globals()[f"run_{task}"](folder)
    except kedit.KEditError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        raise SystemExit(1) from None
    if distributed.current_group().leads:
        torch.save(found, folder / "found.pt")
    distributed.leave()


main()
