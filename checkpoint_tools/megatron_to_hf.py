"""Export a Megatron checkpoint, saved at any parallel layout, to a Hugging Face folder.

python checkpoint_tools/megatron_to_hf.py --megatron runs/stage1/checkpoints --hf QWEN3-STAGE1 [--iteration 500]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from _front import add_file_size, file_bytes, make_parser, run, size_of


def _work(args: argparse.Namespace) -> tuple[int, dict[str, Any], list[str]]:
    from megatron_zeda.conversion import megatron_to_hf
    from megatron_zeda.conversion.dry_run import report_lines

    result = megatron_to_hf(
        args.megatron,
        args.hf,
        iteration=args.iteration,
        hf_config=args.hf_config,
        format=args.format,
        interleave=args.interleave,
        quantize=args.quantize,
        base_model=args.base_model,
        card_metrics=args.card_metrics,
        shard_bytes=file_bytes(args),
        plan_only=args.dry_run,
    )
    if args.dry_run:
        return int(not result["fits"]), result, report_lines(result)
    lines = [f"{args.hf}: iteration {result['iteration']}, {size_of(result)}, verified"]
    if result["num_zero_experts"]:
        lines.append(f"{result['export_format']}: {_extra(result)}; what serving it saves: {result['saves']}")
    lines += [f"{result['export_format']} is not exactly this model everywhere: {note}" for note in result["notes"]]
    return 0, result, lines


def _extra(result: dict[str, Any]) -> str:
    extra = result["extra_bytes"]
    if result["quantization"]:
        return f"experts and attention in FP8, {-extra:,} bytes less"
    return f"{extra:,} bytes more than zeda" if extra else "no extra bytes"


def main(argv: list[str] | None = None) -> int:
    """Run the tool."""
    parser = make_parser("Export a Megatron checkpoint to a Hugging Face checkpoint.")
    parser.add_argument(
        "--megatron", type=Path, required=True, help="Megatron checkpoint folder, or one of its iter_* folders"
    )
    parser.add_argument("--hf", type=Path, required=True, help="folder to create")
    parser.add_argument("--iteration", type=int, help="which iteration; the newest if not given")
    parser.add_argument(
        "--hf-config",
        type=Path,
        help="folder with config.json and tokenizer of the model, for a checkpoint made by other tools",
    )
    parser.add_argument(
        "--format",
        default="zeda",
        choices=("zeda", "dense-zeros", "vllm-mone"),
        help="how zero experts are written (docs/export_formats.md)",
    )
    parser.add_argument(
        "--interleave", action="store_true", help="dense-zeros: spread the zero experts, for expert parallelism"
    )
    parser.add_argument(
        "--quantize", choices=("fp8",), help="zeda: experts and attention in FP8 (needs nvidia-modelopt)"
    )
    parser.add_argument("--base-model", help="hub id of the static model, for the model card")
    parser.add_argument("--card-metrics", type=Path, help="JSON with scores and skip rate, or a run's report.json")
    add_file_size(parser, "--shard-gb", 2.0, ", if the source has several files")
    parser.add_argument("--dry-run", action="store_true", help="print the plan, the disk and the time it needs")
    return run(parser, _work, argv)


if __name__ == "__main__":
    sys.exit(main())
