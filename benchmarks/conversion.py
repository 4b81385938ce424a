"""How fast checkpoints are converted, beside a plain copy of the same bytes on the same disk.

The checkpoint has the tensors of a real model at full width and a few of its layers, with random weights. Every
operation and its copy run in turn (copy, conversion, copy, conversion, ...), from a cold page cache, in a process of
their own, so that the peak of memory is the operation's. A conversion is timed until its result is complete: synced,
read back, compared and under its name. A copy is timed until its files are synced.

python benchmarks/conversion.py --shape qwen3-30b-a3b --folder FOLDER-ON-THE-DISK [--output RESULT.json]
"""

from __future__ import annotations

import argparse
import ast
import cProfile
import json
import math
import os
import pstats
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import side_by_side
import torch
from side_by_side import Target

OPERATIONS = ("inject", "import", "export")
SLOWDOWN_TARGET = 2.0  # a conversion takes at most twice the time of a copy: half its speed
MEMORY_GROUPS, MEMORY_REST = 2, 10**9  # peak memory: two of the largest groups of tensors and a gigabyte

# Layers of the real models: names, widths and vocabularies are theirs, the number of layers is the command's.
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 2048,
        "moe_intermediate_size": 768,
        "intermediate_size": 6144,
        "num_hidden_layers": 3,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "hidden_act": "silu",
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 151936,
    },
    "glm-4.7-flash": {  # layer 0 is dense, and the layer after the last one (MTP) is in the files too
        "architectures": ["Glm4MoeLiteForCausalLM"],
        "model_type": "glm4_moe_lite",
        "attention_bias": False,
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 10240,
        "kv_lora_rank": 512,
        "max_position_embeddings": 202752,
        "moe_intermediate_size": 1536,
        "n_group": 1,
        "n_routed_experts": 64,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 20,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 20,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 768,
        "qk_nope_head_dim": 192,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "routed_scaling_factor": 1.8,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "torch_dtype": "bfloat16",
        "v_head_dim": 256,
        "vocab_size": 154880,
    },
}
CONFIGS["tiny"] = CONFIGS["qwen3-30b-a3b"] | {  # for tests
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "vocab_size": 512,
}


# ---- what a process of its own does ---------------------------------------------------------------------------------


def make_source(folder: Path, shape: str, layers: int | None, shard_bytes: int) -> None:
    """Write a static checkpoint with the safetensors library: random weights, shards and index as on the hub."""
    from safetensors.torch import save_file

    from megatron_zeda.models import HfConfig, family_for

    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    config = CONFIGS[shape] | ({"num_hidden_layers": layers} if layers else {})
    (partial / "config.json").write_text(json.dumps(config, indent=2))
    family = family_for(HfConfig(config, where=partial / "config.json"))
    rows = [*family.weight_table(config), *family.carried_rows(config)]
    shapes = {piece.name: piece.tensor_shape for row in rows for piece in row.pieces}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in shapes.items():
        nbytes = 2 * math.prod(size)
        if shards[-1] and filled + nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += nbytes
    generator = torch.Generator().manual_seed(0)
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name in names:
            dtype = torch.float32 if name.endswith("e_score_correction_bias") else torch.bfloat16
            tensors[name] = torch.empty(shapes[name], dtype=dtype).normal_(std=0.02, generator=generator)
            weight_map[name] = file
        save_file(tensors, partial / file, metadata={"format": "pt"})
    (partial / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    partial.rename(folder)


def copy_folder(source: Path, target: Path) -> None:
    """The baseline: every file copied by the standard library, then synced."""
    shutil.copytree(source, target, copy_function=shutil.copyfile)
    for path in files_of(target):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _convert(operation: str) -> Callable[[Path, Path], Any]:
    from megatron_zeda import conversion
    from megatron_zeda.conversion import torch_dist  # noqa: F401  imported before the clock starts

    functions: dict[str, Callable[[Path, Path], Any]] = {
        "inject": conversion.inject_zero_experts,
        "import": conversion.hf_to_megatron,
        "export": conversion.megatron_to_hf,
    }
    return functions[operation]


def child(operation: str, source: Path, target: Path, profile: int) -> dict[str, float]:
    """Run one operation in this process, as its tool does; return seconds, processor seconds and peak bytes."""
    run = copy_folder if operation == "copy" else _convert(operation)
    os.sync()
    drop_from_cache(files_of(source))
    profiler = cProfile.Profile() if profile else None
    processor, begin = time.process_time(), time.perf_counter()
    if profiler is None:
        run(source, target)
    else:
        profiler.runcall(run, source, target)
    seconds, processor = time.perf_counter() - begin, time.process_time() - processor
    if profiler is not None:
        pstats.Stats(profiler, stream=sys.stderr).sort_stats("tottime").print_stats(profile)
    return {"seconds": seconds, "processor_seconds": processor, "peak_bytes": _peak_memory()}


def _peak_memory() -> int:
    """This program's largest resident set. Unlike ``ru_maxrss`` it does not count the process that started it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


# ---- what the benchmark does ----------------------------------------------------------------------------------------


def files_of(folder: Path) -> list[Path]:
    """All files below a folder."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def drop_from_cache(files: Iterable[Path]) -> None:
    """Make the next read of synced files come from the disk."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)  # dirty pages stay
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def in_child(operation: str, source: Path, target: Path, profile: int = 0) -> dict[str, float]:
    """Run :func:`child` in a new process. The target is removed first; wall seconds with its start are added."""
    shutil.rmtree(target, ignore_errors=True)
    code = (
        f"import sys, json; sys.path.insert(0, {str(Path(__file__).parent)!r}); import conversion; from pathlib import"
    )
    code += " Path; print(json.dumps(conversion.child(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), "
    code += "int(sys.argv[4]))))"
    begin = time.perf_counter()
    command = [sys.executable, "-c", code, operation, str(source), str(target), str(profile)]
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1]) | {"seconds_with_start": time.perf_counter() - begin}


def largest_group_bytes(folder: Path) -> int:
    """Bytes of the largest group of tensors that are converted together (one row of the weight table)."""
    from megatron_zeda.conversion.hf_folder import HfFolder

    with HfFolder(folder) as source:
        sizes = [row.numel * source.dtype(row.pieces[0]).itemsize for row in [*source.rows, *source.carried]]
    return max(sizes)


def measure(operation: str, source: Path, folder: Path, rounds: int) -> tuple[dict[str, Any], list[Target]]:
    """Time an operation and a copy of its source in turn."""
    files = files_of(source)
    num_bytes = sum(path.stat().st_size for path in files)
    runs: dict[str, list[dict[str, float]]] = {"copy": [], operation: []}
    for number in range(rounds):
        for name, seen in runs.items():
            seen.append(in_child(name, source, folder / "out"))
            print(f"{operation} {number + 1}/{rounds} {name}: {seen[-1]['seconds']:.1f} s", flush=True)
    shutil.rmtree(folder / "out")
    seconds = {name: [run["seconds"] for run in seen] for name, seen in runs.items()}
    ratio = side_by_side.ratio(seconds[operation], seconds["copy"])
    peak = max(run["peak_bytes"] for run in runs[operation])
    result: dict[str, Any] = {
        "operation": operation,
        "bytes": num_bytes,
        "files": len(files),
        "conversion_over_copy": ratio,
        "copy_over_conversion": side_by_side.ratio(seconds["copy"], seconds[operation]),
        "peak_bytes": peak,
    }
    for name, seen in runs.items():
        result["copy" if name == "copy" else "conversion"] = {
            "gigabytes_per_second": side_by_side.spread([num_bytes / 1e9 / run["seconds"] for run in seen]),
            **{key: side_by_side.spread([run[key] for run in seen]) for key in seen[0] if key != "peak_bytes"},
        }
    targets = []
    if operation != "inject":  # it is not in the requirement, but it is measured
        targets.append(Target(f"{operation} seconds / copy seconds", SLOWDOWN_TARGET, ratio["median"]))
    return result, targets


def main(argv: list[str] | None = None) -> None:
    """Make the checkpoint if it is not there, measure, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=sorted(CONFIGS), default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, help="layers of the checkpoint; by default enough for more than 4 GB")
    parser.add_argument("--folder", type=Path, required=True, help="where to work: the disk to measure (4 x the bytes)")
    parser.add_argument("--operations", nargs="+", choices=OPERATIONS, default=list(OPERATIONS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shard-bytes", type=ast.literal_eval, default=2 * 10**9, help="largest file of the source")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="only run each once and show N functions")
    parser.add_argument("--keep", action="store_true", help="keep source and Megatron checkpoint for the next time")
    parser.add_argument("--output", type=Path, help="JSON to write")
    args = parser.parse_args(argv)
    layers = args.layers or CONFIGS[args.shape]["num_hidden_layers"]
    work = args.folder.absolute() / f"{args.shape}-{layers}"
    source, megatron = work / "source", work / "megatron"
    if not source.exists():
        print(f"making {source}", flush=True)
        make_source(source, args.shape, args.layers, args.shard_bytes)
    if "export" in args.operations and not (args.keep and megatron.exists()):
        print(f"making {megatron}", flush=True)
        in_child("import", source, megatron)
    sources = {"inject": source, "import": source, "export": megatron}
    results: list[dict[str, Any]] = []
    targets: list[Target] = []
    group = largest_group_bytes(source)
    for operation in args.operations:
        if args.profile:
            print(operation, in_child(operation, sources[operation], work / "out", args.profile), flush=True)
            shutil.rmtree(work / "out")
            continue
        result, found = measure(operation, sources[operation], work, args.rounds)
        bound = (MEMORY_GROUPS * group + MEMORY_REST) / 1e9
        targets += [*found, Target(f"{operation} peak memory in GB", bound, result["peak_bytes"] / 1e9)]
        results.append(result)
    if not args.keep:
        shutil.rmtree(work)
    if args.profile:
        return
    settings = {"shape": args.shape, "layers": layers, "rounds": args.rounds, "largest_group_bytes": group}
    settings["file_system"] = _file_system(args.folder)
    # Of the folder only its place in the command is kept: its name says nothing about the result.
    sys.argv = ["FOLDER" if word == str(args.folder) else word for word in sys.argv]
    side_by_side.write(args.output, "conversion", settings, results, targets)


def _file_system(folder: Path) -> str:
    """Type of the file system that a folder is on."""
    best, found = "", "unknown"
    for line in Path("/proc/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split()
        if folder.resolve().is_relative_to(place) and len(place) > len(best):
            best, found = place, kind
    return found


if __name__ == "__main__":
    main()
