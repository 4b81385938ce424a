"""One batch of responses from the chunks of a Megatron-Core model: the key-value cache, the pipeline, the loop.

Shapes: B rows, S new positions, V vocabulary, H hidden, L MoE layers of this rank, K selections, G router columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import isfinite
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.inference.utils import InferenceMode
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_zeda.rollout.decode import Rows
from megatron_zeda.rollout.engine import Array, Response

# Positions of the first key-value cache beyond the prompt; it doubles when it is full.
_FIRST_ROOM = 256
# What splits a sequence over tensor-parallel ranks: one new token per row cannot be split.
_SEQUENCE_PARALLEL = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")


@contextmanager
def generating(chunks: Sequence[Any]) -> Iterator[None]:
    """Within the block the chunks (``GPTModel``) are ready to generate, and afterwards they are as they were.

    They are in eval mode without gradients, sequence parallelism and FP8 (whose GEMMs want more rows than a batch has;
    weights are in bf16 anyway); routers count nothing. ``torch.inference_mode`` would leave tensors in Megatron-Core's
    caches (rotary embeddings) that training cannot use.
    """
    undo: list[tuple[Any, str, Any]] = []

    def turn_off(owner: Any, name: str, off: Any) -> None:
        before = getattr(owner, name, None)
        if before:
            undo.append((owner, name, before))
            setattr(owner, name, off)

    for module in (module for chunk in chunks for module in chunk.modules()):
        for name in _SEQUENCE_PARALLEL:
            turn_off(module, name, False)
        turn_off(module, "counting", False)
        config = getattr(module, "config", None)
        if isinstance(config, TransformerConfig):
            turn_off(config, "sequence_parallel", False)
            turn_off(config, "fp8", None)
    modes = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    try:
        with torch.no_grad(), InferenceMode.active():
            yield
    finally:
        for owner, name, before in reversed(undo):
            setattr(owner, name, before)
        for chunk, mode in zip(chunks, modes, strict=True):
            chunk.train(mode)
            chunk.set_input_tensor(None)


class CachedModel:
    """A model spread over pipeline stages, and the keys and values of what it has read so far."""

    def __init__(self, chunks: Sequence[Any], *, rows: int, room: int, limit: int) -> None:
        """Args:
        chunks: this rank's, inside :func:`generating`.
        rows: B.
        room: positions to begin with.
        limit: most positions that will ever be read.
        """
        self.chunks, self._limit = chunks, limit
        self._cache = StaticInferenceContext(rows, min(room, limit))
        config = chunks[0].config
        self._hidden_size = config.hidden_size
        self._hidden_dtype = torch.float32 if config.fp32_residual_connection else config.params_dtype

    def step(self, ids_BS: Tensor) -> Tensor | None:
        """Read the next tokens of all rows.

        Returns:
            The logits behind the last of them, ``[B, V]`` float32, on the last pipeline stage.
        """
        cache, (rows, new) = self._cache, ids_BS.shape
        start = cache.sequence_len_offset
        if start + new > cache.max_sequence_length:
            self._move(None, max(min(2 * cache.max_sequence_length, self._limit), start + new))
        positions_BS = torch.arange(start, start + new, device=ids_BS.device).expand_as(ids_BS)
        pipeline = parallel_state.get_pipeline_model_parallel_group()
        rank, size = pipeline.rank(), pipeline.size()
        ranks = dist.get_process_group_ranks(pipeline)
        output = None
        for index, chunk in enumerate(self.chunks):
            if not (rank == 0 and index == 0):
                hidden_SBH = torch.empty(new, rows, self._hidden_size, dtype=self._hidden_dtype, device=ids_BS.device)
                dist.recv(hidden_SBH, src=ranks[(rank - 1) % size], group=pipeline)
                chunk.set_input_tensor(hidden_SBH)
            output = chunk(ids_BS, positions_BS, None, inference_context=cache, runtime_gather_output=True)
            if not (rank == size - 1 and index == len(self.chunks) - 1):
                dist.send(output.to(self._hidden_dtype).contiguous(), dst=ranks[(rank + 1) % size], group=pipeline)
                output = None
        cache.sequence_len_offset += new
        return None if output is None else output[:, -1].float()

    def keep(self, places: Sequence[int]) -> None:
        """Go on with these rows, in this order."""
        self._cache.max_batch_size = len(places)
        self._move(places, self._cache.max_sequence_length)

    def _move(self, places: Sequence[int] | None, room: int) -> None:
        """Copy what has been read into a cache of another size."""
        read, memory = self._cache.sequence_len_offset, self._cache.key_value_memory_dict
        self._cache.max_sequence_length = room
        for layer, pair in memory.items():
            moved = []
            for cached in pair:
                kept = cached[:read] if places is None else cached[:read, list(places)]
                whole = cached.new_empty(room, *kept.shape[1:])
                whole[:read] = kept
                moved.append(whole)
            memory[layer] = tuple(moved)


class RoutingRecorder:
    """Which experts the rows of a batch chose, in the MoE layers of this rank."""

    def __init__(self, chunks: Sequence[Any]) -> None:
        """Find the routers of chunks; layers of multi-token prediction do not generate."""
        modules = (module for chunk in chunks for module in chunk.modules())
        routers = [module for module in modules if isinstance(module, TopKRouter) and not module.is_mtp_layer]
        self.routers = sorted(routers, key=lambda router: int(router.layer_number or 0))
        self.layer_numbers = [int(router.layer_number or 0) for router in self.routers]
        self._step: dict[int, Tensor] = {}
        self._rows: list[list[Array]] = []

    @contextmanager
    def recording(self, rows: int) -> Iterator[None]:
        """Listen within the block, to a batch of so many rows."""
        self._rows = [[] for _ in range(rows)]
        handles = [router.register_forward_hook(self._listen) for router in self.routers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _listen(self, router: Any, _: Any, output: tuple[Tensor, Tensor]) -> None:
        routing_map_TG = output[1]
        chosen = routing_map_TG.to(torch.uint8).topk(router.topk, dim=-1).indices
        self._step[id(router)] = chosen.sort(dim=-1).values

    def add(self, slots: Sequence[int], shape: torch.Size) -> None:
        """Keep what the last step of ``ids [B, S]`` chose, whose first rows are the batch's rows ``slots``."""
        if not self.routers:
            return
        rows, new = shape
        steps = [self._step[id(router)].view(new, rows, -1) for router in self.routers]
        chosen_BSLK = torch.stack(steps).permute(2, 1, 0, 3).to(torch.int16).cpu().numpy()
        for place, row in enumerate(slots):
            self._rows[row].append(chosen_BSLK[place])

    def rows(self) -> list[Array | None]:
        """Per row ``[positions, L, K]``; None on a rank without MoE layers."""
        return [np.concatenate(parts) if parts else None for parts in self._rows]


def decode(
    chunks: Sequence[Any],
    prompts: Sequence[Sequence[int]],
    rows: Rows,
    *,
    device: torch.device,
    together: Any,
    recorder: RoutingRecorder | None,
) -> list[Response]:
    """Answer one batch of prompts; a collective call, inside :func:`generating`.

    Args:
        chunks: this rank's.
        prompts: token ids; none at all where other replicas need this one's experts.
        rows: the responses of these prompts.
        device: of the model.
        together: the group of replicas that take every step together, with equally many rows; None: this one is alone.
        recorder: listens to the routers, if anybody wants to know.

    Returns:
        The responses, complete on every rank of this replica.
    """
    shortest = min(map(len, prompts), default=1 << 30)
    widest, negative, limit = _largest(together, device, len(prompts), -shortest, rows.positions)
    slots, read = list(range(len(prompts))), -negative  # rows of the batch still growing, and what they have read
    begin = [[*prompts[row][:read]] for row in slots] + [[0] * read] * (widest - len(slots))
    ids_BS = torch.tensor(begin, device=device)
    model = CachedModel(chunks, rows=widest, room=read + _FIRST_ROOM, limit=limit)
    while True:
        logits_BV = model.step(ids_BS)
        if recorder is not None:
            recorder.add(slots, ids_BS.shape)
        picked = _pick(logits_BV, slots, rows, device)
        places, following = [], []
        for place, (row, (token, logprob)) in enumerate(zip(slots, picked, strict=True)):
            if read < len(prompts[row]):
                token = prompts[row][read]
            elif not isfinite(logprob):
                rows.responses[row].fail("the model's logits are not finite")
                continue
            elif not rows.add(row, int(token), logprob):
                continue
            places.append(place)
            following.append(int(token))
        (width,) = _largest(together, device, len(places))
        if width == 0:
            return rows.responses
        # The rows of this batch come first; others' batches may need finished ones to go on beside them.
        kept = places + [place for place in range(ids_BS.shape[0]) if place not in places][: width - len(places)]
        if kept != list(range(ids_BS.shape[0])):
            model.keep(kept)
        slots = [slots[place] for place in places]
        ids_BS = torch.tensor(following + [0] * (width - len(following)), device=device)[:, None]
        read += 1


def _pick(
    logits_BV: Tensor | None, slots: Sequence[int], rows: Rows, device: torch.device
) -> list[tuple[float, float]]:
    """Token and log-probability of every row, drawn on the last pipeline stage and told to the others."""
    if not slots:
        return []
    picked = torch.empty(2, len(slots), dtype=torch.float64, device=device)
    if logits_BV is not None:
        tokens, logprobs = rows.pick(logits_BV[: len(slots)], slots)
        picked[0], picked[1] = tokens, logprobs
        tensor = parallel_state.get_tensor_model_parallel_group()
        if tensor.size() > 1:  # sums that are rounded in another order may draw another token
            dist.broadcast(picked, src=dist.get_process_group_ranks(tensor)[0], group=tensor)
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    if pipeline.size() > 1:
        dist.broadcast(picked, src=dist.get_process_group_ranks(pipeline)[-1], group=pipeline)
    tokens_, logprobs_ = picked.tolist()
    return list(zip(tokens_, logprobs_, strict=True))


def _largest(group: Any, device: torch.device, *values: int) -> list[int]:
    """The largest of every value over the ranks of a group."""
    if group is None:
        return list(values)
    largest = torch.tensor(values, device=device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return [int(value) for value in largest.tolist()]
