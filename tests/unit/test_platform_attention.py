"""The local core attention against attention written out in float64, and against Megatron-Core's stock class.

Shape suffixes: S queries, K keys, B batch, N query heads, G key-value groups, D and V head dimensions, T tokens of a
pack.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from attention_models import VOCAB, attention_config, build_model, pack
from layers import layer_config
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer

from megatron_zeda.platform.attention import (
    LocalDotProductAttention,
    LocalMLASelfAttention,
    local_core_attention,
    set_latent_norm_epsilon,
)
from megatron_zeda.platform.zigzag import check_boundaries, thd_partition_indices
from megatron_zeda.zero_experts import get_zero_expert_block_spec, get_zero_expert_layer_spec

pytestmark = pytest.mark.usefixtures("megatron")

# Query heads, key-value groups, head dimensions of queries and keys and of values.
HEADS = {"multi-head": (4, 4, 8, 8), "grouped": (6, 2, 8, 8), "multi-query": (4, 1, 8, 8), "latent": (4, 4, 12, 7)}


def core_attention(mask_type: AttnMaskType = AttnMaskType.causal, **arguments: Any) -> LocalDotProductAttention:
    return LocalDotProductAttention(layer_config(), 1, mask_type, "self", **arguments)


def written_out(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, allowed: torch.Tensor, scale: float
) -> torch.Tensor:
    """``[S, B, N, D]``, ``[K, B, G, D]``, ``[K, B, G, V]``, ``[S, K]`` bool: ``[S, B, N * V]`` in float64."""
    query, key, value = (part.double() for part in (query, key, value))
    repeat = query.shape[2] // key.shape[2]
    key, value = (part.repeat_interleave(repeat, dim=2) for part in (key, value))
    scores = torch.einsum("sbnd,kbnd->bnsk", query, key) * scale
    probs = scores.masked_fill(~allowed, -math.inf).softmax(-1)
    return torch.einsum("bnsk,kbnv->sbnv", probs, value).flatten(2)


def causal(queries: int, keys: int) -> torch.Tensor:
    return torch.arange(keys)[None] <= torch.arange(queries)[:, None] + keys - queries


def random(*shapes: Sequence[int], dtype: torch.dtype = torch.float64, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", HEADS)
def test_equals_attention_written_out(heads: str, dtype: torch.dtype) -> None:
    n, g, d, v = HEADS[heads]
    inputs = random((9, 2, n, d), (9, 2, g, d), (9, 2, g, v), dtype=dtype)
    attention = core_attention(softmax_scale=0.3, k_channels=d, v_channels=v)
    output = attention(*inputs, None)
    twins = [part.detach().double().requires_grad_() for part in inputs]
    expected = written_out(*twins, causal(9, 9), 0.3)
    (weights,) = random(output.shape, dtype=dtype, seed=1)
    (output * weights).sum().backward()
    (expected * weights.double()).sum().backward()
    # Outputs and gradients are of order one.
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 6e-2}[dtype]
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), expected, atol=tolerance, rtol=0)
    for part, twin in zip(inputs, twins, strict=True):
        torch.testing.assert_close(part.grad.double(), twin.grad, atol=tolerance, rtol=0)


def test_the_scale_is_that_of_the_keys() -> None:
    inputs = random((5, 1, 2, 12), (5, 1, 2, 12), (5, 1, 2, 8))
    for attention, scale in ((core_attention(k_channels=12), 12**-0.5), (core_attention(), 8**-0.5)):  # kv_channels 8
        torch.testing.assert_close(attention(*inputs, None), written_out(*inputs, causal(5, 5), scale))


@pytest.mark.parametrize("heads", HEADS)
def test_a_pack_equals_its_sequences_one_by_one(heads: str) -> None:
    n, g, d, v = HEADS[heads]
    lengths = (3, 7, 0, 1, 5)
    packed = random((16, n, d), (16, g, d), (16, g, v))
    attention = core_attention(k_channels=d)
    output = attention(*packed, None, packed_seq_params=pack(*lengths))
    (weights,) = random(output.shape, seed=1)
    (output * weights).sum().backward()
    for start, end in pairwise([0, 3, 10, 10, 11, 16]):
        if start == end:
            continue
        alone = [part.detach()[start:end].unsqueeze(1).requires_grad_() for part in packed]
        expected = written_out(*alone, causal(end - start, end - start), d**-0.5)
        (expected * weights[start:end].unsqueeze(1)).sum().backward()
        torch.testing.assert_close(output[start:end], expected[:, 0], atol=1e-13, rtol=0)
        for part, twin in zip(packed, alone, strict=True):
            torch.testing.assert_close(part.grad[start:end], twin.grad[:, 0], atol=1e-13, rtol=0)


def test_padding_inside_a_pack_is_seen_by_nobody() -> None:
    # Two sequences of 3 and 2 tokens, padded to 4 and 4.
    params = pack(3, 2, cu_seqlens_q_padded=torch.tensor([0, 4, 8]), cu_seqlens_kv_padded=torch.tensor([0, 4, 8]))
    query, key, value = random((8, 4, 8), (8, 2, 8), (8, 2, 8))
    attention = core_attention()
    real = [0, 1, 2, 4, 5]
    before = attention(query, key, value, None, packed_seq_params=params)[real]
    before.sum().backward()
    padding = [3, 6, 7]
    assert not key.grad[padding].any() and not value.grad[padding].any()
    with torch.no_grad():
        key[padding], value[padding] = 1e3, 1e3
    assert torch.equal(attention(query, key, value, None, packed_seq_params=params)[real], before)


@pytest.mark.parametrize("queries", [1, 3, 8])
def test_a_cache_continues_where_it_ended(queries: int) -> None:
    query, key, value = random((8, 2, 6, 8), (8, 2, 2, 8), (8, 2, 2, 8))
    attention = core_attention()
    whole = attention(query, key, value, None)
    last = attention(query[-queries:], key, value, None, attn_mask_type=AttnMaskType.no_mask)
    torch.testing.assert_close(last, whole[-queries:], atol=1e-13, rtol=0)


@pytest.mark.parametrize("batch", [1, 3])
def test_equals_the_stock_class(batch: int) -> None:
    inputs = random((6, batch, 4, 8), (6, batch, 2, 8), (6, batch, 2, 8), dtype=torch.float32)
    stock = DotProductAttention(layer_config(), 1, AttnMaskType.causal, "self")
    generator = torch.Generator().manual_seed(3)
    hidden = torch.rand(batch, 1, 6, 6, generator=generator) < 0.4
    hidden[0, 0, 2] = True  # a row that sees nothing, as padding has them
    for mask in (None, hidden, hidden[:1]):
        ours, theirs = core_attention()(*inputs, mask), stock(*inputs, mask)
        torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)
        assert ours.is_contiguous() == theirs.is_contiguous()
        gradients = [torch.autograd.grad(output.square().sum(), inputs) for output in (ours, theirs)]
        torch.testing.assert_close(*gradients, atol=1e-5, rtol=0)


def test_without_a_causal_type_everything_is_seen() -> None:
    inputs = random((4, 1, 2, 8), (6, 1, 2, 8), (6, 1, 2, 8))
    output = core_attention(AttnMaskType.no_mask)(*inputs, None)
    torch.testing.assert_close(output, written_out(*inputs, torch.ones(4, 6, dtype=torch.bool), 8**-0.5))


@pytest.mark.parametrize("heads", HEADS)
def test_no_scores_are_kept_for_the_backward_pass(heads: str) -> None:
    n, g, d, v = HEADS[heads]
    length = 512
    inputs = random((length, 1, n, d), (length, 1, g, d), (length, 1, g, v), dtype=torch.float32)
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        core_attention()(*inputs, None)
    # Queries, keys, values, the output and a number per row and head; scores would be 4 * length**2 bytes per head.
    assert sum(kept.values()) < 4 * length * n * (4 * d + 2) < length**2 * n


def test_what_is_not_implemented_is_refused() -> None:
    query, key, value = random((4, 1, 2, 8), (4, 1, 2, 8), (4, 1, 2, 8))
    packed = [part.squeeze(1) for part in (query, key, value)]
    attention = core_attention()
    for changes in ({"attention_dropout": 0.1}, {"window_size": (4, 0)}, {"softmax_type": "off-by-one"}):
        with pytest.raises(ValueError, match=f"{next(iter(changes))}=.*Transformer Engine"):
            LocalDotProductAttention(layer_config(**changes), 1, AttnMaskType.causal, "self")
    with pytest.raises(ValueError, match="attention_type=cross"):
        LocalDotProductAttention(layer_config(), 1, AttnMaskType.causal, "cross")
    with pytest.raises(ValueError, match="attention_bias"):
        attention(query, key, value, None, attention_bias=torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match="attention_mask must be None"):
        attention(*packed, torch.zeros(1, 1, 4, 4, dtype=torch.bool), packed_seq_params=pack(4))
    with pytest.raises(ValueError, match="local_cp_size"):
        attention(*packed, None, packed_seq_params=pack(4, local_cp_size=2))
    with pytest.raises(ValueError, match="need causal attention"):
        core_attention(AttnMaskType.no_mask)(*packed, None, packed_seq_params=pack(4))
    with pytest.raises(ValueError, match=r"do not cover a pack of 4 tokens.*a sequence of its own"):
        attention(*packed, None, packed_seq_params=pack(3))
    with pytest.raises(ValueError, match="neither"):
        attention(*packed, None, packed_seq_params=PackedSeqParams(qkv_format="thd"))
    with pytest.raises(ValueError, match="4 queries over 3 keys"):
        attention(query, key[1:], value[1:], None)


# The example in Transformer Engine's thd_sequence_order_to_cp_rank_order: sequences of 8, 8, 8 and 16, four ranks;
# positions within the sequences.
ZIGZAG = [
    [0, 7, 0, 7, 0, 7, 0, 1, 14, 15],
    [1, 6, 1, 6, 1, 6, 2, 3, 12, 13],
    [2, 5, 2, 5, 2, 5, 4, 5, 10, 11],
    [3, 4, 3, 4, 3, 4, 6, 7, 8, 9],
]


def test_tokens_are_split_as_transformer_engine_splits_them() -> None:
    boundaries = torch.tensor([0, 8, 16, 24, 40])
    within = torch.cat([torch.arange(8), torch.arange(8), torch.arange(8), torch.arange(16)])
    parts = [thd_partition_indices(boundaries, 40, 4, rank) for rank in range(4)]
    assert [within[part].tolist() for part in parts] == ZIGZAG
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(40))
    assert torch.equal(thd_partition_indices(torch.tensor([0, 3, 5]), 5, 1, 0), torch.arange(5))


def test_tokens_of_one_sequence_are_split_as_megatron_splits_them() -> None:
    from megatron.core.utils import _get_batch_on_this_cp_rank_per_sequence_balancing

    tokens = torch.arange(24).reshape(1, 24)
    for rank in range(3):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.distributed, "get_world_size", lambda _: 3)
            patch.setattr(torch.distributed, "get_rank", lambda _, rank=rank: rank)
            theirs = _get_batch_on_this_cp_rank_per_sequence_balancing({"tokens": tokens.clone()}, None)["tokens"]
        assert torch.equal(thd_partition_indices(torch.tensor([0, 24]), 24, 3, rank), theirs[0])


@pytest.mark.parametrize(
    ("boundaries", "size", "message"),
    [
        ([0, 4, 10], 2, r"a sequence of 6 tokens cannot be cut into 4 chunks.*multiple of 4"),
        ([0, 4, 8], 2, "do not cover a pack of 10 tokens"),
        ([2, 10], 1, "must rise from 0 to 10"),
        ([0, 8, 4, 10], 1, "must rise"),
        ([], 1, "must rise"),
    ],
)
def test_boundaries_that_do_not_fit_are_refused(boundaries: list[int], size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_boundaries(boundaries, 10, size)


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("latent", [False, True])
def test_a_packed_model_equals_its_sequences_one_by_one(latent: bool) -> None:
    model = build_model(attention_config(latent))
    lengths = (5, 9, 2)
    ids, labels = tokens(1, 16), tokens(1, 16).flip(-1)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = model(ids, positions, None, labels=labels, packed_seq_params=pack(*lengths))
    packed.sum().backward()
    packed_gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    alone = torch.cat(
        [
            model(part, torch.arange(part.shape[1])[None], None, labels=target)
            for part, target in zip(ids.split(lengths, 1), labels.split(lengths, 1), strict=True)
        ],
        dim=1,
    )
    alone.sum().backward()
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)
    for name, parameter in model.named_parameters():
        scale = float(parameter.grad.abs().max())
        assert scale > 0 or "experts" in name, name  # an expert may have no token
        torch.testing.assert_close(packed_gradients[name], parameter.grad, atol=1e-5 * scale, rtol=0)


@pytest.mark.parametrize("latent", [False, True])
def test_decoding_with_a_cache_equals_the_whole_pass(latent: bool) -> None:
    model = build_model(attention_config(latent)).eval()
    ids, positions = tokens(2, 10), torch.arange(10).expand(2, 10)
    with torch.inference_mode():
        whole = model(ids, positions, None)
        context = StaticInferenceContext(2, 10)
        context.config.materialize_only_last_token_logits = False
        parts = []
        for part in (slice(0, 6), slice(6, 9), slice(9, 10)):  # a prompt, three tokens at once, one token
            logits = model(ids[:, part], positions[:, part], None, inference_context=context)
            parts.append(logits)
            context.sequence_len_offset = part.stop
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=0)


@pytest.mark.parametrize("latent", [False, True])
def test_recomputed_attention_gives_the_same_gradients(latent: bool) -> None:
    gradients = []
    for changes in ({}, {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}):
        model = build_model(attention_config(latent, **changes))
        losses = model(tokens(1, 8), torch.arange(8)[None], None, labels=tokens(1, 8), packed_seq_params=pack(5, 3))
        losses.sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients, atol=0, rtol=0)


def core_of(spec: Any) -> Any:
    return spec.submodules.self_attention.submodules.core_attention


def test_local_specs_carry_it_also_without_zero_experts() -> None:
    for config in (attention_config(False), attention_config(True), attention_config(False, num_zero_experts=0)):
        assert core_of(get_zero_expert_layer_spec(config)) is LocalDotProductAttention
    latent = get_zero_expert_layer_spec(attention_config(True)).submodules.self_attention
    assert latent.module is LocalMLASelfAttention and latent.params == {"attn_mask_type": AttnMaskType.causal}
    static = get_zero_expert_layer_spec(attention_config(False, num_zero_experts=0))
    assert static.submodules.mlp.func is MoELayer
    # The dense layer of a mixed model as well.
    block = get_zero_expert_block_spec(attention_config(False, moe_layer_freq=[0, 1]))
    assert [core_of(spec) for spec in block.layer_specs] == [LocalDotProductAttention] * 2


def test_the_stock_class_stays_where_only_it_can() -> None:
    for changes in ({"attention_dropout": 0.1}, {"window_size": (4, 0)}, {"softmax_type": "learnable"}):
        assert local_core_attention(attention_config(False, **changes)) is DotProductAttention
        assert core_of(get_zero_expert_layer_spec(attention_config(False, **changes))) is DotProductAttention
        # There the stock class can do nothing, so ours says what the matter is.
        for config in (attention_config(True, **changes), attention_config(False, context_parallel_size=2, **changes)):
            assert local_core_attention(config) is LocalDotProductAttention


def test_the_epsilon_of_latent_norms_goes_where_the_norm_is() -> None:
    """Into norms that stand alone (local layers), or into the projections that they are fused with."""
    apart = SimpleNamespace(
        q_layernorm=torch.nn.RMSNorm(4),
        kv_layernorm=torch.nn.RMSNorm(4),
        linear_q_up_proj=SimpleNamespace(),
        linear_kv_up_proj=SimpleNamespace(),
    )
    fused = SimpleNamespace(
        q_layernorm=IdentityOp(),
        kv_layernorm=IdentityOp(),
        linear_q_up_proj=SimpleNamespace(eps=1.0),
        linear_kv_up_proj=SimpleNamespace(eps=1.0),
    )
    for attention in (apart, fused):
        set_latent_norm_epsilon(attention, 0.25)
    assert apart.q_layernorm.eps == apart.kv_layernorm.eps == 0.25
    assert fused.linear_q_up_proj.eps == fused.linear_kv_up_proj.eps == 0.25
    del fused.linear_kv_up_proj.eps
    with pytest.raises(RuntimeError, match="has no `eps`"):
        set_latent_norm_epsilon(fused, 0.25)
