"""``zeda rollout``: responses of a Hugging Face folder to a prompt file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megatron_zeda.rollout.engine import Sampling


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``zeda rollout``."""
    default = Sampling()
    parser.add_argument(
        "--model", type=Path, required=True, metavar="DIR", help="Hugging Face folder, static or dynamic"
    )
    parser.add_argument(
        "--prompts", type=Path, required=True, metavar="FILE", help='jsonl, {"prompt": messages or text, ...}'
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="jsonl, one line per response")
    parser.add_argument("--max-new-tokens", type=int, default=default.max_new_tokens, metavar="N", help="(%(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=default.temperature, metavar="T", help="0 is greedy (%(default)s)"
    )
    parser.add_argument("--top-p", type=float, default=default.top_p, metavar="P", help="(%(default)s)")
    parser.add_argument(
        "--samples-per-prompt", type=int, default=default.samples_per_prompt, metavar="N", help="(%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=default.seed, metavar="N", help="of the samples (%(default)s)")
    add_model_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that ``zeda rollout`` and ``zeda eval`` share."""
    parser.add_argument("--batch-size", type=int, default=128, metavar="N", help="sequences at once (%(default)s)")
    parser.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="auto: the folder's own on a GPU, float32 on the CPU",
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run modelling code found in the folder (never needed for ours)",
    )


def quiet_transformers() -> None:
    """Keep ``transformers`` from drawing progress bars and advice between our own lines."""
    import transformers

    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()


def run(args: argparse.Namespace) -> int:
    """Run ``zeda rollout`` and return its exit code."""
    from megatron_zeda.rollout.run import rollout
    from megatron_zeda.rollout.sources import transformers_source

    sampling = Sampling(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        samples_per_prompt=args.samples_per_prompt,
        seed=args.seed,
    )
    quiet_transformers()
    source = transformers_source(
        args.model, batch_size=args.batch_size, dtype=args.dtype, trust_remote_code=args.trust_remote_code
    )
    summary = rollout(source, args.prompts, args.output, sampling)
    if args.json:
        print(json.dumps(summary, indent=2))
    elif summary["new_responses"] == 0:
        print(f"{args.output}: already complete, {summary['responses']} responses")
    else:
        print(
            f"{args.output}: {summary['new_responses']} responses, {summary['mean_response_tokens']:.1f} tokens each, "
            f"{100 * summary['stopped_share']:.1f} % ended by themselves, {summary['seconds']:.1f} s"
        )
    return 0
