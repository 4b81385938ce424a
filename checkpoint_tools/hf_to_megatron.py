"""Convert a Hugging Face checkpoint, static or dynamic, to a Megatron torch_dist checkpoint.

python checkpoint_tools/hf_to_megatron.py --hf QWEN3-DYNAMIC --megatron checkpoints/start
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from _front import make_parser, run


def _work(args: argparse.Namespace) -> tuple[int, dict[str, Any], list[str]]:
    from megatron_zeda.conversion import hf_to_megatron

    result = hf_to_megatron(args.hf, args.megatron)
    return 0, result, [f"{args.megatron}: {result['num_tensors']} tensors, {result['num_bytes']} bytes, verified"]


def main(argv: list[str] | None = None) -> int:
    """Run the tool."""
    parser = make_parser("Convert a Hugging Face checkpoint to a Megatron checkpoint.")
    parser.add_argument("--hf", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--megatron", type=Path, required=True, help="folder to create")
    return run(parser, _work, argv)


if __name__ == "__main__":
    sys.exit(main())
