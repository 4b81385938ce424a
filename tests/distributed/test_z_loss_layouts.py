"""Law 3 for the z-loss: ranks with unevenly many tokens give the value and gradient of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layers import E, H, Z, dynamic_layer, layer_config
from spawn import initialize_megatron, run_distributed

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

COEFF, WORLD, LOSS_TOKENS = 0.3, 2, 7.0


def _tokens(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states ``[S, B, H]`` and padding mask ``[B, S]``: 3 tokens on rank 0, 11 on rank 1."""
    hidden = torch.randn(6, 2, H, generator=torch.Generator().manual_seed(rank))
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[0, 3 if rank == 0 else 5 :] = True
    if rank == 0:
        padding[1] = True
    return hidden, padding


def _run(rank: int, world_size: int) -> dict[str, Any]:
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

    from megatron_zeda.zero_experts import set_loss_tokens

    initialize_megatron()
    results = {}
    for per_token in (False, True):
        settings = {"zero_expert_balance_coeff": 0.0, "moe_z_loss_coeff": COEFF, "calculate_per_token_loss": per_token}
        layer = dynamic_layer(layer_config(**settings))
        layer.router.weight.data.copy_(torch.randn(E + Z, H, generator=torch.Generator().manual_seed(9)) * 0.2)
        hidden, padding = _tokens(rank)
        set_loss_tokens(LOSS_TOKENS)
        output, _ = layer(hidden.requires_grad_(), padding_mask=padding)
        (output * 0.0).sum().backward()
        # What Megatron does with gradients: sum and divide by the loss tokens, or average over the ranks.
        gradient = layer.router.weight.grad
        torch.distributed.all_reduce(gradient)
        results[per_token] = gradient / (LOSS_TOKENS if per_token else world_size)
    tracker = get_moe_metrics_tracker()
    logged = tracker.metrics["z_loss"].values.clone()
    torch.distributed.all_reduce(logged, group=tracker.metrics["z_loss"].reduce_group)
    return {"gradients": results, "logged": logged / 2, "weight": layer.router.weight.detach()}


def test_law_3_z_loss_of_uneven_ranks_is_one_process_s() -> None:
    ranks = run_distributed(_run, WORLD)
    kept = []
    for rank in range(WORLD):
        hidden, padding = _tokens(rank)
        kept.append(hidden.double().reshape(-1, H)[~padding.T.reshape(-1)])
    assert [len(part) for part in kept] == [3, 11]
    weight = ranks[0]["weight"].double().requires_grad_()
    z_loss = torch.logsumexp(torch.cat(kept) @ weight.T, dim=-1).square().mean()
    (COEFF * z_loss).backward()
    for rank in ranks:
        for gradient in rank["gradients"].values():
            torch.testing.assert_close(gradient.double(), weight.grad, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(rank["logged"].double(), z_loss.detach()[None], atol=1e-6, rtol=1e-5)
