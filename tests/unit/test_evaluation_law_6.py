"""Law 6: the skip rate that training reports is the skip rate of the exported model on the same tokens."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from checkpoints import load_megatron, megatron_model
from tiny_hf import VOCABULARY, save_dynamic, save_static

from megatron_zeda.conversion import hf_to_megatron, megatron_to_hf
from megatron_zeda.conversion.megatron_io import latest_checkpoint_dir
from megatron_zeda.evaluation.scoring import score_rollouts
from megatron_zeda.models import load_hf_config
from megatron_zeda.rollout.files import Rollout
from megatron_zeda.rollout.hf_folder import load_model
from megatron_zeda.zero_experts import router_statistics


@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe_lite", "glm4_moe"])
def test_law_6_training_and_export_report_the_same_skip_rate(megatron: None, tmp_path: Path, family: str) -> None:
    dynamic = save_dynamic(save_static(tmp_path / "static", family=family), tmp_path / "dynamic")
    rng = random.Random(3)
    rollouts = []
    for _ in range(9):
        prompt, response = ([rng.randrange(len(VOCABULARY)) for _ in range(rng.randrange(1, 12))] for _ in range(2))
        rollouts.append(Rollout(0, [{"role": "user", "content": ""}], prompt, response, None, "length", {}, "", ""))

    hf_to_megatron(dynamic, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "exported")
    exported = score_rollouts(load_model(tmp_path / "exported", device=torch.device("cpu")), rollouts, batch_size=4)

    model = megatron_model(load_hf_config(dynamic), perform_initialization=False)
    load_megatron(model, latest_checkpoint_dir(tmp_path / "megatron"))
    width = max(len(r.prompt_ids + r.response_ids) for r in rollouts) - 1
    ids = torch.zeros(len(rollouts), width, dtype=torch.long)
    padding, not_response = torch.ones_like(ids).bool(), torch.ones_like(ids).bool()
    for row, rollout in enumerate(rollouts):
        tokens = (rollout.prompt_ids + rollout.response_ids)[:-1]
        ids[row, : len(tokens)] = torch.tensor(tokens)
        padding[row, : len(tokens)] = False
        not_response[row, len(rollout.prompt_ids) - 1 : len(tokens)] = False
    positions = torch.arange(width).expand_as(ids)
    found = []
    for mask in (padding, not_response):
        router_statistics([model])  # forget what came before
        with torch.no_grad():
            model(ids, positions, None, padding_mask=mask)
        found.append(router_statistics([model]))

    everything, responses = found
    assert responses.skip_rate_per_layer == pytest.approx(exported.skip_rate_per_layer, abs=1e-6)
    assert responses.skip_rate == pytest.approx(exported.skip_rate, abs=1e-6)
    assert everything.skip_rate == pytest.approx(1 - exported.real_rows / (4 * exported.tokens), abs=1e-6)
    assert responses.skip_rate != pytest.approx(everything.skip_rate, abs=1e-3)
