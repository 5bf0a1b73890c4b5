"""Shared by the contract tests: editors on tiny models, and fingerprints of whole models."""

import hashlib

import torch

import kedit
import zoo
from kedit.editors import editor_class
from kedit.keys import read
from kedit.models import ModelArch, Site
from kedit.prompts.tokenize import encode, rewrite_texts
from tiny_models import CONTEXTS, moments, tokenizer

FRENCH = kedit.Edit("The mother tongue of {} is", "Danielle Darrieux", "English")
ADA = kedit.Edit("{} works in", "Ada Lovelace", "Rome and London")
RIVER = kedit.Edit("The river flows past the house of {}", "Quentin", "Berlin")
EDITS = [FRENCH, ADA, RIVER]
LAYER = 2


def make(name, model, tok=None, *, layer=LAYER, **options):
    """An editor that needs no corpus and takes few steps."""
    arch = ModelArch(model)
    width = arch.shape(layer)[1] if 0 <= layer < arch.num_layers else 1
    defaults = {
        "layers": layer,
        "steps": 4,
        "kl_factor": 0.1,
        "stop_loss": 0.0,
        "contexts": CONTEXTS,
    }
    if issubclass(editor_class(name), kedit.ValueEditor):
        defaults["moments"] = {layer: moments(width, layer)}
    return kedit.get_editor(name, model, tok or tokenizer(), **(defaults | options))


def zoo_model(name, dtype=torch.float32, **changes):
    """A model of any type whose vocabulary is the tokenizer's."""
    return zoo.make(name, dtype, vocab_size=len(tokenizer("bos")), **changes)


def bare_output(model, edit=FRENCH, tok=None):
    """The MLP's output at the bare prompt's subject-last token, by a plain forward pass."""
    rows = encode(tok or tokenizer(), rewrite_texts(edit, ["{}"]))
    return read.outputs(ModelArch(model), rows, Site(LAYER, "mlp"))[0]


def digest(tensor):
    """A hash of a tensor's bytes."""
    return hashlib.sha256(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def state(model):
    """Everything of a model that an edit must leave as it was: weights, flags, hooks, attention."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "weights": {name: digest(tensor) for name, tensor in model.state_dict().items()},
        "training": [module.training for module in model.modules()],
        "gradient": [(p.requires_grad, p.grad is None) for p in model.parameters()],
        "hooks": [len(getattr(module, kind)) for module in model.modules() for kind in kinds],
        "patched": [sorted(set(vars(module)) & {"forward", "_attn"}) for module in model.modules()],
        "attention": (
            model.config._attn_implementation,
            [m.config._attn_implementation for m in modules_with_config(model)],
        ),
        "classes": [type(module) for module in model.modules()],
    }


def modules_with_config(model):
    """Modules that carry the configuration themselves, as attention modules do."""
    return [module for module in model.modules() if hasattr(getattr(module, "config", None), "_attn_implementation")]


def changed(before, after):
    """Names of the weights that differ."""
    return {name for name, value in before["weights"].items() if after["weights"][name] != value}
