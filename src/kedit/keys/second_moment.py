"""Second moments C = E[k kᵀ] (uncentred) of the down-projection's input, and their factors.

They say which directions the keys of ordinary text use; the closed forms leave those alone as far as they can.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kedit.errors import ConfigError, NonFiniteError, SingularMomentError
from kedit.models import Experts, ModelArch
from kedit.utils.device_memory import device_with_room, offload_if_cpu
from kedit.utils.linalg import cholesky, is_finite, whiten
from kedit.utils.warning import warn_user

RIDGE = 1e-4
OUTLIER = 10.0


@dataclass(frozen=True)
class Moment:
    """The second moment of one layer.

    Attributes:
        matrix: C as the closed forms use it, ridge included, [I, I]; of a mixture of experts one per expert, [N, I, I],
            of the keys weighted by the router and over all tokens, so that they can be compared.
        tokens: how many keys it was estimated from, every token's counted; ``None`` for a matrix handed in.
        ridge: what was added to the diagonal, relative to its mean (:func:`typical`).
        split_half: relative difference between the estimates from two halves of the corpus.
        effective_rank: (tr C)² / tr C²: how many directions carry the keys.
    """

    matrix: Tensor
    tokens: int | None = None
    ridge: float = 0.0
    split_half: float | None = None
    effective_rank: float | None = None

    def warn_if_scarce(self, layer: int) -> None:
        """Warn where the estimate saw fewer keys than their width."""
        width = self.matrix.shape[:-1].numel()  # of a mixture, of all experts together: a token reaches but a few
        if self.tokens is not None and self.tokens < width:
            warn_user(
                f"The second moment of layer {layer} saw {self.tokens} keys of width {width}: directions it never "
                "saw are held up by the ridge alone. Estimate it from more text."
            )

    def statistics(self) -> dict[str, Any]:
        """All but the matrix, for a patch's provenance."""
        return {
            "tokens": self.tokens,
            "ridge": self.ridge,
            "split_half": self.split_half,
            "effective_rank": self.effective_rank,
        }


COPIES = 5  # of C in float64 that its decomposition may take: itself, the result, and room to work (eigenvectors: two)


class SecondMoments(Mapping[int, Moment]):
    """Second moments by layer; their Cholesky factors are computed once and kept."""

    def __init__(self, moments: Mapping[int, Moment | Tensor]) -> None:
        self._moments = {
            layer: moment if isinstance(moment, Moment) else Moment(moment) for layer, moment in moments.items()
        }
        self._factors: dict[tuple[int, int], Tensor] = {}
        self._symmetric: set[int] = set()

    def __getitem__(self, layer: int) -> Moment:
        return self._moments[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self._moments)

    def __len__(self) -> int:
        return len(self._moments)

    def factor(self, layer: int, device: torch.device | None = None) -> Tensor:
        """Lower Cholesky factor of C, [I, I] float64; raises ``SingularMomentError`` where there is none.

        It is computed once, for the first ``device`` that is asked for (where C is, if none), and kept there; in main memory
        if the device has no room for it, or as soon as it is asked for there.
        """
        return self._factor(layer, 0, device)

    def whiten(self, layer: int, keys: Tensor) -> Tensor:
        """C⁻¹ k for each key, [n, I] float64; of a mixture expert by expert, [n, N · I].

        Raises:
            SingularMomentError: C, or that of an expert that some key uses, is not positive definite.
        """
        return self.each_expert(
            layer, keys, lambda expert, part: whiten(self._factor(layer, expert, part.device), part)
        )

    def each_expert(self, layer: int, keys: Tensor, function: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Apply ``function`` (number, keys [n, I]) to every expert's part of keys [n, N · I]; unused parts stay 0.

        The result is where the keys are.
        """
        width = self.matrices(layer).shape[-1]
        parts = list(keys.to(torch.float64).split(width, dim=1))
        for expert, part in enumerate(parts):
            if len(parts) == 1 or bool(part.any()):
                parts[expert] = function(expert, part).to(keys.device)
        return torch.cat(parts, 1)

    def matrices(self, layer: int) -> Tensor:
        """The layer's C, one per expert, [N, I, I]; N is 1 where there is no mixture."""
        if layer not in self._moments:
            raise ConfigError(
                f"There is no second moment for layer {layer}. Does the editor leave it out of its moment_layers?"
            )
        matrix = self._moments[layer].matrix
        return matrix if matrix.ndim == 3 else matrix[None]

    def matrix(self, layer: int, expert: int, device: torch.device | None) -> Tensor:
        """C [I, I] on ``device`` (where it is, if none), or in main memory if that has no room to decompose it."""
        moment = self.matrices(layer)[expert]
        return moment.to(device_with_room(device or moment.device, COPIES * moment.numel() * torch.float64.itemsize))

    def _factor(self, layer: int, expert: int, device: torch.device | None) -> Tensor:
        key = (layer, expert)
        if key not in self._factors:
            self._factors[key] = cholesky(self.matrix(layer, expert, device), layer)
        self._factors[key] = offload_if_cpu(device, self._factors[key])
        return self._factors[key]

    @classmethod
    def from_npz(cls, paths: Mapping[int, str | Path]) -> SecondMoments:
        """Read statistics that the ROME and MEMIT code wrote, ``{layer: path}``; no ridge is added.

        Raises:
            ConfigError: a file is not such a statistic.
        """
        moments: dict[int, Moment | Tensor] = {}
        for layer, path in paths.items():
            try:
                with np.load(path, allow_pickle=False) as file:
                    total, count = file["mom2.mom2"], int(file["mom2.count"])
            except (OSError, KeyError, ValueError, TypeError, zipfile.BadZipFile) as error:
                raise ConfigError(
                    f"{path} is no statistic of the ROME or MEMIT code, which holds mom2.mom2 and mom2.count: {error}."
                ) from error
            if total.ndim != 2 or count < 1 or not np.isfinite(total).all():
                raise ConfigError(f"{path}: mom2.mom2 is not a finite matrix of at least one key.")
            moments[layer] = Moment(torch.from_numpy(total / np.float32(count)), count)
        return cls(moments)

    def check(self, arch: ModelArch, layers: tuple[int, ...]) -> None:
        """Raise :class:`ConfigError` unless every layer has a symmetric matrix of its keys' width."""
        for layer in layers:
            if layer not in self._moments:
                raise ConfigError(
                    f"There is no second moment for layer {layer}; given are layers {sorted(self._moments)}. "
                    "Pass moments={layer: C} for every edited layer, or none to have them estimated."
                )
            matrix, width, experts = self._moments[layer].matrix, arch.shape(layer)[1], arch.experts(layer)
            wanted = (width, width) if experts is None else (experts.count, width, width)
            if not isinstance(matrix, Tensor) or tuple(matrix.shape) != wanted:
                shape = tuple(matrix.shape) if isinstance(matrix, Tensor) else type(matrix).__name__
                raise ConfigError(
                    f"The second moment of layer {layer} is {shape}; its keys have {width} numbers, so {wanted} is needed."
                )
            self._check_symmetric(layer, matrix)

    def _check_symmetric(self, layer: int, matrix: Tensor) -> None:
        if layer in self._symmetric:
            return
        if not matrix.is_floating_point() or not is_finite(matrix):
            raise ConfigError(
                f"The second moment of layer {layer} ({matrix.dtype}) is not made of finite real numbers, so it is no E[k kᵀ]. "
                "Check where it comes from; NaN in it means NaN in the keys."
            )
        skew = float((matrix - matrix.mT).abs().max())
        if skew > 1e-3 * float(matrix.abs().max()):
            raise ConfigError(
                f"The second moment of layer {layer} is not symmetric (it differs from its transpose by up to {skew:.3g}), "
                "so it is no E[k kᵀ]. Check where it comes from."
            )
        self._symmetric.add(layer)


class Accumulator:
    """Sums k kᵀ of one layer, batch by batch, in float32 (float64 for float64 keys).

    Two sketches, C z over two halves of the batches for a few random z, tell how far the halves of the corpus differ
    without a second matrix.
    """

    probes = 16
    first = 0  # the half that begins; of several processes each second one begins with the other, or one half might stay empty

    def __init__(self, width: int, device: torch.device, dtype: torch.dtype) -> None:
        self.total = torch.zeros((width, width), dtype=dtype, device=device)
        self.counts = [0, 0]
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, (width, self.probes), generator=generator) * 2 - 1
        self._signs = signs.to(device, dtype)
        self._sketches = torch.zeros((2, width, self.probes), dtype=dtype, device=device)

    def add(self, keys: Tensor) -> None:
        """Add the keys [n, I] of one batch."""
        keys = keys.to(self.total.dtype)
        half = self._count(len(keys))
        self.total.addmm_(keys.T, keys)
        self._sketches[half] += keys.T @ (keys @ self._signs)

    def _count(self, keys: int) -> int:
        """Count some keys, and say which half they belong to.

        To be called before they are summed, so that the counts tell where Ctrl-C left the sums half done.
        """
        half = self.first if self.counts[0] == self.counts[1] else int(self.counts[0] > self.counts[1])
        self.counts[half] += keys
        return half

    def state(self) -> dict[str, Tensor]:
        """The tensors that :meth:`restore` needs to go on."""
        return {"total": self.total, "sketches": self._sketches, "counts": torch.tensor(self.counts)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state` returned; raises ``ValueError`` where it is of another shape."""
        if state["total"].shape != self.total.shape or state["sketches"].shape != self._sketches.shape:
            raise ValueError("the state of another accumulator")
        self.total.copy_(state["total"])
        self._sketches.copy_(state["sketches"])
        self.counts = [int(count) for count in state["counts"]]

    def moment(self, layer: int, ridge: float = RIDGE) -> Moment:
        """C with its ridge.

        Raises:
            NonFiniteError: some key was NaN or infinite.
            SingularMomentError: every key was 0.
        """
        tokens = sum(self.counts)
        matrix = self.total / tokens
        if not torch.isfinite(matrix).all():
            raise NonFiniteError(
                f"The second moment of layer {layer} holds NaN or infinite numbers: the model's keys do. Check its weights, or "
                "load it in float32 or bfloat16 if it is float16."
            )
        trace = float(matrix.diagonal(dim1=-2, dim2=-1).sum())
        if trace == 0:
            raise SingularMomentError(f"All {tokens} keys of layer {layer} are 0, so nothing can be written there.")
        spread = trace**2 / float(matrix.square().sum())
        difference = None
        if min(self.counts) > 0:
            halves = [sketch / count for sketch, count in zip(self._sketches, self.counts, strict=True)]
            difference = float((halves[0] - halves[1]).norm() / ((halves[0] + halves[1]) / 2).norm())
        # Of all experts alike: one that saw nothing has no scale of its own.
        diagonal = matrix.diagonal(dim1=-2, dim2=-1)
        diagonal.add_(ridge * typical(diagonal))
        return Moment(matrix, tokens, ridge, difference, spread)


def typical(diagonal: Tensor) -> float:
    """A typical E[k²] of one neuron: the mean, or :data:`OUTLIER` times the median where that is less.

    An attention sink (the first token, often) can have a key hundreds of times as long as all others. It raises the mean of
    a few neurons' squares so far that a ridge relative to it would drown what ordinary keys say.
    """
    seen = diagonal[diagonal > 0]
    return min(float(diagonal.mean()), OUTLIER * float(seen.median()))


class ExpertsAccumulator(Accumulator):
    """The same for a mixture of experts: Σ κ κᵀ expert by expert, without what two experts have in common.

    A token that the router sends elsewhere counts as a key of 0, so an expert that ordinary text hardly uses is freer to be
    written.
    """

    def __init__(self, experts: Experts, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(experts.width, device, dtype)
        self._experts = experts
        self.total = self.total.new_zeros((experts.count, *self.total.shape))
        self._sketches = self.total.new_zeros((2, experts.count, experts.width, self.probes))

    def route(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> None:
        """Add the keys of some tokens, as the experts are called with them: [n, H], [n, k], [n, k]."""
        half = self._count(len(hidden))
        for expert in chosen.unique().tolist():
            row, place = torch.where(chosen == expert)
            keys = self._experts.expert_keys(hidden[row], expert).to(self.total.dtype)
            keys = keys * weights[row, place, None].to(keys)
            self.total[expert].addmm_(keys.T, keys)
            self._sketches[half, expert] += keys.T @ (keys @ self._signs)
