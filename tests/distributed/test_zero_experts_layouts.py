"""Laws 2 and 3 over gloo: every layout gives the loss, gradients and statistics of one process.

One set of four processes runs all layouts in turn, and one process runs the same global batches: that is the reference
for law 3. (That one process is right is what tests/unit/test_zero_experts_layer.py shows, against stock layers whose
extra experts are all zero; the last test here shows the same over expert-parallel ranks.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from layers import E, F, K, Z, dynamic_layer, layer_config
from spawn import initialize_megatron, run_distributed

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

VOCAB, SEQ, MICRO_STEPS, SAMPLES = 64, 12, 2, 4  # samples per micro-step, over all data-parallel ranks
SIGMOID: dict[str, Any] = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_topk_scaling_factor": 1.8,
    "moe_shared_expert_intermediate_size": F,
}
# name: (parallel sizes for four processes, configuration, whether samples are padded)
LAYOUTS: dict[str, tuple[dict[str, int], dict[str, Any], bool]] = {
    "EP2 x DP2, alltoall": ({"expert_model_parallel_size": 2}, {}, True),
    "EP2 x DP2, allgather": ({"expert_model_parallel_size": 2}, {"moe_token_dispatcher_type": "allgather"}, True),
    "EP4": ({"expert_model_parallel_size": 4}, {}, True),
    "TP2 x PP2, sigmoid, bias, shared expert, padding": (
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
        {"sequence_parallel": True, **SIGMOID},
        True,
    ),
    "TP2 x EP2, full recompute": (
        {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2},
        {
            "sequence_parallel": True,
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
        True,
    ),
    "TP2 x DP2, allgather, mean loss": (
        {"tensor_model_parallel_size": 2},
        {"sequence_parallel": True, "moe_token_dispatcher_type": "allgather", "calculate_per_token_loss": False},
        False,
    ),
}


def _config(changes: dict[str, Any], sizes: dict[str, int]) -> Any:
    settings = {
        "num_layers": 4,
        "calculate_per_token_loss": True,
        "zero_expert_balance_coeff": 0.5,
        "pipeline_dtype": torch.float32,
    }
    return layer_config(**(settings | changes | sizes))


def _batch(padded: bool, mean_loss: bool) -> list[dict[str, torch.Tensor]]:
    """Per micro-step: tokens, labels, loss mask (responses only) and padding mask, each ``[SAMPLES, SEQ]``.

    With a mean loss every token carries loss: Megatron averages the ranks' means, so they must count alike.
    """
    generator = torch.Generator().manual_seed(11)
    steps = []
    for step in range(MICRO_STEPS):
        ids = torch.randint(0, VOCAB, (SAMPLES, SEQ + 1), generator=generator)
        positions = torch.arange(SEQ).expand(SAMPLES, SEQ)
        lengths = torch.tensor([SEQ, SEQ - 5, SEQ - 1, 6]) if padded else torch.full((SAMPLES,), SEQ)
        prompts = torch.tensor([2, 5, 7, 3]) + step
        padding = positions >= lengths[:, None]
        loss_mask = ((positions >= prompts[:, None]) | mean_loss) & ~padding
        steps.append({"tokens": ids[:, :-1], "labels": ids[:, 1:], "loss_mask": loss_mask, "padding_mask": padding})
    return steps


def _build(config: Any) -> torch.nn.Module:
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel

    from megatron_zeda.zero_experts import get_zero_expert_layer_spec

    torch.manual_seed(3)
    return GPTModel(
        config,
        get_zero_expert_layer_spec(config),
        vocab_size=VOCAB,
        max_sequence_length=SEQ,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )


def _forward_step(batches: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    batch = next(batches)
    positions = torch.arange(SEQ).expand_as(batch["tokens"])
    output = model(batch["tokens"], positions, None, labels=batch["labels"], padding_mask=batch["padding_mask"])

    def loss_func(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        mask = batch["loss_mask"]
        total = (losses * mask).sum()
        return total, mask.sum().int(), {"loss": total.detach().clone()}

    return output, loss_func


def _train_step(config: Any, model: torch.nn.Module, padded: bool) -> dict[str, Any]:
    """One forward-backward over the global batch. Afterwards every parameter *is* its gradient (so that it can be
    saved).
    """
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_zeda.zero_experts import router_statistics, set_loss_tokens

    dp_rank, dp_size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    mine = slice(dp_rank * SAMPLES // dp_size, (dp_rank + 1) * SAMPLES // dp_size)
    steps = _batch(padded, mean_loss=not config.calculate_per_token_loss)
    set_loss_tokens(sum(int(step["loss_mask"].sum()) for step in steps) / MICRO_STEPS)
    config.finalize_model_grads_func = finalize_model_grads
    wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
    wrapped.train()
    wrapped.zero_grad_buffer()
    losses = get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=iter([{name: tensor[mine] for name, tensor in step.items()} for step in steps]),
        model=wrapped,
        num_microbatches=MICRO_STEPS,
        seq_length=SEQ,
        micro_batch_size=SAMPLES // dp_size,
        forward_only=False,
    )
    total = torch.tensor(sum(float(loss["loss"]) for loss in losses))
    torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group())
    statistics = router_statistics(wrapped)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.main_grad)
    last = parallel_state.is_pipeline_last_stage()
    return {"loss": float(total) if last else None, "statistics": statistics}


def _save(model: torch.nn.Module, folder: Path) -> None:
    from megatron.core import dist_checkpointing

    if torch.distributed.get_rank() == 0:
        folder.mkdir()
    torch.distributed.barrier()
    dist_checkpointing.save(model.sharded_state_dict(), str(folder))


def _load(model: torch.nn.Module, folder: Path) -> None:
    from megatron.core import dist_checkpointing

    model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), str(folder)))


def _run_layouts(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    results = {}
    for index, (name, (sizes, changes, padded)) in enumerate(LAYOUTS.items()):
        initialize_megatron(**sizes)
        config = _config(changes, sizes)
        model = _build(config)
        _load(model, folder / f"weights{index}")
        results[name] = _train_step(config, model, padded)
        _save(model, folder / f"grads{index}")
    return results


def _run_reference(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    results = {}
    for index, (name, (_, changes, padded)) in enumerate(LAYOUTS.items()):
        initialize_megatron()
        single = {key: value for key, value in changes.items() if "recompute" not in key and key != "sequence_parallel"}
        config = _config(single, {})
        model = _build(config)
        for layer in model.decoder.layers:
            if layer.mlp.router.expert_bias is not None:
                layer.mlp.router.expert_bias.copy_(torch.linspace(-0.3, 0.3, E + Z))
        _save(model, folder / f"weights{index}")
        results[name] = _train_step(config, model, padded)
        _save(model, folder / f"reference{index}")
    return results


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]], Path]:
    folder = tmp_path_factory.mktemp("layouts")
    reference = run_distributed(_run_reference, 1, folder)[0]
    return reference, run_distributed(_run_layouts, 4, folder), folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_law_3_layout_equals_one_process(name: str, runs: Any, megatron: None) -> None:
    from megatron.core import dist_checkpointing

    reference, ranks, folder = runs
    expected = reference[name]
    losses = [rank[name]["loss"] for rank in ranks if rank[name]["loss"] is not None]
    assert losses == pytest.approx([expected["loss"]] * len(losses), rel=1e-5)
    for rank in ranks:  # the same everywhere, pipeline stages included
        statistics = rank[name]["statistics"]
        assert statistics.layer_numbers == (1, 2, 3, 4)
        assert statistics.num_zero_selections == expected["statistics"].num_zero_selections
        assert statistics.num_selections == expected["statistics"].num_selections
        assert statistics.balance_loss_per_layer == pytest.approx(
            expected["statistics"].balance_loss_per_layer, rel=1e-5
        )
    index = list(LAYOUTS).index(name)
    ours = dist_checkpointing.load_plain_tensors(str(folder / f"grads{index}"))
    theirs = dist_checkpointing.load_plain_tensors(str(folder / f"reference{index}"))
    assert ours.keys() == theirs.keys()
    for key, gradient in theirs.items():
        if "expert_bias" not in key:
            assert gradient.abs().max() > 0, key
        torch.testing.assert_close(
            ours[key], gradient, atol=2e-6, rtol=2e-4, msg=lambda text, key=key: f"{key}: {text}"
        )


def _record_sent_rows(layer: Any, sent: list[int]) -> None:
    """Append the rows that this rank hands to the all-to-all in every later forward pass."""
    dispatch = layer.token_dispatcher.token_dispatch

    def recording(tokens: torch.Tensor, probs: torch.Tensor) -> Any:
        sent.append(tokens.shape[0])
        return dispatch(tokens, probs)

    layer.token_dispatcher.token_dispatch = recording


def _law_2_with_expert_parallelism(rank: int, world_size: int) -> dict[str, Any]:
    """A dynamic layer over EP ranks, and a stock one with E + Z experts, the zero ones interleaved, over the same
    ranks.
    """
    results = {}
    for dispatcher in ("alltoall", "allgather"):
        initialize_megatron(expert_model_parallel_size=world_size)
        sizes = {"expert_model_parallel_size": world_size, "moe_token_dispatcher_type": dispatcher}
        ours = dynamic_layer(layer_config(zero_expert_balance_coeff=0.0, **sizes))
        stock = dynamic_layer(
            layer_config(num_moe_experts=E + Z, num_zero_experts=0, zero_expert_balance_coeff=0.0, **sizes)
        )
        # Every rank of the stock layer holds its share of real experts, then its share of zero ones.
        real, zero = E // world_size, Z // world_size
        order = [
            column
            for part in range(world_size)
            for column in [*range(part * real, (part + 1) * real), *range(E + part * zero, E + (part + 1) * zero)]
        ]
        with torch.no_grad():
            # The initialisation draws each rank's experts from its own random state; routers must agree.
            torch.distributed.broadcast(ours.router.weight, 0)
            stock.router.weight.copy_(ours.router.weight[order])
            for parameter in stock.experts.parameters():
                parameter.zero_()
            theirs = dict(stock.experts.named_parameters())
            for name, parameter in ours.experts.named_parameters():
                theirs[name].copy_(parameter)
        generator = torch.Generator().manual_seed(100 + rank)
        hidden = torch.randn(6, 2, ours.config.hidden_size, generator=generator)
        rows: list[int] = []
        sent: list[int] = []
        ours.experts.register_forward_pre_hook(lambda _, inputs, rows=rows: rows.append(inputs[0].shape[0]))
        if dispatcher == "alltoall":
            _record_sent_rows(ours, sent)
        inputs = [hidden.clone().requires_grad_() for _ in range(2)]
        outputs = [layer(x)[0] for layer, x in zip((ours, stock), inputs, strict=True)]
        for output in outputs:
            output.square().sum().backward()
        grads = dict(stock.experts.named_parameters())
        real_selections = (hidden.reshape(-1, hidden.shape[-1]) @ ours.router.weight.T).topk(K).indices < E
        results[dispatcher] = {
            "output": torch.equal(*outputs),
            "input grad": float((inputs[0].grad - inputs[1].grad).abs().max()),
            "expert grads": all(torch.equal(p.grad, grads[n].grad) for n, p in ours.experts.named_parameters()),
            "router grad": float((ours.router.weight.grad[order] - stock.router.weight.grad).abs().max()),
            "rows": rows[0],
            "sent": sent,
            "real selections": int(real_selections.sum()),
        }
    return results


@pytest.mark.parametrize("world_size", [2, 4])
def test_law_2_and_10_with_expert_parallelism(world_size: int) -> None:
    ranks = run_distributed(_law_2_with_expert_parallelism, world_size)
    for dispatcher in ("alltoall", "allgather"):
        results = [rank[dispatcher] for rank in ranks]
        for result in results:
            assert result["output"] and result["expert grads"]
            # The permuted gate sums its columns in another order.
            assert result["input grad"] < 1e-5 and result["router grad"] < 1e-5
        selections = [result["real selections"] for result in results]
        assert sum(result["rows"] for result in results) == sum(selections) < world_size * 12 * K
        if dispatcher == "alltoall":
            assert [result["sent"] for result in results] == [[count] for count in selections]
