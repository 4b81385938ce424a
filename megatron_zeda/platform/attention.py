"""Core attention for Megatron-Core's local layer spec, where Transformer Engine is not there.

Megatron-Core's own ``DotProductAttention`` refuses context parallelism, packed sequences and multi-latent attention.
This one is built on ``torch.nn.functional.scaled_dot_product_attention``, which keeps no scores where it has a fused
kernel (on a CPU it does).

Shape suffixes: S queries of this rank, K keys, B batch, N query heads of this rank, G key-value groups of this rank,
D head dimension of queries and keys, V head dimension of values, T = S tokens of this rank's part of a pack.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_zeda.platform.zigzag import check_boundaries, thd_partition_indices

_CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)


class LocalDotProductAttention(MegatronModule):
    """Drop-in for ``DotProductAttention``: grouped-query and multi-latent attention, packs, context parallelism.

    Causal attention is aligned to the last key, so that a KV cache (fewer queries than keys) needs nothing else.

    Context parallelism gathers keys and values over its group (their gradients are reduce-scattered), whatever
    ``cp_comm_type`` says: the other ways differ in what they overlap, not in what comes out. Tokens are in the order
    of :func:`~megatron_zeda.platform.zigzag.thd_partition_indices`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        k_channels: int | None = None,
        v_channels: int | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        """Take what Megatron-Core's attention layers give to any core attention.

        Raises:
            ValueError: for a setting that this class does not implement.
        """
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        problems = _unsupported(config, dropout)
        if attention_type != "self":
            problems.append(f"attention_type={attention_type}")
        if problems:
            raise ValueError(
                f"{', '.join(problems)}: the core attention for machines without Transformer Engine does not do this; "
                "leave these settings at attention_dropout=0.0, window_size=None, softmax_type='vanilla' or use "
                "Transformer Engine (transformer_impl='transformer_engine')"
            )
        self.attn_mask_type = attn_mask_type
        # Query-key layer scaling divides the scores and multiplies them again in fp32; softmax here is fp32 anyway.
        channels = config.kv_channels if k_channels is None else k_channels
        self.softmax_scale = 1.0 / math.sqrt(channels) if softmax_scale is None else softmax_scale
        self.cp_group = None
        if config.context_parallel_size > 1:
            if pg_collection is None:
                pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["cp"])
            self.cp_group = pg_collection.cp

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: ``[S, B, N, D]``, or ``[T, N, D]`` in a pack.
            key: ``[K, B, G, D]`` or ``[T, G, D]``.
            value: ``[K, B, G, V]`` or ``[T, G, V]``.
            attention_mask: ``[B or 1, 1, S, K]`` bool, True where a key is hidden; it replaces the causal mask, as in
                the stock class. Not with packs or context parallelism.
            attn_mask_type: not used, as in the stock class; the layer's own counts.
            attention_bias: must be ``None``.
            packed_seq_params: with ``qkv_format`` "thd" every token attends to the earlier tokens of its own sequence.
                Sequences are bounded by ``cu_seqlens_q_padded`` if set, else by ``cu_seqlens_q``, in tokens of all
                context-parallel ranks. Padding inside a sequence is at its end, where causal attention keeps it away
                from the tokens that count.

        Returns:
            ``[S, B, N * V]`` or ``[T, N * V]``.

        Raises:
            ValueError: for a pack that its ``cu_seqlens`` do not describe, or what is not implemented.
        """
        if attention_bias is not None:
            raise ValueError("attention_bias is not supported by LocalDotProductAttention; use Transformer Engine")
        if packed_seq_params is not None and packed_seq_params.local_cp_size is not None:
            raise ValueError("local_cp_size: hybrid context parallelism needs Transformer Engine")
        packed = packed_seq_params is not None and packed_seq_params.qkv_format == "thd"
        if not packed and self.cp_group is None:
            return self._attend(query, key, value, attention_mask).flatten(2)

        if attention_mask is not None:
            raise ValueError("attention_mask must be None with packed sequences or context parallelism")
        if self.attn_mask_type not in _CAUSAL:
            raise ValueError(f"{self.attn_mask_type}: packed sequences and context parallelism need causal attention")
        size, rank = (1, 0) if self.cp_group is None else (self.cp_group.size(), self.cp_group.rank())
        total = query.shape[0] * size
        if packed:
            query, key, value = (part.unsqueeze(1) for part in (query, key, value))
            boundaries = check_boundaries(_cu_seqlens(packed_seq_params), total, size)
        else:
            boundaries = check_boundaries([0, total], total, size)
        if self.cp_group is not None:
            key, value = _gather(key, value, boundaries, self.cp_group)
        # Of every sequence this rank holds all, or two of its chunks.
        held, chunks = ((0,), 1) if size == 1 else ((rank, 2 * size - 1 - rank), 2 * size)
        contexts = []
        first = 0
        for start, end in pairwise(boundaries):
            length = (end - start) // chunks
            for number in held:
                last = start + (number + 1) * length  # causal: no later key of the sequence is needed
                queries, seen = slice(first, first + length), slice(start, last)
                contexts.append(self._attend(query[queries], key[seen], value[seen], None))
                first += length
        context = torch.cat(contexts)
        return context.flatten(1) if packed else context.flatten(2)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Attention of the last S of K positions: ``[S, B, N, D]``, ``[K, B, G, D]``, ``[K, B, G, V]`` to
        ``[S, B, N, V]``.
        """
        length, batch, heads, _ = query.shape
        keys, _, groups, value_dim = value.shape
        causal = self.attn_mask_type in _CAUSAL and attention_mask is None
        if causal and length > keys:
            raise ValueError(f"causal attention of {length} queries over {keys} keys")
        # The fused kernels want one head dimension; zeros change neither scores nor what is kept of the output.
        width = max(query.shape[-1], value_dim)
        query, key, value = (
            part if part.shape[-1] == width else F.pad(part, (0, width - part.shape[-1]))
            for part in (query, key, value)
        )
        # Groups go into the batch, and the heads of a group share its keys without a copy.
        query = query.permute(1, 2, 0, 3).reshape(batch * groups, heads // groups, length, width)
        key, value = (
            part.permute(1, 2, 0, 3).reshape(batch * groups, 1, keys, width).expand(-1, heads // groups, -1, -1)
            for part in (key, value)
        )
        mask = None
        if attention_mask is not None:
            query, mask = _visible(query, attention_mask, groups)
        elif causal and 1 < length < keys:
            # The kernels' own causal mask is aligned to the first key.
            mask = torch.ones(length, keys, dtype=torch.bool, device=query.device).tril(keys - length)
        context = F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=causal and length == keys, scale=self.softmax_scale
        )
        context = context[..., :value_dim].reshape(batch, heads, length, value_dim)
        return context.permute(2, 0, 1, 3)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Nothing: there are no parameters."""
        return {}


class LatentNormMLASelfAttention(MLASelfAttention):
    """Multi-latent attention whose latent norms have an epsilon of their own, ``config.latent_norm_epsilon``.

    Models differ in it, and Megatron-Core gives them the epsilon of all other norms.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        epsilon = getattr(config, "latent_norm_epsilon", None)
        if epsilon is not None:
            set_latent_norm_epsilon(self, epsilon)


def set_latent_norm_epsilon(attention: Any, epsilon: float) -> None:
    """Give the norms of the query and key-value latents of an ``MLASelfAttention`` this epsilon.

    Raises:
        RuntimeError: if a norm keeps its epsilon in another place than Megatron-Core's and Transformer Engine's do.
    """
    for name in ("q", "kv"):
        norm, up = (getattr(attention, part, None) for part in (f"{name}_layernorm", f"linear_{name}_up_proj"))
        # Transformer Engine fuses either norm into the projection behind it, and leaves an identity in its place.
        owner: Any = up if isinstance(norm, IdentityOp) else norm
        if not hasattr(owner, "eps"):
            raise RuntimeError(f"{type(owner).__name__} has no `eps`: latent_norm_epsilon cannot be applied to it")
        owner.eps = epsilon


class LocalMLASelfAttention(LatentNormMLASelfAttention):
    """Multi-latent attention whose gradients are right with tensor parallelism in the local spec.

    There the down projection of keys and values is column-parallel, and Megatron-Core 0.19 gathers its output in a way
    that leaves each rank with the gradient of its own heads for the rotary part of the keys, which all heads share
    (https://github.com/NVIDIA/Megatron-LM/issues/1699).
    """

    def _qkv_down_projection(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As the stock method, with all columns of the keys' and values' projection for this rank's part of the
        sequence: the caller then takes the path of Transformer Engine's replicated projection, which sums what it
        should. Without sequence parallelism Megatron-Core trains no MoE layer, and the forward pass is right.
        """
        query, both = super()._qkv_down_projection(hidden_states)
        if (
            self.config.sequence_parallel
            and both.shape[-1] != self.config.kv_lora_rank + self.config.qk_pos_emb_head_dim
        ):
            both = gather_from_tensor_model_parallel_region(both, group=self.tp_group)
            both = scatter_to_sequence_parallel_region(both, group=self.tp_group)
        return query, both


def local_core_attention(config: TransformerConfig) -> type[MegatronModule]:
    """The core attention of a local layer spec: ours, or stock where only the stock one does what ``config`` asks."""
    stock_can = config.context_parallel_size == 1 and not config.multi_latent_attention
    if stock_can and _unsupported(config, config.attention_dropout):
        return DotProductAttention
    return LocalDotProductAttention


def _unsupported(config: TransformerConfig, dropout: float) -> list[str]:
    """The settings of ``config`` that only other core attentions implement, as ``name=value``."""
    problems = []
    if dropout:
        problems.append(f"attention_dropout={dropout}")
    if config.window_size:
        problems.append(f"window_size={config.window_size}")
    if config.softmax_type != "vanilla":
        problems.append(f"softmax_type={config.softmax_type!r}")
    return problems


def _cu_seqlens(packed: Any) -> list[int]:
    """Where the sequences of a pack begin, padding included, in tokens of all context-parallel ranks."""
    cu_seqlens = packed.cu_seqlens_q if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded
    if cu_seqlens is None:
        raise ValueError("packed_seq_params has neither cu_seqlens_q nor cu_seqlens_q_padded")
    boundaries: list[int] = cu_seqlens.tolist()
    return boundaries


def _gather(
    key: torch.Tensor, value: torch.Tensor, boundaries: list[int], cp_group: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of all context-parallel ranks, in the order of the sequences."""
    size = cp_group.size()
    both = torch.cat([key, value], dim=-1)  # one collective instead of two
    gathered = gather_from_sequence_parallel_region(both, group=cp_group)
    cu_seqlens = torch.tensor(boundaries)
    held = [thd_partition_indices(cu_seqlens, boundaries[-1], size, rank) for rank in range(size)]
    in_order = gathered.index_select(0, torch.cat(held).argsort().to(gathered.device))
    return in_order.split([key.shape[-1], value.shape[-1]], dim=-1)


def _visible(query: torch.Tensor, attention_mask: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries ``[B * G, N / G, S, D]`` and the keys they see ``[B * G or 1, 1, S, K]``, from Megatron's mask.

    A query that sees nothing (padding) averages all values and has no gradient, as in the stock class; a kernel would
    give it NaN.
    """
    hidden = attention_mask if attention_mask.shape[0] == 1 else attention_mask.repeat_interleave(groups, dim=0)
    blind = hidden.all(dim=-1, keepdim=True)
    return query.masked_fill(blind, 0.0), ~hidden | blind
