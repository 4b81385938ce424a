"""``zeda report``: ``report.json``, ``report.md`` and pictures of a run folder."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``zeda report``."""
    parser.add_argument(
        "run_dir",
        type=Path,
        metavar="RUN_DIR",
        help="with metrics.jsonl and evaluation/{teacher,student,control_topk_half}.json",
    )
    parser.add_argument("--json", action="store_true", help="print report.json")


def run(args: argparse.Namespace) -> int:
    """Run ``zeda report`` and return its exit code."""
    from megatron_zeda.evaluation.report import report

    built = report(args.run_dir)
    print(json.dumps(built, indent=2, ensure_ascii=False) if args.json else f"{args.run_dir / 'report.md'}")
    return 0
