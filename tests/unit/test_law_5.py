"""Law 5 for transformers: the exported model says what Megatron says, token by token and with a cache on both sides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import edit_config, load_megatron, megatron_model, newest_iteration
from megatron.core.inference.contexts import StaticInferenceContext
from tiny_hf import VOCABULARY, save_dynamic, save_static

from megatron_zeda.conversion import hf_to_megatron, megatron_to_hf
from megatron_zeda.models import load_hf_config
from megatron_zeda.rollout import Sampling
from megatron_zeda.rollout.decode import decode
from megatron_zeda.rollout.hf_folder import load_model
from megatron_zeda.zero_experts import router_statistics

PROMPTS = [[(7 * i + 11 * row) % len(VOCABULARY) for i in range(length)] for row, length in enumerate((5, 5, 5))]
NEW = 16


def _greedy(model: Any, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Megatron's own key-value cache: ``NEW`` tokens ``[B, NEW]`` and their log-probabilities."""
    ids = torch.tensor(prompts)
    context = StaticInferenceContext(len(prompts), ids.shape[1] + NEW)
    tokens, logprobs = [], []
    with torch.inference_mode():
        for _ in range(NEW):
            start = context.sequence_len_offset
            positions = torch.arange(start, start + ids.shape[1]).expand_as(ids)
            logits = model(ids, positions, None, inference_context=context)[:, -1].float()
            context.sequence_len_offset += ids.shape[1]
            chosen = logits.argmax(-1)
            tokens.append(chosen)
            logprobs.append(logits.log_softmax(-1).gather(-1, chosen[:, None]).squeeze(-1))
            ids = chosen[:, None]
    return torch.stack(tokens, 1), torch.stack(logprobs, 1)


@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe_lite", "glm4_moe"])
@pytest.mark.parametrize("dial", [0.0, -0.05])
def test_law_5_transformers_says_what_megatron_says(megatron: None, tmp_path: Path, family: str, dial: float) -> None:
    static = save_static(tmp_path / "static", family=family, initializer_range=0.1, eos_token_id=None)
    dynamic = save_dynamic(static, tmp_path / "hand", dial=dial)
    if family == "glm4_moe_lite":
        dynamic = edit_config(dynamic, tmp_path / "dynamic", zeda_latent_norm_eps=1e-5)
    hf_to_megatron(dynamic, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "export")

    model = megatron_model(load_hf_config(dynamic), perform_initialization=False)
    load_megatron(model, newest_iteration(tmp_path / "megatron"))
    tokens, logprobs = _greedy(model, PROMPTS)
    assert 0.1 < router_statistics([model]).skip_rate < 0.9

    exported = load_model(tmp_path / "export", device=torch.device("cpu"))
    sampling = Sampling(max_new_tokens=NEW, temperature=0.0)
    found = decode(exported, PROMPTS, sampling=sampling, rows=range(len(PROMPTS)), eos_ids=[], context=96)
    assert [response.ids for response in found] == tokens.tolist()
    assert len(set(tokens.flatten().tolist())) > 4  # it does say something
    torch.testing.assert_close(torch.tensor([r.logprobs for r in found]), logprobs, atol=2e-6, rtol=0)
