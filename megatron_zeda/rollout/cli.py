"""``zeda rollout``: responses of a model to a prompt file, with any engine."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_zeda.errors import InputError
from megatron_zeda.rollout.engine import Sampling

if TYPE_CHECKING:
    from megatron_zeda.rollout.run import Source

ENGINES = ("transformers", "megatron", "vllm", "openai")
_SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)
# Flags that mean something to one engine only, with what they are when they are not given.
_OWN_FLAGS = {
    **dict.fromkeys(_SIZES, ("megatron",)),
    **dict.fromkeys(("url", "served_model", "timeout_minutes", "max_retries"), ("openai",)),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``zeda rollout``."""
    default = Sampling()
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="DIR",
        help="Hugging Face folder, static or dynamic; with --engine megatron an import or a run's checkpoints; with "
        "--engine openai the folder that the server serves",
    )
    parser.add_argument(
        "--prompts", type=Path, required=True, metavar="FILE", help='jsonl, {"prompt": messages or text, ...}'
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="jsonl, one line per response")
    parser.add_argument("--engine", choices=ENGINES, default=ENGINES[0], help="who generates (%(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=default.max_new_tokens, metavar="N", help="(%(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=default.temperature, metavar="T", help="0 is greedy (%(default)s)"
    )
    parser.add_argument("--top-p", type=float, default=default.top_p, metavar="P", help="(%(default)s)")
    parser.add_argument(
        "--samples-per-prompt", type=int, default=default.samples_per_prompt, metavar="N", help="(%(default)s)"
    )
    parser.add_argument(
        "--stop-token-ids", type=int, nargs="+", metavar="ID", help="tokens that end a response (the model's own)"
    )
    parser.add_argument("--seed", type=int, default=default.seed, metavar="N", help="of the samples (%(default)s)")
    add_model_arguments(parser)
    server = parser.add_argument_group("--engine openai")
    server.add_argument("--url", metavar="URL", help="http://host:port/v1")
    server.add_argument("--served-model", metavar="NAME", help="the model's name at the server (the only one it has)")
    server.add_argument("--timeout-minutes", type=float, metavar="MIN", help="longest wait for one response (10)")
    server.add_argument("--max-retries", type=int, metavar="N", help="how often a request is sent again (3)")
    layout = parser.add_argument_group("--engine megatron", "one process, or as many as torchrun starts")
    for name in _SIZES:
        layout.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help="(1)")
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
    from megatron_zeda.launch import ranks_from_environment
    from megatron_zeda.rollout.run import rollout

    sampling = Sampling(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        samples_per_prompt=args.samples_per_prompt,
        seed=args.seed,
        stop_token_ids=None if args.stop_token_ids is None else tuple(args.stop_token_ids),
    )
    quiet_transformers()
    with _source(args) as source:
        summary = rollout(source, args.prompts, args.output, sampling)
    if ranks_from_environment().rank:
        return 0
    if args.json:
        print(json.dumps(summary, indent=2))
    elif summary["new_responses"] == 0:
        print(f"{args.output}: already complete, {summary['responses']} responses")
    else:
        print(
            f"{args.output}: {summary['new_responses']} responses, {summary['mean_response_tokens']:.1f} tokens each, "
            f"{100 * summary['stopped_share']:.1f} % ended by themselves, {summary['empty']} say nothing, "
            f"{summary['seconds']:.1f} s"
        )
    return 0


@contextmanager
def _source(args: argparse.Namespace) -> Iterator[Source]:
    """The engine that was asked for, ready within the block."""
    from megatron_zeda.rollout import sources

    given = {name: getattr(args, name) for name in _OWN_FLAGS if getattr(args, name) is not None}
    for name in given:
        if args.engine not in _OWN_FLAGS[name]:
            raise InputError(
                "this flag means nothing to the engine",
                where=f"--{name.replace('_', '-')}",
                value=args.engine,
                rule=f"it belongs to --engine {_OWN_FLAGS[name][0]}",
                fix="leave it out, or choose that engine",
            )
    if args.engine == "openai":
        if args.url is None:
            raise InputError("no server", where="--url", fix="give http://host:port/v1")
        yield sources.openai_source(args.model, batch_size=args.batch_size, **given)
    elif args.engine == "megatron":
        with sources.megatron_source(args.model, sizes=given, batch_size=args.batch_size, dtype=args.dtype) as source:
            yield source
    else:
        make = sources.vllm_source if args.engine == "vllm" else sources.transformers_source
        yield make(args.model, batch_size=args.batch_size, dtype=args.dtype, trust_remote_code=args.trust_remote_code)
