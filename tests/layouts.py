"""Law 3: one global batch under any parallel layout, and in one process as plainly as it can be computed.

The plain computation is the oracle. It runs a padded batch through the model without Megatron-Core's schedules, data
parallelism and loss scaling, and takes equation 5 of the paper from the routers' logits in float64. Weights are drawn
by name and place, so that every rank of every layout holds its part of the same ones.

Shape suffixes: B samples, S sequence, T tokens, G = E + Z router columns.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import moe_kernels
import numpy as np
import torch
from layers import E, F, H, K, Z, layer_config
from spawn import end_megatron, initialize_megatron

from megatron_zeda.models import family_for
from megatron_zeda.training.setup import release
from megatron_zeda.zero_experts import router_statistics, set_loss_tokens, zero_expert_routers

VOCAB, SEQ, SAMPLES = 64, 16, 8  # samples per micro-step, over all data-parallel ranks
MICRO_STEPS = 4  # enough for virtual pipeline stages to send both ways at once
LAYERS, BALANCE_COEFF = 4, 0.5
ZERO_EXPERT_WEIGHT = 3.0  # w * Z is not E, so that the two groups of equation 5 differ
LENGTHS, PROMPTS = (16, 9, 15, 14, 6, 13, 16, 7), (2, 5, 7, 3, 1, 4, 9, 2)
# The "edges" scenario: the first sample is all padding. Samples of nothing but the marked token choose zero experts
# alone in every layer: its embedding is so long in one direction that no layer turns it, and routers get logits to
# match. Nobody chooses the idle expert.
MARKED_SAMPLES, MARKED_TOKEN, IDLE_EXPERT = slice(SAMPLES // 2, SAMPLES), 0, 3
MARK_LENGTH, MARK_THRESHOLD, SURE = 1e3, 4.5, 100.0  # a normalised marked token has sqrt(H) = 5.7 there

Z_LOSS: dict[str, Any] = {"moe_z_loss_coeff": 0.02}
SIGMOID: dict[str, Any] = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_topk_scaling_factor": 1.8,
    "moe_shared_expert_intermediate_size": F,
}


def glm(num_layers: int) -> dict[str, Any]:
    """What the family of GLM-4.7-Flash makes of a tiny ``config.json``; layer 0 is dense."""
    hf_config = {
        "model_type": "glm4_moe_lite",
        "architectures": ["Glm4MoeLitePlusPlusForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": H,
        "intermediate_size": 2 * F,
        "moe_intermediate_size": F,
        "num_hidden_layers": num_layers,
        "first_k_dense_replace": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 20,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "n_routed_experts": E,
        "n_shared_experts": 1,
        "num_experts_per_tok": K,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.8,
        "max_position_embeddings": SEQ,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "zce_nums": [Z],
        "zce_types": ["zero"],
        "use_zce_mask": False,
        "zeda_latent_norm_eps": 1e-6,
    }
    return {"multi_latent_attention": True, **family_for(hf_config).transformer_config_kwargs(hf_config)}


@dataclass(frozen=True)
class Scenario:
    """What is computed, the same under every layout."""

    config: dict[str, Any] = field(default_factory=dict)
    padded: bool = True
    """Samples of different lengths with loss on responses only; otherwise loss on every token."""
    edges: bool = False
    """Half of the samples skip everything, one has no token at all, and one expert neither."""


SCENARIOS = {
    "softmax": Scenario(Z_LOSS),
    "sigmoid": Scenario(SIGMOID),
    # Megatron averages the ranks' means, which is the mean over all tokens only if they hold equally many.
    "mean loss": Scenario({**Z_LOSS, "calculate_per_token_loss": False}, padded=False),
    "glm": Scenario(glm(LAYERS)),
    # A prime number of layers, as the 47 of GLM-4.7-Flash: no pipeline divides it.
    "glm, 7 layers": Scenario(glm(7)),
    "6 layers": Scenario({"num_layers": 6}),
    "edges": Scenario(edges=True),
    "nothing skips": Scenario({**SIGMOID, "zero_expert_logit_bias": -10.0}),
    "everything skips": Scenario({**SIGMOID, "zero_expert_logit_bias": 10.0}),
}


@dataclass(frozen=True)
class Layout:
    """How it is computed: nothing here may change the result."""

    sizes: dict[str, int]
    """As ``initialize_model_parallel`` takes them."""
    scenario: str = "softmax"
    config: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)
    packed: bool = False
    """The samples of a rank's micro-batch as one pack."""
    stand_ins: bool = False
    """With tests/moe_kernels.py in the place of GPU kernels."""
    world_size: int = 8


@dataclass(frozen=True)
class Outcome:
    """What a step gives, over the whole global batch."""

    loss: float
    num_zero_selections: tuple[int, ...]
    num_selections: tuple[int, ...]
    balance_loss_per_layer: tuple[float, ...]
    layer_numbers: tuple[int, ...]
    gradients: dict[str, np.ndarray] | None
    """Whole tensors by checkpoint key; on rank 0 only."""
    replica_gap: float = 0.0
    """The largest difference between what two ranks hold of the same gradient."""
    skips_all: bool = False
    """Whether this rank's tokens (there are some) chose zero experts alone."""


# ---- the global batch -----------------------------------------------------------------------------------------------


def global_batch(scenario: Scenario) -> list[dict[str, torch.Tensor]]:
    """Per micro-step: tokens, labels, loss mask and padding mask, each ``[SAMPLES, SEQ]``."""
    generator = torch.Generator().manual_seed(17)
    positions = torch.arange(SEQ).expand(SAMPLES, SEQ)
    steps = []
    for step in range(MICRO_STEPS):
        ids = torch.randint(MARKED_TOKEN + 1, VOCAB, (SAMPLES, SEQ + 1), generator=generator)
        if scenario.edges:
            ids[MARKED_SAMPLES, :-1] = MARKED_TOKEN
        lengths = torch.tensor(LENGTHS).roll(step) if scenario.padded else torch.full((SAMPLES,), SEQ)
        if scenario.edges:
            lengths[0] = 0
        prompts = torch.tensor(PROMPTS).roll(step) if scenario.padded else torch.zeros(SAMPLES, dtype=torch.int64)
        padding = positions >= lengths[:, None]
        loss_mask = (positions >= prompts[:, None]) & ~padding
        steps.append({"tokens": ids[:, :-1], "labels": ids[:, 1:], "loss_mask": loss_mask, "padding_mask": padding})
    return steps


def num_loss_tokens(scenario: Scenario) -> int:
    """Tokens that carry loss in the global batch."""
    return sum(int(step["loss_mask"].sum()) for step in global_batch(scenario))


def _pack(batch: dict[str, torch.Tensor], cp_size: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The rows of a padded batch one after the other, ``[1, B * S]``, and where each begins.

    Of its padding a row keeps what makes its length a multiple of 2 * CP; what is saved is a last sequence of padding.
    """
    multiple = 2 * cp_size
    lengths = (~batch["padding_mask"]).sum(1)
    kept = (lengths + multiple - 1) // multiple * multiple
    total = batch["tokens"].numel()
    packed = {}
    for name, rows in batch.items():
        row = torch.cat([row[:length] for row, length in zip(rows, kept.tolist(), strict=True)])
        tail = row.new_full((total - len(row),), name == "padding_mask")
        packed[name] = torch.cat([row, tail])[None]
    boundaries = torch.cat([torch.tensor([0]), kept.cumsum(0), torch.tensor([total])])
    return packed, boundaries.unique().int()


def _rank_batches(layout: Layout) -> list[dict[str, Any]]:
    """This rank's micro-batches as the model takes them, and their ``loss_mask``."""
    from megatron.core import parallel_state
    from megatron.core.packed_seq_params import PackedSeqParams

    from megatron_zeda.platform.zigzag import thd_partition_indices

    dp_rank, dp_size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    cp_rank, cp_size = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
    batches = []
    for step in global_batch(SCENARIOS[layout.scenario]):
        batch: dict[str, Any] = {name: part.chunk(dp_size)[dp_rank] for name, part in step.items()}
        boundaries, packed_seq_params = torch.tensor([0, SEQ]), None
        if layout.packed:
            batch, boundaries = _pack(batch, cp_size)
            longest = int(boundaries.diff().max())
            packed_seq_params = PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=boundaries,
                cu_seqlens_kv=boundaries,
                max_seqlen_q=longest,
                max_seqlen_kv=longest,
            )
        held = thd_partition_indices(boundaries, int(boundaries[-1]), cp_size, cp_rank)
        batch = {name: part.index_select(1, held) for name, part in batch.items()}
        batches.append(batch | {"packed_seq_params": packed_seq_params})
    return batches


# ---- the model ------------------------------------------------------------------------------------------------------


def model_config(scenario: Scenario, sizes: dict[str, int], changes: dict[str, Any]) -> Any:
    """The configuration of a scenario under a layout."""
    settings = {
        "num_layers": LAYERS,
        "calculate_per_token_loss": True,
        "zero_expert_balance_coeff": BALANCE_COEFF,
        "zero_expert_weight": ZERO_EXPERT_WEIGHT,
        "pipeline_dtype": torch.float32,
        "sequence_parallel": sizes.get("tensor_model_parallel_size", 1) > 1,
    }
    if "virtual_pipeline_model_parallel_size" in sizes:
        # Two ranks that are each other's next and previous one need the two directions told apart.
        settings |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    return layer_config(**(settings | scenario.config | changes | sizes))


def build_chunks(config: Any, scenario: Scenario) -> list[torch.nn.Module]:
    """This rank's model chunks with their part of the weights, in training mode."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel

    from megatron_zeda.zero_experts import get_zero_expert_block_spec, get_zero_expert_layer_spec

    uniform = config.moe_layer_freq == 1
    chunks: list[torch.nn.Module] = []
    num_stages = config.virtual_pipeline_model_parallel_size
    for vp_stage in [None] if num_stages is None else range(num_stages):
        place = {"ignore_virtual": False, "vp_stage": vp_stage}
        chunks.append(
            GPTModel(
                config,
                get_zero_expert_layer_spec(config)
                if uniform
                else get_zero_expert_block_spec(config, vp_stage=vp_stage),
                vocab_size=VOCAB,
                max_sequence_length=SEQ,
                pre_process=parallel_state.is_pipeline_first_stage(**place),
                post_process=parallel_state.is_pipeline_last_stage(**place),
                position_embedding_type="rope",
                share_embeddings_and_output_weights=False,
                vp_stage=vp_stage,
            ).train()
        )
    with torch.no_grad():
        for part in _parts(chunks):
            part.data.copy_(_weight(part.key, part.global_shape, scenario)[part.global_slice()])
    if scenario.edges:
        for router in zero_expert_routers(chunks):
            router.gating = partial(_marking_gate, router.gating)
    return chunks


def _parts(chunks: list[torch.nn.Module]) -> Iterator[Any]:
    """What this rank holds of every parameter and buffer, as Megatron-Core's ``ShardedTensor`` (views, not copies)."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories

    for chunk in chunks:
        state = chunk.sharded_state_dict()
        apply_factories(state)
        for part in nested_values(state):
            if isinstance(part, ShardedTensor):
                yield part


def _weight(key: str, shape: tuple[int, ...], scenario: Scenario) -> torch.Tensor:
    """The whole tensor that a checkpoint would hold under this key."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
    if "norm" in key:
        return 1.0 + 0.05 * noise
    if "word_embeddings" in key:
        if scenario.edges:
            noise[MARKED_TOKEN] = 0.0
            noise[MARKED_TOKEN, 0] = MARK_LENGTH
        return noise
    return 0.2 * noise


def _marking_gate(gating: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    """A router's gate for the "edges" scenario: sure of zero experts for marked tokens, and never the idle expert."""
    logits = gating(hidden)
    sure = torch.zeros_like(logits)
    sure[..., E:] = SURE * (hidden[..., :1] > MARK_THRESHOLD)
    sure[..., IDLE_EXPERT] = -SURE
    return logits + sure


# ---- one process, plainly -------------------------------------------------------------------------------------------


def plain_step(scenario: Scenario, balance_coeff: float = BALANCE_COEFF) -> Outcome:
    """The objective, its gradients and statistics, computed in this one process from their definitions.

    Also checks that no selection hangs on rounding: another layout would be free to choose otherwise.
    """
    config = model_config(scenario, {}, {"zero_expert_balance_coeff": 0.0})
    chunks = build_chunks(config, scenario)
    routers = zero_expert_routers(chunks)
    for router in routers:
        router.counting = False  # which leaves out the z-loss, too
    z_loss_coeff = config.moe_z_loss_coeff or 0.0
    steps = global_batch(scenario)
    num_tokens = num_loss_tokens(scenario)
    loss, objective = 0.0, torch.zeros(())
    zero, selections = torch.zeros(len(routers)), torch.zeros(len(routers))
    balances = torch.zeros(len(routers), dtype=torch.float64)
    for batch in steps:
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        for router in routers:
            router.routing = partial(_recorded_routing, type(router).routing, router, seen)
        positions = torch.arange(SEQ).expand(SAMPLES, SEQ)
        losses = chunks[0](batch["tokens"], positions, None, labels=batch["labels"], padding_mask=batch["padding_mask"])
        total = (losses * batch["loss_mask"]).sum()
        loss += float(total.detach())
        valid_T = ~batch["padding_mask"].T.reshape(-1)
        values, z_losses = [], []
        for index, (router, (logits_TG, map_TG)) in enumerate(zip(routers, seen, strict=True)):
            zero[index] += map_TG[valid_T, E:].sum()
            selections[index] += map_TG[valid_T].sum()
            values.append(_balance(router, logits_TG[valid_T], map_TG[valid_T]))
            z_losses.append(logits_TG[valid_T].double().logsumexp(-1).square().mean())
        balances += torch.stack(values).detach() / MICRO_STEPS
        # One token counts like any other, whichever micro-step it is in; every layer's balancing loss and z-loss are
        # averaged over micro-steps.
        routers_part = balance_coeff * torch.stack(values).sum() + z_loss_coeff * torch.stack(z_losses).sum()
        objective = objective + total / num_tokens + routers_part / MICRO_STEPS
    objective.backward()
    with torch.no_grad():
        for parameter in chunks[0].parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    parts = [(p.key, p.global_shape, p.global_slice(), p.data.detach().numpy()) for p in _gradient_parts(chunks)]
    gradients, _ = _whole(parts)
    return Outcome(
        loss,
        tuple(zero.int().tolist()),
        tuple(selections.int().tolist()),
        tuple(balances.tolist()),
        tuple(router.layer_number for router in routers),
        gradients,
    )


def _recorded_routing(
    routing: Any, router: Any, seen: list[Any], logits: torch.Tensor, padding_mask: torch.Tensor | None = None
) -> Any:
    probs_TG, map_TG = routing(router, logits, padding_mask)
    seen.append((logits.reshape(-1, E + Z), map_TG))
    return probs_TG, map_TG


def _balance(router: Any, logits_TG: torch.Tensor, map_TG: torch.Tensor) -> torch.Tensor:
    """Equation 5 in float64, over tokens that are not padding."""
    logits_TG = logits_TG.double()
    if router.score_function == "softmax":
        scores_TG = chosen_by_TG = logits_TG.softmax(-1)
    else:
        scores_TG = chosen_by_TG = logits_TG.sigmoid()
        dial_G = torch.zeros(E + Z).index_fill_(0, torch.arange(E, E + Z), router.config.zero_expert_logit_bias)
        chosen_by_TG = scores_TG + router.expert_bias + dial_G
        scores_TG = scores_TG / scores_TG.sum(-1, keepdim=True)
    ordered = chosen_by_TG.detach().sort(descending=True).values
    margin = float((ordered[:, K - 1] - ordered[:, K]).min())
    assert margin > 1e-5, f"a selection hangs on a difference of {margin}: choose another seed"
    f_G, p_G = map_TG.double().mean(0), scores_TG.mean(0)
    weighted = ZERO_EXPERT_WEIGHT * Z
    sums = f_G[:E].sum() * p_G[:E].sum() / E + f_G[E:].sum() * p_G[E:].sum() / weighted
    return (E + weighted) / K * sums


# ---- many processes -------------------------------------------------------------------------------------------------


def run_layout(rank: int, world_size: int, layout: Layout) -> Outcome:
    """One step of Megatron-Core's own machinery: schedule, data parallelism, gradient finalisation.

    For :func:`spawn.run_distributed`, by way of :func:`run_layouts`.
    """
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    initialize_megatron(**layout.sizes)
    if layout.stand_ins:
        moe_kernels.install()
    scenario = SCENARIOS[layout.scenario]
    config = model_config(scenario, layout.sizes, layout.config)
    chunks = build_chunks(config, scenario)
    ddp_config = DistributedDataParallelConfig(**layout.ddp)
    wrapped = [DistributedDataParallel(config, ddp_config, chunk) for chunk in chunks]
    config.finalize_model_grads_func = finalize_model_grads
    if ddp_config.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    for chunk in wrapped:
        chunk.zero_grad_buffer()
    set_loss_tokens(num_loss_tokens(scenario) / MICRO_STEPS)
    batches = _rank_batches(layout)
    samples = SAMPLES // parallel_state.get_data_parallel_world_size()
    virtual = len(wrapped) > 1
    stored = get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=[iter(batches) for _ in wrapped] if virtual else iter(batches),
        model=wrapped if virtual else wrapped[0],
        num_microbatches=MICRO_STEPS,
        seq_length=samples * SEQ if layout.packed else SEQ,
        micro_batch_size=1 if layout.packed else samples,
        forward_only=False,
    )
    loss = torch.tensor([sum(float(one["loss"]) for one in stored)], dtype=torch.float64)
    # Only the last pipeline stage has a loss.
    torch.distributed.all_reduce(loss, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    torch.distributed.all_reduce(loss, group=parallel_state.get_pipeline_model_parallel_group())

    counts = [router.counts.sums for router in zero_expert_routers(wrapped)]
    skips_all = bool(counts) and all(float(sums[0]) == K * float(sums[1]) > 0 for sums in counts)
    statistics = router_statistics(wrapped)
    if ddp_config.use_distributed_optimizer:
        _gather_gradients(wrapped)
    with torch.no_grad():
        for chunk in chunks:
            for parameter in chunk.parameters():
                parameter.copy_(parameter.main_grad)
    # As numpy arrays, which are pickled ten times as fast.
    mine = [(p.key, p.global_shape, p.global_slice(), p.data.detach().numpy().copy()) for p in _gradient_parts(chunks)]
    everyone: list[Any] | None = None
    if rank == 0:
        everyone = [None] * world_size
    torch.distributed.gather_object(mine, everyone)
    gradients, gap = (None, 0.0) if everyone is None else _whole([part for parts in everyone for part in parts])
    release(wrapped)  # or its groups, for each of which gloo polls, stay until the processes end
    return Outcome(
        float(loss),
        statistics.num_zero_selections,
        statistics.num_selections,
        statistics.balance_loss_per_layer,
        statistics.layer_numbers,
        gradients,
        gap,
        skips_all,
    )


def run_layouts(rank: int, world_size: int, layouts: dict[str, Layout]) -> dict[str, Outcome]:
    """:func:`run_layout` for each of them, in the same processes."""
    outcomes = {}
    for name, layout in layouts.items():
        try:
            before = _num_threads()
            outcomes[name] = run_layout(rank, world_size, layout)
            end_megatron()
            assert _num_threads() < before + 30, "the model and the threads of its groups outlive the layout"
        except BaseException as error:
            error.add_note(f"in layout {name!r}")
            raise
    return outcomes


def _num_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def _forward_step(batches: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    batch = next(batches)
    loss_mask = batch["loss_mask"]
    positions = torch.zeros_like(batch["tokens"])  # rotary embeddings go by places and packs, not by these
    output = model(
        batch["tokens"],
        positions,
        None,
        labels=batch["labels"],
        padding_mask=batch["padding_mask"],
        packed_seq_params=batch["packed_seq_params"],
    )

    def loss_func(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        total = (losses * loss_mask).sum()
        return total, loss_mask.sum().int(), {"loss": total.detach().clone()}

    return output, loss_func


def _gather_gradients(wrapped: list[Any]) -> None:
    """Under the distributed optimizer each rank has the sum over ranks of its shard of a bucket only."""
    for chunk in wrapped:
        for bucket_group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
            group = bucket_group.intra_distributed_optimizer_instance_group
            for bucket in bucket_group.buckets:
                shards = bucket.grad_data.view(group.size(), -1)
                everyone = [torch.empty_like(shard) for shard in shards]
                torch.distributed.all_gather(everyone, shards[group.rank()].clone(), group=group)
                shards.copy_(torch.stack(everyone))


def _gradient_parts(chunks: list[torch.nn.Module]) -> Iterator[Any]:
    return (part for part in _parts(chunks) if "expert_bias" not in part.key)


def _whole(parts: list[tuple[str, Any, Any, np.ndarray]]) -> tuple[dict[str, np.ndarray], float]:
    """Whole tensors from the ranks' parts, and the largest difference between parts that should be copies."""
    whole: dict[str, np.ndarray] = {}
    gap = 0.0
    for key, shape, place, data in parts:
        target = whole.setdefault(key, np.full(shape, np.nan, np.float32))[place]
        if not np.isnan(target).all():
            gap = max(gap, float(np.abs(target - data).max()))
        target[...] = data
    for key, tensor in whole.items():
        assert not np.isnan(tensor).any(), f"no rank holds all of {key}, or its gradient is NaN"
    return whole, gap
