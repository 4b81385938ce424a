"""Conversions stream: their memory follows the largest group of tensors, not the checkpoint."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_zeda.conversion import hf_to_megatron
from megatron_zeda.models import family_for, load_hf_config

MB = 2**20

# Peak resident memory in bytes, of everything after the imports: a warm-up on a tiny checkpoint loads all libraries.
MEASURE = """
import resource, sys
from megatron_zeda.conversion import hf_to_megatron, inject_zero_experts, megatron_to_hf, verify_checkpoint
tool, warm_up, source, out = sys.argv[1:]
tools = {"inject": inject_zero_experts, "import": hf_to_megatron, "export": megatron_to_hf, "verify": verify_checkpoint}
tools[tool](warm_up, warm_up if tool == "verify" else out + "-warm-up")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tools[tool](source, out)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def _make(folder: Path, *, layers: int, experts: int, hidden: int, ffn: int, vocab: int) -> Path:
    """A Qwen3-MoE folder in one file a layer, written without a model."""
    config = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": hidden,
        "moe_intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "num_experts": experts,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "hidden_act": "silu",
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "vocab_size": vocab,
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    hf_config = load_hf_config(folder)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for row in family_for(hf_config).weight_table(hf_config):
        for piece in row.pieces:
            parts = piece.name.split(".")
            name = f"model-{parts[2] if parts[1] == 'layers' else 'rest'}.safetensors"
            shards.setdefault(name, {})[piece.name] = torch.full(piece.shape, 0.5, dtype=torch.bfloat16)
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def _peak(tool: str, tiny: Path, large: Path, out: Path) -> int:
    """Bytes that a tool needs at most, beyond the program. ``out`` is the other checkpoint for ``verify``."""
    command = [sys.executable, "-c", MEASURE, tool, str(tiny), str(large), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def _sources(tmp_path: Path, tool: str, **sizes: int) -> tuple[Path, Path]:
    """A tiny and a large checkpoint that the tool takes."""
    tiny = _make(tmp_path / "tiny", layers=1, experts=2, hidden=64, ffn=32, vocab=64)
    large = _make(tmp_path / "large", **sizes)
    if tool != "export":
        return tiny, large
    for name in ("tiny", "large"):
        hf_to_megatron(tmp_path / name, tmp_path / f"megatron-{name}")
    return tmp_path / "megatron-tiny", tmp_path / "megatron-large"


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["inject", "import", "export", "verify"])
def test_memory_follows_the_largest_tensor(tmp_path: Path, tool: str) -> None:
    """Of 400 MB with a largest group of 4 MB, far less than the checkpoint is ever in memory."""
    tiny, large = _sources(tmp_path, tool, layers=8, experts=8, hidden=1024, ffn=1024, vocab=2048)
    assert sum(path.stat().st_size for path in large.rglob("*.*")) > 400 * MB
    out = shutil.copytree(large, tmp_path / "out") if tool == "verify" else tmp_path / "out"
    assert _peak(tool, tiny, large, out) < 100 * MB


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["inject", "import", "export", "verify", "verify, all differs"])
def test_memory_is_twice_the_largest_tensor(tmp_path: Path, tool: str) -> None:
    """One tensor of 200 MB: a third copy of it, or a mask of all its values, goes over the bound."""
    tool, *differs = tool.split(", ")
    tiny, large = _sources(tmp_path, tool, layers=1, experts=2, hidden=256, ffn=32, vocab=200 * MB // 512)
    out = tmp_path / "out"
    if tool == "verify":
        shutil.copytree(large, out)
        path = out / "model-rest.safetensors"
        if differs:
            save_file({name: -tensor for name, tensor in load_file(path).items()}, path)
    assert _peak(tool, tiny, large, out) < (2 * 200 + 60) * MB
