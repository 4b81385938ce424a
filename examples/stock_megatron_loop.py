"""Zero experts in a plain Megatron-Core training loop, for teams that have a trainer of their own.

    python examples/stock_megatron_loop.py                                 # one process, GPU or CPU
    torchrun --nproc-per-node 2 examples/stock_megatron_loop.py            # two expert-parallel ranks

What differs from a loop without zero experts is marked with ZEDA. The model is tiny and its text is random.
"""

import os

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_zeda import platform, zero_experts

VOCAB, SEQ, MICRO_BATCH, MICRO_BATCHES, STEPS = 128, 64, 4, 2, 20


def forward_step(batches, model):
    tokens = next(batches)
    positions = torch.arange(SEQ, device=tokens.device).expand(MICRO_BATCH, SEQ)
    losses = model(tokens[:, :-1].contiguous(), positions, None, labels=tokens[:, 1:].contiguous())
    return losses, lambda losses: (losses.sum(), torch.tensor(losses.numel(), dtype=torch.int), losses.detach().mean())


def main():
    platform.install()  # ZEDA: only matters without a GPU
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}.items():
        os.environ.setdefault(name, value)
    torch.distributed.init_process_group(platform.backend())
    world_size, device = torch.distributed.get_world_size(), platform.device()
    torch.cuda.set_device(device)
    parallel_state.initialize_model_parallel(expert_model_parallel_size=world_size)
    model_parallel_cuda_manual_seed(1)

    config = zero_experts.ZeroExpertTransformerConfig(  # ZEDA: the configuration and the layer spec
        **{
            "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 32,
            "num_moe_experts": 8, "num_zero_experts": 4, "moe_router_topk": 4, "moe_ffn_hidden_size": 32,
            "expert_model_parallel_size": world_size,
            "moe_token_dispatcher_type": "alltoall", "moe_router_load_balancing_type": "none", "add_bias_linear": False,
            "gated_linear_unit": True, "activation_func": torch.nn.functional.silu, "normalization": "RMSNorm",
            "hidden_dropout": 0.0, "attention_dropout": 0.0, "calculate_per_token_loss": True,
            **platform.transformer_config_overrides(),
        }
    )  # fmt: skip
    spec = zero_experts.get_zero_expert_layer_spec(config)
    model = GPTModel(config, spec, VOCAB, SEQ, position_embedding_type="rope").to(device)
    model = DistributedDataParallel(config, DistributedDataParallelConfig(), model)
    config.finalize_model_grads_func = finalize_model_grads
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=3e-3, weight_decay=0.0), [model])

    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    shape = (MICRO_BATCH, SEQ + 1)
    for step in range(1, STEPS + 1):
        batches = [torch.randint(8, shape, generator=generator).to(device) for _ in range(MICRO_BATCHES)]
        # ZEDA: how many tokens carry loss, per micro-step and over all data-parallel ranks (here: all of them)
        zero_experts.set_loss_tokens(MICRO_BATCH * SEQ * parallel_state.get_data_parallel_world_size())
        model.zero_grad_buffer()
        optimizer.zero_grad()
        losses = get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=iter(batches), model=[model], forward_only=False,
            num_microbatches=MICRO_BATCHES, seq_length=SEQ, micro_batch_size=MICRO_BATCH,
        )  # fmt: skip
        optimizer.step()
        statistics = zero_experts.router_statistics([model])
        if torch.distributed.get_rank() == 0 and step % 5 == 0:
            loss = torch.stack(losses).mean()
            print(f"step {step}: loss {loss:.3f}, skip rate {statistics.skip_rate:.3f}", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
