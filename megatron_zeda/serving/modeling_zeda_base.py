"""What the modelling files of all families share, for Hugging Face transformers 5, written by megatron-zeda.

This file travels with an exported checkpoint, beside the modelling file of its family, and needs transformers and torch
only. The family's file says which stock classes it extends; here is what zero experts change in them.

Each router chooses K of N real and Z zero experts. A chosen zero expert adds nothing, and its share of the routing
weight is not given to the others. Shapes: T tokens, D hidden, N real experts, Z zero experts, K experts per token.

What every router returns (read the skip rate from it with a forward hook on ``model.model.layers[i].mlp.gate``):
    logits ``[T, N + Z]``;
    scores ``[T, K]``: routing weights, exactly 0 for every slot that a zero expert won and for no other;
    indices ``[T, K]``: ids below N, distinct within a token; the id of a slot with weight 0 means nothing.
So ``(scores == 0).float().mean()`` is the layer's skip rate.

Other methods have other keys in config.json:
``zeda_renormalize`` true (AdaMoE): the share of zero experts is given to the real ones, in proportion.
``zeda_expert_type`` "copy" (with ``zce_types`` ["copy"]): the Z experts return their input. Their slots leave the
router with minus their weight, so ``(scores <= 0)`` is what no real expert computes.
``zeda_dynamic_skipping_beta`` (Dynamic Skipping; no zero experts): of the K slots those with less than beta times the
token's largest weight leave with weight 0, and a model that normalises its weights normalises over the rest.

``config.zeda_zero_logit_bias`` (default 0) is the dial: it moves the zero experts' chance of being chosen. Lower skips
less, ``-inf`` gives the model without zero experts.
"""

import inspect
from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.integrations import moe as stock_moe


def zero_expert_settings(config: Any, num_experts: int) -> tuple[int, float]:
    """Return (Z, dial) of a configuration, or raise ValueError naming the key that is missing or wrong.

    A model of Dynamic Skipping has Z = 0. All others need all three ``zce_*`` keys: other readers of this format
    default to identity experts and a mask, which would silently be another model.
    """
    beta = getattr(config, "zeda_dynamic_skipping_beta", None)
    if beta is not None:
        if not is_number(beta) or not 0 <= beta <= 1:
            raise ValueError(f"config.json: `zeda_dynamic_skipping_beta` must be between 0 and 1, got {beta!r}")
        if getattr(config, "zce_nums", None) is not None:
            raise ValueError("config.json: `zeda_dynamic_skipping_beta` is for a model without zero experts")
        return 0, 0.0
    kind, renormalize = getattr(config, "zeda_expert_type", "zero"), getattr(config, "zeda_renormalize", False)
    if kind not in ("zero", "copy"):
        raise ValueError(f"config.json: `zeda_expert_type` must be zero or copy, got {kind!r}")
    if not isinstance(renormalize, bool) or (renormalize and kind == "copy"):
        raise ValueError(f"config.json: `zeda_renormalize` must be true or false (false for copy), got {renormalize!r}")
    for key in ("zce_nums", "zce_types", "use_zce_mask"):
        if getattr(config, key, None) is None:
            raise ValueError(f"config.json: `{key}` is missing; zce_nums, zce_types and use_zce_mask must all be there")
    nums, types, mask = config.zce_nums, config.zce_types, config.use_zce_mask
    if not isinstance(nums, (list, tuple)) or len(nums) != 1 or type(nums[0]) is not int or nums[0] < 1:
        raise ValueError(f"config.json: `zce_nums` must be a list of one positive integer, got {nums!r}")
    if not isinstance(types, (list, tuple)) or list(types) != [kind]:
        raise ValueError(f"config.json: `zce_types` must be ['{kind}'], got {types!r}")
    if mask is not False:
        raise ValueError(f"config.json: `use_zce_mask` must be false, got {mask!r}")
    bias = getattr(config, "zeda_zero_logit_bias", 0.0)
    if not is_number(bias) or bias == float("inf"):
        raise ValueError(f"config.json: `zeda_zero_logit_bias` must be a number below infinity, got {bias!r}")
    if config.num_experts_per_tok > num_experts:
        raise ValueError("config.json: `num_experts_per_tok` is larger than the number of experts")
    return nums[0], float(bias)


def is_number(value: Any) -> bool:
    """Whether a value of config.json is a number: neither a truth value nor NaN."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def hide_zero_slots(
    scores: torch.Tensor, chosen: torch.Tensor, num_real: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn ``scores, chosen [T, K]`` over N + Z experts into what a layer of N experts understands.

    A zero slot leaves with weight 0 and the id of a real expert that this token has not chosen: ids stay valid and
    distinct for every consumer. The weight of a real expert that rounds to 0 becomes the smallest one of ``dtype``.
    """
    is_zero = chosen >= num_real
    taken = scores.new_zeros(chosen.shape[0], num_real + 1).scatter(-1, chosen.clamp(max=num_real), 1.0)[:, :num_real]
    spare = taken.topk(chosen.shape[-1], dim=-1, largest=False).indices
    nth_zero = (is_zero.cumsum(-1) - 1).clamp(min=0)
    indices = torch.where(is_zero, spare.gather(-1, nth_zero), chosen)
    return scores.to(dtype).clamp(min=torch.finfo(dtype).tiny).masked_fill(is_zero, 0.0), indices


class ZeroExpertRows:
    """Mixed into a stock router: rows for N + Z experts."""

    def add_zero_rows(self: Any, config: Any, num_real: int) -> None:
        """Replace the weight ``[N, D]`` by one of ``[N + Z, D]``, and remember N and the dial."""
        num_zero, self.zero_logit_bias = zero_expert_settings(config, num_real)
        self.num_real = num_real
        self.beta = getattr(config, "zeda_dynamic_skipping_beta", None)
        self.copies = getattr(config, "zeda_expert_type", "zero") == "copy"
        self.renormalizes = getattr(config, "zeda_renormalize", False) or (
            self.beta is not None and getattr(config, "norm_topk_prob", False)
        )
        self.num_experts = num_real + num_zero
        self.weight = nn.Parameter(torch.zeros(self.num_experts, self.weight.shape[-1]))
        # Some engines pattern-match "scores, then top-K" routers and put their own routing in place, which would send
        # tokens to experts that do not exist. A router with state that they do not know is left alone.
        self.zero_expert_marker = nn.Buffer(torch.zeros(1), persistent=False)

    def finish(
        self: Any, scores: torch.Tensor, chosen: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """From the weights ``[T, K]`` and ids of all N + Z experts to the scores and indices that a router returns."""
        if self.beta is None:
            skipped = chosen >= self.num_real
        else:
            skipped = scores < self.beta * scores.amax(-1, keepdim=True)
        if self.renormalizes:
            kept = scores.masked_fill(skipped, 0.0)
            scores = kept * (scores.sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp(min=1e-30))
        if self.beta is not None:
            return scores.to(dtype).clamp(min=torch.finfo(dtype).tiny).masked_fill(skipped, 0.0), chosen
        found, indices = hide_zero_slots(scores, chosen, self.num_real, dtype)
        return torch.where(skipped, -scores.to(dtype), found) if self.copies else found, indices

    def dial(self: Any, device: torch.device) -> torch.Tensor:
        """``[N + Z]``: 0 for the real experts, the dial for the others."""
        values = torch.zeros(self.num_experts, device=device)
        values[self.num_real :] = self.zero_logit_bias
        return values


class SigmoidRouter(ZeroExpertRows):
    """Mixed into a stock router with sigmoid scores and a selection bias ``e_score_correction_bias [N + Z]`` in fp32.

    The dial is added to the bias, so it moves the choice and not the weights.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        if (config.n_group or 1) != 1:
            raise ValueError(f"config.json: `n_group` must be 1, got {config.n_group!r}: zero experts are in no group")
        self.add_zero_rows(config, config.n_routed_experts)
        self.e_score_correction_bias = nn.Buffer(torch.zeros(self.num_experts, dtype=torch.float32))

    def forward(self: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        hidden_states = hidden_states.reshape(-1, self.weight.shape[-1])
        logits = nn.functional.linear(hidden_states.float(), self.weight.float())
        scores = logits.sigmoid()
        bias = self.e_score_correction_bias
        if self.zero_logit_bias != 0.0:
            bias = bias + self.dial(bias.device)
        chosen = (scores + bias).topk(self.top_k, dim=-1, sorted=False).indices
        weights = scores.gather(-1, chosen)
        if self.norm_topk_prob:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        weights = weights * self.routed_scaling_factor
        return logits, *self.finish(weights, chosen, torch.float)


def _stock_grouped_mm() -> Any:
    """transformers' product of sorted rows with their experts' matrices; None in releases where it looks otherwise.

    It knows which devices, dtypes and versions of torch have a kernel, and what to do on the others.
    """
    found = getattr(stock_moe, "_grouped_mm", None)
    suits = found is not None and list(inspect.signature(found).parameters) == ["input", "weight", "offs"]
    return found if suits else None


GROUPED_MM = _stock_grouped_mm()
WORTHWHILE = 7 / 8
"""Where kept slots have to be copied before the stock code runs: the largest share of them for which that pays."""


class SkippingExperts:
    """Mixed into the stock experts, N of them: slots of weight 0 are dropped before any expert runs.

    With ``experts_implementation="grouped_mm"`` (the default) the kept slots go through the same two grouped products
    as in the stock code, with fewer copies around them: nothing skipped costs no more than there. Any other
    implementation gets the kept (token, expert) pairs as top-1 tokens, unless nearly all are kept. Under torch.compile
    and CUDA graph capture, where shapes must not depend on data, all K slots are computed: the same result without the
    saving. A slot of negative weight is an identity expert's.
    """

    copies = False

    def forward(
        self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        run: Any = super().forward  # type: ignore[misc]
        copied: Any = 0.0
        if self.copies:
            copied = top_k_weights.clamp(max=0.0).sum(-1, keepdim=True).float().neg() * hidden_states.float()
            top_k_weights = top_k_weights.clamp(min=0.0)
        if torch.compiler.is_compiling() or (hidden_states.is_cuda and torch.cuda.is_current_stream_capturing()):
            out = run(hidden_states, top_k_index, top_k_weights)
        else:
            out = self.run_kept(run, hidden_states, top_k_index, top_k_weights)
        return (out.float() + copied if self.copies else out).to(hidden_states.dtype)

    def run_kept(
        self: Any, run: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """What the slots of weight above 0 add up to, ``[T, D]``."""
        token, slot = torch.nonzero(top_k_weights, as_tuple=True)
        grouped = self.config._experts_implementation == "grouped_mm" and GROUPED_MM is not None
        if not token.numel():
            return torch.zeros_like(hidden_states)
        if not grouped and token.numel() > WORTHWHILE * top_k_weights.numel():
            return run(hidden_states, top_k_index, top_k_weights)
        ids, weights = top_k_index[token, slot], top_k_weights[token, slot]
        if grouped:
            rows, place = self.run_sorted(hidden_states, token, ids, weights)
        else:
            rows = run(hidden_states[token], ids[:, None], weights[:, None])
            place = torch.arange(token.numel(), device=token.device)
        # One sum per token, in float32 and always in the same order, which index_add on a GPU would not promise.
        first = torch.searchsorted(token, torch.arange(len(hidden_states), device=token.device))
        return nn.functional.embedding_bag(place, rows, first, mode="sum")

    def run_sorted(
        self: Any, hidden_states: torch.Tensor, token: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Each pair ``token, ids, weights [P]`` through its expert: rows ``[P, D]`` and the row of every pair."""
        ids, order = ids.sort()
        experts = torch.arange(len(self.gate_up_proj), device=ids.device)
        ends = torch.searchsorted(ids, experts, right=True, out_int32=True)
        rows = GROUPED_MM(hidden_states[token[order]], self.gate_up_proj.transpose(-2, -1), ends)
        gate, up = rows.chunk(2, dim=-1)
        rows = GROUPED_MM(self.act_fn(gate) * up, self.down_proj.transpose(-2, -1), ends)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return rows * weights[order, None], place


class AnyExpertsImplementation:
    """Mixed into the models."""

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        """Some releases decide this from the source text of the model's own file, which is not where they are."""
        return True


def replace_experts(block: Any, router: type, experts: type, config: Any) -> None:
    """Put a zero-expert router and skipping experts in the place of a stock block's, in a layer that has experts."""
    if not hasattr(block, "gate"):
        return
    block.gate, block.experts = router(config), experts(config)
    block.experts.copies = block.gate.copies
    if hasattr(block, "route_tokens_to_experts"):
        # In releases where the block does what the router does since: our router has done it.
        block.route_tokens_to_experts = _routed


def _routed(outputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    _, scores, indices = outputs
    return indices, scores


def ignored_tensors(config: Any) -> list[str]:
    """Patterns of tensors that a checkpoint may hold and this model does not use.

    They are the layers behind the last, which draft tokens for speculative decoding, and the constants that vLLM wants
    for experts that it substitutes.
    """
    first = config.num_hidden_layers
    extra = getattr(config, "num_nextn_predict_layers", None) or 1
    return [*(rf"(^|\.)layers\.{first + layer}\." for layer in range(extra)), r"experts\.\d+\.approx_value$"]


def register(model_type: str, model: type, causal_model: type) -> None:
    """Tell transformers how to read and write checkpoints of these two classes, as it does for its own."""
    # On disk there is one tensor per expert, in memory one per layer. Classes from elsewhere get no such mapping.
    mapping = get_checkpoint_conversion_mapping(model_type)
    for cls, auto_class in ((model, "AutoModel"), (causal_model, "AutoModelForCausalLM")):
        register_checkpoint_conversion_mapping(cls.__name__, mapping, overwrite=True)
        # save_pretrained copies the files beside the weights (early releases of transformers 5 need to be told).
        cls.register_for_auto_class(auto_class)  # type: ignore[attr-defined]
