"""Compile every kernel to machine code for GPUs that need not be present. Run as a script; prints JSON.

Triton must be imported without TRITON_INTERPRET here, so this runs in a process of its own.
"""

from __future__ import annotations

import json
import sys

import torch
import triton
from packaging.version import Version
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kedit.capture import kernel, triton_rows

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
FLOATS = ("scaling", "cap", "floor")
FLOAT32_POINTERS = ("p_ptr", "dp_ptr", "ds_ptr", "lse_ptr")


def signature(function: object, dtype: str, constants: dict[str, object]) -> dict[str, str]:
    types = {}
    for name in function.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name == "pos_ptr":
            types[name] = "*i64"
        elif name == "allow_ptr":
            types[name] = "*i1"
        elif name.endswith("_ptr"):
            types[name] = "*fp32" if name in FLOAT32_POINTERS else f"*{dtype}"
        else:
            types[name] = "fp32" if name in FLOATS else "i32"
    return types


def compile_one(function: object, arch: int, dtype: torch.dtype, rows: int, groups: int, width: int, on: bool) -> int:
    constants = dict(triton_rows.tiles(rows, groups, width, 2048, dtype).constants(groups, width))
    flags = {name: on for name in ("ALLOW", "ADD", "CAUSAL", "WINDOW", "CAPPED", "SINKS", "WANT_DQ", "WANT_DS")}
    flags |= {"LSE": not on, "UPCAST": False, "WANT_DQ": True, "WANT_DS": True}
    flags["PRECISION"] = "ieee" if dtype == torch.float32 else "tf32"
    constants |= {name: value for name, value in flags.items() if name in function.arg_names}
    source = ASTSource(function, signature(function, TYPES[dtype], constants), constants)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": 4, "num_stages": 2})
    assert built.asm["cubin"]
    shared = built.metadata.shared
    assert shared <= SHARED_LIMIT[arch], f"{shared} bytes of shared memory"
    return shared


def main(
    archs: list[int], shapes: list[tuple[int, int, int]], dtypes: list[torch.dtype], features: tuple[bool, ...]
) -> dict[str, object]:
    found: dict[str, object] = {}
    for arch in archs:
        for dtype in dtypes:
            for rows, groups, width in shapes:
                for on in features:
                    for name in ("rows_fwd_kernel", "rows_bwd_dq_kernel", "rows_bwd_dk_kernel"):
                        key = f"sm_{arch} {name} {TYPES[dtype]} R{rows} G{groups} D{width} features={on}"
                        try:
                            found[key] = compile_one(getattr(kernel, name), arch, dtype, rows, groups, width, on)
                        except Exception as error:  # the report names every kernel that failed
                            found[key] = f"{type(error).__name__}: {error}"
    return found


if __name__ == "__main__":
    full = "--full" in sys.argv
    shapes = [(1, 1, 64), (1, 4, 128), (3, 1, 256), (5, 8, 80)] if full else [(3, 1, 64)]
    # Triton compiles for Blackwell from 3.3 on; older ones end the process.
    archs = [80, 90] + [100] * (Version(triton.__version__) >= Version("3.3"))
    found = main(archs, shapes, list(TYPES) if full else [torch.bfloat16], (False, True) if full else (True,))
    json.dump(found, sys.stdout)
