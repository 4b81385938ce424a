"""``zeda eval``: accuracy, KL to the teacher, skip rate and perplexity of a Hugging Face folder."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from megatron_zeda.errors import InputError
from megatron_zeda.rollout.cli import add_model_arguments, quiet_transformers


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``zeda eval``."""
    parser.add_argument(
        "--model", type=Path, required=True, metavar="DIR", help="Hugging Face folder, static or dynamic"
    )
    parser.add_argument("--teacher", type=Path, metavar="DIR", help="adds the KL to this model on the rollouts")
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="jsonl prompts with `answer`: accuracy of greedy responses"
    )
    parser.add_argument(
        "--rollouts", type=Path, metavar="FILE", help="jsonl of `zeda rollout`: skip rate and KL on its responses"
    )
    parser.add_argument("--text", type=Path, metavar="FILE", help="held-out text, or .jsonl with `text`: perplexity")
    parser.add_argument(
        "--num-experts-per-token", type=int, metavar="K", help="another K, for the control of a static model"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N prompts and rollouts")
    parser.add_argument(
        "--max-new-tokens", type=int, default=4096, metavar="N", help="of a greedy response (%(default)s)"
    )
    parser.add_argument(
        "--normaliser", choices=["exact", "strip", "casefold"], default="strip", help="before comparing (%(default)s)"
    )
    add_model_arguments(parser)
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the result as JSON; the file must not exist")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Run ``zeda eval`` and return its exit code."""
    from megatron_zeda.evaluation.evaluate import EvaluationInputs, evaluate
    from megatron_zeda.evaluation.report import refuse_not_finite, write_file

    if args.output is not None and args.output.exists():
        raise InputError("the output exists", where=args.output, fix="remove it or choose another file")
    inputs = EvaluationInputs(
        model=args.model,
        teacher=args.teacher,
        prompts=args.prompts,
        rollouts=args.rollouts,
        text=args.text,
        num_experts_per_token=args.num_experts_per_token,
        limit=args.limit,
        max_new_tokens=args.max_new_tokens,
        normaliser=args.normaliser,
        batch_size=args.batch_size,
        dtype=args.dtype,
        trust_remote_code=args.trust_remote_code,
    )
    quiet_transformers()
    result = evaluate(inputs)
    refuse_not_finite(result, "result")
    text = json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False)
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_file(args.output, f"{text}\n".encode())
    print(text if args.json else summary(result))
    return 0


def summary(result: dict[str, Any]) -> str:
    """Return the main numbers, one a line."""
    lines = [f"model                 {result['model']['path']}"]
    if "accuracy" in result:
        low, high = result["accuracy_interval"]
        lines.append(
            f"accuracy              {100 * result['accuracy']:.1f} %  (95 %: {100 * low:.1f} to {100 * high:.1f}, "
            f"n = {result['accuracy_count']})"
        )
    if "perplexity" in result:
        lines.append(f"perplexity            {result['perplexity']:.3f}  ({result['perplexity_tokens']} tokens)")
    if "kl_to_teacher" in result:
        lines.append(f"KL to the teacher     {result['kl_to_teacher']:.4f} nats per response token")
    if "skip_rate" in result:
        lines.append(
            f"skip rate             {100 * result['skip_rate']:.1f} %  ({result['response_tokens']} response tokens)"
        )
        lines.append(f"expert FLOPs saved    {100 * result['expert_flops_saved']:.1f} %")
    return "\n".join(lines)
