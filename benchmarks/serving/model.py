"""Prefill and decode of a whole model of true layer shape in transformers: ours against the static model.

    python benchmarks/serving/model.py --shape qwen3-30b-a3b                    # a GPU: all layers
    python benchmarks/serving/model.py --layers 2 --prompt 1024 --batch 4       # a CPU

Weights are random and shared by both models. The routers' zero rows are scaled until the asked share of slots is
skipped on random tokens; the measured share goes into the FLOP model that the speed-up is compared with.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from serving_models import SHAPES, hf_values, models, num_experts, set_rates, start
from side_by_side import Target, interleaved, ratio, spread, write

from megatron_zeda.evaluation.flops import ModelShape
from megatron_zeda.evaluation.skip_rate import RoutingRecorder

OF_THEORY, AT_8K = 0.95, 1.20


def filled_cache(model: Any, ids: torch.Tensor, room: int, chunk: int) -> Any:
    """A static cache that holds ``ids [B, S]`` and has room for more tokens."""
    from transformers import StaticCache

    cache = StaticCache(model.config, max_cache_len=ids.shape[1] + room)
    for part in ids.split(max(1, chunk // ids.shape[0]), dim=1):
        model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def decoding(model: Any, ids: torch.Tensor, steps: int, chunk: int) -> Callable[[], None]:
    """A function that decodes ``steps`` tokens after the prompt, always the same positions."""
    prompt = ids.shape[1]
    cache, token = filled_cache(model, ids, steps, chunk), ids[:, :1]
    lengths = [layer.cumulative_length.clone() for layer in cache.layers if hasattr(layer, "cumulative_length")]

    def run() -> None:
        for layer, length in zip(cache.layers, lengths, strict=False):
            layer.cumulative_length.copy_(length)  # forget what was decoded before
        for step in range(steps):
            position = torch.full_like(token, prompt + step)
            model(token, past_key_values=cache, use_cache=True, position_ids=position, logits_to_keep=1)

    return run


def skip_rate_of(model: Any, ids: torch.Tensor, run: Callable[[], None]) -> float:
    """The share of slots that the last forward pass of ``run`` skipped, over all layers."""
    with RoutingRecorder(model) as recorder:
        run()
        return float(recorder.zero_slots(ids).double().mean()) / recorder.topk


def compare(
    stage: str,
    runs: tuple[Callable[[], None], Callable[[], None]],
    theory: float,
    skip_rate: float,
    args: argparse.Namespace,
    device: torch.device,
) -> dict[str, Any]:
    """Time one stage of both models."""
    durations = interleaved(
        [("static", runs[0]), ("ours", runs[1])],
        rounds=args.rounds,
        device=device,
    )
    found = ratio(durations["static"], durations["ours"])
    result = {
        "stage": stage,
        "skip_rate": skip_rate,
        "static_s": spread(durations["static"]),
        "ours_s": spread(durations["ours"]),
        "speedup": found,
        "theoretical_speedup": theory,
        "share_of_theory": found["median"] / theory,
    }
    print(
        f"{stage}: {100 * skip_rate:.1f} % skipped, {found['median']:.3f} times as fast "
        f"({found['min']:.3f} to {found['max']:.3f}), by FLOPs {theory:.3f}",
        flush=True,
    )
    return result


def measure(
    static: Any, ours: Any, shape: ModelShape, skip_rate: float, args: argparse.Namespace, device: torch.device
) -> list[dict[str, Any]]:
    """Prefill of one sequence, and decode of ``--batch`` sequences behind it."""
    prompt = torch.randint(0, ours.config.vocab_size, (1, args.prompt), device=device)
    set_rates(ours, prompt, skip_rate)
    prefills = [partial(model, prompt, use_cache=False, logits_to_keep=1) for model in (static, ours)]
    reached = skip_rate_of(ours, prompt, prefills[1])
    theory = shape.static().prefill_flops(args.prompt) / shape.prefill_flops(args.prompt, reached)
    results = [compare("prefill", (prefills[0], prefills[1]), theory, reached, args, device)]
    ids = torch.randint(0, ours.config.vocab_size, (args.batch, args.prompt), device=device)
    decodes = [decoding(model, ids, args.steps, args.chunk) for model in (static, ours)]
    reached = skip_rate_of(ours, ids[:, :1], decodes[1])
    theory = shape.static().decode_flops(args.steps, prefix=args.prompt)
    theory /= shape.decode_flops(args.steps, reached, prefix=args.prompt)
    return [*results, compare("decode", (decodes[0], decodes[1]), theory, reached, args, device)]


def targets(result: dict[str, Any], args: argparse.Namespace) -> list[Target]:
    """What is asked at half of the slots skipped."""
    name = f"{result['stage']} at {100 * result['skip_rate_asked']:.0f} % skipped"
    if result["skip_rate_asked"] != 0.5:
        return []
    found = [Target(f"{name}, share of the theoretical speed-up", OF_THEORY, result["share_of_theory"], at_least=True)]
    if args.prompt >= 8192 and args.batch >= 32:
        found.append(Target(f"{name}, 8k tokens, 32 sequences", AT_8K, result["speedup"]["median"], at_least=True))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, help="default: those of the shape")
    parser.add_argument("--num-zero-experts", type=int, help="default: half of the real ones")
    parser.add_argument("--implementation", default="grouped_mm", help="of the experts: grouped_mm, batched_mm, eager")
    parser.add_argument("--prompt", type=int, default=8192, help="tokens of a prompt")
    parser.add_argument("--batch", type=int, default=32, help="sequences that are decoded at once")
    parser.add_argument("--steps", type=int, default=16, help="tokens decoded in one measurement")
    parser.add_argument("--chunk", type=int, default=8192, help="tokens at once while the cache is filled")
    parser.add_argument("--skip-rates", nargs="+", type=float, default=[0.0, 0.5])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(argv)
    device = start(args.threads)
    num_zero = args.num_zero_experts or num_experts(args.shape) // 2
    layers = args.layers or SHAPES[args.shape]["num_hidden_layers"]
    static, ours = models(args.shape, num_zero, args.implementation, layers, device)
    config = hf_values(args.shape, num_zero=num_zero, num_hidden_layers=layers)
    results: list[dict[str, Any]] = []
    for skip_rate in args.skip_rates:
        found = measure(static, ours, ModelShape.from_hf_config(config), skip_rate, args, device)
        results += [{"skip_rate_asked": skip_rate, **result} for result in found]
    names = ("shape", "implementation", "prompt", "batch", "steps", "rounds")
    settings = {name: getattr(args, name) for name in names}
    settings |= {"layers": layers, "num_zero_experts": num_zero, "dtype": "bf16", "device": device.type}
    write(
        args.output,
        "serving_model",
        settings,
        results,
        [target for found in results for target in targets(found, args)],
    )


if __name__ == "__main__":
    main()
