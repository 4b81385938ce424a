"""Forward pass of one MoE block of real width in transformers: skipping against the alternatives.

    python benchmarks/serving/layer.py --shape qwen3-30b-a3b

What is compared is at the top of serving_models.py; how, in README.md beside this file.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from serving_models import SHAPES, blocks, num_experts, set_rate, start
from side_by_side import Target, interleaved, ratio, spread, write

FORMS = ("static", "ours", "dense zeros", "expert 0")
# Gathering a copy of an expert's matrices for every slot, this one is for decoding.
MOST_TOKENS = {"batched_mm": 64}
FEWEST_ROUNDS, MOST_ROUNDS = 3, 41
AT_NO_SKIP, AT_ONE_TOKEN, AT_MANY_TOKENS = 0.98, 1.7, 1.3


def measure(
    compared: dict[str, Any], tokens: int, skip_rate: float, args: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    """Time all forms on the same tokens."""
    hidden = torch.randn(1, tokens, compared["static"].gate.weight.shape[-1], device=device, dtype=torch.bfloat16)
    gate = compared["ours"].gate
    reached = set_rate(gate, hidden[0], skip_rate)
    copy_router(gate, compared["dense zeros"].gate)
    runs: list[tuple[str, Callable[[], None]]] = [(name, partial(compared[name], hidden)) for name in FORMS]
    begin = time.perf_counter()
    for _, run in runs:
        run()
    one_round = time.perf_counter() - begin  # compilation of CPU kernels included: rather too few rounds
    rounds = int(min(MOST_ROUNDS, max(FEWEST_ROUNDS, args.seconds / one_round)))
    durations = interleaved(runs, rounds=rounds, device=device)
    static = durations["static"]
    return {
        "tokens": tokens,
        "skip_rate_asked": skip_rate,
        "skip_rate": reached,
        "rounds": rounds,
        "static_s": spread(static),
        **{f"static_over_{key(name)}": ratio(static, durations[name]) for name in FORMS[1:]},
    }


def copy_router(source: Any, target: Any) -> None:
    """Give the stock router of the dense form the same rows (and selection bias)."""
    target.weight.copy_(source.weight)
    if hasattr(source, "e_score_correction_bias"):
        target.e_score_correction_bias.copy_(source.e_score_correction_bias)


def key(form: str) -> str:
    """A form's name in the results."""
    return form.replace(" ", "_")


def targets(implementation: str, result: dict[str, Any]) -> list[Target]:
    """What is asked of one measurement: speed-ups, at least."""
    tokens, asked = result["tokens"], result["skip_rate_asked"]
    limit = None
    if asked == 0.0:
        limit = AT_NO_SKIP
    elif asked == 0.5 and tokens == 1:
        limit = AT_ONE_TOKEN
    elif asked == 0.5 and tokens >= 256:
        limit = AT_MANY_TOKENS
    if limit is None:
        return []
    name = f"{implementation}, {tokens} tokens, {100 * asked:.0f} % skipped: static / ours"
    return [Target(name, limit, result["static_over_ours"]["median"], at_least=True)]


def line(result: dict[str, Any]) -> str:
    """One measurement for people."""
    shown = [f"{result['tokens']:>6} tokens, {100 * result['skip_rate']:5.1f} % skipped, {result['rounds']} rounds:"]
    for name in FORMS[1:]:
        found = result[f"static_over_{key(name)}"]
        shown.append(f"{name} {found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f})")
    return " ".join(shown)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--num-zero-experts", type=int, help="default: half of the real ones")
    parser.add_argument("--implementations", nargs="+", default=["grouped_mm"], help="eager, grouped_mm, batched_mm")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 64, 256, 1024, 4096, 8192])
    parser.add_argument("--skip-rates", nargs="+", type=float, default=[0.0, 0.25, 0.5, 0.75])
    parser.add_argument("--seconds", type=float, default=6.0, help="for each measurement, about")
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args(argv)
    device = start(args.threads)
    num_zero = args.num_zero_experts or num_experts(args.shape) // 2
    results, met = [], []
    for implementation in args.implementations:
        compared = blocks(args.shape, num_zero, implementation, device)
        print(f"{args.shape}, {implementation}: static seconds over those of")
        for tokens in args.tokens:
            if tokens > MOST_TOKENS.get(implementation, tokens):
                continue
            for skip_rate in args.skip_rates:
                found = measure(compared, tokens, skip_rate, args, device)
                results.append({"implementation": implementation, **found})
                met += targets(implementation, found)
                print(line(found), flush=True)
    settings = {"shape": args.shape, **SHAPES[args.shape], "num_zero_experts": num_zero, "dtype": "bf16"}
    settings |= {"device": device.type, "seconds_per_measurement": args.seconds}
    write(args.output, "serving_layer", settings, results, met)


if __name__ == "__main__":
    main()
