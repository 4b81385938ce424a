"""What zero experts change in a mixture-of-experts block of vLLM: its gate, its router and its expert map.

The block itself, its N experts and their kernels stay vLLM's own. Kernels that know expert parallelism drop slots whose
expert is on another rank before the matrix products; zero experts are presented to them as experts that are on no rank.
To all other kernels they are presented as expert 0 with weight 0: the same result, and nothing is saved.

Shapes: T tokens, N real experts, Z zero experts, K slots.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import GateLinear
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter

from megatron_zeda.serving.vllm.settings import NEVER_CHOSEN, ZeroExperts, refusal

logger = init_logger("vllm.megatron_zeda")  # below vLLM's own logger, so that its settings apply

_EXPERTS = "vllm.model_executor.layers.fused_moe.experts"
SKIPPING_KERNELS = frozenset(
    {
        f"{_EXPERTS}.triton_moe.TritonExperts",
        f"{_EXPERTS}.triton_moe.TritonWNA16Experts",
        f"{_EXPERTS}.marlin_moe.MarlinExperts",
        f"{_EXPERTS}.deep_gemm_moe.DeepGemmExperts",
        f"{_EXPERTS}.triton_deep_gemm_moe.TritonOrDeepGemmExperts",
    }
)
"""Kernels that drop a slot whose expert maps to -1 before the GEMMs and leave it out of the sum, read in vLLM 0.32 and
0.33. A kernel that is not here may ignore the map, which would be out-of-bounds memory, so it never gets one."""


class ZeroExpertGate(GateLinear):
    """A gate of N + Z rows, in the place of one of N rows; never quantised."""

    def __init__(self, stock: Any, zero_experts: ZeroExperts) -> None:
        """Take shape and types from vLLM's gate.

        Args:
            stock: the gate of N rows.
            zero_experts: the model's settings.
        """
        self.num_rows = stock.output_size + zero_experts.num_zero
        self.missing = {"weight"}
        super().__init__(
            stock.input_size,
            self.num_rows,
            out_dtype=stock.out_dtype,
            params_dtype=stock.params_dtype,
            prefix=stock.prefix,
        )
        self.zero_dial: torch.Tensor | None
        self.register_buffer("zero_dial", None, persistent=False)
        if getattr(stock, "e_score_correction_bias", None) is not None:
            self._add_selection_bias(zero_experts)
        elif zero_experts.dial:
            dial = torch.zeros(self.num_rows, dtype=torch.float32)
            dial[zero_experts.num_real :] = zero_experts.dial
            self.zero_dial = dial

    def _add_selection_bias(self, zero_experts: ZeroExperts) -> None:
        """``e_score_correction_bias [N + Z]``. The dial is in it from loading on, at every loading anew."""
        bias = nn.Parameter(torch.empty(self.num_rows, dtype=torch.float32), requires_grad=False)

        def load(param: torch.Tensor, loaded: torch.Tensor) -> None:
            self._check(loaded, (self.num_rows,), "e_score_correction_bias")
            param.data.copy_(loaded)
            if zero_experts.dial:
                param.data[zero_experts.num_real :] += zero_experts.dial
                param.data[zero_experts.num_real :].clamp_(min=NEVER_CHOSEN)

        bias.weight_loader = load  # type: ignore[attr-defined]
        self.e_score_correction_bias = bias
        self.missing.add("e_score_correction_bias")

    def weight_loader(self, param: nn.Parameter, loaded_weight: torch.Tensor) -> None:
        """Load ``weight [N + Z, D]``.

        Raises:
            ValueError: another shape, or a quantised tensor.
        """
        self._check(loaded_weight, (self.num_rows, self.input_size), "weight")
        super().weight_loader(param, loaded_weight)

    def _check(self, loaded: torch.Tensor, shape: tuple[int, ...], name: str) -> None:
        if tuple(loaded.shape) != shape:
            raise refusal(
                f"{self.prefix}.{name} has shape {list(loaded.shape)}",
                rule=f"config.json asks for {list(shape)}, a row for every real and every zero expert",
                fix="export the checkpoint again, or remove the zce_* keys to serve a static model",
            )
        if not loaded.is_floating_point() or loaded.dtype.itemsize < 2:
            raise refusal(
                f"{self.prefix}.{name} is {loaded.dtype}",
                rule="routers are kept in their own precision",
                fix="quantise the experts without their routers",
            )
        self.missing.discard(name)

    def forward(self, x: torch.Tensor) -> Any:
        """Logits ``[T, N + Z]``, the dial included."""
        output = super().forward(x)
        if self.zero_dial is None:
            return output
        logits, bias = output
        return (logits.float() + self.zero_dial).to(logits.dtype), bias


class ZeroSlotRouter(BaseRouter):
    """Routes over N + Z experts as vLLM's router does and presents the zero slots to the layer's kernel."""

    def __init__(self, stock: Any, experts: Any, zero_experts: ZeroExperts, *, skips: bool) -> None:
        """Wrap a router.

        Args:
            stock: vLLM's router.
            experts: the layer's ``RoutedExperts``.
            zero_experts: the model's settings.
            skips: whether the kernel gets ids of zero experts (and an expert map), or weight 0 on a valid id.
        """
        super().__init__(top_k=stock.top_k, global_num_experts=zero_experts.num_real + zero_experts.num_zero)
        self.stock, self.experts, self.zero_experts, self.skips = stock, experts, zero_experts, skips
        self._checked: Any = None

    @property
    def routing_method_type(self) -> Any:
        """vLLM's name for how experts are chosen."""
        return self.stock.routing_method_type

    def _compute_routing(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self.stock._compute_routing(*args, **kwargs)

    def _select_experts(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and ids ``[T, K]``. What ``--enable-return-routed-experts`` reports are ids up to N + Z - 1."""
        weights, ids = super()._select_experts(*args, **kwargs)
        if self.skips:
            self._check_kernel()
        return present_zero_slots(weights, ids, self.zero_experts, hide_ids=not self.skips)

    def _check_kernel(self) -> None:
        """vLLM replaces kernels in some set-ups after a layer was built: none without a map may follow."""
        kernel = self.experts.quant_method.moe_kernel
        if kernel is self._checked:
            return
        name = class_name(type(kernel.fused_experts))
        if name not in SKIPPING_KERNELS:
            raise RuntimeError(f"megatron-zeda: vLLM changed the experts' kernel to {name}, which would not skip")
        self._checked = kernel


def present_zero_slots(
    weights: torch.Tensor, ids: torch.Tensor, zero_experts: ZeroExperts, *, hide_ids: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn the routing over N + Z experts into what a kernel with N experts takes.

    Args:
        weights: ``[T, K]``, normalised over all K or not at all.
        ids: ``[T, K]`` below N + Z; -1 for a row of padding.
        zero_experts: the model's settings.
        hide_ids: give zero slots id 0, for kernels without an expert map.

    Returns:
        Weights and ids ``[T, K]``. With hidden ids a zero slot has weight 0; kernels that skip it do not read its
        weight.
    """
    if not hide_ids and not zero_experts.renormalizes:
        return weights, ids
    is_zero = ids >= zero_experts.num_real
    kept = weights.masked_fill(is_zero, 0.0)
    if zero_experts.renormalizes:
        kept = kept * (weights.sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp(min=1e-30))
    return kept, ids.masked_fill(is_zero, 0) if hide_ids else ids


def expert_map(num_real: int, num_zero: int, of_rank: torch.Tensor | None) -> torch.Tensor:
    """``[N + Z]``: the place of every expert among this rank's, -1 for those that it does not have.

    Args:
        num_real: N.
        num_zero: Z.
        of_rank: ``[N]``, vLLM's own map with expert parallelism, ``None`` without.
    """
    real = torch.arange(num_real, dtype=torch.int32) if of_rank is None else of_rank
    return torch.cat([real, real.new_full((num_zero,), -1)])


def class_name(cls: type) -> str:
    """Module and name of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def add_zero_experts(block: Any, zero_experts: ZeroExperts) -> None:
    """Give a block of N experts that was just built its zero experts.

    Args:
        block: vLLM's mixture-of-experts block with ``gate`` and ``experts`` (a ``MoERunner``).
        zero_experts: the model's settings.

    Raises:
        ValueError: the block runs in a way that does not allow it.
    """
    runner = block.experts
    experts, stock_router = runner.routed_experts, runner.router
    _refuse_block(block, zero_experts)
    gate = ZeroExpertGate(block.gate, zero_experts)
    if runner.gate is not None:
        runner.gate = gate
    block.gate = gate
    bias = getattr(gate, "e_score_correction_bias", None)
    if bias is not None:
        stock_router.e_score_correction_bias = experts.e_score_correction_bias = bias
    stock_router.global_num_experts = gate.num_rows
    skips = _can_skip(runner)
    if skips:
        found = expert_map(zero_experts.num_real, zero_experts.num_zero, experts.expert_map)
        experts.register_buffer("_expert_map", found, persistent=False)
        experts.global_num_experts = gate.num_rows
    runner.router = ZeroSlotRouter(stock_router, experts, zero_experts, skips=skips)


def _can_skip(runner: Any) -> bool:
    """Whether the kernel skips zero experts. What was found is logged, once."""
    experts = runner.routed_experts
    kernel = getattr(experts.quant_method, "experts_cls", None)
    name = class_name(kernel) if kernel is not None else type(experts.quant_method).__name__
    if name not in SKIPPING_KERNELS:
        logger.warning_once(
            "megatron-zeda: %s computes all slots, those of zero experts with weight 0: the results are exact, nothing "
            "is saved. Kernels that skip them: %s (--moe-backend triton).",
            name,
            ", ".join(sorted(kernel.rsplit(".", 1)[-1] for kernel in SKIPPING_KERNELS)),
        )
        return False
    if experts.moe_config.moe_parallel_config.use_all2all_kernels:
        logger.warning_once(
            "megatron-zeda: with all-to-all expert parallelism all slots are sent and computed, those of zero experts "
            "with weight 0: the results are exact, nothing is saved."
        )
        return False
    logger.info_once("megatron-zeda: %s skips the slots of zero experts.", name)
    return True


def _refuse_block(block: Any, zero_experts: ZeroExperts) -> None:
    runner = block.experts
    if runner.is_monolithic:
        raise refusal(
            f"the experts' backend {type(runner.routed_experts.quant_method).__name__} routes by itself",
            rule="it knows no zero experts",
            fix="start with --moe-backend triton",
        )
    if getattr(block, "is_fused_shared_expert_enabled", False):
        raise refusal(
            "the shared expert is fused into the routed ones",
            rule="its number would be that of a zero expert",
            fix="set VLLM_ROCM_USE_AITER_FUSION_SHARED_EXPERTS=0",
        )
    if not isinstance(runner.router, BaseRouter) or runner.routed_experts.moe_config.num_experts != (
        zero_experts.num_real
    ):
        raise refusal(
            f"{runner.layer_name} was built in an unknown way ({type(runner.router).__name__})",
            rule="this plugin was written for vLLM 0.32 and 0.33",
            fix="use one of them, or the forms dense-zeros or vllm-mone",
        )
