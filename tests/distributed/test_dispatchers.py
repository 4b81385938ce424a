"""Laws 2 and 10 for every dispatcher over expert-parallel ranks, and over expert-tensor-parallel ones.

Each dispatcher is compared with a *stock* layer behind the stock all-to-all that has E + Z experts, the zero ones
all-zero matrices spread over the ranks. What crosses the wire and enters the GEMMs is counted, forward and backward,
and compared with selections that are computed here from the router's logits.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from layers import E, F, H, K, Z, dynamic_layer, layer_config, rows_into_experts
from moe_kernels import install
from spawn import initialize_megatron, run_distributed
from torch.utils.flop_counter import FlopCounterMode

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SEQ, BATCH = 6, 2
SHARED: dict[str, Any] = {"moe_shared_expert_intermediate_size": F}
OVERLAP: dict[str, Any] = {**SHARED, "moe_shared_expert_overlap": True}
DISPATCHERS: dict[str, dict[str, Any]] = {
    "alltoall": {"moe_token_dispatcher_type": "alltoall"},
    "allgather": {"moe_token_dispatcher_type": "allgather"},
    "deepep": {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "deepep"},
    "hybridep": {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "hybridep"},
    "ncclep": {
        "moe_token_dispatcher_type": "flex",
        "moe_flex_dispatcher_backend": "ncclep",
        "moe_expert_rank_capacity_factor": 4.0,
    },
}
FLEX = ("deepep", "hybridep", "ncclep")
# name: (dispatcher, further settings)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in DISPATCHERS},
    "alltoall, shared expert overlapped": ("alltoall", OVERLAP),
    "deepep, shared expert overlapped": ("deepep", OVERLAP),
    "alltoall, permute fusion": ("alltoall", {"moe_permute_fusion": True}),
    "allgather, permute fusion": ("allgather", {"moe_permute_fusion": True}),
    "deepep, permute fusion": ("deepep", {"moe_permute_fusion": True}),
    # Only the fused permutation behind DeepEP fills up for FP8 by itself; elsewhere the experts do.
    "deepep, permute fusion, FP8 padding": ("deepep", {"moe_permute_fusion": True}),
}
# name: (bias of the zero columns on rank 0, on the others, of real expert 0)
BATCHES: dict[str, tuple[float, float, float]] = {
    "some skipped": (0.0, 0.0, 0.0),
    "nothing skipped": (-1e3, -1e3, 0.0),
    "everything skipped": (1e3, 1e3, 0.0),
    "a rank skips everything": (1e3, 0.0, 0.0),
    "a rank receives nothing": (0.0, 0.0, 0.0),
    "an expert without a token": (0.0, 0.0, -1e3),
}
ALL_BATCHES, TWO_BATCHES = tuple(BATCHES), ("some skipped", "a rank skips everything")
# name: (world size, Megatron's sizes)
LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "EP2": (2, {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1}),
    "EP4": (4, {"expert_model_parallel_size": 4, "expert_tensor_parallel_size": 1}),
    "EP2 x expert TP2": (
        4,
        {"expert_model_parallel_size": 2, "tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2},
    ),
}


class _Wire:
    """The tokens that this rank hands to all-to-alls: ``(rows, bytes)`` of every message of hidden states."""

    def __init__(self) -> None:
        self.messages: list[tuple[int, int]] = []
        self.other_bytes = 0
        self._exchange = torch.distributed.all_to_all_single

    def __enter__(self) -> _Wire:
        def exchange(output: torch.Tensor, input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if input.dim() == 2 and input.shape[1] == H:
                self.messages.append((input.shape[0], input.numel() * input.element_size()))
            else:
                self.other_bytes += input.numel() * input.element_size()
            return self._exchange(output, input, *args, **kwargs)

        torch.distributed.all_to_all_single = exchange
        return self

    def __exit__(self, *_: Any) -> None:
        torch.distributed.all_to_all_single = self._exchange


def _bias_columns(layer: Any, column_bias: torch.Tensor) -> None:
    """Add a constant to the router's logits. (The dial would do for our layer; the stock one has none.)"""
    gating = layer.router.gating
    layer.router.gating = lambda hidden: gating(hidden) + column_bias


def _gathered(tensor: torch.Tensor, group: Any = None) -> torch.Tensor:
    """``[ranks of the group, ...]``"""
    parts = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, tensor.contiguous(), group=group)
    return torch.stack(parts)


def _initialise_alike(ours: Any, stock: Any, ep: int, ep_rank: int, etp_rank: int) -> list[int]:
    """Give both layers the same router and experts; the stock one's ranks hold their share of zero experts last.

    Returns the order of our columns in the stock router.
    """
    real, zero = E // ep, Z // ep
    order = [
        column
        for part in range(ep)
        for column in [*range(part * real, (part + 1) * real), *range(E + part * zero, E + (part + 1) * zero)]
    ]
    with torch.no_grad():
        torch.distributed.broadcast(ours.router.weight, 0)
        stock.router.weight.copy_(ours.router.weight[order])
        generator = torch.Generator().manual_seed(1000 + 10 * ep_rank + etp_rank)
        theirs = dict(stock.named_parameters())
        for parameter in stock.experts.parameters():
            parameter.zero_()
        for name, parameter in ours.experts.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            theirs[f"experts.{name}"].copy_(parameter)
        if ours.shared_experts is not None:
            generator = torch.Generator().manual_seed(77)
            for name, parameter in ours.shared_experts.named_parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
                theirs[f"shared_experts.{name}"].copy_(parameter)
    return order


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).detach().abs().max()) if a.numel() else 0.0


def _run(case: str, batch: str, sizes: dict[str, int]) -> dict[str, Any]:
    from megatron.core import parallel_state

    ep, ep_rank = sizes["expert_model_parallel_size"], parallel_state.get_expert_model_parallel_rank()
    etp, etp_rank = sizes["expert_tensor_parallel_size"], parallel_state.get_expert_tensor_parallel_rank()
    rank = torch.distributed.get_rank()
    dispatcher, changes = CASES[case]
    common = {**sizes, "sequence_parallel": etp > 1, "zero_expert_balance_coeff": 0.0}
    # NCCL-EP takes bf16 only. Its stand-in does not care, and the comparison is sharper in fp32.
    config = layer_config(**common, **DISPATCHERS[dispatcher], **changes, bf16=dispatcher == "ncclep")
    ours = dynamic_layer(config)
    rows = rows_into_experts(ours)
    multiple = 1
    if "FP8" in case:  # of which the padding is all that a CPU can do
        ours.config.fp8, ours.config.fp8_recipe, multiple = "hybrid", "tensorwise", 16
    plain = {**changes, "moe_shared_expert_overlap": False, "moe_permute_fusion": False}
    stock = dynamic_layer(layer_config(**common, **plain, num_moe_experts=E + Z, num_zero_experts=0))
    order = _initialise_alike(ours, stock, ep, ep_rank, etp_rank)

    mine, others, expert_0 = BATCHES[batch]
    bias = torch.zeros(E + Z)
    bias[E:] = mine if rank == 0 else others
    bias[0] += expert_0
    if batch == "a rank receives nothing":
        bias[E // ep * (ep - 1) : E] = -1e3
    _bias_columns(ours, bias)
    _bias_columns(stock, bias[order])

    hidden = torch.randn(SEQ, BATCH, H, generator=torch.Generator().manual_seed(100 + rank))
    logits = hidden.reshape(-1, H).double() @ ours.router.weight.detach().double().T + bias
    chosen = torch.zeros_like(logits).scatter(1, logits.topk(K).indices, 1.0)[:, :E].bool()

    inputs = [hidden.clone().requires_grad_() for _ in range(2)]
    with _Wire() as wire, FlopCounterMode(display=False) as flops:
        output = ours(inputs[0])[0]
        forward_messages = len(wire.messages)
        output.square().sum().backward()
    expected = stock(inputs[1])[0]
    expected.square().sum().backward()

    here = slice(ep_rank * E // ep, (ep_rank + 1) * E // ep)
    chosen_here = _gathered(chosen)[..., here]
    local = chosen_here.sum((0, 1))
    from_peers = _gathered(chosen, parallel_state.get_expert_model_parallel_group())[..., here]
    theirs = dict(stock.named_parameters())
    return {
        "output": _difference(output, expected),
        "input grad": _difference(inputs[0].grad, inputs[1].grad),
        "router grad": _difference(ours.router.weight.grad[order], stock.router.weight.grad),
        "grads": max(
            _difference(parameter.grad, theirs[name].grad)
            for name, parameter in ours.named_parameters()
            if name != "router.weight"
        ),
        "scale": float(expected.abs().max()),
        "selections": int(chosen.sum()),
        # One row per token and rank that holds a selection of it.
        "token-rank pairs": int(chosen.reshape(-1, ep, E // ep).any(2).sum()) * etp,
        "tokens that come here": int(chosen_here.any(-1).sum()),
        # Of this rank's place among the expert-tensor-parallel ranks, which then gather each other's.
        "selections that come here": int(from_peers.sum()),
        "rows for local experts": int(local.sum()),
        "with padding": int((-(-local // multiple) * multiple).sum()),
        "rows into experts": rows[0],
        "forward": wire.messages[:forward_messages],
        "backward": wire.messages[forward_messages:],
        "other bytes": wire.other_bytes,
        "flops": flops.get_total_flops(),
        "shared": "moe_shared_expert_intermediate_size" in changes,
        "etp": etp,
    }


def _run_all(rank: int, world_size: int, layout: str) -> dict[tuple[str, str], dict[str, Any]]:
    install()
    initialize_megatron(**LAYOUTS[layout][1])  # once: every group of gloo polls in threads of its own, for ever
    results = {}
    for case in CASES:
        for batch in _batches(case, layout):
            results[case, batch] = _run(case, batch, LAYOUTS[layout][1])
    return results


def _batches(case: str, layout: str) -> tuple[str, ...]:
    if layout == "EP2 x expert TP2":
        return () if "," in case else TWO_BATCHES
    return TWO_BATCHES if "shared" in case else ALL_BATCHES


@pytest.fixture(scope="module", params=LAYOUTS)
def ranks(request: pytest.FixtureRequest) -> tuple[str, list[dict[tuple[str, str], dict[str, Any]]]]:
    return request.param, run_distributed(_run_all, LAYOUTS[request.param][0], request.param)


@pytest.mark.parametrize("case", CASES)
def test_law_2_and_10(case: str, ranks: Any) -> None:
    layout, results = ranks
    for batch in _batches(case, layout):
        for rank, result in enumerate(run[case, batch] for run in results):
            where = f"{layout}, {case}, {batch}, rank {rank}: {result}"
            _check_law_2(result, where)
            _check_rows(case, result, where)
            _check_wire(case, result, where)
        total = sum(run[case, batch]["selections"] for run in results)
        assert total == {"everything skipped": 0, "nothing skipped": len(results) * SEQ * BATCH * K}.get(batch, total)
        if batch == "some skipped":
            assert 0.2 < total / (len(results) * SEQ * BATCH * K) < 0.9


def _check_law_2(result: dict[str, Any], where: str) -> None:
    """To the order in which a token's K weighted outputs, or a gradient's parts, are summed."""
    assert result["output"] <= 1e-6 * max(1.0, result["scale"]), where
    assert max(result["input grad"], result["router grad"], result["grads"]) <= 2e-5 * max(1.0, result["scale"]), where


def _check_rows(case: str, result: dict[str, Any], where: str) -> None:
    """Forward and backward, in operations: 3 x the forward, of which an expert-tensor-parallel rank does its share."""
    expert = 2 * H * 2 * F + 2 * F * H
    per_token = 2 * H * (E + Z) + (expert if result["shared"] else 0)
    experts = 3 * result["with padding"] * expert // result["etp"]
    assert result["rows into experts"] == result["with padding"], where
    assert result["flops"] == experts + 3 * SEQ * BATCH * per_token, where


def _check_wire(case: str, result: dict[str, Any], where: str) -> None:
    """Dispatch sends, combine sends back what was received; backward mirrors both. Row by row and byte by byte."""
    dispatcher = CASES[case][0]
    if dispatcher == "allgather":
        assert result["forward"] == result["backward"] == [], where
        return
    flex = dispatcher in FLEX
    sent = result["token-rank pairs" if flex else "selections"]
    received = result["tokens that come here" if flex else "selections that come here"]
    messages = [(sent, sent * H * 4), (received, received * H * 4)]
    assert result["forward"] == result["backward"] == messages, where
    if not flex:
        # Beside each row its weight, and the weight's gradient on the way back.
        assert result["other bytes"] == (sent + received) * 4, where
    else:
        # The stand-ins send a place (int64) and a weight for every slot, or expert, of a token, and get its gradient.
        slots = (E if dispatcher == "hybridep" else K) * result["etp"]
        assert result["other bytes"] == slots * (sent * (8 + 4) + received * 4), where
