"""Convert a Hugging Face checkpoint, static or dynamic, to a Megatron torch_dist checkpoint.

python checkpoint_tools/hf_to_megatron.py --hf QWEN3-DYNAMIC --megatron checkpoints/start [--dry-run]

Killed and started again, it goes on after the last finished file.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from _front import add_file_size, file_bytes, make_parser, run, size_of


def _work(args: argparse.Namespace) -> tuple[int, dict[str, Any], list[str]]:
    from megatron_zeda.conversion import hf_to_megatron
    from megatron_zeda.conversion.dry_run import report_lines

    result = hf_to_megatron(args.hf, args.megatron, file_bytes=file_bytes(args), plan_only=args.dry_run)
    if args.dry_run:
        return int(not result["fits"]), result, report_lines(result)
    return 0, result, [f"{args.megatron}: {size_of(result)}, verified"]


def main(argv: list[str] | None = None) -> int:
    """Run the tool."""
    parser = make_parser("Convert a Hugging Face checkpoint to a Megatron checkpoint.")
    parser.add_argument("--hf", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--megatron", type=Path, required=True, help="folder to create")
    add_file_size(parser, "--file-gb", 0.5)
    parser.add_argument("--dry-run", action="store_true", help="print the plan, the disk and the time it needs")
    return run(parser, _work, argv)


if __name__ == "__main__":
    sys.exit(main())
