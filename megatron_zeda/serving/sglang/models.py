"""SGLang's own models with wider routers: everything but the choice of experts is the engine's.

A class under SGLang's own name is SGLang's own class in everything until ``config.json`` has a key of a dynamic model.
Written for SGLang 0.5.23.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable
from typing import Any

import torch
from sglang.srt.layers.linear import ReplicatedLinear
from sglang.srt.layers.moe import get_moe_a2a_backend
from sglang.srt.layers.moe.topk import TopKOutputFormat, fused_topk, fused_topk_torch_native
from sglang.srt.models import glm4_moe, glm4_moe_lite, qwen3_moe
from sglang.srt.runtime_context import get_exec
from sglang.srt.utils import is_cuda
from torch import Tensor, nn

from megatron_zeda.serving.sglang.routing import ZeroExpertRouting
from megatron_zeda.serving.sglang.settings import ZeroExperts, read_zero_experts, refusal

_log = logging.getLogger(__name__)
_BLOCKS = (
    qwen3_moe.Qwen3MoeSparseMoeBlock,
    glm4_moe.Glm4MoeSparseMoeBlock,
    glm4_moe_lite.Glm4MoeLiteSparseMoeBlock,
)


class _Dynamic:
    """What a dynamic model does otherwise than the SGLang model that stands behind it among the bases."""

    native: str
    """Name under which SGLang finds its own defaults for this architecture."""
    needs_native_name = False

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        zero_experts = read_zero_experts(config)
        if zero_experts is not None:
            self._check_name(config)
        super().__init__(config, quant_config, prefix)  # type: ignore[call-arg]
        self._routers: dict[str, nn.Module] = {}
        if zero_experts is None:
            return
        for name, block in self.named_modules():  # type: ignore[attr-defined]
            if isinstance(block, _BLOCKS):
                _widen(block, config, zero_experts)
                self._routers[name] = block.gate

    def load_weights(self, weights: Iterable[tuple[str, Tensor]], *args: Any, **options: Any) -> Any:
        """Load as SGLang does; every router must have been in the checkpoint.

        Raises:
            ValueError: if one was not.
        """
        constants = ".approx_value"  # of vllm-mone exports: zeros that nothing needs here
        kept = ((name, tensor) for name, tensor in weights if not name.endswith(constants))
        result = super().load_weights(kept, *args, **options)  # type: ignore[misc]
        for name, router in self._routers.items():
            if any(bool(parameter.isnan().any()) for parameter in router.parameters()):
                raise refusal(
                    f"the router of {name} was not loaded",
                    rule="a dynamic checkpoint has a router of N + Z rows in every such layer",
                    fix="export the checkpoint again",
                )
        return result

    def _check_name(self, config: Any) -> None:
        if self.native in config.architectures:
            return
        option = f"""--json-model-override-args '{{"architectures": ["{self.native}"]}}'"""
        if self.needs_native_name:
            raise refusal(
                f"served as {config.architectures[0]}",
                rule="SGLang recognises latent attention by the name of the architecture",
                fix=f"add {option}",
            )
        _log.warning("megatron-zeda: SGLang has defaults for %s; to get them add %s", self.native, option)


class Qwen3MoeForCausalLM(_Dynamic, qwen3_moe.Qwen3MoeForCausalLM):  # type: ignore[misc]
    """Qwen3-MoE."""

    native = "Qwen3MoeForCausalLM"


class Glm4MoeForCausalLM(_Dynamic, glm4_moe.Glm4MoeForCausalLM):  # type: ignore[misc]
    """GLM-4.5-Air."""

    native = "Glm4MoeForCausalLM"


class Glm4MoeLiteForCausalLM(_Dynamic, glm4_moe_lite.Glm4MoeLiteForCausalLM):  # type: ignore[misc]
    """GLM-4.7-Flash."""

    native = "Glm4MoeLiteForCausalLM"
    needs_native_name = True


MODELS: dict[str, type] = {
    "Qwen3MoeForCausalLM": Qwen3MoeForCausalLM,
    "Qwen3MoePlusPlusForCausalLM": Qwen3MoeForCausalLM,
    "Glm4MoeForCausalLM": Glm4MoeForCausalLM,
    "Glm4MoePlusPlusForCausalLM": Glm4MoeForCausalLM,
    "Glm4MoeLiteForCausalLM": Glm4MoeLiteForCausalLM,
    "Glm4MoeLitePlusPlusForCausalLM": Glm4MoeLiteForCausalLM,
}
"""Architecture in ``config.json`` -> class."""


def _widen(block: Any, config: Any, zero_experts: ZeroExperts) -> None:
    """Give a block a router of N + Z rows, and the choice that knows what the last Z are."""
    _check_engine(block)
    settings = block.topk.topk_config
    num_columns = zero_experts.num_real + zero_experts.num_zero
    bias = None
    if isinstance(block, qwen3_moe.Qwen3MoeSparseMoeBlock):
        block.gate = ReplicatedLinear(config.hidden_size, num_columns, bias=False, quant_config=None)
    else:
        wide = copy.copy(config)
        wide.n_routed_experts = num_columns
        block.gate = type(block.gate)(config=wide)
        bias = block.gate.e_score_correction_bias
    for parameter in block.gate.parameters():
        parameter.data.fill_(torch.nan)  # what is not loaded is found
    offset = None
    if zero_experts.dial:
        offset = torch.zeros(num_columns, device=block.gate.weight.device, dtype=torch.float32)
        offset[zero_experts.num_real :] = zero_experts.dial
    runner = settings.runner_backend
    drop = is_cuda() and runner is not None and runner.is_triton()
    if not drop and block.layer_id == config.num_hidden_layers - 1:
        _log.warning("megatron-zeda: these experts (%s) compute skipped slots: exact, and nothing is saved", runner)
    routing = ZeroExpertRouting(_choose, zero_experts.num_real, drop=drop, bias=bias, offset=offset)
    settings.custom_routing_function, settings.use_grouped_topk, settings.correction_bias = routing, False, None


def _choose(hidden: Tensor, logits: Tensor, topk: int, renormalize: bool, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """SGLang's own choice among all columns."""
    choose = fused_topk if is_cuda() else fused_topk_torch_native
    scoring = "softmax" if bias is None else "sigmoid"
    found: tuple[Tensor, Tensor] = choose(hidden, logits, topk, renormalize, correction_bias=bias, scoring_func=scoring)
    return found


def _check_engine(block: Any) -> None:
    """What the engine was started with must leave the ids of slots to the router."""
    problems = (
        (
            block.topk.topk_config.output_format not in (None, TopKOutputFormat.STANDARD),
            "these experts choose inside their kernel",
            "zero experts are taken out between the choice and the kernel",
            "add --moe-runner-backend triton",
        ),
        (
            not get_moe_a2a_backend().is_none(),
            "an all-to-all backend is on",
            "it sends every slot to the rank of a real expert",
            "start without --moe-a2a-backend",
        ),
        (
            get_exec().moe.ep_num_redundant_experts > 0,
            "redundant experts are on",
            "they are copied by their numbers, and zero experts have no weights to copy",
            "start without --ep-num-redundant-experts and --enable-eplb",
        ),
        (
            getattr(block, "num_fused_shared_experts", 0) > 0,
            "shared experts are fused with the routed ones",
            "they take the number N, which is that of a zero expert",
            "add --disable-shared-experts-fusion",
        ),
    )
    for found, what, rule, fix in problems:
        if found:
            raise refusal(what, rule=rule, fix=fix)
