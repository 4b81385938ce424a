"""Context parallelism of the local core attention over gloo: the same outputs and gradients as one process.

Shape suffixes: T tokens of all ranks, N query heads, G key-value groups, D and V head dimensions.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_models import VOCAB, attention_config, build_model, pack
from layers import layer_config
from spawn import initialize_megatron, run_distributed

pytestmark = pytest.mark.distributed

LENGTHS = (16, 8, 0, 24)  # the empty one as collators leave them
TOTAL = sum(LENGTHS)
HEADS = {"grouped": (4, 2, 8, 8), "latent": (4, 4, 12, 7)}


def _written_out(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    """``[T, N, D]``, ``[T, G, D]``, ``[T, G, V]`` to ``[T, N * V]``: causal within each sequence."""
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    order = torch.arange(len(sequence))
    allowed = (sequence[:, None] == sequence[None]) & (order[:, None] >= order[None])
    key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
    scores = torch.einsum("snd,knd->nsk", query, key) / math.sqrt(query.shape[-1])
    probs = scores.masked_fill(~allowed, -math.inf).softmax(-1)
    return torch.einsum("nsk,knv->snv", probs, value).flatten(1)


def _core_attention_difference(heads: str, packed: bool) -> float:
    """Largest difference of outputs and gradients from attention written out, both in float64."""
    from megatron.core import parallel_state
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_zeda.platform.attention import LocalDotProductAttention
    from megatron_zeda.platform.zigzag import thd_partition_indices

    n, g, d, v = HEADS[heads]
    size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    config = layer_config(context_parallel_size=size)
    attention = LocalDotProductAttention(
        config, 1, AttnMaskType.causal, "self", k_channels=d, v_channels=v, cp_comm_type="p2p"
    )
    lengths = LENGTHS if packed else (TOTAL,)
    params = pack(*lengths)
    mine = thd_partition_indices(params.cu_seqlens_q, TOTAL, size, rank)
    generator = torch.Generator().manual_seed(1)
    shapes = (TOTAL, n, d), (TOTAL, g, d), (TOTAL, g, v), (TOTAL, n * v)
    *whole, weights = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    local = [part[mine].requires_grad_() for part in whole]
    if packed:
        output = attention(*local, None, packed_seq_params=params)
    else:
        output = attention(*(part.unsqueeze(1) for part in local), None)[:, 0]
    (output * weights[mine]).sum().backward()
    whole = [part.requires_grad_() for part in whole]
    expected = _written_out(*whole, lengths)
    (expected * weights).sum().backward()
    pairs = [(output, expected), *((part.grad, twin.grad) for part, twin in zip(local, whole, strict=True))]
    return max(float((ours - theirs[mine]).detach().abs().max()) for ours, theirs in pairs)


def _losses(model: Any, packed: bool, mine: torch.Tensor) -> torch.Tensor:
    """Loss of every token of this context-parallel rank ``[T / CP]``."""
    ids = torch.randint(VOCAB, (2, 1, TOTAL), generator=torch.Generator().manual_seed(2))
    lengths = LENGTHS if packed else (TOTAL,)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    inputs, labels, positions = (part.index_select(1, mine) for part in (*ids, positions))
    params = pack(*lengths) if packed else None
    return model(inputs, positions, None, labels=labels, packed_seq_params=params)[0]


def _model_differences(sizes: dict[str, int], latent: bool, packed: bool, folder: Path) -> dict[str, float]:
    """A language model over the layout against the same model in each process alone.

    Returns:
        Differences of the losses and of every gradient, the latter relative to its largest entry.
    """
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    from megatron_zeda.platform.zigzag import thd_partition_indices

    initialize_megatron()
    model = build_model(attention_config(latent))
    rank = torch.distributed.get_rank()
    for kind in ("weights", "gradients"):
        if rank == 0:
            (folder / kind).mkdir(parents=True)
    torch.distributed.barrier()
    dist_checkpointing.save(model.sharded_state_dict(), str(folder / "weights"))
    expected = _losses(model, packed, torch.arange(TOTAL))
    expected.mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    dist_checkpointing.save(model.sharded_state_dict(), str(folder / "gradients"))

    initialize_megatron(**sizes)
    config = attention_config(
        latent,
        calculate_per_token_loss=True,
        sequence_parallel=sizes.get("tensor_model_parallel_size", 1) > 1,
        **sizes,
    )
    model = build_model(config)
    model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), str(folder / "weights")))
    wrapped = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
    wrapped.train()
    wrapped.zero_grad_buffer()
    lengths = LENGTHS if packed else (TOTAL,)
    size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    mine = thd_partition_indices(pack(*lengths).cu_seqlens_q, TOTAL, size, rank)
    losses = _losses(wrapped, packed, mine)
    losses.sum().backward()
    finalize_model_grads([wrapped], torch.tensor(losses.numel(), dtype=torch.int))
    gradients = {name: parameter.main_grad.clone() for name, parameter in model.named_parameters()}
    model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), str(folder / "gradients")))
    differences = {"loss": float((losses - expected[mine]).detach().abs().max())}
    for name, reference in model.named_parameters():
        scale = float(reference.detach().abs().max())
        assert scale > 0 or "experts" in name, name  # an expert may have no token
        difference = float((gradients[name] - reference).detach().abs().max())
        differences[name] = difference / scale if scale else difference
    return differences


def _measure(rank: int, world_size: int, layouts: list[dict[str, int]], folder: Path) -> dict[str, Any]:
    initialize_megatron(context_parallel_size=world_size)
    results: dict[str, Any] = {
        f"core attention, {heads}, {'packed' if packed else 'one sequence'}": _core_attention_difference(heads, packed)
        for heads in HEADS
        for packed in (False, True)
    }
    for sizes in layouts:
        for latent in (False, True):
            for packed in (False, True):
                name = f"model, {'latent' if latent else 'grouped'}, {'packed' if packed else 'one sequence'}, {sizes}"
                results[name] = _model_differences(sizes, latent, packed, folder / str(len(results)))
    return results


@pytest.mark.slow
@pytest.mark.parametrize(
    "layouts",
    [[{"context_parallel_size": 2}], [{"context_parallel_size": 2, "tensor_model_parallel_size": 2}]],
    ids=["2 processes", "4 processes"],
)
def test_context_parallelism_equals_one_process(layouts: list[dict[str, int]], tmp_path: Path) -> None:
    world_size = math.prod(layouts[0].values())
    for results in run_distributed(_measure, world_size, layouts, tmp_path):
        for name, differences in results.items():
            if name.startswith("core"):
                assert differences < 1e-13, name  # float64, values of order one
            else:
                worst = max(differences, key=differences.get)
                assert differences[worst] < 1e-5, f"{name}: {worst} differs by {differences[worst]}"
