"""``zeda report``: ``report.json``, ``report.md`` and pictures of a run folder, or the FLOP model of a checkpoint."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from megatron_zeda.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``zeda report``."""
    parser.add_argument(
        "run_dir",
        type=Path,
        nargs="?",
        metavar="RUN_DIR",
        help="with metrics.jsonl and evaluation/{teacher,student,control_topk_half}.json",
    )
    parser.add_argument("--json", action="store_true", help="print report.json")
    model = parser.add_argument_group("without RUN_DIR: the theoretical speed-up of a checkpoint, from counting FLOPs")
    model.add_argument("--model", type=Path, metavar="FOLDER", help="Hugging Face or Megatron checkpoint")
    model.add_argument("--skip-rate", type=float, metavar="R", help="measured share of skipped slots, 0 to 1")
    model.add_argument("--prompt-skip-rate", type=float, metavar="R", help="of prompt tokens (default: --skip-rate)")
    model.add_argument("--seq-length", type=int, nargs="+", metavar="L", help="tokens (default: 1024 8192 32768)")


def run(args: argparse.Namespace) -> int:
    """Run ``zeda report`` and return its exit code."""
    if (args.run_dir is None) == (args.model is None):
        raise InputError("give either RUN_DIR or --model", where="zeda report", fix="see zeda report --help")
    if args.model is not None:
        return _print_speedup(args)
    only_with_model = ("skip_rate", "prompt_skip_rate", "seq_length")
    given = [name for name in only_with_model if getattr(args, name) is not None]
    if given:
        flag = f"--{given[0].replace('_', '-')}"
        raise InputError("goes with --model only", where=flag, rule="a run folder holds its measured rates")
    from megatron_zeda.evaluation.markdown import speedup_table
    from megatron_zeda.evaluation.report import report

    built = report(args.run_dir)
    if args.json:
        print(json.dumps(built, indent=2, ensure_ascii=False))
        return 0
    by_length = (built["theoretical_speedup"] or {}).get("by_length")
    if by_length:
        print(speedup_table(by_length))
    print(args.run_dir / "report.md")
    return 0


def _print_speedup(args: argparse.Namespace) -> int:
    from megatron_zeda.evaluation.flops import LENGTHS, ModelShape, speedup_by_length
    from megatron_zeda.evaluation.markdown import speedup_table
    from megatron_zeda.models import load_hf_config

    if args.skip_rate is None:
        raise InputError("missing", where="--skip-rate", rule="the measured one", fix="`zeda eval` measures it")
    inner = args.model / "hf"  # where a Megatron checkpoint keeps it
    shape = ModelShape.from_hf_config(load_hf_config(inner if (inner / "config.json").is_file() else args.model))
    prompt = args.skip_rate if args.prompt_skip_rate is None else args.prompt_skip_rate
    rates = {"prompt_skip_rate": prompt, "response_skip_rate": args.skip_rate}
    by_length = speedup_by_length(shape, **rates, lengths=args.seq_length or LENGTHS)
    if args.json:
        found: dict[str, Any] = {"model": str(args.model), "num_experts": shape.experts}
        found |= {"num_zero_experts": shape.zero_experts, "topk": shape.topk, **rates, "by_length": by_length}
        print(json.dumps(found, indent=2))
        return 0
    zero = f" and {shape.zero_experts} zero" if shape.zero_experts else ""
    print(f"{args.model}: {shape.topk} of {shape.experts}{zero} experts; counted, not measured\n")
    print(speedup_table(by_length))
    return 0
