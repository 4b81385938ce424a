"""Generation with the model of a training job, in its processes and with its weights: nothing to copy, nothing to sync.

A decode loop over Megatron-Core's ``GPTModel`` and its static inference context (the key-value cache). It runs at any
training layout without context parallelism:

- tensor parallelism as in training, but without sequence parallelism: one new token per row cannot be split;
- pipeline stages, virtual ones too, hand the hidden states on, and the last one tells all others what was sampled;
- every data-parallel replica answers its share of the requests. Where experts are spread over replicas, these take
  every step together, with equally many rows, until all are done (every token dispatcher can do that).

Rows begin at position 0 whatever the length of their prompts: the cache is filled up to the end of the shortest prompt
at once, the rest of longer ones is fed token by token. So no row has padding, and requests are sorted by length.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_zeda.errors import InputError
from megatron_zeda.rollout.decode import Rows
from megatron_zeda.rollout.engine import Array, Request, Response, Sampling
from megatron_zeda.rollout.megatron_decode import RoutingRecorder, decode, generating


class MegatronEngine:
    """Answers prompts with this rank's part of a model; every rank of the job makes every call."""

    collective = True

    def __init__(
        self,
        chunks: Sequence[Any],
        *,
        eos_ids: Sequence[int],
        context: int,
        batch_size: int = 32,
        record_routing: bool = False,
        weights_version: int | None = None,
    ) -> None:
        """Take a model.

        Args:
            chunks: this rank's model chunks, wrapped (DDP, ``Float16Module``) or plain. With
                ``ddp.overlap_param_gather`` every rank must hold its whole parameters while :meth:`generate` runs.
            eos_ids: tokens that end a response, unless the sampling names others.
            context: most positions of prompt and response together.
            batch_size: rows that one data-parallel replica generates together.
            record_routing: keep which experts every token chose, in :attr:`Response.routing`.
            weights_version: updates that the weights have had; the attribute of that name may be set before every
                call.

        Raises:
            InputError: a layout or setting that cannot generate.
        """
        self.chunks = [_unwrap(chunk) for chunk in chunks]
        self.eos_ids, self.context, self.batch_size = list(eos_ids), context, batch_size
        self.weights_version = weights_version
        config = self.chunks[0].config
        _check(config, batch_size)
        self.device = next(parameter.device for chunk in self.chunks for parameter in chunk.parameters())
        self._recorder = RoutingRecorder(self.chunks) if record_routing else None
        # Experts that are spread over more ranks than one replica has tie the steps of replicas together.
        replica = config.tensor_model_parallel_size
        spread = config.expert_model_parallel_size * config.expert_tensor_parallel_size
        self._replicas = parallel_state.get_data_parallel_group()
        self._together = self._replicas if spread > replica else None
        compute = str(config.params_dtype).removeprefix("torch.")
        self.name = f"megatron-core {version('megatron-core')}, {compute}, {self.device.type}"

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Response]:
        """Answer requests: a collective call of all ranks with the same requests.

        Returns:
            All responses, on every rank.

        Raises:
            InputError: a prompt that is empty or leaves no room for a response.
        """
        for request in requests:
            if not 1 <= len(request.prompt_ids) < self.context:
                raise InputError(
                    "impossible length of a prompt",
                    where=f"row {request.row}",
                    value=len(request.prompt_ids),
                    rule=f"1 to {self.context - 1} tokens, so that a response fits",
                )
        # Longest first: rows that are read together have about the same length, and running out of memory happens at
        # once or never.
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids), reverse=True)
        mine = order[self._replicas.rank() :: self._replicas.size()]
        most = -(-len(order) // self._replicas.size())
        answered: list[Response] = []
        with generating(self.chunks):
            for start in range(0, most, self.batch_size):
                batch = [requests[i] for i in mine[start : start + self.batch_size]]
                if batch or self._together is not None:
                    answered += self._answer(batch, sampling)
        return self._gather(order, answered)

    def _answer(self, batch: Sequence[Request], sampling: Sampling) -> list[Response]:
        """The responses of one batch of this replica."""
        prompts = [request.prompt_ids for request in batch]
        rows = Rows(
            prompts,
            sampling=sampling,
            rows=[request.row for request in batch],
            eos_ids=self.eos_ids,
            context=self.context,
        )
        shared: dict[str, Any] = {"device": self.device, "together": self._together, "recorder": self._recorder}
        if self._recorder is None:
            responses = decode(self.chunks, prompts, rows, **shared)
        else:
            with self._recorder.recording(len(batch)):
                responses = decode(self.chunks, prompts, rows, **shared)
            for response, routing in zip(responses, _whole_routing(self._recorder), strict=True):
                response.routing = None if response.finish_reason == "error" else routing
        for response in responses:
            response.weights_version = self.weights_version
        return responses

    def _gather(self, order: Sequence[int], answered: list[Response]) -> list[Response]:
        """The responses of all replicas, in the order of the requests."""
        size = self._replicas.size()
        everyone = [answered]
        if size > 1:
            parts: list[Any] = [None] * size
            dist.all_gather_object(parts, answered, group=self._replicas)
            everyone = parts
        responses: list[Response] = [Response() for _ in order]
        for rank, part in enumerate(everyone):
            for index, response in zip(order[rank::size], part, strict=True):
                responses[index] = response
        return responses


def _unwrap(chunk: Any) -> Any:
    """The ``GPTModel`` inside DDP and ``Float16Module``."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def _check(config: Any, batch_size: int) -> None:
    """Refuse what cannot generate."""
    if batch_size < 1:
        raise InputError("out of range", where="batch_size", value=batch_size, rule="at least 1")
    rules: list[tuple[str, bool, str]] = [
        ("context_parallel_size", config.context_parallel_size == 1, "1: a new token cannot be split"),
        ("moe_expert_capacity_factor", config.moe_expert_capacity_factor is None, "null: rows must not displace rows"),
        ("cuda_graph_impl", config.cuda_graph_impl == "none", "none"),
        ("flash_decode", not config.flash_decode, "false"),
    ]
    for name, holds, rule in rules:
        if not holds:
            raise InputError(
                "the megatron engine cannot generate with this setting",
                where=f"model.{name}",
                value=getattr(config, name),
                rule=rule,
                fix="change it, or take another rollout.engine",
            )


def _whole_routing(recorder: RoutingRecorder) -> list[Array | None]:
    """The routing of this replica's rows in the MoE layers of all pipeline stages."""
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    mine = (recorder.layer_numbers, recorder.rows())
    if pipeline.size() == 1:
        return mine[1]
    stages: list[Any] = [None] * pipeline.size()
    dist.all_gather_object(stages, mine, group=pipeline)
    stages = [stage for stage in stages if stage[0]]
    places = np.argsort([number for numbers, _ in stages for number in numbers])
    return [
        np.concatenate(parts, axis=1)[:, places] if parts else None
        for parts in zip(*(rows for _, rows in stages), strict=True)
    ]
