"""Make a static Hugging Face checkpoint dynamic: widen every router by Z zero experts.

python checkpoint_tools/inject_zero_experts.py --input QWEN3 --output QWEN3-DYNAMIC [--num-zero-experts 64] [--seed 0]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from _front import add_file_size, file_bytes, make_parser, run, size_of


def _work(args: argparse.Namespace) -> tuple[int, dict[str, Any], list[str]]:
    from megatron_zeda.conversion import inject_zero_experts
    from megatron_zeda.conversion.dry_run import report_lines

    result = inject_zero_experts(
        args.input,
        args.output,
        num_zero_experts=args.num_zero_experts,
        seed=args.seed,
        init=args.init,
        shard_bytes=file_bytes(args),
        plan_only=args.dry_run,
    )
    if args.dry_run:
        return int(not result["fits"]), result, report_lines(result)
    real, zero = result["num_experts"], result["num_zero_experts"]
    experts = f"{real} real + {zero} zero experts, seed {args.seed}"
    return 0, result, [f"{args.output}: {experts}, {size_of(result)}, verified"]


def main(argv: list[str] | None = None) -> int:
    """Run the tool."""
    parser = make_parser("Inject zero experts into a static Hugging Face checkpoint.")
    parser.add_argument("--input", type=Path, required=True, help="static Hugging Face folder")
    parser.add_argument("--output", type=Path, required=True, help="folder to create")
    parser.add_argument("--num-zero-experts", type=int, help="Z; half the number of experts if not given")
    parser.add_argument("--seed", type=int, default=0, help="seed of the new router rows and selection biases")
    parser.add_argument(
        "--init",
        default="gaussian",
        help="new router rows: gaussian (from the old ones), teacher-mean, zeros, or experts (copies of old ones)",
    )
    add_file_size(parser, "--shard-gb", 2.0, ", if the source has several files")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, the disk and the time it needs")
    return run(parser, _work, argv)


if __name__ == "__main__":
    sys.exit(main())
