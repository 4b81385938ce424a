"""Layer specs with zero experts: the only file that depends on how one Megatron-Core version builds its specs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from megatron.core import __version__ as megatron_version
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_decoder_layer_specs,
)
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_zeda.platform.attention import LatentNormMLASelfAttention, LocalMLASelfAttention, local_core_attention
from megatron_zeda.zero_experts.config import ZeroExpertTransformerConfig, skips_experts
from megatron_zeda.zero_experts.layer import ZeroExpertMoELayer
from megatron_zeda.zero_experts.router import DynamicSkippingRouter, StaticRouter, ZeroExpertRouter

# What Transformer Engine's fused modules call the norms that the local spec keeps apart. A checkpoint must not depend
# on where it was written, and upstream maps the norm before an MoE layer to a dense layer's name, and none of MLA's.
_GROUPED_QUERY_NAMES = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
_LATENT_NAMES = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}
_DENSE_NAMES = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}


def get_zero_expert_layer_spec(
    config: ZeroExpertTransformerConfig, use_transformer_engine: bool | None = None
) -> ModuleSpec:
    """The layer spec for ``GPTModel(transformer_layer_spec=...)`` of a model whose layers are all MoE layers.

    Args:
        config: with ``num_zero_experts = 0`` the layer and its router are the stock classes.
        use_transformer_engine: default: as ``config.transformer_impl`` says.

    Returns:
        A fresh ``ModuleSpec``. Distributed checkpoints of models built from it carry Transformer Engine's names with
        either implementation.

    Raises:
        ValueError: if ``config`` has no experts, or dense layers in between (use :func:`get_zero_expert_block_spec`).
        RuntimeError: if Megatron-Core's own spec is not what this file knows.
    """
    if not config.num_moe_experts:
        raise ValueError("num_moe_experts is not set: there is no MoE layer to give zero experts to")
    if config.moe_layer_freq != 1:
        raise ValueError(
            f"moe_layer_freq={config.moe_layer_freq}: some layers are dense; use get_zero_expert_block_spec"
        )
    if use_transformer_engine is None:
        use_transformer_engine = config.transformer_impl == "transformer_engine"
    # Upstream's own way from a configuration to layers, so that no setting is lost; all layers are the same.
    spec = get_gpt_decoder_layer_specs(
        config, use_transformer_engine, normalization=config.normalization, qk_l2_norm=config.qk_l2_norm
    )[0]
    _require_moe(spec)
    return _with_zero_experts(spec, config, use_transformer_engine)


def get_zero_expert_block_spec(
    config: ZeroExpertTransformerConfig,
    use_transformer_engine: bool | None = None,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
) -> TransformerBlockSubmodules:
    """The layers of this rank's pipeline stage, for models that mix dense and MoE layers.

    Args:
        config: as for :func:`get_zero_expert_layer_spec`.
        use_transformer_engine: default: as ``config.transformer_impl`` says.
        vp_stage: virtual pipeline stage.
        pp_rank: pipeline stage; default: this rank's in Megatron-Core's own groups.
    """
    if use_transformer_engine is None:
        use_transformer_engine = config.transformer_impl == "transformer_engine"
    block = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine,
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
        vp_stage=vp_stage,
        pp_rank=pp_rank,
    )
    frequency = config.moe_layer_freq
    for layer, spec in zip(_layers_of_stage(config, vp_stage, pp_rank), block.layer_specs, strict=True):
        if frequency[layer] if isinstance(frequency, list) else layer % frequency == 0:
            _require_moe(spec)
    block.layer_specs = [_with_zero_experts(spec, config, use_transformer_engine) for spec in block.layer_specs]
    return block


def _layers_of_stage(config: ZeroExpertTransformerConfig, vp_stage: int | None, pp_rank: int | None) -> Sequence[int]:
    """Which layers of the model a stage has, from 0, as ``get_gpt_decoder_block_spec`` deals them out."""
    layout = config.pipeline_model_parallel_layout
    if layout is not None:
        return list(layout.get_layer_id_list(layer_type=LayerType.decoder, vp_stage=vp_stage, pp_rank=pp_rank))
    first = get_transformer_layer_offset(config, vp_stage=vp_stage, pp_rank=pp_rank)
    return range(first, first + get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank))


def _is_moe(spec: ModuleSpec) -> bool:
    mlp = spec.submodules.mlp
    return isinstance(mlp, partial) and mlp.func is MoELayer


def _require_moe(spec: ModuleSpec) -> None:
    """An MoE layer that is not recognised would silently stay static."""
    if not _is_moe(spec):
        raise RuntimeError(
            f"megatron-core {megatron_version} describes MoE layers in another way than 0.19 "
            f"({spec.submodules.mlp}); install a version that pyproject.toml allows"
        )


def _with_zero_experts(
    spec: ModuleSpec, config: ZeroExpertTransformerConfig, use_transformer_engine: bool
) -> ModuleSpec:
    """A copy of a stock layer spec whose MoE layer and router know zero experts; a dense layer keeps its MLP.

    Multi-latent attention gets an epsilon of its own for its norms. Local specs also get the core attention that knows
    packs, context parallelism and multi-latent attention, and Transformer Engine's names in checkpoints.
    """
    spec = _with_our_attention(spec, config)
    submodules, is_moe = spec.submodules, _is_moe(spec)
    changes: dict[str, Any] = {}
    if is_moe and (skips_experts(config) or config.teacher_router_topk is not None):
        mlp = submodules.mlp
        router = ZeroExpertRouter if config.num_zero_experts else DynamicSkippingRouter
        layer: Any = ZeroExpertMoELayer
        if not skips_experts(config):  # a static model that is trained (NET): its selection bias stays as it is
            router, layer = StaticRouter, MoELayer
        moe_submodules = replace(mlp.keywords["submodules"], router=router)
        changes["mlp"] = partial(layer, **{**mlp.keywords, "submodules": moe_submodules})
    if not use_transformer_engine:
        names = dict(_LATENT_NAMES if config.multi_latent_attention else _GROUPED_QUERY_NAMES)
        changes["sharded_state_dict_keys_map"] = names if is_moe else names | _DENSE_NAMES
    return replace(spec, submodules=replace(submodules, **changes))


def _with_our_attention(spec: ModuleSpec, config: ZeroExpertTransformerConfig) -> ModuleSpec:
    """A copy of a layer spec with our multi-latent attention, and with our core attention for the stock one, which only
    local specs have.
    """
    attention = spec.submodules.self_attention
    changes: dict[str, Any] = {}
    local = attention.submodules.core_attention is DotProductAttention
    if attention.module is MLASelfAttention:
        changes["module"] = LocalMLASelfAttention if local else LatentNormMLASelfAttention
    if local:
        changes["submodules"] = replace(attention.submodules, core_attention=local_core_attention(config))
    return replace(spec, submodules=replace(spec.submodules, self_attention=replace(attention, **changes)))
