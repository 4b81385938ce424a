"""The z-loss that Megatron-Core logs: the mean over all ranks' tokens, beside static layers and without them.

Its gradients are compared in test_zero_experts_layouts.py.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from layers import H, dynamic_layer, layer_config
from megatron.core.transformer.moe.moe_layer import MoELayer
from spawn import initialize_megatron, run_distributed

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

WORLD, MICRO_STEPS = 2, 2


def _tokens(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states ``[S, B, H]`` and padding mask ``[B, S]``: 3 tokens on rank 0, 11 on rank 1."""
    hidden = torch.randn(6, 2, H, generator=torch.Generator().manual_seed(rank))
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[0, 3 if rank == 0 else 5 :] = True
    if rank == 0:
        padding[1] = True
    return hidden, padding


def _z_loss(layer: MoELayer, *ranks: int) -> float:
    """Over the tokens of these ranks, in float64."""
    kept = []
    for rank in ranks:
        hidden, padding = _tokens(rank)
        kept.append(hidden.double().reshape(-1, H)[~padding.T.reshape(-1)])
    logits = torch.cat(kept) @ layer.router.weight.detach().double().T
    return float(torch.logsumexp(logits, dim=-1).square().mean())


def _run(rank: int, world_size: int) -> list[tuple[dict[str, float], dict[str, float]]]:
    """What is logged and what should be, without a static layer and with one before or after ours."""
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker, get_moe_metrics_tracker

    initialize_megatron()
    config = layer_config(zero_expert_balance_coeff=0.0, moe_z_loss_coeff=0.3, mtp_num_layers=1)
    ours = dynamic_layer(config)
    static = dynamic_layer(config, is_mtp_layer=True)
    hidden, padding = _tokens(rank)
    results = []
    for layers in ([ours], [ours, static], [static, ours]):
        destroy_moe_metrics_tracker()
        for _ in range(MICRO_STEPS):
            for layer in layers:
                layer(hidden, padding_mask=padding)
        logged: dict[str, float] = {}
        writer = SimpleNamespace(add_scalar=lambda name, value, iteration, logged=logged: logged.update({name: value}))
        get_moe_metrics_tracker().report(
            1 / MICRO_STEPS, 0, writer, per_layer_logging=True, track_names="z_loss", num_layers=1, mtp_num_layers=1
        )
        # Megatron-Core's own is the mean of the ranks' means.
        alone = sum(_z_loss(static, one) for one in range(world_size)) / world_size if len(layers) > 1 else 0.0
        whole = _z_loss(ours, *range(world_size))
        wanted = {"moe/z_loss_layer_0": whole, "moe/z_loss_layer_1": alone, "z_loss": (whole + alone) / 2}
        results.append((logged, wanted))
    return results


def test_logged_z_loss_is_that_of_all_tokens() -> None:
    assert [int((~_tokens(rank)[1]).sum()) for rank in range(WORLD)] == [3, 11]
    for rank in run_distributed(_run, WORLD):
        for logged, wanted in rank:
            assert logged == pytest.approx(wanted, rel=1e-5)
