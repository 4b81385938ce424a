"""Forward + backward of one MoE layer: with zero experts at several skip rates, against stock Megatron-Core.

    python benchmarks/moe_layer.py --shape qwen3-30b-a3b            # seconds, ratios, saved activations
    python benchmarks/moe_layer.py --shape qwen3-30b-a3b --ep 2 4   # all-to-all bytes and balance, over gloo
    python benchmarks/moe_layer.py --shape qwen3-30b-a3b --profile  # where the time goes

What is compared is explained in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from side_by_side import Target, interleaved, ratio, spread, start, write
from torch.utils._python_dispatch import TorchDispatchMode
from zero_expert_layers import (
    SHAPES,
    dense_zeros_layer,
    dynamic_layer,
    fp8_layer,
    naive_layer,
    stock_layer,
    turn_dial,
)

R0_LIMIT, R50_LIMIT, OVERHEAD_LIMIT, BYTES_LIMIT = 1.03, 0.60, 0.03, 0.01


def _pass(layer: Any, hidden: torch.Tensor, grad: torch.Tensor, context: Any = nullcontext) -> Callable[[], None]:
    """A function that runs ``layer`` forward and backward."""

    def run() -> None:
        with context():
            output = layer(hidden)
        output = output[0] if isinstance(output, tuple) else output
        output.backward(grad)

    return run


def _route(layer: Any, hidden: torch.Tensor) -> Callable[[], None]:
    """The router alone, with its loss and statistics, forward and backward."""
    grad = torch.rand(hidden.shape[0], layer.router.num_experts, device=hidden.device)

    def run() -> None:
        probs, _ = layer.route(hidden)
        probs.backward(grad.to(probs.dtype))

    return run


def saved_bytes(layer: Any, hidden: torch.Tensor) -> int:
    """Bytes that a forward pass keeps for the backward pass, parameters left out, shared storage counted once."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(hidden)
    return sum(saved.values())


def peak_bytes(run: Callable[[], None], device: torch.device) -> int | None:
    """GPU memory that one pass needs on top of weights and their gradients; None on a CPU."""
    if device.type != "cuda":
        return None
    run()  # the gradients are there from here on
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() - before


class Bench:
    """The layers of one shape, and what can be measured on them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = start(args.threads)
        self.dynamic = dynamic_layer(args.shape, self.device)
        self.stock = stock_layer(self.dynamic, args.shape, self.device)
        self.dense_zeros = dense_zeros_layer(self.dynamic, args.shape, self.device)
        self.layers = [self.dynamic, self.stock, self.dense_zeros]
        self.fp8 = None
        if args.fp8:
            self.fp8 = fp8_layer(self.dynamic, args.shape, self.device, args.fp8)
            self.layers.append(self.fp8)

    def hidden(self, tokens: int) -> torch.Tensor:
        """Random layer inputs ``[S, 1, H]`` of unit variance, as behind a norm."""
        size = self.dynamic.config.hidden_size
        return torch.randn(tokens, 1, size, device=self.device, dtype=torch.bfloat16).requires_grad_()

    def drop_gradients(self) -> None:
        for layer in self.layers:
            for parameter in layer.parameters():
                if self.args.gradients == "write":
                    parameter.grad = None

    def naive(self) -> str:
        """What becomes of the shortest way to zero experts: an error message, or that it runs."""
        layer = naive_layer(self.dynamic, self.args.shape, self.device)
        hidden = self.hidden(256)
        turn_dial(layer.router, hidden, 0.5)
        try:
            with torch.no_grad():
                output = layer(hidden)[0]
                turn_dial(self.dynamic.router, hidden, 0.5)
                expected = self.dynamic(hidden)[0]
        except (RuntimeError, AssertionError, ValueError) as error:
            return f"raises {type(error).__name__}: {str(error).splitlines()[0][:120]}"
        equal = torch.allclose(output.float(), expected.float(), atol=2e-2, rtol=2e-2)
        return "runs, and its output is " + ("right" if equal else "wrong")

    def _achieved(self, hidden: torch.Tensor, skip_rate: float) -> float:
        router = self.dynamic.router
        turn_dial(router, hidden, skip_rate)
        router.counts.reset()
        with torch.no_grad():
            self.dynamic.eval()
            router(hidden)
            self.dynamic.train()
        zero, tokens = router.counts.sums[:2].tolist()
        return zero / (tokens * router.topk)

    def measure(self, tokens: int) -> dict[str, Any]:
        """Everything at one number of tokens."""
        hidden = self.hidden(tokens)
        grad = torch.randn_like(hidden)
        rates = self.args.skip_rates
        dials, achieved, memory = {}, {}, {}
        for rate in rates:
            achieved[rate] = self._achieved(hidden, rate)
            dials[rate] = self.dynamic.router.zero_logit_bias
            memory[rate] = saved_bytes(self.dynamic, hidden)
        stock_memory = saved_bytes(self.stock, hidden)

        def at(rate: float, layer: Any, context: Any = nullcontext) -> Callable[[], None]:
            run = _pass(layer, hidden, grad, context)

            def turned() -> None:
                layer.router.zero_logit_bias = dials[rate]
                run()

            return turned

        stock = _pass(self.stock, hidden, grad)
        sequence: list[tuple[str, Callable[[], None]]] = []
        for rate in rates:
            sequence += [("stock", stock), (f"dynamic {rate}", at(rate, self.dynamic))]
            if self.fp8 is not None:
                sequence += [(f"fp8 {rate}", at(rate, self.fp8, self._fp8_context))]
        # The naive way computes T x K rows at any skip rate, so that its router's own rate stands for all.
        sequence += [("stock", stock), ("naive", _pass(self.dense_zeros, hidden, grad))]
        sequence += [("stock router", _route(self.stock, hidden)), ("dynamic router", _route(self.dynamic, hidden))]
        if self.dynamic.shared_experts is not None:
            sequence += [("shared expert", _pass(self.dynamic.shared_experts, hidden, grad))]
        durations = interleaved(sequence, rounds=self.args.rounds, device=self.device, before=self.drop_gradients)

        pairs = len(rates) + 1  # stock passes per round
        stock_of = {rate: durations["stock"][index::pairs] for index, rate in enumerate(rates)}
        shared = statistics.median(durations.get("shared expert", [0.0]))
        stock_s = statistics.median(durations["stock"])
        stock_router = statistics.median(durations["stock router"])
        added = [
            (ours - theirs) / stock_s
            for ours, theirs in zip(durations["dynamic router"], durations["stock router"], strict=True)
        ]
        routed = stock_s - stock_router - shared
        by_rate = []
        for rate in rates:
            ours, theirs = durations[f"dynamic {rate}"], stock_of[rate]
            entry = {
                "skip_rate_asked": rate,
                "skip_rate": achieved[rate],
                "dynamic_s": spread(ours),
                "dynamic_over_stock": ratio(ours, theirs),
                "ideal_over_stock": ((1 - achieved[rate]) * routed + stock_router + shared) / stock_s,
                "saved_activation_bytes": memory[rate],
                "saved_activations_over_stock": memory[rate] / stock_memory,
            }
            if shared:
                entry["dynamic_over_stock_without_shared_expert"] = ratio(ours, theirs, offset=shared)
            if self.fp8 is not None:
                entry["fp8_over_bf16"] = ratio(durations[f"fp8 {rate}"], ours)
            if self.device.type == "cuda":
                entry["peak_bytes"] = peak_bytes(at(rate, self.dynamic), self.device)
            by_rate.append(entry)
        result = {
            "tokens": tokens,
            "stock_s": spread(durations["stock"]),
            "stock_saved_activation_bytes": stock_memory,
            "naive_s": spread(durations["naive"]),
            "naive_over_stock": ratio(durations["naive"], durations["stock"][len(rates) :: pairs]),
            "stock_router_s": spread(durations["stock router"]),
            "dynamic_router_and_loss_s": spread(durations["dynamic router"]),
            "router_and_loss_over_layer": statistics.median(durations["dynamic router"]) / stock_s,
            "added_router_and_loss_over_layer": spread(added),
            "skip_rates": by_rate,
        }
        if shared:
            result["shared_expert_s"] = spread(durations["shared expert"])
        if self.device.type == "cuda":
            result["stock_peak_bytes"] = peak_bytes(stock, self.device)
        return result

    def _fp8_context(self) -> Any:
        from megatron.core.fp8_utils import get_fp8_context

        return get_fp8_context(self.fp8.config)

    def profile(self, tokens: int) -> Iterator[str]:
        """Tables of the operators that take the most time, stock and dynamic."""
        hidden = self.hidden(tokens)
        grad = torch.randn_like(hidden)
        runs = [("stock", _pass(self.stock, hidden, grad), None)]
        runs += [(f"dynamic at {rate}", _pass(self.dynamic, hidden, grad), rate) for rate in self.args.skip_rates]
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        for name, run, rate in runs:
            if rate is not None:
                turn_dial(self.dynamic.router, hidden, rate)
            self.drop_gradients()
            run()
            self.drop_gradients()
            with torch.profiler.profile(activities=activities) as profiler:
                run()
            key = "self_cpu_time_total" if self.device.type == "cpu" else "self_cuda_time_total"
            yield f"{name}, {tokens} tokens\n{profiler.key_averages().table(sort_by=key, row_limit=20)}"


def time_layers(args: argparse.Namespace) -> None:
    bench = Bench(args)
    naive = bench.naive()
    print(f"slicing the router's output with the stock dispatcher: {naive}")
    results, targets = [], []
    for tokens in args.tokens:
        result = bench.measure(tokens)
        results.append(result)
        print(table(result))
        targets += layer_targets(result)
    settings = {
        "shape": args.shape,
        **SHAPES[args.shape],
        "dtype": "bf16",
        "gradients": args.gradients,
        "rounds": args.rounds,
        "experts": type(bench.dynamic.experts).__name__,
        "permute_fusion": bench.dynamic.config.moe_permute_fusion,
        "fp8": args.fp8,
        "slicing_with_the_stock_dispatcher": naive,
        "naive": "stock layer with all-zero extra experts, which it computes",
    }
    write(args.output, "moe_layer", settings, results, targets)


def layer_targets(result: dict[str, Any]) -> list[Target]:
    """The limits that apply to one number of tokens."""
    tokens, targets = result["tokens"], []
    for entry in result["skip_rates"]:
        measured = entry["dynamic_over_stock"]["median"]
        if entry["skip_rate_asked"] == 0.0:
            targets.append(Target(f"{tokens} tokens, dynamic / stock at 0 % skip", R0_LIMIT, measured))
        if entry["skip_rate_asked"] == 0.5 and tokens >= 8192:
            targets.append(Target(f"{tokens} tokens, dynamic / stock at 50 % skip", R50_LIMIT, measured))
    added = result["added_router_and_loss_over_layer"]["median"]
    targets.append(Target(f"{tokens} tokens, added by router and loss / layer", OVERHEAD_LIMIT, added))
    return targets


def table(result: dict[str, Any]) -> str:
    """The figures of one number of tokens for people."""
    stock, naive = result["stock_s"], result["naive_over_stock"]
    lines = [
        f"{result['tokens']} tokens: stock {_range(stock)} s, naive / stock {_range(naive)}, router and loss "
        f"{100 * result['router_and_loss_over_layer']:.1f} % of the layer, of which zero experts add "
        f"{100 * result['added_router_and_loss_over_layer']['median']:.1f} %"
    ]
    for entry in result["skip_rates"]:
        line = (
            f"  {100 * entry['skip_rate']:5.1f} % skipped: dynamic / stock {_range(entry['dynamic_over_stock'])}, "
            f"ideal {entry['ideal_over_stock']:.3f}, saved activations {entry['saved_activations_over_stock']:.3f}"
        )
        if "dynamic_over_stock_without_shared_expert" in entry:
            line += f", without the shared expert {_range(entry['dynamic_over_stock_without_shared_expert'])}"
        if "fp8_over_bf16" in entry:
            line += f", FP8 / bf16 {_range(entry['fp8_over_bf16'])}"
        lines.append(line)
    return "\n".join(lines)


def _range(values: dict[str, float]) -> str:
    return f"{values['median']:.3f} ({values['min']:.3f} to {values['max']:.3f})"


class AllToAllBytes(TorchDispatchMode):
    """Counts the bytes that this rank hands to all-to-all collectives, and those of them that leave the rank."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank, self.entering, self.leaving = rank, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.c10d.alltoall_base_.default:
            source, splits = args[1], args[4]
            row = source[:1].numel() * source.element_size()
            rows = source.shape[0]
            own = splits[self.rank] if splits else rows // torch.distributed.get_world_size()
            self.entering += rows * row
            self.leaving += (rows - own) * row
        return func(*args, **(kwargs or {}))


def _expert_parallel_rank(rank: int, world_size: int, port: int, args: argparse.Namespace, results: Any) -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_zeda import platform

    platform.install()
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    parallel_state.initialize_model_parallel(expert_model_parallel_size=world_size)
    model_parallel_cuda_manual_seed(1)
    device, group = torch.device("cpu"), torch.distributed.group.WORLD
    sizes = {"expert_model_parallel_size": world_size}
    torch.manual_seed(1)
    dynamic = dynamic_layer(args.shape, device, **sizes)
    torch.distributed.broadcast(dynamic.router.weight.data, 0)
    stock = stock_layer(dynamic, args.shape, device, **sizes)
    rows: list[int] = []
    dynamic.experts.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[0]))
    torch.manual_seed(100 + rank)
    hidden = torch.randn(args.ep_tokens, 1, dynamic.config.hidden_size, dtype=torch.bfloat16).requires_grad_()
    for rate in [None, *args.skip_rates]:
        layer = stock if rate is None else dynamic
        if rate is not None:
            turn_dial(dynamic.router, hidden, rate, group)
            dynamic.router.counts.reset()
        for parameter in layer.parameters():
            parameter.grad = None
        with AllToAllBytes(rank) as count:
            _pass(layer, hidden, torch.ones_like(hidden))()
        counts = [0, 0] if rate is None else [int(value) for value in dynamic.router.counts.sums[:2]]
        numbers = torch.tensor([count.entering, count.leaving, *counts])
        torch.distributed.all_reduce(numbers)
        all_rows = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size)]
        torch.distributed.all_gather(all_rows, torch.tensor([rows.pop()]))
        if rank == 0:
            results.append((rate, numbers.tolist(), [int(value) for value in all_rows]))
    torch.distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def expert_parallel(args: argparse.Namespace) -> None:
    """All-to-all bytes and rows per rank for every size of ``--ep``."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    results, targets = [], []
    for world_size in args.ep:
        with mp.Manager() as manager:
            shared = manager.list()
            mp.spawn(_expert_parallel_rank, (world_size, _free_port(), args, shared), nprocs=world_size)
            (_, static, static_rows), *dynamic = list(shared)
        by_rate = []
        for rate, (entering, leaving, zero, tokens), rows in dynamic:
            achieved = zero / (tokens * SHAPES[args.shape]["moe_router_topk"])
            entry = {
                "skip_rate_asked": rate,
                "skip_rate": achieved,
                "all_to_all_bytes": entering,
                "all_to_all_bytes_over_static": entering / static[0],
                "bytes_between_ranks_over_static": leaving / static[1],
                "rows_per_rank": rows,
                "max_over_mean_rows": max(rows) * len(rows) / sum(rows),
            }
            by_rate.append(entry)
            print(
                f"EP {world_size}, {100 * achieved:.2f} % skipped: bytes / static "
                f"{entry['all_to_all_bytes_over_static']:.4f}, between ranks "
                f"{entry['bytes_between_ranks_over_static']:.4f}, max / mean rows {entry['max_over_mean_rows']:.3f}"
            )
            off = abs(entering / static[0] / (1 - achieved) - 1)
            name = f"EP {world_size}, {100 * rate:g} % skip, bytes / static off proportion"
            targets.append(Target(name, BYTES_LIMIT, off))
        balance = max(static_rows) * len(static_rows) / sum(static_rows)
        print(f"EP {world_size}, static: max / mean rows {balance:.3f}")
        results.append(
            {
                "expert_model_parallel_size": world_size,
                "static": {
                    "all_to_all_bytes": static[0],
                    "bytes_between_ranks": static[1],
                    "rows_per_rank": static_rows,
                    "max_over_mean_rows": balance,
                },
                "skip_rates": by_rate,
            }
        )
    settings = {"shape": args.shape, **SHAPES[args.shape], "tokens_per_rank": args.ep_tokens, "backend": "gloo"}
    write(args.output, "moe_layer_expert_parallel", settings, results, targets)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 4096, 1024])
    parser.add_argument("--skip-rates", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75])
    parser.add_argument("--rounds", type=int, default=7, help="how often every pair is timed")
    parser.add_argument(
        "--gradients",
        choices=["write", "accumulate"],
        default="write",
        help="write: each pass writes the weights' gradients; accumulate: it adds to those of the passes before",
    )
    parser.add_argument("--fp8", metavar="RECIPE", help="GPU: also time the layer in FP8, e.g. tensorwise, blockwise")
    parser.add_argument("--ep", type=int, nargs="+", help="expert-parallel sizes: count bytes and rows instead")
    parser.add_argument("--ep-tokens", type=int, default=1024, help="tokens per expert-parallel rank")
    parser.add_argument("--profile", action="store_true", help="print operator tables instead")
    parser.add_argument("--threads", type=int, help="default: every core this process may use")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args(arguments)
    if args.ep:
        expert_parallel(args)
    elif args.profile:
        bench = Bench(args)
        for tokens in args.tokens:
            for text in bench.profile(tokens):
                print(text)
    else:
        time_layers(args)


if __name__ == "__main__":
    main()
