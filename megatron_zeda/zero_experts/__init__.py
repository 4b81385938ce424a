"""What changes in Megatron-Core's MoE: router, loss, layer, dispatcher, spec and injection.

On a machine without a GPU call :func:`megatron_zeda.platform.install` before building models.
"""

from megatron_zeda.zero_experts.config import (
    ZeroExpertMLATransformerConfig,
    ZeroExpertTransformerConfig,
    unsupported_settings,
)
from megatron_zeda.zero_experts.group_balance import (
    controlled_weight,
    group_balancing_loss,
    target_skip_rate,
    weight_for_skip_rate,
)
from megatron_zeda.zero_experts.injection import (
    INITS,
    default_num_zero_experts,
    draw_zero_entries,
    draw_zero_rows,
    widen_gate,
)
from megatron_zeda.zero_experts.layer import ZeroExpertMoELayer
from megatron_zeda.zero_experts.router import (
    DynamicSkippingRouter,
    WeightRatios,
    ZeroExpertRouter,
    masked_zero_experts,
    set_loss_tokens,
    set_zero_expert_weight,
    zero_expert_routers,
)
from megatron_zeda.zero_experts.specs import get_zero_expert_block_spec, get_zero_expert_layer_spec
from megatron_zeda.zero_experts.statistics import RouterStatistics, router_statistics

__all__ = [
    "INITS",
    "DynamicSkippingRouter",
    "RouterStatistics",
    "WeightRatios",
    "ZeroExpertMLATransformerConfig",
    "ZeroExpertMoELayer",
    "ZeroExpertRouter",
    "ZeroExpertTransformerConfig",
    "controlled_weight",
    "default_num_zero_experts",
    "draw_zero_entries",
    "draw_zero_rows",
    "get_zero_expert_block_spec",
    "get_zero_expert_layer_spec",
    "group_balancing_loss",
    "masked_zero_experts",
    "router_statistics",
    "set_loss_tokens",
    "set_zero_expert_weight",
    "target_skip_rate",
    "unsupported_settings",
    "weight_for_skip_rate",
    "widen_gate",
    "zero_expert_routers",
]
