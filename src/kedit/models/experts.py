"""A mixture of experts, seen as one linear memory.

At a token the MLP gives Σ_e w_e (W_e k_e + b_e), over the experts e that the router chose with the weights w_e. With the
experts' matrices side by side, W = [W_1 ... W_N], and the weighted keys below one another, κ = [w_1 k_1; ...; w_N k_N], zero
for experts that were not chosen, this is W κ and a constant. So a fact is written into W at κ as into any down-projection:
into the experts that serve the token, in the proportion that the router uses them. κ is the key of the block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kedit.errors import ArchitectureError, UnsupportedError
from kedit.models.compat import has_gate
from kedit.models.offload import offloaded
from kedit.models.weight import Weight


@dataclass(frozen=True)
class Experts:
    """The experts of one block, in the fused form of transformers.

    Attributes:
        module: holds the fused tensors; called with hidden states [n, H], chosen experts [n, k] and their weights [n, k].
        path: its name in the model.
        leaf: name of the fused down-projections.

    Raises:
        UnsupportedError: the module is not of that form, or does something to an expert's output that is not linear.
    """

    module: Any
    path: str
    leaf: str

    def __post_init__(self) -> None:
        """Check that the module is of the form that is understood."""
        fused = getattr(self.module, self.leaf, None)
        known = all(hasattr(self.module, name) for name in ("has_bias", "is_transposed", "_apply_gate"))
        if not known or not isinstance(fused, nn.Parameter) or fused.ndim != 3:
            raise UnsupportedError(
                f"{self.path} is a {type(self.module).__name__}: kedit edits experts whose down-projections are one plain tensor "
                "[experts, ...], as transformers loads them without quantization. Load the model so."
            )
        if getattr(self.module, "has_post_expert_norm", False) or getattr(self.module, "_is_expert_parallel", False):
            raise UnsupportedError(
                f"The experts {self.path} normalise each expert's output or are spread over processes, so the MLP is no linear "
                "function of their keys and no closed form holds. Edit a dense model, or load it on one process."
            )

    @property
    def fused(self) -> nn.Parameter:
        """The down-projections, [N, O, I] or [N, I, O]."""
        parameter: nn.Parameter = getattr(self.module, self.leaf)
        return parameter

    @property
    def transposed(self) -> bool:
        """Whether an expert's matrix is stored as [I, O]."""
        return bool(self.module.is_transposed)

    @property
    def count(self) -> int:
        """Number of experts, N."""
        return int(self.fused.shape[0])

    @property
    def width(self) -> int:
        """Width of one expert's key, I."""
        return self.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I) of an expert's matrix."""
        rows, columns = self.fused.shape[1:]
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def names(self) -> list[str]:
        """Names of the experts' matrices."""
        return [f"{self.path}.{self.leaf}[{index}]" for index in range(self.count)]

    def weight(self, index: int) -> Weight:
        """One expert's matrix."""
        if index >= self.count:
            raise ArchitectureError(f"{self.path}.{self.leaf} has {self.count} experts, and no number {index}.")
        away = offloaded(self.module, self.leaf) if self.fused.is_meta else None
        return Weight(self.names[index], self.fused, self.transposed, index, away)

    def expert_keys(self, hidden: Tensor, expert: int) -> Tensor:
        """k_e: what one expert's down-projection sees of hidden states [n, H]; [n, I]."""
        module = self.module
        gated = has_gate(module)
        name = "gate_up_proj" if gated else "up_proj"
        matrix = self._read(name)[expert].to(hidden.device)
        inner = hidden.to(matrix) @ (matrix if module.is_transposed else matrix.T)
        if module.has_bias:
            inner = inner + self._read(f"{name}_bias")[expert].to(inner)
        keys: Tensor = module._apply_gate(inner) if gated else module.act_fn(inner)
        return keys

    def _read(self, leaf: str) -> Tensor:
        parameter: Tensor = getattr(self.module, leaf)
        away = offloaded(self.module, leaf) if parameter.is_meta else None
        return parameter if away is None else away.read()

    @torch.no_grad()
    def keys(self, hidden: Tensor, chosen: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
        """κ of some tokens.

        Args:
            hidden: what the experts see, [n, H].
            chosen: the router's choice, [n, k].
            weights: the router's weights, [n, k].
            dtype: of the result.

        Returns:
            [n, N · I], expert by expert; zero where an expert was not chosen.
        """
        weighted = torch.zeros((len(hidden), self.count, self.width), dtype=dtype, device=hidden.device)
        for expert in chosen.unique().tolist():
            row, place = torch.where(chosen == expert)
            keys = self.expert_keys(hidden[row], expert).to(dtype)
            weighted[row, expert] = weights[row, place, None].to(dtype) * keys
        return weighted.flatten(1)
