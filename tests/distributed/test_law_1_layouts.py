"""Law 1 at layouts, and the logits of converted models there: the oracle of both is one process or a stock model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    EXPERTS,
    HIDDEN,
    VOCAB,
    load_hf_model,
    load_megatron,
    make_dense_zeros,
    make_hf,
    megatron_model,
    newest_iteration,
)
from spawn import initialize_megatron, run_distributed

from megatron_zeda.conversion import hf_to_megatron, inject_zero_experts

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ZERO = 4  # as many as real ones, so that the padded teacher's experts divide among four ranks too
IDS = torch.arange(2 * 16).reshape(2, 16) * 7 % VOCAB
LAYOUTS: list[dict[str, int]] = [
    {"expert_model_parallel_size": 4},
    {"tensor_model_parallel_size": 4},
    {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "expert_model_parallel_size": 2},
]


def _forward(model: Any, sizes: dict[str, int]) -> torch.Tensor | None:
    """This rank's part of the vocabulary of the logits of ``IDS``; None before the last pipeline stage."""
    from megatron.core import parallel_state

    positions = torch.arange(IDS.shape[1])[None].expand_as(IDS)
    with torch.no_grad():
        if not parallel_state.is_pipeline_first_stage():
            hidden = torch.empty(IDS.shape[1] // sizes["tensor_model_parallel_size"], IDS.shape[0], HIDDEN)
            torch.distributed.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
            model.set_input_tensor(hidden)
        output: torch.Tensor = model(IDS, positions, None)
    if parallel_state.is_pipeline_last_stage():
        return output
    torch.distributed.send(output.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
    return None


def _compare(rank: int, world_size: int, root: str, family: str) -> list[list[float]]:
    """For each layout: masked student against padded teacher and against teacher, dynamic against one process."""
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.router import TopKRouter

    from megatron_zeda.models import load_hf_config
    from megatron_zeda.zero_experts import masked_zero_experts

    found = []
    expected = torch.load(Path(root) / "logits.pt", weights_only=True)
    for sizes in LAYOUTS:
        initialize_megatron(expert_tensor_parallel_size=1, **sizes)
        models = {}
        for name in ("static", "dynamic", "dense"):
            folder = Path(root) / f"megatron-{name}"
            models[name] = megatron_model(
                load_hf_config(folder / "hf"),
                **sizes,
                expert_tensor_parallel_size=1,
                sequence_parallel="tensor_model_parallel_size" in sizes,
                pipeline_dtype=torch.float32,
                perform_initialization=False,
            )
            load_megatron(models[name], newest_iteration(folder))
        dynamic = _forward(models["dynamic"], sizes)
        for router in models["dense"].modules():
            if isinstance(router, TopKRouter):
                _put_out_of_reach(router)
        with masked_zero_experts(models["dynamic"]):
            masked = _forward(models["dynamic"], sizes)
        padded, static = _forward(models["dense"], sizes), _forward(models["static"], sizes)
        if dynamic is None or masked is None or padded is None or static is None:
            continue
        part = expected.chunk(parallel_state.get_tensor_model_parallel_world_size(), dim=-1)
        mine = part[parallel_state.get_tensor_model_parallel_rank()]
        pairs = ((masked, padded), (masked, static), (dynamic, mine), (dynamic, masked))
        found.append([float((a - b).abs().max()) for a, b in pairs])
    return found


def _put_out_of_reach(router: Any) -> None:
    """Mask the last ``ZERO`` experts of a stock router."""
    if router.expert_bias is not None:
        router.expert_bias[EXPERTS:] = float("-inf")
        return
    gating = router.gating

    def masked(hidden: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = gating(hidden)
        logits[..., EXPERTS:] = float("-inf")
        return logits

    router.gating = masked


@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe_lite", "glm4_moe"])
def test_law_1_and_logits_at_layouts(tmp_path: Path, family: str) -> None:
    make_hf(tmp_path / "static", family=family, num_hidden_layers=4, num_key_value_heads=4)
    inject_zero_experts(tmp_path / "static", tmp_path / "dynamic", num_zero_experts=ZERO)
    make_dense_zeros(tmp_path / "dynamic", tmp_path / "dense")
    for name in ("static", "dynamic", "dense"):
        hf_to_megatron(tmp_path / name, tmp_path / f"megatron-{name}")
    with torch.no_grad():
        torch.save(load_hf_model(tmp_path / "dense")(IDS).logits, tmp_path / "logits.pt")
    compared = [layout for rank in run_distributed(_compare, 4, str(tmp_path), family) for layout in rank]
    assert len(compared) == 4 + 4 + 2
    for to_padded, to_teacher, to_oracle, to_masked in compared:
        assert to_padded == 0.0
        assert to_teacher <= 1e-5
        assert to_oracle <= 2e-5
        assert to_masked > 1e-2  # zero experts are chosen where they are not masked
