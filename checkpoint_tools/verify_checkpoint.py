"""Compare two checkpoints, Hugging Face or Megatron: names, shapes, types and bits, or what they compute on prompts.

Exit code 0 equal (or within the tolerance), 1 different, 2 bad input.

python checkpoint_tools/verify_checkpoint.py A B
python checkpoint_tools/verify_checkpoint.py A          # every file, against the hashes with which it was written
python checkpoint_tools/verify_checkpoint.py A B --logits [--prompts FILE] [--dtype bfloat16] [--mask-zero-experts]
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from pathlib import Path
from typing import Any

from _front import make_parser, run

_LINES_SHOWN = 20


def _work(args: argparse.Namespace) -> tuple[int, dict[str, Any], list[str]]:
    from megatron_zeda.conversion import verify_checkpoint
    from megatron_zeda.conversion.verification import verify_files
    from megatron_zeda.errors import InputError

    if args.logits and args.b is None:
        raise InputError("needs two checkpoints", where="--logits", fix="give a second folder")
    if args.logits:
        return _compare_logits(args)
    for option in ("prompts", "dtype", "max_tokens", "tolerance", "mask_zero_experts"):
        if getattr(args, option):
            raise InputError("used without --logits", where="--" + option.replace("_", "-"), fix="add --logits")
    if args.b is None:
        found = verify_files(args.a)
        result = {"equal": not found, "differences": found}
        if not found:
            return 0, result, ["every file has the size and the SHA-256 with which it was written"]
        return 1, result, [f"different: {len(found)} files", *_shortened(found)]
    found = verify_checkpoint(args.a, args.b, hf_config=args.hf_config)
    result = {"equal": not found, "differences": found}
    if not found:
        return 0, result, ["equal: configuration, names, shapes, types and bits"]
    return 1, result, [f"different: {len(found)} lines", *_shortened(found)]


def _shortened(lines: list[str]) -> list[str]:
    more = [f"... and {len(lines) - _LINES_SHOWN} more"] if len(lines) > _LINES_SHOWN else []
    return [*lines[:_LINES_SHOWN], *more]


def _compare_logits(args: argparse.Namespace) -> tuple[int, dict[str, Any], list[str]]:
    from megatron_zeda.conversion.logits import FLOAT32_TOLERANCE, MAX_TOKENS, compare_logits

    logging.getLogger("megatron").setLevel(logging.ERROR)  # notices about Megatron-Core's own plans
    dtype = args.dtype or "float32"
    found = compare_logits(
        args.a,
        args.b,
        prompts=args.prompts,
        dtype=dtype,
        max_tokens=MAX_TOKENS if args.max_tokens is None else args.max_tokens,
        mask_zero_experts=args.mask_zero_experts,
        hf_config=args.hf_config,
    )
    tolerance = args.tolerance
    if tolerance is None and dtype == "float32":
        tolerance = FLOAT32_TOLERANCE
    within = None if tolerance is None else found.logits.largest <= tolerance
    verdict = {
        None: "not judged: in bfloat16 give --tolerance",
        True: f"equal: no logit differs by more than {tolerance}",
        False: f"different: a logit differs by more than {tolerance}",
    }[within]
    result = {"equal": within, "tolerance": tolerance, "dtype": dtype, **dataclasses.asdict(found)}
    return int(within is False), result, [*found.lines(), verdict]


def main(argv: list[str] | None = None) -> int:
    """Run the tool."""
    parser = make_parser("Compare two checkpoints bit by bit, or by what they compute.")
    parser.add_argument("a", type=Path, help="Hugging Face or Megatron folder")
    parser.add_argument(
        "b",
        type=Path,
        nargs="?",
        help="the other one; without it, the files of A are checked against its manifest",
    )
    parser.add_argument(
        "--hf-config", type=Path, help="folder with config.json, for a Megatron checkpoint made by other tools"
    )
    parser.add_argument("--logits", action="store_true", help="run both, one layer at a time, and compare every layer")
    parser.add_argument(
        "--prompts",
        type=Path,
        help="with --logits: .jsonl (`prompt` or `prompt_ids`) or a text file, one prompt a line",
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="with --logits: type to compute in (float32)")
    parser.add_argument("--max-tokens", type=int, help="with --logits: cut prompts to this length (256)")
    parser.add_argument(
        "--tolerance", type=float, help="with --logits: largest difference of a logit (1e-4 in float32)"
    )
    parser.add_argument(
        "--mask-zero-experts",
        action="store_true",
        help="with --logits: choose no zero expert on either side; a dynamic model then is the static one",
    )
    return run(parser, _work, argv)


if __name__ == "__main__":
    sys.exit(main())
