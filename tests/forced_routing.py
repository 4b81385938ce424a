"""MoE layers whose routing is prescribed, and what they must compute in float64.

The router's weight is the identity on the first G hidden values, so that these are the logits: a test says how many
tokens each expert gets. Real selections lie far above the rest, so that no precision changes who is chosen.

Shape suffixes: T tokens, G = E + Z router columns, K selections, H hidden, F expert hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from layers import E, K, Z, dynamic_layer, layer_config
from megatron.core.transformer.moe.moe_layer import MoELayer

from megatron_zeda import platform

G = E + Z
# Wide enough for FP8: blocks of 128 values have one scale.
WIDE: dict[str, Any] = {"hidden_size": 256, "ffn_hidden_size": 128, "moe_ffn_hidden_size": 128, "init_method_std": 0.06}


def alignment(config: Any) -> int:
    """To how many rows an expert's input is filled up: the FP8 GEMMs of Megatron-Core take nothing else."""
    if not config.fp8:
        return 1
    return 32 if config.fp8_recipe == "mxfp8" else 16


def expert_rows(tokens_per_expert: Sequence[int], multiple: int) -> tuple[int, int]:
    """Rows that enter the experts' GEMMs: real selections, and the zeros they are filled up with, counted apart.

    An expert without a token gets no row at all.
    """
    padded = [-(-count // multiple) * multiple for count in tokens_per_expert]
    return sum(tokens_per_expert), sum(padded) - sum(tokens_per_expert)


def rows_into_gemms(layer: MoELayer) -> list[int]:
    """Record the rows of every later call of the experts' first GEMM, padding included."""
    rows: list[int] = []
    experts = layer.experts
    first = [expert.linear_fc1 for expert in experts.local_experts] if hasattr(experts, "local_experts") else None
    for linear in first or [experts.linear_fc1]:
        linear.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[0]))
    return rows


def choose(tokens_per_expert: Sequence[int], num_tokens: int) -> torch.Tensor:
    """A routing map ``[T, G]`` that gives every expert its count; whatever is left of K goes to zero experts.

    The tokens that have chosen least so far choose next.
    """
    chosen = torch.zeros(num_tokens, G, dtype=torch.bool)
    for expert in sorted(range(E), key=lambda e: -tokens_per_expert[e]):
        load = chosen[:, :E].sum(1)
        chosen[load.argsort(stable=True)[: tokens_per_expert[expert]], expert] = True
    load = chosen[:, :E].sum(1)
    assert int(load.max()) <= K <= Z, "too few tokens for these counts"
    chosen[:, E:] = torch.arange(Z) < (K - load)[:, None]
    return chosen


@dataclass
class Case:
    """A layer and an input for which the routing is known."""

    layer: MoELayer
    hidden: torch.Tensor
    """``[T, 1, H]``, a leaf."""
    chosen: torch.Tensor
    """``[T, G]`` on the CPU."""
    cotangent: torch.Tensor
    """``[T, 1, H]``: the gradient of the output."""


def case(
    tokens_per_expert: Sequence[int], *, num_tokens: int = 40, dtype: torch.dtype = torch.float32, **changes: Any
) -> Case:
    """A layer on this machine's device that routes so many tokens to each of its E experts.

    Args:
        tokens_per_expert: E counts.
        num_tokens: T.
        dtype: of parameters and hidden states.
        changes: configuration fields; the balancing loss is off unless they turn it on.
    """
    settings: dict[str, Any] = {
        "zero_expert_balance_coeff": 0.0,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        **WIDE,
    }
    settings |= changes
    # Without Transformer Engine a configuration refuses FP8, but its layers pad for it all the same.
    later = (
        {}
        if platform.have_transformer_engine()
        else {n: settings.pop(n) for n in {"fp8", "fp8_recipe"} & settings.keys()}
    )
    layer = dynamic_layer(layer_config(**settings)).to(platform.device()).to(dtype)
    for name, value in later.items():
        setattr(layer.config, name, value)
    chosen = choose(tokens_per_expert, num_tokens)
    numbers = torch.Generator().manual_seed(3)
    hidden = torch.randn(num_tokens, 1, layer.config.hidden_size, generator=numbers)
    logits = torch.rand(num_tokens, G, generator=numbers)
    hidden[:, 0, :G] = torch.where(chosen, 2.0 + logits, -2.0 + logits)
    with torch.no_grad():
        weight = layer.router.weight
        weight.zero_()
        weight[:, :G] = torch.eye(G)
        weight += 1e-3 * torch.randn(weight.shape, generator=numbers).to(weight)
        for name in ("linear_fc1", "linear_fc2"):  # the same experts, grouped or not, on any device
            for parameter in expert_parameters(layer, name):
                values = torch.randn(parameter.shape, generator=numbers) * layer.config.init_method_std
                parameter.copy_(values)
    cotangent = torch.randn(hidden.shape, generator=numbers).to(hidden)
    place = {"device": platform.device(), "dtype": dtype}
    return Case(layer, hidden.to(**place).requires_grad_(), chosen, cotangent.to(**place))


def expert_parameters(layer: MoELayer, name: str) -> list[torch.nn.Parameter]:
    """The parameters ``linear_fc1`` or ``linear_fc2`` of all experts, grouped or not."""
    named = dict(layer.experts.named_parameters())
    grouped = f"{name}.weight0" in named
    names = [f"{name}.weight{e}" if grouped else f"local_experts.{e}.{name}.weight" for e in range(E)]
    return [named[name] for name in names]


def run(case: Case) -> dict[str, torch.Tensor]:
    """Output and gradients of one pass, in fp32 on the CPU; in FP8 where the configuration says so."""
    from megatron.core.fp8_utils import get_fp8_context

    with get_fp8_context(case.layer.config, 0):
        output, _ = case.layer(case.hidden)
    output.backward(case.cotangent)
    results = {"output": output, "grad hidden": case.hidden.grad, "grad router": case.layer.router.weight.grad}
    for name in ("linear_fc1", "linear_fc2"):
        # A GEMM that ran for no expert at all may leave no gradient; one that ran for some leaves zeros for the others.
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in expert_parameters(case.layer, name)]
        results[f"grad {name}"] = torch.stack(gradients)
    return {name: value.detach().float().cpu() for name, value in results.items()}


def expected(case: Case) -> dict[str, torch.Tensor]:
    """The same in float64, one token and one expert after the other."""
    double = [p.detach().double().cpu() for p in (case.hidden, case.layer.router.weight)]
    hidden, router = (value.clone().requires_grad_() for value in double)
    first, second = (
        [p.detach().double().cpu().requires_grad_() for p in expert_parameters(case.layer, name)]
        for name in ("linear_fc1", "linear_fc2")
    )
    x_TH = hidden.reshape(-1, hidden.shape[-1])
    top = (x_TH @ router.T).topk(K, dim=-1)
    assert torch.zeros_like(case.chosen).scatter(1, top.indices, True).equal(case.chosen), "not the routing asked for"
    weights_TK = top.values.softmax(-1)
    outputs = torch.zeros_like(x_TH)
    for expert in range(E):
        tokens, slots = (top.indices == expert).nonzero(as_tuple=True)
        gate, up = (x_TH[tokens] @ first[expert].T).chunk(2, dim=-1)
        rows = (torch.nn.functional.silu(gate) * up) @ second[expert].T
        outputs = outputs.index_add(0, tokens, weights_TK[tokens, slots, None] * rows)
    leaves = [hidden, router, *first, *second]
    gradients = torch.autograd.grad(outputs, leaves, case.cotangent.double().cpu().reshape(outputs.shape))
    return {
        "output": outputs.detach().reshape(hidden.shape),
        "grad hidden": gradients[0],
        "grad router": gradients[1],
        "grad linear_fc1": torch.stack(gradients[2 : 2 + E]),
        "grad linear_fc2": torch.stack(gradients[2 + E :]),
    }


def errors(actual: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> dict[str, float]:
    """Norm of the difference over the norm of what is wanted; infinite for anything but zero where zero is wanted."""
    table = {}
    for name, value in wanted.items():
        difference, norm = float((actual[name].double() - value.double()).norm()), float(value.double().norm())
        table[name] = difference / norm if norm else (0.0 if difference == 0.0 else float("inf"))
    return table
