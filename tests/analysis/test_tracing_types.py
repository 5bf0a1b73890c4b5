"""Tracing of model types whose blocks are built in other ways: against plain hooks, one restoration at a time."""

import numpy as np
import pytest
import torch

import kedit
import zoo
from analysis_common import FACTS, TOKENIZER
from kedit.analysis.causal_tracing import draw_noise, embedding_deviation
from kedit.analysis.facts import as_facts
from kedit.analysis.interventions import ACTIVATIONS
from kedit.models import ModelArch, Site

# OPT works on all tokens in one row; Gemma scales its embeddings; Bloom and MPT add the residual inside the MLP.
TYPES = ["opt", "opt-normalised", "gemma", "gemma3", "bloom", "mpt", "falcon-new", "gpt_oss-sinks", "mixtral", "olmo2"]


class Plain:
    """One prompt, one restoration, one forward pass; outputs as rows of tokens, whatever their shape."""

    def __init__(self, model, fact):
        self.model, self.fact, self.arch = model, fact, ModelArch(model)
        self.sites = [(kind, layer) for kind in ACTIVATIONS for layer in range(self.arch.num_layers)]
        self.clean = {}
        self.run(keep=True)

    @torch.no_grad()
    def run(self, noise=None, restored=None, token=0, keep=False):
        """The answer's probability."""

        def corrupt(_module, _args, output):
            changed = output.clone()
            changed[0, self.fact.row.first : self.fact.row.subject_last + 1] += noise
            return changed

        def at(key):
            def hook(_module, _args, output):
                tensor = output[0] if isinstance(output, tuple) else output
                rows = tensor.reshape(-1, tensor.shape[-1]).clone()
                if keep:
                    self.clean[key] = rows
                if key != restored:
                    return None
                rows[token] = self.clean[key][token]
                changed = rows.view_as(tensor)
                return (changed, *output[1:]) if isinstance(output, tuple) else changed

            return hook

        handles = [
            self.arch.site(Site(layer, ACTIVATIONS[kind])).register_forward_hook(at((kind, layer)))
            for kind, layer in self.sites
        ]
        if noise is not None:
            handles.append(self.model.get_input_embeddings().register_forward_hook(corrupt))
        logits = self.model(torch.tensor([self.fact.row.ids])).logits[0].double().log_softmax(-1)
        for handle in handles:
            handle.remove()
        places = range(self.fact.row.prompt_last, len(self.fact.row.ids) - 1)
        return float(sum(logits[i, self.fact.row.ids[i + 1]] for i in places).exp())


@pytest.mark.parametrize("name", TYPES)
def test_the_batched_pass_equals_one_restoration_at_a_time(name):
    model = zoo.make(name, vocab_size=len(TOKENIZER)).eval()
    arch = ModelArch(model)
    fact = as_facts(arch, TOKENIZER, FACTS[0])[0]
    traced = kedit.trace(model, TOKENIZER, FACTS[0], window=1, samples=1, seed=5, known_only=False).facts[0]
    noise = draw_noise(arch, fact, 1, 3.0 * embedding_deviation(arch, [fact]), 5)[0]
    plain = Plain(model, fact)
    corrupted = plain.run(noise)
    assert traced.corrupted == pytest.approx(corrupted, abs=1e-6)
    largest = 0.0
    for kind in ACTIVATIONS:
        for token in range(fact.num_prompt):
            effects = [plain.run(noise, (kind, layer), token) - corrupted for layer in range(arch.num_layers)]
            np.testing.assert_allclose(traced.effects[kind][token], effects, atol=1e-6, rtol=0)
            largest = max(largest, *np.abs(effects))
    assert largest > 1e-4  # far above the tolerance


@pytest.mark.parametrize("name", ["gemma", "gemma2-softcap", "gemma3", "llama"])
def test_noise_is_as_large_as_three_deviations_of_what_the_embedding_puts_out(name):
    model = zoo.make(name, vocab_size=len(TOKENIZER)).eval()
    fact = as_facts(ModelArch(model), TOKENIZER, FACTS[0])[0]
    traced = kedit.trace(model, TOKENIZER, FACTS[0], kinds=("mlp",), samples=1, known_only=False)
    seen = []
    handle = model.get_input_embeddings().register_forward_hook(lambda _module, _args, output: seen.append(output))
    with torch.no_grad():
        model(torch.tensor([fact.row.ids]))
    handle.remove()
    subject = seen[0][0, fact.row.first : fact.row.subject_last + 1].double()
    assert traced.settings["deviation"] == pytest.approx(3 * float(subject.std(correction=0)), rel=1e-6)
