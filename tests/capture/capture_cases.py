"""Random attention problems for the row implementations, and their error against the float64 reference."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kedit.capture.attention_rule import Rule
from kedit.capture.autograd import rows_node
from kedit.capture.dispatch import RowsBackend
from kedit.capture.reference import reference_rows


@dataclass(frozen=True)
class Case:
    """One problem; ``groups`` query heads share each of ``kv_heads`` key heads, the last ``queries`` keys are queried."""

    keys: int = 17
    queries: int = 0  # 0: as many as keys
    width: int = 64
    rows: int = 3
    groups: int = 1
    kv_heads: int = 2
    batch: int = 2
    dtype: torch.dtype = torch.float32
    causal: bool = True
    upper_left: bool = False
    window: int = 0
    softcap: float | None = None
    sinks: bool = False
    allow: str = ""  # axes of the bool mask that are kept: "bhqk"; others have size 1
    add: str = ""
    lse: bool = False
    packed: bool = False  # q, k as the heads of one [B, T, 3, A, D] product
    dead: bool = False  # all rows dead

    def __str__(self) -> str:
        default = Case()
        changed = {n: v for n, v in vars(self).items() if v != getattr(default, n)}
        return " ".join(f"{n}={str(v).replace('torch.', '')}" for n, v in changed.items()) or "plain"


AWKWARD = [
    Case(keys=keys, width=width, rows=rows, groups=groups, batch=1 if keys == 257 else 2)
    for keys, width, rows, groups in [
        (1, 64, 1, 1), (1, 80, 3, 4), (17, 64, 5, 8), (17, 80, 2, 4), (17, 128, 1, 1), (17, 256, 4, 1),
        (63, 64, 1, 4), (63, 80, 3, 1), (63, 128, 5, 8), (63, 256, 2, 4), (257, 64, 2, 1), (257, 80, 1, 8),
        (257, 128, 3, 4), (257, 256, 5, 1),
    ]
]  # fmt: skip
FEATURES = [
    Case(causal=False),
    Case(queries=5, groups=4),
    Case(queries=5, upper_left=True, keys=23),
    Case(window=4, keys=63),
    Case(window=4, queries=5, keys=63, groups=4),
    Case(softcap=3.0, groups=4),
    Case(softcap=3.0, window=5, sinks=True, width=80),
    Case(sinks=True, groups=4, rows=5),
    Case(allow="bqk", causal=False, groups=4),
    Case(allow="bk"),
    Case(allow="bhqk", queries=5, groups=4),
    Case(add="bqk", causal=False),
    Case(add="hqk", groups=4, width=80),
    Case(add="bqk", allow="bk", softcap=2.0, sinks=True, groups=4),
    Case(lse=True, groups=4),
    Case(lse=True, sinks=True, keys=63),
    Case(packed=True, groups=1),
    Case(packed=True, groups=1, width=80, keys=63),
    Case(dead=True),
    Case(rows=70, keys=23),
    Case(rows=33, groups=4),
    Case(batch=1, kv_heads=1, groups=8, rows=1, queries=1, keys=63),
]
HALVES = [
    replace(case, dtype=dtype)
    for dtype in (torch.bfloat16, torch.float16)
    for case in (Case(groups=4), Case(keys=63, width=128, rows=5, add="bqk"), Case(softcap=3.0, sinks=True, width=80))
]
CASES = AWKWARD + FEATURES + HALVES
TOLERANCE = {torch.float32: (2e-6, 2e-6), torch.float16: (2e-6, 1e-3), torch.bfloat16: (2e-6, 8e-3)}


def build(case: Case, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Rule, Tensor]:
    """q, k, positions (with duplicates and dead rows), rule and the weights of a linear loss on the rows."""
    torch.manual_seed(len(str(case)))
    heads, queries = case.kv_heads * case.groups, case.queries or case.keys
    size = {"b": case.batch, "h": heads, "q": queries, "k": case.keys}
    if case.packed:
        product = torch.randn(case.batch, case.keys, 3, heads, case.width).to(device, case.dtype)
        q, k = (product[:, :, i].transpose(1, 2) for i in (0, 1))
    else:
        q = torch.randn(case.batch, queries, heads, case.width).to(device, case.dtype).transpose(1, 2)
        k = torch.randn(case.batch, case.keys, case.kv_heads, case.width).to(device, case.dtype).transpose(1, 2)
    positions = torch.randint(0, queries, (case.batch, case.rows))
    if case.rows > 1:
        positions[0, 1] = positions[0, 0]
        positions[-1, -1] = -1
    if case.dead:
        positions.fill_(-1)
    shape = lambda axes: [size[axis] if axis in axes else 1 for axis in "bhqk"]  # noqa: E731
    allow = torch.rand(shape(case.allow)).to(device) < 0.7 if case.allow else None
    add = None
    if case.add:
        add = torch.randn(shape(case.add)).to(case.dtype)
        add = add.masked_fill(torch.rand(shape(case.add)) < 0.3, torch.finfo(case.dtype).min).to(device)
    rule = Rule(
        scaling=1.7 * case.width**-0.5,
        allow=allow,
        add=add,
        causal=case.causal,
        offset=0 if case.upper_left else None,
        window=case.window,
        softcap=case.softcap,
        sinks=torch.randn(heads).to(device, case.dtype) if case.sinks else None,
    )
    weights = torch.randn(case.batch, heads, case.rows, case.keys).to(device)
    return q, k, positions.to(device), rule, weights


def in_float64(rule: Rule) -> Rule:
    """The same rule for the reference: the mask's smallest number stays the smallest."""
    add = rule.add
    if add is not None:
        add = add.double().masked_fill(add <= torch.finfo(add.dtype).min, torch.finfo(torch.float64).min)
    return replace(rule, add=add, sinks=None if rule.sinks is None else rule.sinks.double())


def log_normaliser(q: Tensor, k: Tensor, positions: Tensor, rule: Rule) -> Tensor:
    """LSE of the rows, [B, A, R], as a fast attention would return it."""
    zero = replace(rule, lse=torch.zeros(q.shape[0], q.shape[1], positions.shape[1], dtype=torch.float64))
    total = reference_rows(q.double(), k.double(), positions, in_float64(zero)).sum(-1)
    if rule.sinks is not None:
        total = total + rule.sinks.double().exp()[:, None]
    return total.clamp(min=1e-300).log()


def errors(case: Case, backend: RowsBackend, device: str = "cpu") -> tuple[float, float, float]:
    """Largest absolute error of the rows and largest errors of dq and dk relative to the largest true entry."""
    q, k, positions, rule, weights = build(case, device)
    if case.lse:
        rule = replace(rule, lse=log_normaliser(q, k, positions, rule).float())
    true_q, true_k = q.detach().double().requires_grad_(), k.detach().double().requires_grad_()
    want = reference_rows(true_q, true_k, positions, replace(in_float64(rule), lse=None))
    want_grads = torch.autograd.grad((want * weights.double()).sum(), (true_q, true_k))
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    rows = rows_node(q, k, positions, rule, backend)
    grads = torch.autograd.grad((rows * weights).sum(), (q, k))
    assert rows.dtype == torch.float32
    worst = [(rows.double() - want).abs().max().item()]
    for found, true in zip(grads, want_grads, strict=True):
        worst.append((found.double() - true).abs().max().item() / max(true.abs().max().item(), 1e-3))
    return worst[0], worst[1], worst[2]


def passes(case: Case, worst: tuple[float, float, float]) -> bool:
    """Whether errors lie within the tolerance of the dtype; NaN does not."""
    rows, grads = TOLERANCE[case.dtype]
    return worst[0] <= rows and worst[1] <= grads and worst[2] <= grads
