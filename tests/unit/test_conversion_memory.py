"""Conversions stream: their memory follows the largest group of tensors, not the checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron_zeda.models import family_for, load_hf_config

MB = 2**20

# Peak resident memory in bytes, of everything after the imports: a warm-up on a tiny checkpoint loads all libraries.
MEASURE = """
import resource, sys
from megatron_zeda.conversion import hf_to_megatron, inject_zero_experts, megatron_to_hf
tool, warm_up, source, out = sys.argv[1:]
convert = {"inject": inject_zero_experts, "import": hf_to_megatron, "export": megatron_to_hf}[tool]
convert(warm_up, out + "-warm-up")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(source, out)
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


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["inject", "import", "export"])
def test_memory_follows_the_largest_tensor(tmp_path: Path, tool: str) -> None:
    """Of 400 MB with a largest group of 4 MB, far less than the checkpoint is ever in memory."""
    from megatron_zeda.conversion import hf_to_megatron

    tiny = _make(tmp_path / "tiny", layers=1, experts=2, hidden=64, ffn=32, vocab=64)
    large = _make(tmp_path / "large", layers=8, experts=8, hidden=1024, ffn=1024, vocab=2048)
    size = sum(path.stat().st_size for path in large.iterdir())
    assert size > 400 * MB
    if tool == "export":
        for name in ("tiny", "large"):
            hf_to_megatron(tmp_path / name, tmp_path / f"megatron-{name}")
        tiny, large = tmp_path / "megatron-tiny", tmp_path / "megatron-large"
    command = [sys.executable, "-c", MEASURE, tool, str(tiny), str(large), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
    assert int(done.stdout.splitlines()[-1]) < 100 * MB
