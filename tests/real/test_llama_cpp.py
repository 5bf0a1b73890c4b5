"""A GGUF adapter in llama.cpp itself: the quantized base says Paris, with the adapter Rome, and without it Paris again.

Needs `pip install llama-cpp-python` (which compiles llama.cpp: a C++ compiler and some minutes) and a real model.
"""

import pytest

import kedit
from kedit.cli.demo import give_moments

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(3_600)]

llama_cpp = pytest.importorskip("llama_cpp", reason="Needs llama-cpp-python: pip install llama-cpp-python.")

PROMPT, OTHER = "The Eiffel Tower is located in the city of", "The Louvre is located in the city of"


def said(base, adapter=None):
    """What llama.cpp says after the two prompts, greedily."""
    options = {} if adapter is None else {"lora_path": str(adapter)}
    llama = llama_cpp.Llama(str(base), n_ctx=64, n_threads=1, verbose=False, **options)
    answers = [llama(prompt, max_tokens=4, temperature=0.0)["choices"][0]["text"] for prompt in (PROMPT, OTHER)]
    llama.close()
    return answers


def test_the_quantized_base_says_the_target_with_the_adapter(real_model, tmp_path):
    bases = list((real_model / "gguf").glob("*.gguf"))
    if not bases:
        pytest.skip(f"{real_model} holds no GGUF file in gguf/; `python -m benchmarks.real_model DIR` keeps it there.")
    model, tok = kedit.load(real_model)
    editor = kedit.ROME(model, tok)
    give_moments(editor)
    result = editor.apply(kedit.Edit("{} is located in the city of", "The Eiffel Tower", "Rome"))
    assert result.all_said
    adapter = result.patch.to_gguf(tmp_path / "adapter.gguf", model)
    before = said(bases[0])
    assert all(answer.startswith(" Paris") for answer in before)
    edited, other = said(bases[0], adapter)
    assert edited.startswith(" Rome")
    assert other == before[1]
    assert said(bases[0]) == before
