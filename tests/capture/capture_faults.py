"""Faults that are planted in the kernels' source, and the case that has to notice each."""

from __future__ import annotations

from dataclasses import dataclass

from capture_cases import Case

_ROWS = "    return g, kv * G + g, r, pos, tl.where(live, pos, 0).to(tl.int64)"
_BOOL = "tl.load(allow_ptrs[:, None] + n[None, :] * san, mask=seen, other=0)"


@dataclass(frozen=True)
class Fault:
    """Replace ``old`` by ``new`` everywhere in the source; ``case`` fails then."""

    old: str
    new: str
    case: Case


FAULTS = {
    "causal mask off by one": Fault("n[None, :] <= at[:, None]", "n[None, :] < at[:, None]", Case()),
    "queries at the wrong key": Fault("at = query + first", "at = query", Case(queries=5)),
    "window off by one": Fault("at[:, None] - window", "at[:, None] - window - 1", Case(window=4, keys=63)),
    "bool mask ignored": Fault(f"{_BOOL} != 0", f"{_BOOL} != 2", Case(allow="bk")),
    "mask of the wrong query": Fault(
        "batch * sab + head * sah + query * sat", "batch * sab + head * sah", Case(allow="bqk", causal=False)
    ),
    "mask of the wrong head": Fault("batch * sdb + head * sdh", "batch * sdb + kv * sdh", Case(add="hqk", groups=4)),
    "additive mask twice": Fault("s += add", "s += add + add", Case(add="bqk", causal=False)),
    "sinks ignored": Fault("tl.exp(sink - higher)", "0.0 * sink", Case(sinks=True)),
    "no softcap": Fault("s = cap * _tanh(s / cap)", "s = s * 1.0", Case(softcap=3.0)),
    "no softcap in the gradient": Fault("(1 - (s / cap) * (s / cap))", "1", Case(softcap=3.0)),
    "gradient without its mean": Fault("p * (dp - weighted[:, None])", "p * dp", Case()),
    "gradient without scaling": Fault("(dp - weighted[:, None])) * scaling", "(dp - weighted[:, None]))", Case()),
    "key heads interleaved": Fault(_ROWS, _ROWS.replace("kv * G + g", "g * 2 + kv"), Case(groups=4, kv_heads=2)),
    "duplicates counted once": Fault(
        "tl.where(same, 1.0, 0.0)", "tl.where(same & (m[None, :] == m[:, None]), 1.0, 0.0)", Case()
    ),
    "duplicates of different heads joined": Fault(" & (g[:, None] == g[None, :])", "", Case(groups=4)),
    "running sum not rescaled": Fault(
        "total * tl.exp(top - safe) + tl.sum", "total + tl.sum", Case(keys=63, width=256)
    ),
    "last block of keys left out": Fault("range(0, TK, BN)", "range(0, TK - BN + 1, BN)", Case(keys=63, width=256)),
    "width not masked": Fault("(d < D)", "(d < BD)", Case(width=80, packed=True)),
    "dead rows read": Fault(
        "live = inside & (pos >= 0)\n" + _ROWS,
        "live = inside\n" + _ROWS.replace("tl.where(live, pos, 0)", "tl.maximum(pos, 0)"),
        Case(dead=True, causal=False),
    ),
    "dk overwritten": Fault("(before + dk)", "(dk)", Case(groups=4)),
    "dk of the first rows only": Fault("range(0, blocks)", "range(0, 1)", Case(rows=33, groups=4)),
}
