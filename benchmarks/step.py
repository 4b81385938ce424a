"""One training step of a small model with zero experts against the same step on stock Megatron-Core.

    python benchmarks/step.py

A step is what a trainer does: forward and backward over the micro-batches, finalising the gradients, the optimizer.
Both models have the same real weights and see the same tokens; the learning rate is 0, so that both stay as they are.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from side_by_side import Target, interleaved, ratio, spread, start, write
from zero_expert_layers import fused_kernels, turn_dials

SIZES: dict[str, dict[str, Any]] = {
    "small": {
        "num_layers": 4,
        "hidden_size": 768,
        "num_attention_heads": 24,
        "num_query_groups": 4,
        "kv_channels": 64,
        "moe_ffn_hidden_size": 288,
        "num_moe_experts": 64,
        "num_zero_experts": 32,
        "moe_router_topk": 8,
        "vocab_size": 16384,
    },
    "tiny": {  # for tests
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 8,
        "moe_ffn_hidden_size": 16,
        "num_moe_experts": 8,
        "num_zero_experts": 4,
        "moe_router_topk": 4,
        "vocab_size": 64,
    },
}
R0_LIMIT = 1.03


class Trainer:
    """A model, its optimizer and a step over fixed data."""

    def __init__(self, args: argparse.Namespace, device: torch.device, num_zero_experts: int) -> None:
        from megatron.core.distributed import (
            DistributedDataParallel,
            DistributedDataParallelConfig,
            finalize_model_grads,
        )
        from megatron.core.models.gpt import GPTModel
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.transformer.module import Float16Module

        from megatron_zeda.zero_experts import ZeroExpertTransformerConfig, get_zero_expert_layer_spec

        sizes = dict(SIZES[args.size])
        vocab_size = sizes.pop("vocab_size")
        self.args = args
        self.config = ZeroExpertTransformerConfig(
            **{
                **sizes,
                "num_zero_experts": num_zero_experts,
                "ffn_hidden_size": sizes["moe_ffn_hidden_size"],
                "qk_layernorm": True,
                "moe_router_dtype": "fp32",
                "moe_router_load_balancing_type": "none",
                "moe_token_dispatcher_type": "alltoall",
                "add_bias_linear": False,
                "gated_linear_unit": True,
                "activation_func": torch.nn.functional.silu,
                "normalization": "RMSNorm",
                "calculate_per_token_loss": True,
                "bf16": True,
                "params_dtype": torch.bfloat16,
                "hidden_dropout": 0.0,
                "attention_dropout": 0.0,
                **fused_kernels(),
            }
        )
        model = GPTModel(
            self.config,
            get_zero_expert_layer_spec(self.config),
            vocab_size=vocab_size,
            max_sequence_length=args.seq_length,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
        )
        wrapped = Float16Module(self.config, model.to(device))
        self.model = DistributedDataParallel(self.config, DistributedDataParallelConfig(), wrapped)
        self.config.finalize_model_grads_func = finalize_model_grads
        optimizer_config = OptimizerConfig(lr=0.0, weight_decay=0.1, bf16=True, params_dtype=torch.bfloat16)
        self.optimizer = get_megatron_optimizer(optimizer_config, [self.model])
        self.config.grad_scale_func = self.optimizer.scale_loss
        generator = torch.Generator().manual_seed(1)
        shape = (args.micro_batches, args.micro_batch_size, args.seq_length + 1)
        self.tokens = torch.randint(0, vocab_size, shape, generator=generator).to(device)

    def copy_real_weights(self, other: Trainer) -> None:
        """Take over the weights of ``other``, whose routers may have more rows."""
        theirs = dict(other.model.named_parameters())
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(theirs[name][: parameter.shape[0]])
        self.optimizer.reload_model_params()

    def forward_backward(self, *, forward_only: bool = False) -> None:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        get_forward_backward_func()(
            forward_step_func=_forward_step,
            data_iterator=iter(self.tokens),
            model=[self.model],
            num_microbatches=self.args.micro_batches,
            seq_length=self.args.seq_length,
            micro_batch_size=self.args.micro_batch_size,
            forward_only=forward_only,
        )

    def step(self) -> None:
        from megatron_zeda.zero_experts import set_loss_tokens

        set_loss_tokens(self.args.micro_batch_size * self.args.seq_length)
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.forward_backward()
        self.optimizer.step()


def _forward_step(batches: Any, model: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
    tokens = next(batches)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    positions = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)
    losses = model(inputs, positions, None, labels=labels)

    def loss_func(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return losses.float().sum(), torch.tensor(losses.numel(), dtype=torch.int), losses.detach().float().mean()

    return losses, loss_func


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--skip-rates", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75])
    parser.add_argument("--seq-length", type=int, default=1024)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--micro-batches", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7, help="how often every pair is timed")
    parser.add_argument("--threads", type=int, help="default: every core this process may use")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args(arguments)

    from megatron_zeda.zero_experts import router_statistics, zero_expert_routers

    device = start(args.threads)
    dynamic = Trainer(args, device, SIZES[args.size]["num_zero_experts"])
    stock = Trainer(args, device, 0)
    stock.copy_real_weights(dynamic)
    routers = zero_expert_routers(dynamic.model)
    dials, achieved = {}, {}

    def step_at(rate: float) -> None:
        for router, dial in zip(routers, dials[rate], strict=True):
            router.zero_logit_bias = dial
        dynamic.step()

    for rate in args.skip_rates:
        turn_dials(dynamic.model, partial(dynamic.forward_backward, forward_only=True), rate)
        dials[rate] = [router.zero_logit_bias for router in routers]
        router_statistics(dynamic.model)
        step_at(rate)
        achieved[rate] = router_statistics(dynamic.model).skip_rate

    sequence: list[tuple[str, Callable[[], Any]]] = []
    for rate in args.skip_rates:
        sequence += [("stock", stock.step), (f"dynamic {rate}", partial(step_at, rate))]
    sequence += [("optimizer", dynamic.optimizer.step)]
    durations = interleaved(sequence, rounds=args.rounds, device=device)

    results: dict[str, Any] = {
        "stock_s": spread(durations["stock"]),
        "optimizer_s": spread(durations["optimizer"]),
        "parameters": sum(parameter.numel() for parameter in stock.model.parameters()),
        "skip_rates": [],
    }
    targets = []
    print(
        f"stock step {results['stock_s']['median']:.3f} s, of which optimizer {results['optimizer_s']['median']:.3f} s"
    )
    for index, rate in enumerate(args.skip_rates):
        ours, theirs = durations[f"dynamic {rate}"], durations["stock"][index :: len(args.skip_rates)]
        over_stock = ratio(ours, theirs)
        results["skip_rates"].append(
            {
                "skip_rate_asked": rate,
                "skip_rate": achieved[rate],
                "dynamic_s": spread(ours),
                "dynamic_over_stock": over_stock,
            }
        )
        print(
            f"  {100 * achieved[rate]:5.1f} % skipped: dynamic / stock {over_stock['median']:.3f} "
            f"({over_stock['min']:.3f} to {over_stock['max']:.3f})"
        )
        if rate == 0.0:
            targets.append(Target("step, dynamic / stock at 0 % skip", R0_LIMIT, over_stock["median"]))
    settings = {
        **SIZES[args.size],
        "dtype": "bf16",
        "sequence_length": args.seq_length,
        "tokens_per_step": args.micro_batches * args.micro_batch_size * args.seq_length,
        "micro_batches": args.micro_batches,
        "optimizer": type(dynamic.optimizer).__name__,
        "rounds": args.rounds,
    }
    write(args.output, "step", settings, results, targets)


if __name__ == "__main__":
    main()
