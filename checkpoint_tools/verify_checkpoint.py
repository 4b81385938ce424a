"""Compare two checkpoints, Hugging Face or Megatron: names, shapes, types and bits.

Exit code 0 equal, 1 different, 2 bad input.

python checkpoint_tools/verify_checkpoint.py A B
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from _front import make_parser, run

_LINES_SHOWN = 20


def _work(args: argparse.Namespace) -> tuple[int, dict[str, Any], list[str]]:
    from megatron_zeda.conversion import verify_checkpoint

    found = verify_checkpoint(args.a, args.b)
    result = {"equal": not found, "differences": found}
    if not found:
        return 0, result, ["equal: names, shapes, types and bits"]
    more = [f"... and {len(found) - _LINES_SHOWN} more"] if len(found) > _LINES_SHOWN else []
    return 1, result, [f"different: {len(found)} tensors", *found[:_LINES_SHOWN], *more]


def main(argv: list[str] | None = None) -> int:
    """Run the tool."""
    parser = make_parser("Compare two checkpoints bit by bit.")
    parser.add_argument("a", type=Path, help="Hugging Face or Megatron folder")
    parser.add_argument("b", type=Path, help="Hugging Face or Megatron folder")
    return run(parser, _work, argv)


if __name__ == "__main__":
    sys.exit(main())
