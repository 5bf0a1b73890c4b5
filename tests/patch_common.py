"""Shared by the patch tests: patches from seeds, and weights as bytes."""

import torch

from kedit.models import ModelArch
from kedit.patch import EditPatch, fingerprints
from kedit.patch.delta import DenseDelta, LowRankDelta
from tiny_models import tiny_model as model

TYPES = ("gpt2", "llama", "qwen2", "gptj")


def bytes_of(subject):
    """All weights of a model as bytes, by name."""
    return {
        name: tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name, tensor in subject.state_dict().items()
    }


def random_delta(shape, rank, seed=0, scale=0.1):
    """A low-rank update, or a dense one for rank None."""
    generator = torch.Generator().manual_seed(seed)
    if rank is None:
        return DenseDelta(scale * torch.randn(shape, generator=generator))
    left = scale * torch.randn(shape[0], rank, generator=generator)
    return LowRankDelta(left, torch.randn(shape[1], rank, generator=generator))


def patch_for(subject, ranks, seed=0, scale=0.1, provenance=None):
    """A patch with a random update of a rank per layer: ``{layer: rank}``."""
    arch = ModelArch(subject)
    weights = {layer: arch.weight(layer) for layer in ranks}
    deltas = {
        weights[layer].name: random_delta(tuple(weights[layer].matrix.shape), rank, seed + layer, scale)
        for layer, rank in ranks.items()
    }
    known = {"editor": "rome", "model": {"name": "tiny", "type": arch.model_type}} if provenance is None else provenance
    return EditPatch(deltas, fingerprints(arch, deltas), known)


@torch.no_grad()
def logits(subject, seed=0):
    """Logits [2, 9, V] of fixed tokens."""
    ids = torch.randint(2, 200, (2, 9), generator=torch.Generator().manual_seed(seed))
    return subject(input_ids=ids).logits


def save_checkpoint(folder, model_type="llama", dtype=torch.bfloat16, shard="30KB"):
    """Write a tiny sharded checkpoint; return the model."""
    subject = model(model_type, dtype=dtype)
    subject.save_pretrained(folder, max_shard_size=shard)
    return subject
