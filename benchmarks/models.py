"""Models of real shapes with random weights, and the tokenizer that goes with them."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase

from kedit import embedded


def gpt2_small(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """GPT-2 small's shape: 12 blocks, width 768, vocabulary 50,257."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)).to(dtype).eval()


def tokenizer() -> PreTrainedTokenizerBase:
    """GPT-2's tokenizer where the test data is, else the embedded model's (more tokens per word)."""
    data = os.environ.get("KEDIT_TEST_DATA")
    folder = Path(data) / "tokenizers" / "gpt2" if data else None
    if folder is not None and folder.is_dir():
        return AutoTokenizer.from_pretrained(folder)
    return embedded.load()[1]
