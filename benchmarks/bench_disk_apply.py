"""Measure time and peak memory of `kedit patch apply` on a large checkpoint, beside `cp` of the same folder.

    python benchmarks/bench_disk_apply.py --gigabytes 8 --folder /scratch --out benchmarks/results/disk_apply.md

It writes a synthetic Llama checkpoint in bfloat16 (the shapes of an 8-billion-parameter model, as many blocks as fit) in
shards of about 1 GB, patches five layers, and measures each run in a process of its own. Both `cp` and kedit are timed
until the data are on the disk.
"""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

H, INNER, KV, VOCAB = 4096, 14336, 1024, 32000
BLOCK = {
    "self_attn.q_proj": (H, H),
    "self_attn.k_proj": (KV, H),
    "self_attn.v_proj": (KV, H),
    "self_attn.o_proj": (H, H),
    "mlp.gate_proj": (INNER, H),
    "mlp.up_proj": (INNER, H),
    "mlp.down_proj": (H, INNER),
}


def shapes(layers):
    """Every tensor of the checkpoint, by name."""
    found = {"model.embed_tokens.weight": (VOCAB, H), "model.norm.weight": (H,), "lm_head.weight": (VOCAB, H)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        found |= {f"{prefix}.{name}.weight": shape for name, shape in BLOCK.items()}
        found |= {f"{prefix}.{name}.weight": (H,) for name in ("input_layernorm", "post_attention_layernorm")}
    return found


def make_checkpoint(folder, gigabytes):
    """Write the checkpoint shard by shard; return its number of blocks."""
    import torch

    from kedit.utils.files import write_safetensors

    per_block = 2 * sum(a * b for a, b in BLOCK.values())
    layers = max(6, round((gigabytes * 1e9 - 4 * VOCAB * H) / per_block))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": H,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": VOCAB,
        "dtype": "bfloat16",
        "tie_word_embeddings": False,
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    shards, size = [{}], 0
    for name, shape in shapes(layers).items():
        numbers = 2 * math.prod(shape)
        if size + numbers > 1e9:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += numbers
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: (0.02 * torch.randn(shape)).bfloat16() for name, shape in shard.items()}
        write_safetensors(folder / file, tensors, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return layers


def make_patch(folder, layers, rank, path):
    """Write a patch of five neighbouring layers, with the fingerprints of the checkpoint."""
    import torch

    from kedit.models.fingerprint import tensor_fingerprint
    from kedit.patch import EditPatch
    from kedit.patch.checkpoint.read import Checkpoint
    from kedit.patch.delta import LowRankDelta

    checkpoint = Checkpoint.open(folder)
    names = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in range((layers - 5) // 2, (layers + 5) // 2)]
    deltas = {name: LowRankDelta(1e-3 * torch.randn(H, rank), torch.randn(INNER, rank)) for name in names}
    prints = {name: tensor_fingerprint(checkpoint.read(name)) for name in names}
    EditPatch(deltas, prints, {"editor": "bench", "model": {"name": "synthetic"}}).save(path)


def measure(command):
    """Seconds and peak resident memory of a process; this one has to be small, as a child starts with its parent's peak."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"failed: {command}")
    return time.perf_counter() - start, usage.ru_maxrss / 1e6


def drop_caches():
    """Forget what was read, where this process may ask for that; return whether it could."""
    try:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=8)
    parser.add_argument("--folder", type=Path, required=True, help="scratch space of three times that size; removed")
    parser.add_argument("--rank", type=int, default=10)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--make", action="store_true", help="only write the checkpoint and the patch")
    args = parser.parse_args()
    work = args.folder / "bench-disk-apply"
    base, patch = work / "base", work / "patch.safetensors"
    rows = []
    try:
        if args.make:
            make_patch(base, make_checkpoint(base, args.gigabytes), args.rank, patch)
            return
        subprocess.run([sys.executable, *sys.argv, "--make"], check=True)
        layers = json.loads((base / "config.json").read_text())["num_hidden_layers"]
        total = sum(path.stat().st_size for path in base.iterdir()) / 1e9
        apply = [
            sys.executable,
            "-m",
            "kedit",
            "patch",
            "apply",
            str(base),
            "--patch",
            str(patch),
            "--out",
            str(work / "o"),
        ]
        runs = {
            "cp -r, then sync": ["sh", "-c", f"cp -r {base} {work}/o && sync -f {work}/o"],
            "kedit patch apply": apply,
            "kedit patch apply --link": [*apply, "--link"],
        }
        cold = False
        for name, command in [item for _ in range(args.rounds) for item in runs.items()]:
            cold = drop_caches()
            seconds, peak = measure(command)
            rows.append((name, seconds, total / seconds, peak))
            shutil.rmtree(work / "o")
    finally:
        if not args.make:
            shutil.rmtree(work, ignore_errors=True)
    where = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    lines = [
        "# Editing a checkpoint on disk",
        "",
        f"Synthetic Llama checkpoint, bfloat16, {layers} blocks, {total:.2f} GB in shards of about 1 GB; five down-projections "
        f"[{H}, {INNER}] patched with rank {args.rank}. The runs in turn, {args.rounds} times, "
        f"{'cold' if cold else 'warm'} cache, timed until the data are on the disk.",
        f"{where}, torch {importlib.metadata.version('torch')}.",
        "",
        "| run | seconds | GB/s of the checkpoint | peak memory, GB |",
        "|---|---|---|---|",
        *(f"| {name} | {seconds:.1f} | {speed:.2f} | {peak:.2f} |" for name, seconds, speed, peak in rows),
        "",
        f"Made by `python benchmarks/bench_disk_apply.py --gigabytes {args.gigabytes:g}`. The peak of a child process is at least "
        f"that of the measuring process, {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB.",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text)


if __name__ == "__main__":
    main()
