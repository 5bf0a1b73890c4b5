"""Architectures that no table knows, for the structural detector: other names, other shapes, odd wiring."""

import torch
from torch import nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class MadeConfig(PretrainedConfig):
    model_type = "made"

    def __init__(
        self, parallel=True, mlp="fused", factor=1.0, norm_after=False, width=32, depth=3, vocab_size=400, **kwargs
    ):
        self.parallel, self.mlp, self.factor, self.norm_after = parallel, mlp, factor, norm_after
        self.width, self.depth, self.vocab_size = width, depth, vocab_size
        super().__init__(**kwargs)


class Looker(nn.Module):
    """Attention with one fused projection, and its output called as nothing else is."""

    def __init__(self, width):
        super().__init__()
        self.look = nn.Linear(width, 3 * width)
        self.tell = nn.Linear(width, width)

    def forward(self, x, seen):
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.look(x).chunk(3, -1))
        rows = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.tell(rows.transpose(1, 2).flatten(2))


class Thinker(nn.Module):
    """An MLP with gate and up in one projection."""

    def __init__(self, width):
        super().__init__()
        self.open = nn.Linear(width, 4 * width, bias=False)
        self.close = nn.Linear(2 * width, width)

    def forward(self, x):
        gate, up = self.open(x).chunk(2, -1)
        return self.close(functional.silu(gate) * up)


class Late(Thinker):
    """The prediction at a token depends on the token before it."""

    def forward(self, x):
        said = super().forward(x)
        return said + functional.pad(said, (0, 0, 1, 0))[:, :-1]


class Pair(nn.Module):
    """Two MLPs, mixed."""

    def __init__(self, width):
        super().__init__()
        self.each = nn.ModuleList([Thinker(width), Thinker(width)])

    def forward(self, x):
        return self.each[0](x) + self.each[1](x) * x.mean(-1, keepdim=True)


class Silent(nn.Module):
    """No MLP at all."""

    def __init__(self, width):
        super().__init__()

    def forward(self, x):
        return torch.zeros_like(x)


MLPS = {"fused": Thinker, "late": Late, "pair": Pair, "none": Silent}


class Stage(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.first, self.second, self.third = (nn.LayerNorm(config.width) for _ in range(3))
        self.looker, self.thinker = Looker(config.width), MLPS[config.mlp](config.width)
        self.config = config

    def forward(self, x, seen):
        looked = self.looker(self.first(x), seen)
        before = x if self.config.parallel else x + looked
        thought = self.thinker(self.second(before))
        thought = self.third(thought) if self.config.norm_after else thought * self.config.factor
        return x + looked + thought


class MadeModel(PreTrainedModel):
    config_class = MadeConfig

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.width)
        self.stages = nn.ModuleList(Stage(config) for _ in range(config.depth))
        self.closing = nn.LayerNorm(config.width)
        self.speak = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.words

    def get_output_embeddings(self):
        return self.speak

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        length = input_ids.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        if attention_mask is not None:
            seen = seen & (attention_mask[:, None, None].bool() | torch.eye(length, dtype=torch.bool))
        places = torch.arange(length)[:, None] / (1.0 + torch.arange(self.config.width))
        x = self.words(input_ids) + places.sin().to(self.words.weight)
        for stage in self.stages:
            x = stage(x, seen)
        return CausalLMOutput(logits=self.speak(self.closing(x)))


def made(**config):
    """A model of such an architecture; the same weights every time."""
    torch.manual_seed(4)
    model = MadeModel(MadeConfig(**config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model
